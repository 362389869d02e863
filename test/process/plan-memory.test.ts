/** Plans against what runs take at their peak, counted exactly by the CPU's allocator (MARTLET_CPU_MEMORY_LIMIT). */
import assert from 'node:assert/strict';
import { mkdirSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { planTraining, type TrainConfigInput, type TrainEvent } from '../../lib/index.js';
import { blip2Dir } from '../support/blip2.js';
import { runChild } from '../support/process.js';
import { qwenDir } from '../support/qwen-vl.js';
import { smallConfig } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

/** `words`: how often a row repeats its four; `rows` in a micro-batch. */
const MODELS = {
  llava: { words: 8, rows: 32, config: {} },
  qwen2_vl: { words: 8, rows: 32, config: { model: qwenDir('qwen2_vl', 'model-4x') } },
  // 96 positions
  blip2_opt: { words: 3, rows: 96, config: { model: blip2Dir('opt', 'model-new') } },
};
const SETTINGS: Record<string, Record<string, unknown>> = {
  'lora, nothing recomputed': { gradient_checkpointing: 'none' },
  'lora, layers recomputed': { gradient_checkpointing: 'layer' },
  'lora, MLPs recomputed': { gradient_checkpointing: 'mlp' },
  'lora under autograd (dropout), nothing recomputed': { lora_dropout: 0.1, gradient_checkpointing: 'none' },
  'lora under autograd (dropout), MLPs recomputed': { lora_dropout: 0.1, gradient_checkpointing: 'mlp' },
  'lora on queries and values, nothing recomputed': {
    target_modules: ['q_proj', 'v_proj'],
    gradient_checkpointing: 'none',
  },
  'lora on queries and values under autograd, nothing recomputed': {
    target_modules: ['q_proj', 'v_proj'],
    lora_dropout: 0.1,
    gradient_checkpointing: 'none',
  },
  'lora under autograd (dropout), cheap parts recomputed': { lora_dropout: 0.1, gradient_checkpointing: 'cheap' },
  'lora under autograd (dropout), layers recomputed': { lora_dropout: 0.1, gradient_checkpointing: 'layer' },
  qlora: { sft_type: 'qlora', gradient_checkpointing: 'none' },
  full: { sft_type: 'full', gradient_checkpointing: 'none' },
};

for (const [name, { words, rows, config: model }] of Object.entries(MODELS)) {
  for (const [setting, changes] of Object.entries(SETTINGS)) {
    test(`${name}, ${setting}: the plan's peak is within 10 % of the run's`, async () => {
      const dir = join(root, `${name} ${setting}`);
      mkdirSync(dir);
      const dataset = join(dir, 'rows.json');
      // prompts and answers of the same length: half of the tokens are labelled, as a plan takes it
      const text = 'one two three four '.repeat(words);
      const row = {
        messages: [
          { role: 'user', content: text },
          { role: 'assistant', content: text },
        ],
      };
      writeFileSync(dataset, JSON.stringify(new Array(rows).fill(row)));
      const config = smallConfig(dir, {
        ...model,
        lora_dropout: 0,
        ...changes,
        dataset,
        max_steps: 2,
        save_strategy: 'no',
        per_device_train_batch_size: rows,
        gradient_accumulation_steps: 1,
      });
      const { code, stdout } = await runChild('train', config, { env: { MARTLET_CPU_MEMORY_LIMIT: '1000000000000' } });
      assert.equal(code, 0, stdout);
      const events = stdout
        .trim()
        .split('\n')
        .map((line) => JSON.parse(line)) as TrainEvent[];
      const peak = Math.max(...events.map((event) => (event.type === 'step' ? event.memoryAllocated : 0)));
      const { memory } = await planTraining(config as TrainConfigInput, { gpu: '1000GB' });
      assert.ok(memory.activations > memory.weights + memory.adapters + memory.optimizer, 'the rows are most of it');
      const ratio = memory.total / peak;
      assert.ok(ratio > 0.9 && ratio < 1.1, `${ratio.toFixed(3)}: ${peak} measured, planned ${JSON.stringify(memory)}`);
    });
  }
}
