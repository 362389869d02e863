/**
 * Makes examples/quickstart/model: trains the tiny LLaVA from scratch with martlet itself (sft_type: full) on generated pictures.
 * Options: --pictures N --epochs N --batch N --lr X --device D --out DIR --work DIR, --seconds N (stops after the step then running and saves).
 */
import { cp, mkdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { trainLoRA } from '../../../dist/lib/index.js';
import { initModel } from './init-model.mjs';
import { random, randomScene, writePicture } from './pictures.mjs';
import { conversation, copyRow } from './questions.mjs';

const { values: options } = parseArgs({
  options: {
    pictures: { type: 'string', default: '16000' },
    epochs: { type: 'string', default: '12' },
    batch: { type: 'string', default: '128' },
    lr: { type: 'string', default: '1.5e-3' },
    device: { type: 'string', default: 'auto' },
    dtype: { type: 'string', default: 'bfloat16' },
    seconds: { type: 'string', default: 'Infinity' },
    out: { type: 'string', default: fileURLToPath(new URL('../model', import.meta.url)) },
    work: { type: 'string', default: join(tmpdir(), 'martlet-quickstart-base') },
  },
});

const TURNS = 6;
const began = performance.now();
const seconds = () => ((performance.now() - began) / 1000).toFixed(0);

await rm(options.work, { recursive: true, force: true });
await mkdir(join(options.work, 'images'), { recursive: true });
await initModel(join(options.work, 'init'), 1);

const rng = random(2);
const rows = [];
const writing = new Set();
for (let i = 0; i < Number(options.pictures); i++) {
  const scene = randomScene(rng);
  const name = `${i}.${rng() < 0.5 ? 'png' : 'jpg'}`;
  rows.push({ id: String(i), image: name, conversations: conversation(scene, TURNS, rng) });
  const written = writePicture(join(options.work, 'images', name), scene, random(1000 + i)).then(() =>
    writing.delete(written),
  );
  writing.add(written);
  if (writing.size >= 32) await Promise.race(writing);
  if (i % 10 === 0) rows.push({ id: `copy-${i}`, conversations: copyRow(rng) });
}
await Promise.all(writing);
await writeFile(join(options.work, 'data.json'), JSON.stringify(rows));
console.log(`${seconds()} s: ${rows.length} rows`);

const run = trainLoRA({
  model: join(options.work, 'init'),
  sft_type: 'full',
  torch_dtype: options.dtype,
  device: options.device,
  dataset: [{ path: join(options.work, 'data.json'), dataset_root: options.work, image_folder: 'images' }],
  freeze_vit: false,
  freeze_aligner: false,
  freeze_llm: false,
  num_train_epochs: Number(options.epochs),
  per_device_train_batch_size: Number(options.batch),
  gradient_accumulation_steps: 1,
  learning_rate: Number(options.lr),
  weight_decay: 0.05,
  warmup_ratio: 0.05,
  lr_scheduler_type: 'cosine',
  gradient_checkpointing: false,
  logging_steps: 25,
  save_strategy: 'no',
  output_dir: join(options.work, 'output'),
  seed: 7,
});
for await (const event of run) {
  if (performance.now() - began > 1000 * Number(options.seconds)) run.stop();
  if (event.type === 'step') {
    console.log(
      `${seconds()} s: step ${event.step} epoch ${event.epoch.toFixed(2)} loss ${event.loss.toFixed(4)} token accuracy ${event.tokenAccuracy.toFixed(4)}`,
    );
  } else if (event.type === 'warning') console.log(`warning: ${event.message}`);
}
const result = await run;
await rm(options.out, { recursive: true, force: true });
await mkdir(options.out, { recursive: true });
// the model's own files; what the run wrote beside them stays behind
for (const name of [
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.json',
  'preprocessor_config.json',
  'processor_config.json',
  'model.safetensors',
]) {
  await cp(join(result.outputDir, name), join(options.out, name));
}
console.log(
  `${seconds()} s: ${result.steps} steps, loss ${result.finalLoss.toFixed(4)}; the model is in ${options.out}`,
);
