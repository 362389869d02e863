/** A given reference of a model's original code (../shared/reference), and what the native engine makes of its rows. */
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { JobBuffers } from '../../lib/api/samples.js';
import type { TrainBeginArgs } from '../../lib/native/binding.js';
import { Engine } from '../../lib/native/engine.js';
import { loadProcessor, type Processor } from '../../lib/processing/index.js';
import type { ChatMessage, EncodedSample, ProcessorOptions } from '../../lib/processing/types.js';
import { GREEDY } from './greedy.js';
import { type FixtureTensor, readSafetensors } from './safetensors.js';

const device = process.env.MARTLET_TEST_DEVICE ?? 'cpu';

export interface ReferenceRow {
  name: string;
  images: string[];
  messages: ChatMessage[];
}

export interface NamedGradients {
  loss: number;
  gradients: Map<string, Float32Array>;
}

export class Reference {
  readonly #files = new Map<string, Map<string, FixtureTensor>>();

  constructor(
    readonly dir: string,
    readonly rows: ReferenceRow[],
    readonly options: ProcessorOptions = {},
  ) {}

  row(name: string): ReferenceRow {
    const found = this.rows.find((row) => row.name === name);
    assert(found, `no row ${name}`);
    return found;
  }

  has(path: string): boolean {
    return existsSync(join(this.dir, path));
  }

  /** A tensor of `path`.safetensors. */
  tensor(path: string, name: string): FixtureTensor {
    let file = this.#files.get(path);
    if (!file) {
      file = readSafetensors(join(this.dir, `${path}.safetensors`));
      this.#files.set(path, file);
    }
    const found = file.get(name);
    assert(found, `${path} has no ${name}`);
    return found;
  }

  names(path: string): string[] {
    this.tensor(
      path,
      readSafetensors(join(this.dir, `${path}.safetensors`))
        .keys()
        .next().value as string,
    );
    return [...(this.#files.get(path) as Map<string, FixtureTensor>).keys()];
  }

  processor(modelDir = join(this.dir, 'model')): Promise<Processor> {
    return loadProcessor(modelDir, this.options);
  }

  async encode(name: string, purpose: 'train' | 'generate' = 'train'): Promise<EncodedSample> {
    const { messages, images } = this.row(name);
    return (await this.processor()).encode(
      {
        messages: purpose === 'train' ? messages : messages.slice(0, -1),
        images: images.map((image) => join(this.dir, image)),
        id: name,
      },
      { for: purpose },
    );
  }

  async open(modelDir = join(this.dir, 'model')): Promise<Engine> {
    const engine = new Engine();
    const { imageTokenId } = await this.processor(modelDir);
    await engine.call('load', { modelDir, device, dtype: 'float32', imageTokenId });
    return engine;
  }
}

/** Token ids alone, every one of them labelled. */
export function textSample(ids: ArrayLike<number>): EncodedSample {
  const inputIds = Int32Array.from(ids);
  return { inputIds, labels: inputIds, images: [] };
}

/** Logits of the places that predict labelled tokens, and their loss. */
export async function score(engine: Engine, sample: EncodedSample, adapter?: string) {
  const job = new JobBuffers();
  const args = { sample: job.sample(sample), logits: true, ...(adapter !== undefined && { adapter }) };
  const { result, buffers } = await engine.call('score', args, { buffers: job.buffers });
  assert(result.logits);
  return { loss: result.loss, logits: new Float32Array(buffers[result.logits.buffer] as ArrayBuffer) };
}

/** Rows of expected logits [L, vocabulary] that predict labelled tokens. */
export function labelledRows(
  { labels = new Int32Array() }: EncodedSample,
  { data, shape }: FixtureTensor,
): Float32Array {
  const vocabulary = shape[1] as number;
  const rows = [...labels].flatMap((label, i) => (i > 0 && label !== -100 ? [i - 1] : []));
  const out = new Float32Array(rows.length * vocabulary);
  for (const [i, row] of rows.entries())
    out.set(data.subarray(row * vocabulary, (row + 1) * vocabulary), i * vocabulary);
  return out;
}

export async function greedy(engine: Engine, sample: EncodedSample, maxNewTokens: number, adapter?: string) {
  const job = new JobBuffers();
  const { result, buffers } = await engine.call(
    'generate',
    { sample: job.sample(sample), maxNewTokens, ...GREEDY, ...(adapter !== undefined && { adapter }) },
    { buffers: job.buffers },
  );
  return Array.from(new Int32Array(buffers[result.tokenIds] as ArrayBuffer));
}

/** Holds a batch of them to what each gives alone; their answers are of different lengths. */
export async function assertBatchIsEachAlone(engine: Engine, samples: EncodedSample[]) {
  const job = new JobBuffers();
  const requests = samples.map((sample, i) => ({ sample: job.sample(sample), maxNewTokens: 24 - (i % 5), ...GREEDY }));
  const { result, buffers } = await engine.call('generate.batch', { requests }, { buffers: job.buffers });
  const answers = result.answers.map(({ tokenIds }) => [...new Int32Array(buffers[tokenIds] as ArrayBuffer)]);
  const alone = [];
  for (const [i, sample] of samples.entries()) alone.push(await greedy(engine, sample, 24 - (i % 5)));
  assert.deepEqual(answers, alone);
}

export async function gradients(engine: Engine, samples: EncodedSample[]): Promise<NamedGradients> {
  const job = new JobBuffers();
  const microBatches = [samples.map((sample) => job.sample(sample))];
  const { result, buffers } = await engine.call('train.gradients', { microBatches }, { buffers: job.buffers });
  return {
    loss: result.loss,
    gradients: new Map(
      result.gradients.map(({ name, buffer }) => [name, new Float32Array(buffers[buffer] as ArrayBuffer)]),
    ),
  };
}

export async function step(engine: Engine, samples: EncodedSample[]) {
  const job = new JobBuffers();
  const microBatches = [samples.map((sample) => job.sample(sample))];
  return (await engine.call('train.step', { microBatches }, { buffers: job.buffers })).result;
}

/** AdamW as the references use it: constant rate, no warm-up. */
export function trainArgs(changes: Partial<TrainBeginArgs>): TrainBeginArgs {
  return {
    method: 'lora',
    lora: { r: 8, alpha: 16, dropout: 0, useRslora: false, targetModules: 'all-linear' },
    freeze: { vision: true, projector: true, language: false },
    optimizer: { name: 'adamw', beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0.01 },
    schedule: { type: 'constant', warmupSteps: 0, totalSteps: 20 },
    learningRate: 1e-3,
    maxGradNorm: 1,
    recompute: 'none',
    seed: 42,
    deterministic: false,
    ...changes,
  };
}

export async function using<T>(engine: Promise<Engine>, body: (engine: Engine) => Promise<T>): Promise<T> {
  const opened = await engine;
  try {
    return await body(opened);
  } finally {
    await opened.close();
  }
}

/** Largest |a − b| as a share of the largest |b|. */
export function shareOfLargest(a: ArrayLike<number>, b: ArrayLike<number>): number {
  assert.equal(a.length, b.length, 'lengths differ');
  let worst = 0;
  let largest = 0;
  for (let i = 0; i < a.length; i++) {
    const distance = Math.abs((a[i] as number) - (b[i] as number));
    if (!(distance <= worst)) worst = distance; // a NaN sticks
    largest = Math.max(largest, Math.abs(b[i] as number));
  }
  return largest === 0 ? worst : worst / largest;
}
