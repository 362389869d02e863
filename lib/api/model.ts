import { randomInt } from 'node:crypto';
import { join } from 'node:path';
import { MartletError } from '../errors.js';
import { exists, isDirectory } from '../files.js';
import { resolveModel } from '../hub/index.js';
import type { GenerateRequest, LoadResult, MemoryStats, Methods } from '../native/binding.js';
import { Engine } from '../native/engine.js';
import { type EncodedSample, loadProcessor, type ParsedBox, type Processor } from '../processing/index.js';
import { pickVisionOptions } from '../processing/vision-options.js';
import { abortedError, throwIfAborted } from './abort.js';
import { readAdapterArgs } from './adapter-args.js';
import { checkOptions } from './options.js';
import { JobBuffers } from './samples.js';
import { TokenText } from './stop-text.js';
import type {
  GenerateBatchOptions,
  GenerateOptions,
  GenerateResult,
  LoadModelOptions,
  Model,
  PrepareResult,
  PromptOptions,
  ScoreResult,
  StreamChunk,
} from './types.js';
import { visionCacheArgs } from './vision-cache.js';

const DEFAULT_MAX_NEW_TOKENS = 512;

/**
 * Loads a checkpoint folder (or a hub id) and its adapters onto one device, on a thread of its own.
 *
 * Rejects with `ERR_MARTLET_MODEL_NOT_FOUND`, `_UNSUPPORTED_MODEL`, `_WEIGHTS`, `_ADAPTER`, `_TOKENIZER`, `_CUDA_UNAVAILABLE`,
 * `_OUT_OF_MEMORY`, `_LIBTORCH_NOT_FOUND` or `_ABORTED`; nothing stays allocated then.
 */
export async function loadModel(dirOrId: string, options: LoadModelOptions = {}): Promise<Model> {
  checkOptions('loadModel', options);
  const { signal, onProgress } = options;
  throwIfAborted(signal);
  const { quantization = 'none' } = options;
  if (!['none', 'int8', 'nf4'].includes(quantization)) {
    throw new MartletError('ERR_MARTLET_USAGE', `quantization must be none, int8 or nf4, not ${quantization}.`, {
      field: 'quantization',
      value: quantization,
    });
  }
  const modelDir = await resolveModel(dirOrId, {
    ...(signal && { signal }),
    onProgress: ({ done, total, bytes }) => onProgress?.({ done, total, bytes }),
  });
  if (typeof options.adapters === 'string') {
    throw new MartletError(
      'ERR_MARTLET_USAGE',
      `adapters names each folder: { default: ${JSON.stringify(options.adapters)} }.`,
      {
        field: 'adapters',
      },
    );
  }
  const adapters = Object.entries(options.adapters ?? {});
  for (const [name, dir] of adapters) await checkAdapterDir(name, dir);
  const processors = new Processors(modelDir, options);
  const processor = await processors.of(adapters[0]?.[1] ?? modelDir);
  const own = new Map<string, Processor>();
  for (const [name, dir] of adapters) own.set(name, await processors.of(dir));

  const engine = new Engine();
  try {
    const { result: loaded } = await engine.call(
      'load',
      {
        modelDir,
        device: options.device ?? 'auto',
        dtype: options.dtype ?? 'auto',
        imageTokenId: processor.imageTokenId,
        quantization,
        ...visionCacheArgs({ mode: options.visionCache ?? 'memory', size: options.visionCacheSize ?? '1GB' }),
      },
      {
        signal,
        onEvent: (event) => onProgress?.(event as { done: number; total: number; bytes: number }),
      },
    );
    for (const [name, dir] of adapters) await engine.call('adapter.load', { name, dir }, { signal });
    // an abort that came too late for native code, such as one by the last onProgress
    throwIfAborted(signal);
    return new LoadedModel(engine, { processors, processor, adapters: own }, loaded);
  } catch (error) {
    await engine.close();
    throw abortedError(error, signal);
  }
}

/** Prompts and pictures as each adapter was trained: those of one template, system prompt and pixel limits share a processor. */
class Processors {
  readonly #modelDir: string;
  readonly #options: LoadModelOptions;
  readonly #loaded = new Map<string, Processor>();

  constructor(modelDir: string, options: LoadModelOptions) {
    this.#modelDir = modelDir;
    this.#options = options;
  }

  /** For an adapter's folder, or the model's own. What `loadModel` was told wins over its `args.yaml`. */
  async of(folder: string): Promise<Processor> {
    const saved = await readAdapterArgs(folder);
    const { template, labels, system, exifOrientation } = this.#options;
    const settings = {
      template: template ?? saved.template ?? 'default',
      labels: labels ?? 'default',
      system: system ?? saved.system,
      exifOrientation: exifOrientation ?? saved.exif_orientation ?? true,
      vision: pickVisionOptions(this.#options),
      savedVision: saved.vision,
    };
    const key = JSON.stringify(settings);
    const processor = this.#loaded.get(key) ?? (await loadProcessor(this.#modelDir, settings));
    this.#loaded.set(key, processor);
    return processor;
  }
}

interface ModelProcessors {
  processors: Processors;
  /** The first adapter's, else the model's own. */
  processor: Processor;
  adapters: Map<string, Processor>;
}

async function checkAdapterDir(name: string, dir: string): Promise<void> {
  if (!(await isDirectory(dir))) {
    throw new MartletError(
      'ERR_MARTLET_ADAPTER',
      `adapter '${name}': there is no folder ${dir}. Give the output_dir of a training run or one of its checkpoint-N folders.`,
      { adapter: name, path: dir },
    );
  }
  if (!(await exists(join(dir, 'adapter_config.json')))) {
    throw new MartletError(
      'ERR_MARTLET_ADAPTER',
      `adapter '${name}': ${dir} has no adapter_config.json. Give the output_dir of a training run or one of its checkpoint-N folders.`,
      { adapter: name, path: dir },
    );
  }
}

class LoadedModel implements Model {
  readonly modelType: string;
  readonly device: string;
  readonly dtype: Model['dtype'];
  readonly parameters: number;
  readonly #engine: Engine;
  readonly #processor: Processor;
  readonly #maxPositions: number;
  readonly #processors: Processors;
  readonly #adapters: Map<string, Processor>;
  /** Used when a call names no adapter. */
  readonly #defaultAdapter: string | undefined;
  #closing: Promise<void> | undefined;

  constructor(engine: Engine, { processors, processor, adapters }: ModelProcessors, loaded: LoadResult) {
    this.modelType = loaded.modelType;
    this.device = loaded.device;
    this.dtype = loaded.dtype;
    this.parameters = loaded.parameters;
    this.#engine = engine;
    this.#processor = processor;
    this.#maxPositions = loaded.maxPositions;
    this.#processors = processors;
    this.#adapters = adapters;
    this.#defaultAdapter = adapters.size === 1 ? [...adapters.keys()][0] : undefined;
  }

  get adapters(): string[] {
    return [...this.#adapters.keys()];
  }

  get disposed(): boolean {
    return this.#closing !== undefined;
  }

  async generate(options: GenerateOptions): Promise<GenerateResult> {
    checkOptions('generate', options);
    const generation = await this.#prepareGeneration(options);
    const stop = stopStrings(options.stop);
    if (stop.length === 0) {
      const run = await generation.start();
      const text = this.#processorOf(options.adapter).decode(run.tokenIds, decodeOptions(options));
      return generation.result(run.tokenIds, text, run.finishReason, run);
    }
    const text = new TokenText(this.#streamDecoder(options), stop);
    const chunks: StreamChunk[] = [];
    const run = await generation.start((id) => {
      chunks.push(...text.push(id));
      return !text.stopped;
    });
    chunks.push(...text.flush());
    return generation.result(
      Int32Array.from(chunks, (chunk) => chunk.tokenId),
      chunks.map((chunk) => chunk.text).join(''),
      text.stopped ? 'stop' : run.finishReason,
      run,
    );
  }

  async generateBatch(
    requests: Omit<GenerateOptions, 'adapter' | 'signal'>[],
    options: GenerateBatchOptions = {},
  ): Promise<GenerateResult[]> {
    const started = performance.now();
    if (!Array.isArray(requests)) {
      throw new MartletError('ERR_MARTLET_USAGE', `generateBatch takes a list of requests, not ${typeof requests}.`, {
        field: 'requests',
      });
    }
    checkOptions('generateBatch', options);
    for (const request of requests) checkOptions('a request of generateBatch', request);
    const { adapter: name, signal, onChunk } = options;
    const adapter = this.#adapter(name);
    if (requests.length === 0) return [];
    const job = new JobBuffers();
    const rows: BatchRow[] = [];
    for (const options of requests) {
      const stop = stopStrings(options.stop);
      rows.push({
        ...(await this.#request({ ...options, signal }, job)),
        options,
        text:
          onChunk || stop.length > 0
            ? new TokenText(this.#processor.createStreamDecoder(decodeOptions(options)), stop)
            : undefined,
        chunks: [] as StreamChunk[],
      });
    }
    const encoded = performance.now();
    const hear = (row: number, chunks: StreamChunk[]) => {
      rows[row]?.chunks.push(...chunks);
      for (const chunk of chunks) onChunk?.(row, chunk);
    };
    const left = new Uint8Array(rows.length);
    const { result, buffers } = await this.#call(
      'generate.batch',
      {
        requests: rows.map(({ request }) => request),
        left: job.add(left),
        ...(adapter !== undefined && { adapter }),
      },
      {
        buffers: job.buffers,
        signal,
        ...(rows.some(({ text }) => text) && {
          onEvent: (event) => {
            const { row, id } = event as { row: number; id: number };
            const text = rows[row]?.text;
            if (!text) return;
            hear(row, text.push(id));
            if (text.stopped) Atomics.store(left, row, 1);
          },
        }),
      },
    );
    return rows.map(({ promptTokens, options, text, chunks }, row) => {
      const answer = result.answers[row] as (typeof result.answers)[0];
      const facts = { started, encoded, promptTokens };
      const run = finished(answer, buffers);
      if (!text) {
        return generateResult(
          facts,
          run.tokenIds,
          this.#processor.decode(run.tokenIds, decodeOptions(options)),
          run.finishReason,
          run,
        );
      }
      hear(row, text.flush());
      return generateResult(
        facts,
        Int32Array.from(chunks, (chunk) => chunk.tokenId),
        chunks.map((chunk) => chunk.text).join(''),
        text.stopped ? 'stop' : run.finishReason,
        run,
      );
    });
  }

  async *stream(options: GenerateOptions): AsyncGenerator<StreamChunk, undefined> {
    checkOptions('stream', options);
    const generation = await this.#prepareGeneration(options);
    const text = new TokenText(this.#streamDecoder(options), stopStrings(options.stop));
    const ready: StreamChunk[] = [];
    let left = false;
    let wake = () => {};
    let ended = false;
    const run = generation
      .start((id) => {
        ready.push(...text.push(id));
        wake();
        return !left && !text.stopped;
      })
      .finally(() => {
        ended = true;
        wake();
      });
    run.catch(() => {}); // awaited below; until then a failure must not count as unhandled
    try {
      while (!ended || ready.length > 0) {
        const chunk = ready.shift();
        if (chunk) yield chunk;
        else
          await new Promise<void>((resolve) => {
            wake = resolve;
            if (ended || ready.length > 0) resolve();
          });
      }
      await run;
      yield* text.flush();
    } finally {
      left = true;
      generation.cancel();
      await run.catch(() => {});
    }
    return undefined;
  }

  async score(options: PromptOptions & { logits?: boolean }): Promise<ScoreResult> {
    checkOptions('score', options);
    const adapter = this.#adapter(options.adapter);
    const sample = await this.#encode(options, 'train');
    const labels = sample.labels as Int32Array;
    this.#checkLength(sample.inputIds.length - 1, 'the row');
    const job = new JobBuffers();
    const { result, buffers } = await this.#call(
      'score',
      { sample: job.sample(sample), ...(adapter !== undefined && { adapter }), logits: options.logits === true },
      { buffers: job.buffers, signal: options.signal },
    );
    return {
      inputIds: sample.inputIds,
      labels,
      logprobs: new Float32Array(buffers[result.logprobs] as ArrayBuffer),
      loss: result.loss,
      ...(result.logits && {
        logits: {
          data: new Float32Array(buffers[result.logits.buffer] as ArrayBuffer),
          shape: result.logits.shape,
        },
      }),
    };
  }

  async prepare(options: PromptOptions & { for?: 'train' | 'generate' }): Promise<PrepareResult> {
    checkOptions('prepare', options);
    const { for: purpose = 'generate' } = options;
    if (purpose !== 'train' && purpose !== 'generate') {
      throw new MartletError('ERR_MARTLET_USAGE', `for must be train or generate, not ${String(purpose)}.`, {
        field: 'for',
        value: purpose,
      });
    }
    const sample = await this.#encode(options, purpose);
    const job = new JobBuffers();
    const images = sample.images.map((image) => job.image(image));
    const pixels: PrepareResult['pixels'] = {};
    if (images.length > 0) {
      const { result, buffers } = await this.#call(
        'preprocess',
        { images },
        { buffers: job.buffers, signal: options.signal },
      );
      const patched = images.some(({ plan }) => plan.patches !== undefined && !plan.patches.sideBySide);
      const names = new Set(result.pixels.map(({ name }) => name));
      for (const name of names) {
        const parts = result.pixels
          .filter((pixel) => pixel.name === name)
          .map(({ shape, buffer }) => ({ data: new Float32Array(buffers[buffer] as ArrayBuffer), shape }));
        Object.assign(pixels, (patched || name !== 'pixel_values' ? concatenate : stack)(name, parts));
      }
      const seconds = images.flatMap(({ secondsPerGrid }) => secondsPerGrid ?? []);
      if (seconds.length > 0) pixels.second_per_grid_ts = { data: Float32Array.from(seconds), shape: [seconds.length] };
    }
    return { inputIds: sample.inputIds, ...(sample.labels && { labels: sample.labels }), pixels };
  }

  parseBoxes(answer: string | ArrayLike<number>, picture: Parameters<Model['parseBoxes']>[1]): ParsedBox[] {
    checkOptions('model.parseBoxes', picture);
    const { width, height, adapter, ...limits } = picture;
    const processor = this.#processorOf(adapter);
    const text = typeof answer === 'string' ? answer : processor.decode(answer, { skipSpecialTokens: false });
    return processor.parseBoxes(text, { width, height, vision: pickVisionOptions(limits) });
  }

  async loadAdapter(name: string, dir: string): Promise<void> {
    this.#checkOpen();
    if (this.#adapters.has(name)) {
      throw new MartletError('ERR_MARTLET_ADAPTER', `an adapter named '${name}' is loaded already: unload it first.`, {
        adapter: name,
      });
    }
    await checkAdapterDir(name, dir);
    const processor = await this.#processors.of(dir);
    await this.#call('adapter.load', { name, dir });
    this.#adapters.set(name, processor);
  }

  async unloadAdapter(name: string): Promise<void> {
    this.#checkOpen();
    this.#checkAdapterName(name);
    await this.#call('adapter.unload', { name });
    this.#adapters.delete(name);
  }

  async memory(): Promise<MemoryStats> {
    this.#checkOpen();
    return (await this.#call('stats', {})).result;
  }

  dispose(): Promise<void> {
    this.#closing ??= this.#engine.close();
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  async #prepareGeneration(options: GenerateOptions): Promise<Generation> {
    const started = performance.now();
    const adapter = this.#adapter(options.adapter);
    const job = new JobBuffers();
    const { request, promptTokens } = await this.#request(options, job);
    const args = { ...request, ...(adapter !== undefined && { adapter }) };
    return new Generation(
      (signal, onEvent) => this.#call('generate', args, { buffers: job.buffers, signal, onEvent }),
      { started, encoded: performance.now(), promptTokens },
      options.signal,
    );
  }

  /** What native code is asked for one answer; its tensors are added to the job. */
  async #request(
    options: Omit<GenerateOptions, 'adapter'>,
    job: JobBuffers,
  ): Promise<{ request: GenerateRequest; promptTokens: number }> {
    const defaults = this.#processor.generationDefaults;
    const settings = {
      maxNewTokens: options.maxNewTokens ?? defaults.maxNewTokens ?? DEFAULT_MAX_NEW_TOKENS,
      temperature: options.temperature ?? defaults.temperature ?? 0,
      topP: options.topP ?? defaults.topP ?? 1,
      topK: options.topK ?? defaults.topK ?? 0,
      repetitionPenalty: options.repetitionPenalty ?? defaults.repetitionPenalty ?? 1,
      seed: options.seed ?? randomInt(2 ** 32),
    };
    checkSettings(settings);
    const sample = await this.#encode(options, 'generate');
    this.#checkLength(sample.inputIds.length, 'the prompt');
    const room = this.#maxPositions - sample.inputIds.length;
    return {
      promptTokens: sample.inputIds.length,
      request: {
        ...settings,
        maxNewTokens: this.#maxPositions > 0 ? Math.min(settings.maxNewTokens, room) : settings.maxNewTokens,
        sample: job.sample(sample),
        stopTokenIds: this.#processor.stopTokenIds,
      },
    };
  }

  /** Positions are left for one more token, or none is needed: `tokens` leaves a row's last one out. */
  #checkLength(tokens: number, what: 'the prompt' | 'the row'): void {
    if (this.#maxPositions <= 0 || tokens < this.#maxPositions) return;
    const promptTokens = what === 'the row' ? tokens + 1 : tokens;
    throw new MartletError(
      'ERR_MARTLET_USAGE',
      `${what} has ${promptTokens} tokens (image tokens included), the model takes ${this.#maxPositions}: shorten the text or use fewer images.`,
      { promptTokens, maxPositions: this.#maxPositions },
    );
  }

  async #encode(options: PromptOptions, purpose: 'train' | 'generate'): Promise<EncodedSample> {
    this.#checkOpen();
    const { messages, id, images = [], videos, objects, signal } = options;
    throwIfAborted(signal);
    try {
      return await this.#processorOf(options.adapter).encode(
        {
          messages,
          ...(id !== undefined && { id: String(id) }),
          images,
          videos,
          objects,
          vision: pickVisionOptions(options),
        },
        { for: purpose, signal },
      );
    } catch (error) {
      throw abortedError(error, options.signal);
    }
  }

  async #call<M extends keyof Methods>(
    method: M,
    args: Methods[M][0],
    options: { buffers?: ArrayBufferView[]; signal?: AbortSignal; onEvent?: (event: unknown) => void } = {},
  ): Promise<{ result: Methods[M][1]; buffers: ArrayBuffer[] }> {
    this.#checkOpen();
    try {
      return await this.#engine.call(method, args, options);
    } catch (error) {
      // dispose() cancels what runs: the caller should hear of the disposal, not of an abort that it never asked for
      if (this.disposed && !options.signal?.aborted) throw disposedError(error);
      throw abortedError(error, options.signal);
    }
  }

  /** An adapter is asked as it was trained; the base as the first adapter, or as its own folder says. */
  #processorOf(adapter: string | null | undefined): Processor {
    const name = this.#adapter(adapter);
    return (name === undefined ? undefined : this.#adapters.get(name)) ?? this.#processor;
  }

  #streamDecoder(options: GenerateOptions) {
    return this.#processorOf(options.adapter).createStreamDecoder(decodeOptions(options));
  }

  #adapter(name: string | null | undefined): string | undefined {
    this.#checkOpen();
    if (name === null) return undefined;
    if (name === undefined) {
      return this.#defaultAdapter !== undefined && this.#adapters.has(this.#defaultAdapter)
        ? this.#defaultAdapter
        : undefined;
    }
    this.#checkAdapterName(name);
    return name;
  }

  #checkAdapterName(name: string): void {
    if (this.#adapters.has(name)) return;
    const loaded = this.#adapters.size === 0 ? 'none is' : `loaded: ${this.adapters.join(', ')}`;
    throw new MartletError('ERR_MARTLET_ADAPTER', `no adapter named '${name}' is loaded (${loaded}).`, {
      adapter: name,
      loaded: this.adapters,
    });
  }

  #checkOpen(): void {
    if (this.disposed) throw disposedError();
  }
}

/** Patches and grids of all pictures, one after the other along the first dimension, as transformers' processors give them. */
function concatenate(name: string, parts: { data: Float32Array; shape: number[] }[]): PrepareResult['pixels'] {
  const [, ...inner] = (parts[0] as (typeof parts)[0]).shape;
  const data = new Float32Array(parts.reduce((sum, part) => sum + part.data.length, 0));
  let offset = 0;
  for (const part of parts) {
    data.set(part.data, offset);
    offset += part.data.length;
  }
  return { [name]: { data, shape: [parts.reduce((sum, { shape }) => sum + (shape[0] as number), 0), ...inner] } };
}

/** Tensors of one size become one with a leading dimension; of several sizes, `name.0`, `name.1`, …. */
function stack(name: string, parts: { data: Float32Array; shape: number[] }[]): PrepareResult['pixels'] {
  const [first, ...rest] = parts as [(typeof parts)[0], ...typeof parts];
  if (rest.some(({ shape }) => shape.join() !== first.shape.join())) {
    return Object.fromEntries(parts.map((part, i) => [`${name}.${i}`, part]));
  }
  const data = new Float32Array(parts.length * first.data.length);
  for (const [i, part] of parts.entries()) data.set(part.data, i * first.data.length);
  return { [name]: { data, shape: [parts.length, ...first.shape] } };
}

function disposedError(cause?: unknown): MartletError {
  return new MartletError(
    'ERR_MARTLET_DISPOSED',
    'the model was disposed: load it again with loadModel().',
    {},
    { cause },
  );
}

function decodeOptions({ skipSpecialTokens = true }: Pick<GenerateOptions, 'skipSpecialTokens'>): {
  skipSpecialTokens: boolean;
} {
  return { skipSpecialTokens };
}

function stopStrings(stop: string | string[] | undefined): string[] {
  const list = stop === undefined ? [] : Array.isArray(stop) ? stop : [stop];
  if (list.some((text) => typeof text !== 'string' || text === '')) {
    throw new MartletError('ERR_MARTLET_USAGE', 'stop must be a string or a list of strings, none of them empty.', {
      field: 'stop',
    });
  }
  return list;
}

type Settings = Record<'maxNewTokens' | 'temperature' | 'topP' | 'topK' | 'repetitionPenalty' | 'seed', number>;

function checkSettings(settings: Settings): void {
  const rules: Record<keyof Settings, [(value: number) => boolean, string]> = {
    maxNewTokens: [(v) => Number.isInteger(v) && v >= 1, 'a whole number of at least 1'],
    temperature: [(v) => Number.isFinite(v) && v >= 0, 'a number of at least 0 (0 = greedy)'],
    topP: [(v) => v > 0 && v <= 1, 'a number above 0 and at most 1'],
    topK: [(v) => Number.isInteger(v) && v >= 0, 'a whole number of at least 0 (0 = off)'],
    repetitionPenalty: [(v) => Number.isFinite(v) && v > 0, 'a number above 0 (1 = off)'],
    seed: [(v) => Number.isSafeInteger(v) && v >= 0, 'a whole number of at least 0'],
  };
  for (const [field, [holds, expected]] of Object.entries(rules) as [
    keyof Settings,
    [(v: number) => boolean, string],
  ][]) {
    const value = settings[field];
    if (typeof value !== 'number' || !holds(value)) {
      throw new MartletError('ERR_MARTLET_USAGE', `${field} must be ${expected}, not ${String(value)}.`, {
        field,
        value,
      });
    }
  }
}

interface BatchRow {
  request: GenerateRequest;
  promptTokens: number;
  options: Omit<GenerateOptions, 'adapter' | 'signal'>;
  /** Absent: nobody listens, nothing stops it. */
  text: TokenText | undefined;
  chunks: StreamChunk[];
}

interface FinishedGeneration {
  tokenIds: Int32Array;
  finishReason: GenerateResult['finishReason'];
  /** Milliseconds. */
  vision: number;
  prefill: number;
  decode: number;
}

type NativeGenerate = (
  signal: AbortSignal,
  onEvent: ((event: unknown) => void) | undefined,
) => Promise<{ result: Methods['generate'][1]; buffers: ArrayBuffer[] }>;

interface GenerationFacts {
  /** performance.now() when the call came in, and when its prompt was encoded. */
  started: number;
  encoded: number;
  promptTokens: number;
}

function finished(result: Methods['generate'][1], buffers: ArrayBuffer[]): FinishedGeneration {
  return {
    tokenIds: new Int32Array(buffers[result.tokenIds] as ArrayBuffer),
    finishReason: result.finishReason,
    vision: result.timings.visionMs,
    prefill: result.timings.prefillMs,
    decode: result.timings.decodeMs,
  };
}

function generateResult(
  { promptTokens, started, encoded }: GenerationFacts,
  tokenIds: Int32Array,
  text: string,
  finishReason: GenerateResult['finishReason'],
  run: FinishedGeneration,
): GenerateResult {
  const completionTokens = tokenIds.length;
  return {
    text,
    tokenIds,
    promptTokens,
    finishReason,
    usage: { promptTokens, completionTokens, totalTokens: promptTokens + completionTokens },
    timings: {
      preprocess: encoded - started,
      vision: run.vision,
      prefill: run.prefill,
      decode: run.decode,
      total: performance.now() - started,
    },
  };
}

/** One native generation that can be ended from here, by a stop string or by leaving the stream. */
class Generation {
  readonly #native: NativeGenerate;
  readonly #facts: GenerationFacts;
  /** The caller's. */
  readonly #signal: AbortSignal | undefined;
  readonly #enough = new AbortController();

  constructor(native: NativeGenerate, facts: GenerationFacts, signal: AbortSignal | undefined) {
    this.#native = native;
    this.#facts = facts;
    this.#signal = signal;
  }

  cancel(): void {
    this.#enough.abort();
  }

  /** Runs it; generation ends as soon as `onToken` returns false. */
  async start(onToken?: (id: number) => boolean): Promise<FinishedGeneration> {
    const user = this.#signal;
    const signal = user ? AbortSignal.any([user, this.#enough.signal]) : this.#enough.signal;
    const began = performance.now();
    const ids: number[] = [];
    let firstToken = began;
    try {
      const { result, buffers } = await this.#native(
        signal,
        onToken &&
          ((event) => {
            const { id } = event as { id: number };
            if (ids.length === 0) firstToken = performance.now();
            ids.push(id);
            if (!this.#enough.signal.aborted && !onToken(id)) this.cancel();
          }),
      );
      return finished(result, buffers);
    } catch (error) {
      if (!this.#enough.signal.aborted || user?.aborted) throw error;
      // ended from here: the native job gave no timings, so the vision part counts as prefill
      return {
        tokenIds: Int32Array.from(ids),
        finishReason: 'stop',
        vision: 0,
        prefill: firstToken - began,
        decode: performance.now() - firstToken,
      };
    }
  }

  result(
    tokenIds: Int32Array,
    text: string,
    finishReason: GenerateResult['finishReason'],
    run: FinishedGeneration,
  ): GenerateResult {
    return generateResult(this.#facts, tokenIds, text, finishReason, run);
  }
}
