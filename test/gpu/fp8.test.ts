/** base_dtype: fp8 on the GPU: gradients and curves beside bfloat16's, runs that are continued, merging. */
import assert from 'node:assert/strict';
import { rmSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { readAdapterArgs } from '../../lib/api/adapter-args.js';
import { loadModel, mergeAdapter, trainLoRA } from '../../lib/index.js';
import { Engine } from '../../lib/native/engine.js';
import { device } from '../support/device.js';
import { cosine, getCase, llava } from '../support/fixtures.js';
import { gradientsOfBatches, greedy, lora } from '../support/llava-parity.js';
import { digest, losses, MODEL, smallConfig, steps, train } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtemp(join(root, 'run-'));

const config = (dir: string, more: Record<string, unknown> = {}) =>
  smallConfig(dir, { device, torch_dtype: 'bfloat16', base_dtype: 'fp8', lora_dropout: 0, ...more });

test('loss and LoRA gradients of one batch beside bfloat16: within 1 %, cosine above 0.99', async () => {
  const found = [];
  for (const quantization of ['none', 'fp8'] as const) {
    const engine = new Engine();
    try {
      const { result } = await engine.call('load', { modelDir: MODEL, device, dtype: 'bfloat16', quantization });
      assert.deepEqual([result.quantization, result.warnings], [quantization, []]);
      await engine.call('train.begin', lora);
      const { loss, gradients } = await gradientsOfBatches(engine, [['single', 'multi-turn', 'text-only']]);
      found.push({ loss, bytes: result.weightBytes, all: [...gradients.values()].flatMap((one) => [...one]) });
    } finally {
      await engine.close();
    }
  }
  const [full, fp8] = found;
  assert(full && fp8);
  const near = cosine(fp8.all, full.all);
  console.log(`loss ${fp8.loss} beside ${full.loss}, cosine ${near}`);
  assert.ok(fp8.bytes < full.bytes, 'the weights are smaller');
  assert.notEqual(fp8.loss, full.loss, 'it is another arithmetic');
  assert.ok(Math.abs(fp8.loss / full.loss - 1) < 0.01, `${fp8.loss} beside ${full.loss}`);
  assert.ok(near > 0.99, String(near));
});

test('it answers, one token at a time; full training of it is refused', async () => {
  const engine = new Engine();
  try {
    await engine.call('load', { modelDir: MODEL, device, dtype: 'bfloat16', quantization: 'fp8' });
    assert.ok((await greedy(engine, 'single')).length > 0);
    const { lora: _, adapterDir: __, ...full } = lora;
    await assert.rejects(engine.call('train.begin', { ...full, method: 'full' }), {
      code: 'ERR_MARTLET_CONFIG',
      message: /full cannot train quantised weights/,
    });
  } finally {
    await engine.close();
  }
  const other = new Engine();
  await assert.rejects(other.call('load', { modelDir: MODEL, device, dtype: 'float32', quantization: 'fp8' }), {
    code: 'ERR_MARTLET_CONFIG',
    message: /fp8 is for bfloat16, .*float32\. Set torch_dtype: bfloat16/,
  });
  await other.close();
});

test('a run learns as in bfloat16, and a continued one gives the bits of one that was not interrupted', async () => {
  const whole = await folder();
  const { events } = await train(config(whole, { deterministic: true }));
  assert.equal((await readAdapterArgs(join(whole, 'out'))).base_dtype, 'fp8');
  const plain = await train(config(await folder(), { deterministic: true, base_dtype: 'auto' }));
  const [own, other] = [losses(events), losses(plain.events)];
  console.log(`fp8 ${own}; bfloat16 ${other}`);
  for (const [i, loss] of own.entries()) assert.ok(Math.abs(loss / (other[i] as number) - 1) < 0.03, `${own} ${other}`);

  const cut = await folder();
  for await (const event of trainLoRA(config(cut, { deterministic: true })))
    if (event.type === 'checkpoint' && event.step === 3) break;
  rmSync(join(cut, 'out', 'checkpoint-6'), { recursive: true, force: true });
  const again = await train(config(cut, { deterministic: true, resume_from_checkpoint: true }));
  assert.equal(steps(again.events)[0]?.step, 4, 'it went on after the checkpoint');
  const weights = 'adapter_model.safetensors';
  assert.equal(digest(join(cut, 'out', weights)), digest(join(whole, 'out', weights)));
});

test('what was trained on fp8 merges into the original weights and into those it was trained against', async () => {
  const dir = await folder();
  await train(config(dir, { save_strategy: 'no' }));
  const out = join(dir, 'out');
  const { messages, images } = getCase('single');
  const row = { messages, images: images.map((image) => join(llava, 'images', image)) };
  const scores: number[] = [];
  for (const base of ['original', 'quantized'] as const) {
    const { outputDir } = await mergeAdapter({ adapter: out, outputDir: join(dir, base), base });
    const model = await loadModel(outputDir, { device: device as 'cuda', dtype: 'bfloat16' });
    scores.push((await model.score(row)).loss);
    await model.dispose();
  }
  const [original, quantized] = scores as [number, number];
  console.log(`loss on the original weights ${original}, on those of fp8 ${quantized}`);
  assert.ok(original !== quantized && Math.abs(original / quantized - 1) < 0.05, String(scores));
});
