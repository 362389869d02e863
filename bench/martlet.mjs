/**
 * martlet's side of the benchmark: the tasks that come as JSON lines on standard input, through the engine that the public API uses.
 *
 *     node bench/martlet.mjs DIR cuda < tasks.jsonl
 *
 * DIR holds what make_checkpoint.py writes. Each task is answered by one JSON line on standard output; progress goes to standard error. A training
 * step is timed from the call in JavaScript to its result there: pictures arrive as RGB bytes and are normalised within the step.
 */
import { mkdirSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { planTraining } from '../dist/lib/index.js';
import { Engine } from '../dist/lib/native/engine.js';
import { readSafetensors, writeFloat32 } from './safetensors.mjs';

const CLIP = { mean: [0.48145466, 0.4578275, 0.40821073], std: [0.26862954, 0.26130258, 0.27577711] };
const HALF = { mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5] };

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

/** A row as arguments of a job; its buffers are added to `buffers`. `first` picture of `pictures` and `count` − 1 more. */
function sample(buffers, ids, labels, pictures, first, count) {
  const size = pictures.shape[1];
  const bytes = size * size * 3;
  const add = (values) => buffers.push(values.slice()) - 1;
  const images = Array.from({ length: count }, (_, i) => {
    const buffer = add(pictures.data.subarray((first + i) * bytes, (first + i + 1) * bytes));
    return plans.map((plan) => ({ buffer, width: size, height: size, plan }));
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
    learningRate: full ? 1e-5 : 1e-4,
    maxGradNorm: 1,
    recompute: typeof recompute === 'string' ? recompute : recompute ? 'layer' : 'none',
    seed: 42,
    deterministic: false,
  };
}

const BITS = { nf4: 4, int8: 8 };

/** What `martlet plan` says that such a run takes at most, in bytes. */
async function plannedPeak({ method, batch, recompute, optim = 'adamw_torch', ...task }) {
  const bits = BITS[method];
  const { r = 8, alpha = 16, targets = 'all-linear' } = { ...shape.lora, ...(task.r && { r: task.r }) };
  const { memory, settings } = await planTraining(
    {
      model: join(dir, 'model'),
      device,
      sft_type: bits ? 'qlora' : method,
      ...(bits && { quant_bits: bits }),
      ...(method !== 'full' && { lora_rank: r, lora_alpha: alpha, target_modules: targets }),
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

async function timed(work) {
  const began = performance.now();
  const value = await work();
  return { value, seconds: (performance.now() - began) / 1000 };
}

const TASKS = {
  /** `quantization`: none, nf4 (with double quantisation) or int8. */
  async load({ quantization = 'none' }) {
    shape = JSON.parse(readFileSync(join(dir, 'shape.json'), 'utf8'));
    plans = viewPlans(shape);
    data = readSafetensors(join(dir, 'data.safetensors'));
    const { value, seconds } = await timed(() =>
      engine.call('load', { modelDir: join(dir, 'model'), device, dtype: 'bfloat16', quantization }),
    );
    const { parameters, weightBytes } = value.result;
    const { peakAllocated } = (await engine.call('stats', {})).result;
    return { seconds, parameters, weightBytes, peakAllocated };
  },

  async decode({ promptTokens, newTokens, warmup, repeats }) {
    const runs = [];
    let peak;
    for (let i = 0; i < warmup + repeats; i++) {
      const { samples, buffers } = rows(0, 1, promptTokens);
      const began = performance.now();
      const times = [];
      const out = await engine.call(
        'generate',
        { sample: samples[0], ...greedy(newTokens) },
        { buffers, onEvent: () => times.push(performance.now()) },
      );
      const ids = [...new Int32Array(out.buffers[out.result.tokenIds])];
      if (ids.length !== newTokens || times.length !== newTokens) throw new Error(`${ids.length} tokens came`);
      if (i < warmup) continue;
      runs.push({ first: (times[0] - began) / 1000, rate: ((newTokens - 1) * 1000) / (times.at(-1) - times[0]), ids });
      peak = (await engine.call('stats', {})).result;
    }
    return {
      firstTokenSeconds: runs.map(({ first }) => first),
      tokensPerSecond: runs.map(({ rate }) => rate),
      tokenIds: runs[0].ids,
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

  /** With a `method`: lora, nf4, int8 (LoRA on weights loaded that way) or full; else LoRA. `r` and `optim` in place of the shape's and AdamW. */
  async train(task) {
    await engine.call('emptyCache', {});
    const planned = task.method && (await plannedPeak(task));
    const { result: begun } = await engine.call('train.begin', begin(task));
    const seconds = [];
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
        if (step < task.warmup) continue;
        seconds.push(took);
        for (const key of Object.keys(peak)) peak[key] = Math.max(peak[key], result.memory[key]);
      }
    } finally {
      await engine.call('train.end', {});
    }
    if (!losses.every(Number.isFinite)) throw new Error(`losses are not finite: ${losses}`);
    return {
      seconds,
      losses,
      trainableParams: begun.trainableParams,
      ...(planned && { plannedPeak: planned }),
      ...peak,
    };
  },

  async gradients({ batch, file }) {
    await engine.call('train.begin', begin({ recompute: true }));
    const { samples, buffers } = rows(0, batch);
    const { result, buffers: out } = await engine.call('train.gradients', { microBatches: [samples] }, { buffers });
    writeFloat32(
      file,
      result.gradients.map(({ name, shape, buffer }) => ({ name, shape, data: new Float32Array(out[buffer]) })),
    );
    await engine.call('train.end', {});
    return { loss: result.loss, tensors: result.gradients.length };
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
