/** The example configs of BLIP-2 are configs, say nothing that has no effect, and train what the document says. */
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { test } from 'node:test';
import { loadTrainConfig } from '../../lib/config/index.js';
import { projectRoot } from '../support/fixtures.js';

const load = async (name: string) => {
  const { config, warnings } = await loadTrainConfig(join(projectRoot, 'examples/configs', name));
  assert.deepEqual(warnings, []);
  assert.equal(config.dropout, null, "the original's own");
  return config;
};

for (const [name, targets] of [
  ['blip2_opt_lora.yaml', ['q_proj', 'v_proj']],
  ['blip2_t5_lora.yaml', ['q', 'v']],
] as const) {
  test(name, async () => {
    const config = await load(name);
    assert.equal(config.sft_type, 'lora');
    assert.deepEqual(config.target_modules, targets);
  });
}

test('blip2_stage.yaml', async () => {
  const { sft_type, freeze_vit, freeze_llm, freeze_aligner } = await load('blip2_stage.yaml');
  assert.deepEqual([sft_type, freeze_vit, freeze_llm, freeze_aligner], ['full', true, true, false]);
});
