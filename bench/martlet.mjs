/**
 * martlet's side of the benchmark: the tasks that come as JSON lines on standard input, through the engine that the public API uses.
 *
 *     node bench/martlet.mjs DIR cuda < tasks.jsonl
 *
 * DIR holds what make_checkpoint.py writes. Each task is answered by one JSON line on standard output; progress goes to standard error. A training
 * step is timed from the call in JavaScript to its result there: pictures arrive as RGB bytes and are normalised within the step.
 */
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import sharp from 'sharp';
import { planTraining, trainLoRA } from '../dist/lib/index.js';
import { Engine } from '../dist/lib/native/engine.js';
import { readSafetensors, writeFloat32 } from './safetensors.mjs';

const CLIP = { mean: [0.48145466, 0.4578275, 0.40821073], std: [0.26862954, 0.26130258, 0.27577711] };
const HALF = { mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5] };

const QUICKSTART_MODEL = fileURLToPath(new URL('../examples/quickstart/model', import.meta.url));

const [dir, device] = process.argv.slice(2);
const say = (text) => console.error(`    martlet: ${text}`);
const engine = new Engine();
let shape;
let data;
/** Of the network's views of one picture. */
let plans;

/** What lib/processing does to a picture that has the right size already. MiniCPM-V: the whole, then its slices. */
function viewPlans({ config, row }) {
  const rescale = 1 / 255;
  if (config.model_type.startsWith('qwen2'))
    return [{ rescale, ...CLIP, patches: { size: 14, temporal: 2, merge: 2 } }];
  if (config.model_type !== 'minicpmv') return [{ rescale, ...CLIP }];
  const size = config.slice_config.scale_resolution;
  const view = (side, crop) => ({
    resize: { width: side, height: side, backend: 'pillow' },
    ...(crop && { crop: { ...crop, width: size, height: size } }),
    rescale,
    ...HALF,
    patches: { size: 14, temporal: 1, merge: 1, sideBySide: true },
  });
  const across = row.picture / size;
  const slices = Array.from({ length: across ** 2 }, (_, i) =>
    view(row.picture, { top: Math.floor(i / across) * size, left: (i % across) * size }),
  );
  return [view(size), ...slices];
}

/** A row as arguments of a job; its buffers are added to `buffers`. `first` picture of `pictures` and `count` − 1 more, each with a key of its own. */
function sample(buffers, ids, labels, pictures, first, count) {
  const size = pictures.shape[1];
  const bytes = size * size * 3;
  const add = (values) => buffers.push(values.slice()) - 1;
  const images = Array.from({ length: count }, (_, i) => {
    const buffer = add(pictures.data.subarray((first + i) * bytes, (first + i + 1) * bytes));
    return plans.map((plan, view) => ({
      buffer,
      width: size,
      height: size,
      plan,
      key: ((first + i) * plans.length + view).toString(16).padStart(8, '0'),
    }));
  });
  return { inputIds: add(ids), ...(labels && { labels: add(labels) }), images: images.flat() };
}

/** One micro-batch of `count` rows from row `first` on, with its buffers; `promptTokens` cuts rows and leaves the labels out. */
function rows(first, count, promptTokens) {
  const buffers = [];
  const [total] = data.ids.shape;
  const samples = Array.from({ length: count }, (_, i) => {
    const row = (first + i) % total;
    const part = ({ data, shape: [, length] }, end = length) => data.subarray(row * length, row * length + end);
    const labels = promptTokens === undefined ? part(data.labels) : undefined;
    return { ...sample(buffers, part(data.ids, promptTokens), labels, data.pictures, row, 1), id: `row ${row}` };
  });
  return { samples, buffers };
}

/** LoRA starts from the stored adapter, as the peer's does, where there is a peer; from PEFT's fresh one where there is none. */
function begin({ recompute, method = 'lora', optim = 'adamw', ...task }) {
  const { r = 8, alpha = 16, dropout = 0, targets = 'all-linear' } = { ...shape.lora, ...(task.r && { r: task.r }) };
  const full = method === 'full';
  return {
    method: full ? 'full' : 'lora',
    ...(!full && { lora: { r, alpha, dropout, useRslora: false, targetModules: targets } }),
    ...(!full && shape.peer !== 'none' && { adapterDir: join(dir, 'adapter') }),
    freeze: { vision: true, projector: true, language: false },
    optimizer: {
      name: optim.replace('paged_', ''),
      paged: optim.startsWith('paged_'),
      beta1: 0.9,
      beta2: 0.999,
      epsilon: 1e-8,
      weightDecay: 0.1,
    },
    schedule: { type: 'constant', warmupSteps: 0, totalSteps: 1000 },
    learningRate: task.learningRate ?? (full ? 1e-5 : 1e-4),
    maxGradNorm: 1,
    recompute: typeof recompute === 'string' ? recompute : recompute ? 'layer' : 'none',
    seed: 42,
    deterministic: false,
  };
}

/**
 * Bytes that one answer's token reads from device memory: all weights except tower, projector, an encoder, what is only read for the encoder's states
 * and the table of embeddings, of which it reads a row (a head that is that table is read as a whole); and keys and values of a position in the
 * caches.
 */
async function tokenBytes(weightBytes) {
  const { parameters, decoder } = (await engine.call('describe', { modelDir: join(dir, 'model') })).result;
  const hasHead = parameters.some(({ name }) => /lm_head/.test(name));
  const isTable = (name) => /embed_tokens|embed_positions|\.wte\.|\.shared\./.test(name);
  const ofEncoder = (name) => /language_model\.encoder\.|EncDecAttention\.[kv]\./.test(name);
  const unread = parameters.filter(
    ({ name, part }) => part !== 'language' || ofEncoder(name) || (isTable(name) && hasHead),
  );
  const elements = unread.reduce((sum, { numel }) => sum + numel, 0);
  // Half of an encoder-decoder's layers are the encoder's.
  const layers = parameters.some(({ name }) => ofEncoder(name)) ? decoder.layers / 2 : decoder.layers;
  return { weights: weightBytes - 2 * elements, position: 4 * layers * decoder.keyValueHeads * decoder.headDim };
}

const BITS = { nf4: 4, int8: 8 };

/** What `martlet plan` says that such a run takes at most, in bytes. */
async function plannedPeak({ method, batch, recompute, optim = 'adamw_torch', ...task }) {
  const bits = BITS[method];
  const isFp8 = method === 'fp8';
  const { r = 8, alpha = 16, dropout = 0, targets = 'all-linear' } = { ...shape.lora, ...(task.r && { r: task.r }) };
  const { memory, settings } = await planTraining(
    {
      model: join(dir, 'model'),
      device,
      sft_type: bits ? 'qlora' : isFp8 ? 'lora' : method,
      ...(bits && { quant_bits: bits }),
      ...(isFp8 && { base_dtype: 'fp8' }),
      ...(method !== 'full' && { lora_rank: r, lora_alpha: alpha, lora_dropout: dropout, target_modules: targets }),
      optim,
      per_device_train_batch_size: batch,
      max_length: shape.row.tokens,
      gradient_checkpointing: recompute,
    },
    { gpu: '1000GB' },
  );
  const changed = Object.keys(settings).filter((key) => key !== 'gradient_checkpointing');
  if (changed.length > 0) throw new Error(`the plan is for another run: ${JSON.stringify(settings)}`);
  return memory.total;
}

const greedy = (maxNewTokens) => ({
  maxNewTokens,
  temperature: 0,
  topP: 1,
  topK: 0,
  repetitionPenalty: 1,
  seed: 0,
  stopTokenIds: [],
});

/**
 * LLaVA's checkpoint with a tokenizer (the quickstart's, which has few words), and rows as users have them: photographs as JPEG files of 1,024 × 768
 * and conversations of about the shape's length. Written to `folder`.
 */
async function userFiles(folder, count) {
  const model = join(folder, 'model');
  const pictures = join(folder, 'images');
  for (const path of [model, pictures]) mkdirSync(path, { recursive: true });
  const read = (name) => JSON.parse(readFileSync(join(QUICKSTART_MODEL, name), 'utf8'));
  const write = (name, value) => writeFileSync(join(model, name), JSON.stringify(value));
  const { image_token_index, pad_token_id } = read('config.json');
  const { image_size: side, patch_size } = shape.config.vision_config;
  write('config.json', { ...shape.config, image_token_index, pad_token_id });
  write('processor_config.json', { ...read('processor_config.json'), patch_size });
  write('preprocessor_config.json', {
    ...read('preprocessor_config.json'),
    crop_size: { height: side, width: side },
    size: { shortest_edge: side },
  });
  for (const name of ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.json'])
    copyFileSync(join(QUICKSTART_MODEL, name), join(model, name));
  for (const name of readdirSync(join(dir, 'model')))
    if (!existsSync(join(model, name))) symlinkSync(join(dir, 'model', name), join(model, name));
  const words = Object.keys(read('tokenizer.json').model.vocab).filter((word) => /^\p{Letter}{2,}$/u.test(word));
  const size = data.pictures.shape[1];
  const text = (first, length) => Array.from({ length }, (_, i) => words[(first + 7 * i) % words.length]).join(' ');
  const conversations = [];
  for (let row = 0; row < count; row++) {
    const start = (row % data.pictures.shape[0]) * size * size * 3;
    const raw = { width: size, height: size, channels: 3 };
    await sharp(data.pictures.data.slice(start, start + size * size * 3), { raw })
      .resize(1024, 768, { fit: 'fill' })
      .jpeg({ quality: 90 })
      .toFile(join(pictures, `${row}.jpg`));
    // A word is about two tokens of this tokenizer.
    const spare = shape.row.tokens - shape.row.imageTokens;
    conversations.push({
      id: String(row),
      image: `${row}.jpg`,
      conversations: [
        { from: 'human', value: `<image>\n${text(row, Math.floor(spare / 4))}` },
        { from: 'gpt', value: text(row + 3, Math.floor(spare / 8)) },
      ],
    });
  }
  writeFileSync(join(folder, 'train.json'), JSON.stringify(conversations));
  return { model, dataset: [{ path: join(folder, 'train.json'), dataset_root: folder, image_folder: 'images' }] };
}

async function timed(work) {
  const began = performance.now();
  const value = await work();
  return { value, seconds: (performance.now() - began) / 1000 };
}

function readShape() {
  shape = JSON.parse(readFileSync(join(dir, 'shape.json'), 'utf8'));
  plans = viewPlans(shape);
  data = readSafetensors(join(dir, 'data.safetensors'));
}

const TASKS = {
  /** `quantization`: none, nf4 (with double quantisation), int8 or fp8. */
  /** `visionCache`: features of pictures are kept in memory. */
  async load({ quantization = 'none', visionCache = false }) {
    readShape();
    // The device's context is not part of loading a model.
    const first = new Engine();
    await first.call('load', { modelDir: QUICKSTART_MODEL, device, dtype: 'bfloat16', quantization: 'none' });
    await first.close();
    const { value, seconds } = await timed(() =>
      engine.call('load', {
        modelDir: join(dir, 'model'),
        device,
        dtype: 'bfloat16',
        quantization,
        ...(visionCache && { visionCache: { bytes: 2 ** 32 } }),
      }),
    );
    const { parameters, weightBytes } = value.result;
    const { peakAllocated } = (await engine.call('stats', {})).result;
    return { seconds, parameters, weightBytes, peakAllocated, tokenBytes: await tokenBytes(weightBytes) };
  },

  /** `batch` answers at once. One: tokens/s after the first token. More: all tokens by the time of the whole request. */
  async decode({ promptTokens, newTokens, warmup, repeats, batch }) {
    const runs = [];
    const warmupSeconds = [];
    let peak;
    for (let i = 0; i < warmup + repeats; i++) {
      const { samples, buffers } = rows(0, batch, promptTokens);
      const requests = samples.map((sample) => ({ sample, ...greedy(newTokens) }));
      const times = [];
      const began = performance.now();
      const onEvent = () => times.push(performance.now());
      const out =
        batch === 1
          ? await engine.call('generate', requests[0], { buffers, onEvent })
          : await engine.call(
              'generate.batch',
              { requests, left: buffers.push(new Uint8Array(batch)) - 1 },
              { buffers, onEvent },
            );
      const answers = (batch === 1 ? [out.result] : out.result.answers).map(({ tokenIds }) => [
        ...new Int32Array(out.buffers[tokenIds]),
      ]);
      if (answers.some((ids) => ids.length !== newTokens) || times.length !== batch * newTokens)
        throw new Error(`${times.length} tokens came`);
      const first = (times[0] - began) / 1000;
      const after = (times.at(-1) - times[0]) / 1000;
      if (i < warmup) {
        warmupSeconds.push(first + after);
        continue;
      }
      const rate = batch === 1 ? (newTokens - 1) / after : (batch * newTokens) / (first + after);
      runs.push({ first, rate, ids: answers[0] });
      peak = (await engine.call('stats', {})).result;
    }
    return {
      firstTokenSeconds: runs.map(({ first }) => first),
      tokensPerSecond: runs.map(({ rate }) => rate),
      tokenIds: runs[0].ids,
      warmupSeconds,
      peakAllocated: peak.peakAllocated,
      peakReserved: peak.peakReserved,
    };
  },

  /**
   * Tower and merger: the engine's own clock (timings.visionMs of generate) while it answers a prompt with all the pictures, from patches on the
   * host to features in the prompt's embeddings: the copy to the device is in it.
   */
  async vision({ warmup, repeats }) {
    await engine.call('emptyCache', {});
    const pictures = data.visionPictures.shape[0];
    const visionSeconds = [];
    for (let i = 0; i < warmup + repeats; i++) {
      const buffers = [];
      const prompt = sample(buffers, data.visionIds.data, undefined, data.visionPictures, 0, pictures);
      const { result } = await engine.call('generate', { sample: prompt, ...greedy(1) }, { buffers });
      if (i >= warmup) visionSeconds.push(result.timings.visionMs / 1000);
    }
    return { visionSeconds, pictures };
  },

  /** With a `method`: lora, fp8, nf4, int8 (LoRA on weights loaded that way) or full; else LoRA. `r` and `optim` in place of the shape's and AdamW. */
  async train(task) {
    await engine.call('emptyCache', {});
    const planned = task.method && (await plannedPeak(task));
    const { result: begun } = await engine.call('train.begin', begin(task));
    const seconds = [];
    const warmupSeconds = [];
    const losses = [];
    const peak = { peakAllocated: 0, peakReserved: 0 };
    try {
      for (let step = 0; step < task.warmup + task.steps; step++) {
        const { samples, buffers } = rows(step * task.batch, task.batch);
        const { value, seconds: took } = await timed(() =>
          engine.call('train.step', { microBatches: [samples] }, { buffers }),
        );
        const { result } = value;
        losses.push(result.loss);
        if (step < 3 || step % 10 === 0)
          say(`step ${step}: ${(took * 1000).toFixed(0)} ms, loss ${result.loss.toFixed(4)}`);
        if (step < task.warmup) {
          warmupSeconds.push(took);
          continue;
        }
        seconds.push(took);
        for (const key of Object.keys(peak)) peak[key] = Math.max(peak[key], result.memory[key]);
      }
    } finally {
      await engine.call('train.end', {});
    }
    if (!losses.every(Number.isFinite)) throw new Error(`losses are not finite: ${losses}`);
    return {
      seconds,
      warmupSeconds,
      losses,
      trainableParams: begun.trainableParams,
      ...(planned && { plannedPeak: planned }),
      ...peak,
    };
  },

  /** Training on a model that keeps features. */
  cached: (task) => TASKS.train(task),

  /** The losses of `steps` steps over the first `rows` rows, again and again. */
  async curve({ batch, rows: count, steps, ...task }) {
    await engine.call('train.begin', begin(task));
    const losses = [];
    try {
      for (let step = 0; step < steps; step++) {
        const { samples, buffers } = rows((step * batch) % count, batch);
        const { result } = await engine.call('train.step', { microBatches: [samples] }, { buffers });
        losses.push(result.loss);
        if (step % 20 === 0) say(`step ${step}: loss ${result.loss.toFixed(4)}`);
      }
    } finally {
      await engine.call('train.end', {});
    }
    if (!losses.every(Number.isFinite)) throw new Error(`losses are not finite: ${losses}`);
    return { losses };
  },

  /**
   * A run through the public API from JPEG files and text: pictures are decoded, resized and tokenised beside the steps. `dataWait`: the share of the
   * steps' time in which the engine waited for rows.
   */
  async data({ batch, warmup, steps, out }) {
    readShape();
    rmSync(out, { recursive: true, force: true });
    const files = await userFiles(out, 4 * batch);
    const run = trainLoRA({
      ...files,
      device,
      torch_dtype: 'bfloat16',
      sft_type: 'lora',
      lora_rank: 8,
      lora_alpha: 16,
      lora_dropout: 0,
      target_modules: 'all-linear',
      per_device_train_batch_size: batch,
      gradient_accumulation_steps: 1,
      max_steps: warmup + steps,
      max_length: 2 * shape.row.tokens,
      gradient_checkpointing: false,
      logging_steps: 1,
      save_strategy: 'no',
      eval_strategy: 'no',
      output_dir: join(out, 'run'),
    });
    let [tokens, time, waited] = [0, 0, 0];
    let before = 0;
    for await (const event of run) {
      if (event.type !== 'step') continue;
      const own = event.tokens - before;
      before = event.tokens;
      if (event.step <= warmup) continue;
      tokens += own;
      time += own / event.tokensPerSecond;
      waited += (event.dataWait * own) / event.tokensPerSecond;
    }
    rmSync(out, { recursive: true });
    return { dataTokensPerSecond: tokens / time, dataWait: waited / time, rowTokens: tokens / steps / batch };
  },

  /** Of the first batch; `loss` is the mean over the first `losses` batches. */
  async gradients({ batch, losses, file }) {
    await engine.call('train.begin', begin({ recompute: true }));
    const gradients = (i) => {
      const { samples, buffers } = rows(i * batch, batch);
      return engine.call('train.gradients', { microBatches: [samples] }, { buffers });
    };
    const { result, buffers: out } = await gradients(0);
    let sum = result.loss;
    for (let i = 1; i < losses; i++) sum += (await gradients(i)).result.loss;
    writeFloat32(
      file,
      result.gradients.map(({ name, shape, buffer }) => ({ name, shape, data: new Float32Array(out[buffer]) })),
    );
    await engine.call('train.end', {});
    return { loss: sum / losses, tensors: result.gradients.length };
  },

  /** From files to a merged folder; each element is checked against the sum in float64 on the way. */
  async merge({ out }) {
    rmSync(out, { recursive: true, force: true });
    mkdirSync(out);
    const { value, seconds } = await timed(() =>
      engine.call('merge', {
        modelDir: join(dir, 'model'),
        adapterDir: join(dir, 'adapter'),
        outputDir: out,
        maxShardSize: 5e9,
        device,
      }),
    );
    const files = readdirSync(out).filter((name) => name.endsWith('.safetensors'));
    const bytes = files.reduce((sum, name) => sum + statSync(join(out, name)).size, 0);
    rmSync(out, { recursive: true });
    const { mergedTensors, maxAbsError } = value.result;
    return { mergeSeconds: seconds, bytes, mergedTensors, maxAbsError };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const task = JSON.parse(line);
  say(line);
  let result;
  try {
    result = await TASKS[task.kind](task);
  } catch (error) {
    const outOfMemory = error.code === 'ERR_MARTLET_OUT_OF_MEMORY';
    if (!outOfMemory) console.error(error);
    result = { error: outOfMemory ? 'out of memory' : `${error.code ?? error.name}: ${error.message}` };
  }
  console.log(JSON.stringify({ ...task, ...result }));
}
await engine.close();
