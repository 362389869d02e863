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
  initialize(options: { libtorchLib: string; cuda: boolean; threads: number; threadsBesideGpu: number }): void;
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
  /** Where there is a CUDA device: whether martlet's own kernels are used, else ATen's operations; and why they are not. */
  cudaKernels?: boolean;
  cudaKernelsError?: string;
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
  /** Hexadecimal; equal only for equal pixels and plans. The features of pictures with a key are kept (`LoadArgs.visionCache`). */
  key?: string;
}

/**
 * One row: `inputIds` and `labels` are indices of Int32Array buffers of one length; image tokens are expanded already. An encoder-decoder's `labels`
 * are its decoder's: of their own length, nothing shifted.
 */
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
  /** Of the language model's linears, as they are read. Defaults to none. */
  quantization?: Quantization;
  /** nf4: scales in 8 bits too. Defaults to true. */
  doubleQuantization?: boolean;
  /** Keeps what pictures become in front of the language model, where no part of that is trained or adapted: in memory, or in files below `dir`. */
  visionCache?: { bytes: number; dir?: string };
  /** The id that marks a picture's places, for families whose config.json does not say it. */
  imageTokenId?: number;
}

/** `fp8`: ERR_MARTLET_CONFIG except in bfloat16 on a GPU from Hopper on. */
export type Quantization = 'none' | 'int8' | 'nf4' | 'fp8';

export interface LoadResult {
  modelType: string;
  family: string;
  device: string;
  dtype: Dtype;
  parameters: number;
  /** bytes of all weights as they are kept */
  weightBytes: number;
  /** `stored`: the checkpoint itself is quantised */
  quantization: Quantization | 'stored';
  vocabSize: number;
  /** 0 = no limit */
  maxPositions: number;
  /** id of the token that marks image positions */
  imageTokenId: number;
  warnings: string[];
  seconds: number;
}

export interface LoraArgs {
  r: number;
  alpha: number;
  dropout: number;
  useRslora: boolean;
  useDora?: boolean;
  /** Biases of the base model that are trained too. Defaults to none. */
  bias?: 'none' | 'all' | 'lora_only';
  /** true | false | gaussian | pissa | pissa_niter_N. Defaults to true. */
  initWeights?: string;
  /** Of the pairs; null = computed in the model's dtype, saved in float32. */
  dtype?: Dtype | null;
  /** Modules that are trained as a whole: names or endings, all-embedding, all-norm. */
  modulesToSave?: string[];
  /** Train vision tower and projector as a whole too (ms-swift's lora_llm). */
  fullVisionAndProjector?: boolean;
  /** Names or suffixes; or one regular expression (full match on the module path); or 'all-linear'. */
  targetModules: string[] | string;
}

/** What the backward pass computes again: nothing, norms and elementwise products, the MLP, the whole layer. */
export type Recompute = 'none' | 'cheap' | 'mlp' | 'layer';

export interface TrainBeginArgs {
  method: 'lora' | 'full';
  lora?: LoraArgs;
  /** Start from this PEFT adapter instead of fresh A/B matrices. */
  adapterDir?: string;
  freeze: { vision: boolean; projector: boolean; language: boolean };
  /** Beginnings of parameter names, and regular expressions ('' = none). trainable wins; the frozen ones are for `full`. */
  parameters?: {
    trainable: string[];
    trainableRegex: string;
    frozen: string[];
    frozenRegex: string;
    frozenRatio: number;
  };
  optimizer: {
    name: 'adamw' | 'adamw_8bit' | 'sgd' | 'adafactor';
    /** AdamW's moments in pinned host memory. */
    paged?: boolean;
    beta1: number;
    beta2: number;
    epsilon: number;
    weightDecay: number;
    /** sgd */
    momentum?: number;
    nesterov?: boolean;
  };
  schedule: {
    type:
      | 'linear'
      | 'cosine'
      | 'cosine_with_restarts'
      | 'cosine_with_min_lr'
      | 'constant'
      | 'constant_with_warmup'
      | 'polynomial'
      | 'inverse_sqrt';
    warmupSteps: number;
    totalSteps: number;
    numCycles?: number;
    timescale?: number;
    /** Shares of the base rate: cosine_with_min_lr's lowest, polynomial's last. */
    minLrRate?: number;
    endRate?: number;
    power?: number;
  };
  learningRate: number;
  /** Of one part; null = learningRate. */
  vitLearningRate?: number | null;
  alignerLearningRate?: number | null;
  /** LoRA+: rate of B over rate of A. */
  loraPlusRatio?: number | null;
  /** 0 = no clipping */
  maxGradNorm: number;
  /** In place of the dropouts that the model itself has; null = config.json's. LoRA's is apart. Above 0 where it has none: ERR_MARTLET_CONFIG. */
  dropout?: number | null;
  neftuneNoiseAlpha?: number;
  labelSmoothing?: number;
  recompute: Recompute;
  /** Layers of a vision tower that is trained. Defaults to whether anything is recomputed. */
  visionRecompute?: boolean;
  seed: number;
  deterministic: boolean;
  tf32?: boolean;
}

export interface TrainBeginResult {
  trainableParams: number;
  totalParams: number;
  /** trainable parameters by part */
  parts: { vision: number; projector: number; language: number };
  /** of the optimiser */
  groups: { learningRate: number; weightDecay: number }[];
  /** module paths that got a LoRA pair */
  targets: string[];
  /** entries of targetModules that matched nothing, with the nearest names */
  unmatched: { name: string; nearest: string[] }[];
  /** things the user should know (a freeze flag that won over an explicit target, …) */
  warnings: string[];
}

export interface TrainStepArgs {
  /** Number of the step from 1; dropout and noise follow from it. Defaults to the one after the last. */
  step?: number;
  /** The loss is the sum over labelled tokens of all micro-batches divided by their count; each micro-batch is packed into one sequence. */
  microBatches: SampleArg[][];
}

export interface TrainStepResult {
  step: number; // from 1
  loss: number;
  gradNorm: number; // before clipping
  learningRate: number; // used in this step
  overflow: boolean; // float16: the scaled gradients were not finite, nothing was updated
  lossScale: number; // 1 unless float16
  tokens: number;
  labelledTokens: number;
  correctTokens: number; // labelled tokens predicted right
  seconds: number;
  memory: MemoryStats;
  /** CUDA only */
  modelFlopUtilisation?: number;
  visionCache?: VisionCacheCounts;
}

/** Of a loaded model, since it was loaded. */
export interface VisionCacheCounts {
  hits: number;
  misses: number;
  bytes: number;
  /** Why nothing is stored any more. */
  error?: string;
}

export interface MemoryStats {
  /** device memory in tensors now / at most; on the CPU the process's resident set */
  allocated: number;
  peakAllocated: number;
  reserved: number;
  peakReserved: number;
  /** Of the pictures' features that are kept; absent where none are. */
  visionCache?: VisionCacheCounts;
}

export interface EvalResult {
  loss: number;
  labelledTokens: number;
  correctTokens: number;
}

export interface GenerateRequest {
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
}

export interface GenerateWith {
  /** name of a loaded adapter; absent = base model */
  adapter?: string;
  /** while the model is trained: what it has learnt so far */
  trained?: boolean;
}

export interface GenerateArgs extends GenerateRequest, GenerateWith {}

export interface GenerateBatchArgs extends GenerateWith {
  requests: GenerateRequest[];
  /** Buffer index: Uint8Array, one of each request; set (Atomics.store) while the job runs it ends that row's answer. */
  left?: number;
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
  /** 'auto' | 'cpu' | 'cuda' | 'cuda:N': where the sums are computed. Defaults to cpu. */
  device?: string;
  /** Merge into the weights that this quantisation leaves, computed from `dtype`; those of a quantised checkpoint are what it holds. */
  quantization?: { method: 'int8' | 'nf4' | 'fp8'; doubleQuantization: boolean; dtype: 'auto' | Dtype };
}

/** A model's sizes, from its config.json. */
export interface ModelDescription {
  family: string;
  modelType: string;
  /** of the weights where they are there, else as config.json says; null where it does not */
  dtype: Dtype | null;
  parameters: { name: string; part: 'vision' | 'projector' | 'language'; numel: number; quantizable: boolean }[];
  /** `reads`: in the decoder's layers, the norm before attention, attention's output, the norm before the MLP, or the MLP's product. */
  linears: {
    path: string;
    part: 'vision' | 'projector' | 'language';
    in: number;
    out: number;
    reads?: 'norm1' | 'attention' | 'norm2' | 'product';
  }[];
  decoder: {
    hiddenSize: number;
    intermediateSize: number;
    layers: number;
    heads: number;
    keyValueHeads: number;
    headDim: number;
    vocabSize: number;
    tiedHead: boolean;
    /** RMS norms; else LayerNorms */
    rmsNorm: boolean;
    /** norms over the heads of queries and keys */
    qkNorm: boolean;
    /** `keeps`: tensors of the MLP's width that it needs for its backward, besides its result where `keepsResult` */
    activation: { gated: boolean; keeps: number; keepsResult: boolean };
    /** the model's own rate in its layers, 0 where it has none */
    dropout: number;
    /** added to the embeddings */
    learnedPositions: boolean;
    /** its layers are of the form that native/core/language/frozen_layer.h takes */
    writtenOut: boolean;
  };
}

export interface QuantizeArgs {
  modelDir: string;
  outputDir: string; // exists
  quantization: 'int8' | 'nf4';
  doubleQuantization: boolean;
  /** of what is not quantised, and of the arithmetic later */
  dtype: Dtype;
  device: string;
  maxShardSize: number; // bytes
}

export interface QuantizeResult {
  shards: string[];
  quantizedTensors: number;
  bytes: number;
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
  /** Reads config.json, and the headers of weights that are there. */
  describe: [{ modelDir: string }, ModelDescription];
  'adapter.load': [{ name: string; dir: string }, { r: number; alpha: number; parameters: number; targets: number }];
  'adapter.unload': [{ name: string }, Record<string, never>];
  preprocess: [{ images: ImageArg[] }, { pixels: { name: string; shape: number[]; buffer: number }[] }];
  /** events: {type:'token', row: 0, id} */
  generate: [GenerateArgs, GenerateResult];
  /** One step for all rows that have not ended. Events: {type:'token', row, id} */
  'generate.batch': [GenerateBatchArgs, { answers: GenerateResult[] }];
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
  /** Writes a checkpoint quantised. Events: {type:'quantize', done, total} */
  quantize: [QuantizeArgs, QuantizeResult];
  /** events: {type:'convert', done, total} */
  convert: [ConvertArgs, { shards: string[]; tensors: number }];
  stats: [Record<string, never>, MemoryStats];
  emptyCache: [Record<string, never>, Record<string, never>];
  /** For tests only: keeps the engine busy for `ms`, honouring cancellation. */
  sleep: [{ ms: number }, Record<string, never>];
}
