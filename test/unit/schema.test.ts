/** The JSON Schema for editors takes what the config's own check takes, and refuses what it refuses. */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { z } from 'zod';
import { resolveTrainConfig } from '../../lib/config/index.js';
import { parseYaml } from '../../lib/config/yaml.js';
import { projectRoot } from '../support/fixtures.js';

const schema = z.fromJSONSchema(JSON.parse(readFileSync(join(projectRoot, 'schema/train-config.schema.json'), 'utf8')));
const base = { model: 'm', dataset: 'd.json' };

/** Both judge alike. */
function judged(config: object, valid: boolean): void {
  const { success } = schema.safeParse(config);
  assert.equal(success, valid, `the schema says ${success}: ${JSON.stringify(config)}`);
  if (valid) resolveTrainConfig(config);
  else assert.throws(() => resolveTrainConfig(config), { code: 'ERR_MARTLET_CONFIG' });
}

test('the example configs, the quickstart and the tutorial are valid', () => {
  const examples = readdirSync(join(projectRoot, 'examples/configs')).map((name) => `examples/configs/${name}`);
  for (const path of [...examples, 'examples/quickstart/quickstart.yaml', 'test/fixtures/tutorial/qwen_vl_lora.yaml'])
    judged(parseYaml(readFileSync(join(projectRoot, path), 'utf8')).value as object, true);
});

test('both dialects, other names and spelled-out defaults are valid', () => {
  for (const config of [
    {},
    { model_args: { torch_dtype: 'bf16', device_map: 'auto' }, lora_args: null, train_args: { lora_rank: 4 } },
    { dataset: ['a.json', 'b.json#20', { path: 'c.json', sample: 3 }] },
    { dataset: { train: [{ file_name: 'a.json', dataset_root: 'x', type: 'custom' }], eval: null } },
    { lora_r: 4, lora_target_modules: ['q_proj'], evaluation_strategy: 'no', save_strategy: false },
    { base_dtype: 'fp8', sft_type: 'lora' },
    { adapters: 'dir', report_to: 'tensorboard', template: 'llava1_5_hf', fp16: true, strict: false },
    { packing: false, quant_bits: 0, deepspeed: null, attn_impl: 'flash_attn', framework: 'pt' },
    { target_modules: '.*q_proj', max_length: null, resume_from_checkpoint: true },
  ])
    judged({ ...base, ...config }, true);
});

test('misspelt keys, wrong values and options that are not supported are not valid', () => {
  for (const config of [
    { lora_rnak: 8 },
    { lora_args: { lora_rnak: 8 } },
    { lora_rank: 0 },
    { train_args: { learning_rate: 'high' } },
    { lr_scheduler_type: 'cosien' },
    { torch_dtype: 'fp15' },
    { streaming: true },
    { quant_bits: 3 },
    { base_dtype: 'fp16' },
    { optim: 'adam' },
    { dataset: { trian: 'a.json' } },
    { dataset: [{ path: 'a.json', image_fodler: 'x' }] },
  ])
    judged({ ...base, ...config }, false);
});
