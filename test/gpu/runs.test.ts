/** Training runs and answers through the public API on the GPU. */
import assert from 'node:assert/strict';
import { rmSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { trainLoRA } from '../../lib/index.js';
import type { Dtype } from '../../lib/native/binding.js';
import { device } from '../support/device.js';
import { cosine, relativeError } from '../support/fixtures.js';
import { gradientsOfBatches, lora, open } from '../support/llava-parity.js';
import { lastJson, runChild } from '../support/process.js';
import { digest, losses, MODEL, smallConfig, steps, train } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtemp(join(root, 'run-'));

const METHODS = {
  lora: { changes: { lora_dropout: 0.1 }, weights: 'adapter_model.safetensors' },
  full: { changes: { sft_type: 'full', learning_rate: 1e-3, freeze_vit: false }, weights: 'model.safetensors' },
} as const;

for (const dtype of ['float32', 'bfloat16'] as const) {
  for (const [method, { changes, weights }] of Object.entries(METHODS)) {
    const config = (dir: string, more: Record<string, unknown> = {}) =>
      smallConfig(dir, { device, torch_dtype: dtype, deterministic: true, ...changes, ...more });

    test(`${method}, ${dtype}: deterministic gives the same bits twice, and another seed others`, async () => {
      const found = [];
      for (const more of [{}, {}, { seed: 7 }]) {
        const dir = await folder();
        const { events } = await train(config(dir, more));
        found.push({ losses: losses(events), weights: digest(join(dir, 'out', weights)) });
        const first = steps(events)[0]?.loss as number;
        const last = steps(events).at(-1)?.loss as number;
        assert.ok(last < first, `it learns: ${first} → ${last}`);
      }
      assert.deepEqual(found[1], found[0]);
      assert.notEqual(found[2]?.weights, found[0]?.weights);
    });

    test(`${method}, ${dtype}: a run that is continued gives the bits of one that was not interrupted`, async () => {
      const whole = await folder();
      await train(config(whole));
      const cut = await folder();
      for await (const event of trainLoRA(config(cut))) if (event.type === 'checkpoint' && event.step === 3) break;
      rmSync(join(cut, 'out', 'checkpoint-6'), { recursive: true, force: true });
      const again = await train(config(cut, { resume_from_checkpoint: true }));
      assert.equal(steps(again.events)[0]?.step, 4, 'it went on after the checkpoint');
      assert.equal(digest(join(cut, 'out', weights)), digest(join(whole, 'out', weights)));
    });
  }
}

/** Rows of 20 to 60 tokens, one of them with two pictures. */
const ROWS = ['single', 'text-only', 'chinese', 'two-images', 'multi-turn'];
const LIMITS: Record<string, (own: number[], other: number[]) => boolean> = {
  float32: (own, other) => relativeError(own, other) < 1e-5,
  bfloat16: (own, other) => cosine(own, other) > 0.999,
};

for (const dtype of ['float32', 'bfloat16'] as Dtype[]) {
  test(`${dtype}: rows packed into one sequence give the gradient of the rows one by one`, async () => {
    const engine = await open('model-4x', device, dtype);
    try {
      await engine.call('train.begin', lora);
      const packed = await gradientsOfBatches(engine, [ROWS]);
      const separate = await gradientsOfBatches(
        engine,
        ROWS.map((row) => [row]),
      );
      assert.ok(Math.abs(packed.loss / separate.loss - 1) < (dtype === 'float32' ? 1e-5 : 2e-3));
      const flat = ({ gradients }: typeof packed) => [...gradients.values()].flatMap((gradient) => [...gradient]);
      assert.ok(LIMITS[dtype]?.(flat(packed), flat(separate)));
      // Rows that saw one another would give another loss altogether.
      const other = await gradientsOfBatches(engine, [[...ROWS].reverse()]);
      assert.ok(LIMITS[dtype]?.(flat(other), flat(packed)), 'the order of the rows does not matter');
    } finally {
      await engine.close();
    }
  });
}

test('training and answering in worker threads at once give what the main thread gives', async () => {
  const jobs = [
    { kind: 'train', config: smallConfig(await folder(), { device, torch_dtype: 'bfloat16', deterministic: true }) },
    { kind: 'generate', model: MODEL, tokens: 40, device },
    { kind: 'generate', model: MODEL, tokens: 25, device },
  ];
  const { code, signal, stdout, stderr } = await runChild('workers', { scenario: 'results', jobs }, { limit: 180_000 });
  assert.deepEqual({ code, signal }, { code: 0, signal: null }, stderr);
  const { inWorkers, here } = lastJson<{ inWorkers: number[][]; here: number[][] }>(stdout);
  assert.deepEqual(
    here.map((list) => list.length),
    [6, 40, 25],
  );
  assert.deepEqual(inWorkers, here);
});

test('a worker that is terminated in the middle of a step on the GPU takes nothing else with it', async () => {
  const jobs = [
    { kind: 'train', config: smallConfig(await folder(), { device, max_steps: 100_000, save_strategy: 'no' }) },
    { kind: 'generate', model: MODEL, tokens: 8, device },
  ];
  const { code, signal, stdout, stderr } = await runChild(
    'workers',
    { scenario: 'terminate', jobs },
    { limit: 180_000 },
  );
  assert.deepEqual({ code, signal }, { code: 0, signal: null }, stderr);
  const { finished, after: later } = lastJson<{ finished: boolean; after: number[][] }>(stdout);
  assert.equal(finished, false, 'the job was in its middle');
  assert.equal(later[0]?.length, 8);
  assert.deepEqual(later[1], later[0]);
});
