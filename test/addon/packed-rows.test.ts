/** Packed rows of Qwen-VL-Chat and MiniCPM-V: the loss and the gradients of the rows apart. */
import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import type { ChatMessage } from '../../lib/processing/types.js';
import { projectRoot } from '../support/fixtures.js';
import { writeRandomModel } from '../support/random-model.js';
import { shareOfLargest } from '../support/reference.js';
import { readSafetensors } from '../support/safetensors.js';
import { losses, steps, train } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

const picture = (name: string) => join(projectRoot, 'test/fixtures/minicpm_v/images', name);
const turns = (...texts: string[]): ChatMessage[] =>
  texts.map((content, i) => ({ role: i % 2 === 0 ? 'user' : 'assistant', content }));
/** No picture, one that is not sliced, two, one in each turn; slices of several shapes, so that MiniCPM-V pads keys. */
const ROWS = [
  { messages: turns('Hello.', 'Good day.', 'And now?', 'Nothing.'), images: [] },
  { messages: turns('<image>What is it?', 'A shape.'), images: [picture('small.png')] },
  {
    messages: turns('<image><image>Which one is longer?', 'The second one of them.'),
    images: [picture('wide.png'), picture('small.png')],
  },
  {
    messages: turns('<image>First?', 'Yes.', 'And this: <image>?', 'No.'),
    images: [picture('small.png'), picture('tall.png')],
  },
  { messages: turns('Bye.', 'Bye bye.'), images: [] },
];

/** SGD at a rate of one: the first step moves B by its gradient, the second A as well. */
async function run(model: string, changes: Record<string, unknown>) {
  const dir = await mkdtemp(join(root, 'run-'));
  const dataset = join(dir, 'data.json');
  writeFileSync(dataset, JSON.stringify(ROWS));
  const { events } = await train({
    model,
    dataset,
    output_dir: join(dir, 'out'),
    device: 'cpu',
    torch_dtype: 'float32',
    lora_rank: 4,
    lora_dropout: 0,
    freeze_vit: false,
    freeze_aligner: false,
    optim: 'sgd',
    learning_rate: 1,
    lr_scheduler_type: 'constant',
    weight_decay: 0,
    max_grad_norm: 0,
    gradient_checkpointing: 'none',
    num_train_epochs: 2,
    logging_steps: 1,
    save_strategy: 'no',
    report_to: 'none',
    ...changes,
  });
  return { events, adapter: readSafetensors(join(dir, 'out/adapter_model.safetensors')) };
}

const MODELS: Record<string, (dir: string) => string> = {
  'Qwen-VL-Chat': (dir) => {
    writeRandomModel('qwen_vl_chat', dir);
    return dir;
  },
  'MiniCPM-V 2.6': (dir) => {
    writeRandomModel('minicpm_v', dir);
    return dir;
  },
  'MiniCPM-V 4.5': () => join(projectRoot, 'test/fixtures/minicpm_v_4_5/model'),
};

for (const [name, prepare] of Object.entries(MODELS)) {
  test(`${name}: rows with and without pictures, all of them packed into one, a few, and apart`, async () => {
    const model = prepare(join(root, name));
    const apart = await run(model, { per_device_train_batch_size: 1, gradient_accumulation_steps: ROWS.length });
    assert.equal(losses(apart.events).length, 2);
    for (const packing_length of [2048, 800]) {
      // one step an epoch, however many bins
      const packed = await run(model, {
        packing: true,
        packing_length,
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: ROWS.length,
      });
      assert.deepEqual(
        steps(packed.events).map(({ tokens }) => tokens),
        steps(apart.events).map(({ tokens }) => tokens),
      );
      for (const [i, loss] of losses(apart.events).entries())
        assert.ok(
          Math.abs(loss - (losses(packed.events)[i] as number)) < 1e-5,
          `${losses(apart.events)} ${losses(packed.events)}`,
        );
      assert.deepEqual([...packed.adapter.keys()], [...apart.adapter.keys()]);
      for (const [key, { data }] of apart.adapter) {
        assert.ok(!key.includes('lora_B') || data.some((x) => x !== 0), `${key} has a gradient`);
        const share = shareOfLargest((packed.adapter.get(key) as { data: Float32Array }).data, data);
        // rounding of two steps: 1.0e-5 at most, where gradients cancel (queries of the vision tower)
        assert.ok(share < 2e-5, `${key} ${share}`);
      }
    }
  });
}
