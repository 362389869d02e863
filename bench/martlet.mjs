/**
 * martlet's side of the benchmark: the tasks of a plan one after another, through the engine that the public API uses.
 *
 *     node bench/martlet.mjs '{"dir": …, "device": "cuda", "tasks": [{"kind": "load"}, …]}'
 *
 * Each result is one JSON line on standard output; progress goes to standard error. A training step is timed from the call in JavaScript to its
 * result there: pictures arrive as RGB bytes and are normalised within the step.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Engine } from '../dist/lib/native/engine.js';

const MEAN = [0.48145466, 0.4578275, 0.40821073];
const STD = [0.26862954, 0.26130258, 0.27577711];

const plan = JSON.parse(process.argv[2]);
const say = (text) => console.error(`    martlet: ${text}`);
const data = readSafetensors(join(plan.dir, 'data.safetensors'));
const engine = new Engine();

/** Tensors of int32 and uint8 as typed arrays with their shape. */
function readSafetensors(path) {
  const bytes = readFileSync(path);
  const size = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, 8 + size).toString());
  const out = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    if (name === '__metadata__') continue;
    const [start, end] = data_offsets.map((offset) => 8 + size + offset);
    const copy = Uint8Array.from(bytes.subarray(start, end));
    out[name] = { shape, data: dtype === 'I32' ? new Int32Array(copy.buffer) : copy };
  }
  return out;
}

function writeFloat32(path, tensors) {
  const header = {};
  let end = 0;
  for (const { name, shape, data: values } of tensors) {
    header[name] = { dtype: 'F32', shape, data_offsets: [end, end + values.byteLength] };
    end += values.byteLength;
  }
  let text = JSON.stringify(header);
  text += ' '.repeat((8 - (text.length % 8)) % 8);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  const parts = tensors.map(({ data: values }) => Buffer.from(values.buffer, values.byteOffset, values.byteLength));
  writeFileSync(path, Buffer.concat([length, Buffer.from(text), ...parts]));
}

/** One micro-batch of `count` rows from row `first` on, with its buffers; `promptTokens` cuts rows and leaves the labels out. */
function rows(first, count, promptTokens) {
  const buffers = [];
  const [total, length] = data.ids.shape;
  const size = data.pictures.shape[1];
  const samples = Array.from({ length: count }, (_, i) => {
    const row = (first + i) % total;
    const part = (tensor, width) => tensor.data.subarray(row * width, (row + 1) * width);
    return {
      inputIds: buffers.push(part(data.ids, length).slice(0, promptTokens)) - 1,
      ...(promptTokens === undefined && { labels: buffers.push(part(data.labels, length).slice()) - 1 }),
      images: [
        {
          buffer: buffers.push(part(data.pictures, size * size * 3).slice()) - 1,
          width: size,
          height: size,
          plan: { rescale: 1 / 255, mean: MEAN, std: STD },
        },
      ],
      id: `row ${row}`,
    };
  });
  return { samples, buffers };
}

const begin = ({ recompute = false, adapterDir, seed = 42 }) => ({
  method: 'lora',
  lora: { r: 8, alpha: 16, dropout: 0, useRslora: false, targetModules: 'all-linear' },
  ...(adapterDir && { adapterDir }),
  freeze: { vision: true, projector: true, language: false },
  optimizer: { name: 'adamw', beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0.1 },
  schedule: { type: 'constant', warmupSteps: 0, totalSteps: 1000 },
  learningRate: 1e-4,
  maxGradNorm: 1,
  gradientCheckpointing: recompute,
  seed,
  deterministic: false,
});

async function timed(work) {
  const began = performance.now();
  const value = await work();
  return { value, seconds: (performance.now() - began) / 1000 };
}

const TASKS = {
  async load() {
    const { value, seconds } = await timed(() =>
      engine.call('load', { modelDir: join(plan.dir, 'model'), device: plan.device, dtype: 'bfloat16' }),
    );
    return { seconds, parameters: value.result.parameters };
  },

  async decode({ promptTokens, newTokens, warmup, repeats }) {
    const args = {
      maxNewTokens: newTokens,
      temperature: 0,
      topP: 1,
      topK: 0,
      repetitionPenalty: 1,
      seed: 0,
      stopTokenIds: [],
    };
    const runs = [];
    let peak;
    for (let i = 0; i < warmup + repeats; i++) {
      const { samples, buffers } = rows(0, 1, promptTokens);
      const began = performance.now();
      const times = [];
      const out = await engine.call(
        'generate',
        { sample: samples[0], ...args },
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

  async train(task) {
    await engine.call('emptyCache', {});
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
    return { seconds, losses, trainableParams: begun.trainableParams, ...peak };
  },

  async gradients({ batch, file }) {
    await engine.call('train.begin', begin({ recompute: true, adapterDir: join(plan.dir, 'adapter') }));
    const { samples, buffers } = rows(0, batch);
    const { result, buffers: out } = await engine.call(
      'train.gradients',
      { microBatches: [samples] },
      {
        buffers,
      },
    );
    writeFloat32(
      file,
      result.gradients.map(({ name, shape, buffer }) => ({ name, shape, data: new Float32Array(out[buffer]) })),
    );
    await engine.call('train.end', {});
    return { loss: result.loss, tensors: result.gradients.length };
  },
};

for (const task of plan.tasks) {
  say(JSON.stringify(task));
  let result;
  try {
    result = await TASKS[task.kind](task);
  } catch (error) {
    if (error.code !== 'ERR_MARTLET_OUT_OF_MEMORY') throw error;
    result = { error: 'out of memory', message: error.message };
  }
  console.log(JSON.stringify({ ...task, ...result }));
}
await engine.close();
