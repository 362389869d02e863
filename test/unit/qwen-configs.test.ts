/** The example configs of the Qwen-VL families are configs, and say nothing that has no effect. */
import assert from 'node:assert/strict';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { loadTrainConfig } from '../../lib/config/index.js';
import { projectRoot } from '../support/fixtures.js';

const folder = join(projectRoot, 'examples/configs');
const files = readdirSync(folder).filter((name) => /^qwen(2|2_5|3)_vl.*\.yaml$/.test(name));

test('there is one a family', () => {
  assert.deepEqual(files.sort(), ['qwen2_5_vl_lora.yaml', 'qwen2_vl_lora.yaml', 'qwen3_vl_lora.yaml']);
});

for (const file of [
  ...files.map((name) => join(folder, name)),
  join(projectRoot, 'examples/grounding/grounding.yaml'),
]) {
  test(file.slice(projectRoot.length), async () => {
    const { config, warnings } = await loadTrainConfig(file);
    assert.deepEqual(warnings, []);
    // a picture of the largest size must fit into a row
    const tokens = config.image_max_token_num ?? (config.max_pixels as number) / 28 ** 2;
    assert.ok(config.max_length === null || tokens < config.max_length);
  });
}
