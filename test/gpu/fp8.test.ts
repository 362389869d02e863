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
import { cosine, getCase, llava, projectRoot } from '../support/fixtures.js';
import { greedy, lora } from '../support/llava-parity.js';
import { QUICKSTART_MODEL } from '../support/process.js';
import { readSafetensors } from '../support/safetensors.js';
import { digest, losses, MODEL, smallConfig, steps, train } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtemp(join(root, 'run-'));

const config = (dir: string, more: Record<string, unknown> = {}) =>
  smallConfig(dir, { device, torch_dtype: 'bfloat16', base_dtype: 'fp8', lora_dropout: 0, ...more });

/** The quickstart's trained model and rows: the fixture's random weights magnify each rounding. */
const quickstart = (dir: string, more: Record<string, unknown>) => {
  const data = join(projectRoot, 'examples/quickstart/data');
  return {
    model: QUICKSTART_MODEL,
    dataset: [{ path: join(data, 'train.json'), dataset_root: data, image_folder: 'images' }],
    output_dir: join(dir, 'out'),
    device,
    torch_dtype: 'bfloat16',
    lora_dropout: 0,
    per_device_train_batch_size: 8,
    gradient_accumulation_steps: 1,
    gradient_checkpointing: false,
    lr_scheduler_type: 'constant',
    logging_steps: 1,
    save_strategy: 'no',
    report_to: 'none',
    ...more,
  };
};

test('loss and gradients of a batch beside bfloat16: within 1 %, cosine above 0.99', async () => {
  const found = [];
  for (const base_dtype of ['auto', 'fp8']) {
    const dir = await folder();
    // One step of plain descent at a rate of 1 from lora_B = 0: the adapter's lora_B is the gradient, negated.
    const once = { max_steps: 1, optim: 'sgd', learning_rate: 1, weight_decay: 0, max_grad_norm: 1e9 };
    const { events } = await train(quickstart(dir, { ...once, base_dtype }));
    const warned = events.filter((event) => event.type === 'warning').map(({ message }) => message);
    assert.ok(!warned.some((message) => /fp8/.test(message)), `every linear is held: ${warned}`);
    const pairs = readSafetensors(join(dir, 'out', 'adapter_model.safetensors'));
    const gradient = [...pairs].flatMap(([name, { data }]) => (name.includes('lora_B') ? [...data] : []));
    assert.ok(gradient.some((value) => value !== 0));
    found.push({ loss: losses(events)[0] as number, gradient });
  }
  const [full, fp8] = found;
  assert(full && fp8);
  const near = cosine(fp8.gradient, full.gradient);
  console.log(`loss ${fp8.loss} beside ${full.loss}, cosine ${near}`);
  assert.notEqual(fp8.loss, full.loss, 'it is another arithmetic');
  assert.ok(Math.abs(fp8.loss / full.loss - 1) < 0.01, `${fp8.loss} beside ${full.loss}`);
  assert.ok(near > 0.99, String(near));
});

test('a run learns as in bfloat16', async () => {
  const ends: number[] = [];
  let begin = 0;
  for (const base_dtype of ['auto', 'fp8']) {
    const { events } = await train(quickstart(await folder(), { max_steps: 60, learning_rate: 1e-3, base_dtype }));
    const curve = losses(events);
    begin = curve[0] as number;
    ends.push(curve.slice(-10).reduce((a, b) => a + b, 0) / 10);
  }
  const [full, fp8] = ends as [number, number];
  console.log(`from ${begin} to ${full} in bfloat16, ${fp8} in fp8`);
  assert.ok(full < 0.7 * begin, `it learns: ${begin} → ${full}`);
  // Of the way down: where little is left, a share of it is noise.
  assert.ok(Math.abs(fp8 - full) < 0.01 * (begin - full), `${fp8} beside ${full}`);
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

test('a continued run gives the bits of one that was not interrupted', async () => {
  const whole = await folder();
  await train(config(whole, { deterministic: true }));
  assert.equal((await readAdapterArgs(join(whole, 'out'))).base_dtype, 'fp8');
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
