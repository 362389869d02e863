/**
 * The typed surface of the native addon. The addon itself knows one thing only: an engine (a thread with a job queue) that takes
 * `(method, arguments as JSON, buffers)` and gives back `(result as JSON, buffers)`. This file says which methods there are.
 * The C++ side of each is `native/core/session.cpp`.
 */

/** The raw addon (`martlet.node`). Everything else in martlet talks to it through `lib/native/engine.ts`. */
export interface Addon {
  /** The libtorch version the addon was compiled against, e.g. `2.13.0`. */
  readonly compiledTorchVersion: string;
  /** Loads CUDA libraries if they are beside libtorch (before the first question about CUDA), sets thread counts. Call once a process. */
  initialize(options: { libtorchLib: string; cuda: boolean; threads: number }): void;
  /** JSON of {@link SystemInfo}. */
  systemInfo(): string;
  Engine: new () => RawEngine;
}

export interface RawEngine {
  /**
   * Queues a job. `buffers` are borrowed until the job ends. `onEvent` receives JSON strings on the main thread.
   * The promise rejects with an Error that has `code` and `details` (JSON string).
   */
  submit(
    method: string,
    args: string,
    buffers: ArrayBufferView[],
    onEvent?: (event: string) => void,
  ): { promise: Promise<{ result: string; buffers: ArrayBuffer[] }>; cancel: () => void };
  /** Cancels what is queued or running, waits for the thread, frees everything. Idempotent. */
  close(): Promise<void>;
}

export interface DeviceInfo {
  name: string; // 'cpu' | 'cuda:0' | …
  description: string;
  totalMemory: number; // bytes
  freeMemory: number; // bytes
}

export interface SystemInfo {
  torchVersion: string; // of the library loaded
  compiledTorchVersion: string;
  cudaAvailable: boolean;
  cudaError?: string; // why the CUDA libraries beside libtorch could not be loaded
  devices: DeviceInfo[];
  threads: number;
  cpuCapability: string; // 'AVX512' | 'AVX2' | 'DEFAULT'
}

/** What native code does to one decoded picture, in this order. Sizes are computed by `lib/processing/<family>.ts`. */
export interface ImagePlan {
  /** `torchvision`: antialiased bicubic on uint8 as torchvision and transformers 5's fast processors do; `pillow`: bit-equal to Pillow. */
  resize?: { height: number; width: number; backend: 'torchvision' | 'pillow' };
  /** In pixels of the resized picture; what lies outside it is zero. */
  crop?: { top: number; left: number; height: number; width: number };
  /** Applied as (x − mean/rescale) / (std/rescale), in float32 (transformers 5's fused form). */
  rescale: number;
  /**
   * Cut into patches, [grid.t · grid.h · grid.w, 3 · temporal · size · size], `merge`² neighbours one after the other (Qwen2-VL's order); a
   * last temporal patch that is not full repeats its last frame. `sideBySide`: one after the other to the right instead, [3, size, size · patches]
   * (MiniCPM-V's; what the network is fed is the same). Absent: one [3, H, W].
   */
  patches?: { size: number; temporal: number; merge: number; sideBySide?: boolean };
  mean: [number, number, number];
  std: [number, number, number];
}

/** One decoded picture or video: `buffer` is an index into the job's buffers: RGB, uint8, frames × height × width × 3. */
export interface ImageArg {
  buffer: number;
  width: number;
  height: number;
  /** Present = a video of this many frames (1 or more): its features go to video tokens, not to image tokens. */
  frames?: number;
  /** Seconds between two temporal patches, where the family's positions use it. */
  secondsPerGrid?: number;
  plan: ImagePlan;
}

/** One row: `inputIds` and `labels` are indices of Int32Array buffers of one length; image tokens are expanded already. */
export interface SampleArg {
  inputIds: number;
  /** −100 = not trained. Absent for generation. */
  labels?: number;
  images: ImageArg[];
  /** Names the row in messages (`train.json row 17`). */
  id?: string;
}

export type Dtype = 'float32' | 'bfloat16' | 'float16';

export interface LoadArgs {
  modelDir: string;
  /** 'auto' | 'cpu' | 'cuda' | 'cuda:N' */
  device: string;
  /** 'auto' = the checkpoint's own dtype on CUDA; on the CPU too (bfloat16 is computed in bfloat16). */
  dtype: 'auto' | Dtype;
  /** The id that marks a picture's places, for families whose config.json does not say it. */
  imageTokenId?: number;
}

export interface LoadResult {
  modelType: string;
  family: string;
  device: string;
  dtype: Dtype;
  parameters: number;
  vocabSize: number;
  maxPositions: number;
  /** id of the token that marks image positions */
  imageTokenId: number;
  seconds: number;
}

export interface LoraArgs {
  r: number;
  alpha: number;
  dropout: number;
  useRslora: boolean;
  /** Names or suffixes; or one regular expression (full match on the module path); or 'all-linear'. */
  targetModules: string[] | string;
}

export interface TrainBeginArgs {
  method: 'lora' | 'full';
  lora?: LoraArgs;
  /** Start from this PEFT adapter instead of fresh A/B matrices. */
  adapterDir?: string;
  freeze: { vision: boolean; projector: boolean; language: boolean };
  optimizer: { name: 'adamw'; beta1: number; beta2: number; epsilon: number; weightDecay: number };
  schedule: {
    type: 'linear' | 'cosine' | 'constant' | 'constant_with_warmup';
    warmupSteps: number;
    totalSteps: number;
  };
  learningRate: number;
  /** 0 = no clipping */
  maxGradNorm: number;
  /** Recompute each layer in the backward pass instead of keeping its activations. */
  gradientCheckpointing: boolean;
  seed: number;
  deterministic: boolean;
}

export interface TrainBeginResult {
  trainableParams: number;
  totalParams: number;
  /** trainable parameters by part */
  parts: { vision: number; projector: number; language: number };
  /** module paths that got a LoRA pair */
  targets: string[];
  /** entries of targetModules that matched nothing, with the nearest names */
  unmatched: { name: string; nearest: string[] }[];
  /** things the user should know (a freeze flag that won over an explicit target, …) */
  warnings: string[];
}

export interface TrainStepArgs {
  /** The loss is the sum over labelled tokens of all micro-batches divided by their count; each micro-batch is packed into one sequence. */
  microBatches: SampleArg[][];
}

export interface TrainStepResult {
  step: number; // from 1
  loss: number;
  gradNorm: number; // before clipping
  learningRate: number; // used in this step
  tokens: number;
  labelledTokens: number;
  correctTokens: number; // labelled tokens predicted right
  seconds: number;
  memory: MemoryStats;
}

export interface MemoryStats {
  /** device memory in tensors now / at most; on the CPU the process's resident set */
  allocated: number;
  peakAllocated: number;
  reserved: number;
  peakReserved: number;
}

export interface EvalResult {
  loss: number;
  labelledTokens: number;
  correctTokens: number;
}

export interface GenerateArgs {
  sample: SampleArg;
  maxNewTokens: number;
  /** 0 = greedy */
  temperature: number;
  topP: number;
  /** 0 = off */
  topK: number;
  repetitionPenalty: number;
  seed: number;
  stopTokenIds: number[];
  /** name of a loaded adapter; absent = base model */
  adapter?: string;
}

export interface GenerateResult {
  /** buffer index: Int32Array, without the stop token */
  tokenIds: number;
  promptTokens: number;
  finishReason: 'stop' | 'length' | 'abort';
  timings: { visionMs: number; prefillMs: number; decodeMs: number };
}

export interface MergeArgs {
  modelDir: string;
  adapterDir: string;
  outputDir: string; // exists, empty: native code writes weight shards and the index into it
  dtype?: Dtype; // absent = as stored
  maxShardSize: number; // bytes
}

export interface MergeResult {
  shards: string[];
  mergedTensors: number;
  /** largest |stored − exact float64 sum| over all merged elements */
  maxAbsError: number;
}

export interface ConvertArgs {
  modelDir: string;
  outputDir: string; // exists, empty: native code writes weight shards and the index into it
  dtype?: Dtype; // absent = as stored
  maxShardSize: number; // bytes
}

/** Method name → [arguments, result]. Progress events are given beside each. */
export interface Methods {
  /** events: {type:'load', done, total, bytes} */
  load: [LoadArgs, LoadResult];
  'adapter.load': [{ name: string; dir: string }, { r: number; alpha: number; parameters: number; targets: number }];
  'adapter.unload': [{ name: string }, Record<string, never>];
  preprocess: [{ images: ImageArg[] }, { pixels: { name: string; shape: number[]; buffer: number }[] }];
  /** events: {type:'token', id} */
  generate: [GenerateArgs, GenerateResult];
  score: [
    { sample: SampleArg; adapter?: string; logits?: boolean },
    { loss: number; logprobs: number; logits?: { buffer: number; shape: number[] } },
  ];
  'train.begin': [TrainBeginArgs, TrainBeginResult];
  /** events: {type:'micro', done, total} */
  'train.step': [TrainStepArgs, TrainStepResult];
  'train.evaluate': [TrainStepArgs, EvalResult];
  /** Gradients of one batch without an update, for tests: buffers in the order of `names`. */
  'train.gradients': [TrainStepArgs, { loss: number; gradients: { name: string; shape: number[]; buffer: number }[] }];
  /** LoRA: adapter_config.json + adapter_model.safetensors. Full: model shards + index. Each file is written under a temporary name, fsynced, renamed. */
  'train.save': [{ dir: string; baseModel: string; maxShardSize: number }, { files: string[] }];
  /** Optimiser moments, master weights, step, schedule and random state in `optimizer.safetensors`. */
  'train.saveState': [{ dir: string }, { files: string[] }];
  'train.loadState': [{ dir: string }, { step: number }];
  /** Frees optimiser and gradients; the trained adapter stays loaded under this name if given. */
  'train.end': [{ keepAs?: string }, Record<string, never>];
  /** events: {type:'merge', done, total} */
  merge: [MergeArgs, MergeResult];
  /** events: {type:'convert', done, total} */
  convert: [ConvertArgs, { shards: string[]; tensors: number }];
  stats: [Record<string, never>, MemoryStats];
  emptyCache: [Record<string, never>, Record<string, never>];
  /** For tests only: keeps the engine busy for `ms`, honouring cancellation. */
  sleep: [{ ms: number }, Record<string, never>];
}
