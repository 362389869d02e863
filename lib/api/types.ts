import type { TrainConfig } from '../config/index.js';
import type { MemoryStats, VisionCacheCounts } from '../native/binding.js';
import type {
  ChatMessage,
  GroundingObjects,
  ImageSource,
  ParsedBox,
  VideoSource,
  VisionOptions,
} from '../processing/types.js';

export type { ChatMessage, GroundingObjects, ImageSource, ParsedBox, VideoSource, VisionOptions };

/**
 * Options of {@link loadModel}. Pixel limits and the like win over the environment (`MAX_PIXELS`, …), which wins over what an adapter was trained
 * with, which wins over the checkpoint; families without them refuse them.
 */
export interface LoadModelOptions extends VisionOptions {
  /** Defaults to `auto`: the first CUDA device, else the CPU. A CUDA device that is absent is `ERR_MARTLET_CUDA_UNAVAILABLE`. */
  device?: 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;
  /** Defaults to `auto`: as stored in the checkpoint. */
  dtype?: 'auto' | 'float32' | 'bfloat16' | 'float16';
  /** The language model's linears in 8 bits (by rows) or 4 (NF4, double quantisation), quantised as they are read. Defaults to `none`. */
  quantization?: 'none' | 'int8' | 'nf4';
  /** PEFT adapter folders by the name that `generate({ adapter })` uses. Each is asked as its `args.yaml` says it was trained: template, system prompt, pixel limits. */
  adapters?: Record<string, string>;
  /** `default` = the checkpoint's own chat template; `ms-swift` = its registered template. Defaults to what an adapter's `args.yaml` says, else `default`. */
  template?: 'default' | 'ms-swift';
  /** What `score` and `prepare` label: `default` = the answers with their end; `official` = as the model's authors trained it (Qwen-VL-Chat). Defaults to `default`. */
  labels?: 'default' | 'official';
  /** System prompt used when the messages have none. */
  system?: string;
  /** Turn pictures as their EXIF orientation says. Defaults to true. */
  exifOrientation?: boolean;
  /** Keep what pictures become in front of the language model, so that further questions about one are answered without its vision tower. Adapters that change that part are left out. Defaults to `memory`. */
  visionCache?: 'off' | 'memory';
  /** Bytes or `1GB`: what is kept at most; the longest unused goes first. Defaults to `1GB`. */
  visionCacheSize?: number | string;
  signal?: AbortSignal;
  onProgress?: (progress: { done: number; total: number; bytes: number }) => void;
}

/** Pixel limits and the like are those of this call alone, and win over the model's. */
export interface PromptOptions extends Omit<VisionOptions, 'normBbox' | 'bboxFormat'> {
  messages: ChatMessage[];
  /** Of the row, so that rows of data can be given as they are: errors name it. */
  id?: string | number;
  /** In the order of the `<image>` marks. Defaults to none. */
  images?: ImageSource[];
  /** In the order of the `<video>` marks, each a list of frames. Defaults to none. */
  videos?: VideoSource[];
  /** Take the places of `<ref-object>` and `<bbox>` in the messages. */
  objects?: GroundingObjects;
  /** Name of a loaded adapter; without it the base model answers, or the only adapter if exactly one was loaded by `loadModel`. `null` = base model. */
  adapter?: string | null;
  signal?: AbortSignal;
}

export interface GenerateOptions extends PromptOptions {
  /** Defaults to generation_config.json's, else 512. */
  maxNewTokens?: number;
  /** 0 = greedy. Defaults to generation_config.json's (greedy if it says do_sample: false). */
  temperature?: number;
  topP?: number;
  topK?: number;
  repetitionPenalty?: number;
  /** Defaults to a random one. */
  seed?: number;
  /** The answer ends before the first of these strings. */
  stop?: string | string[];
  /** Leave tokens such as `<|box_start|>` out of the text. Defaults to true. */
  skipSpecialTokens?: boolean;
}

/** What the requests of {@link Model.generateBatch} share. */
export interface GenerateBatchOptions {
  /** As in {@link PromptOptions}, for all of them. */
  adapter?: string | null;
  signal?: AbortSignal;
  /** Hears the pieces of each answer as they come; `row` counts the requests from 0. What it throws ends the call. */
  onChunk?: (row: number, chunk: StreamChunk) => void;
}

export interface GenerateResult {
  text: string;
  /** Without the end token. */
  tokenIds: Int32Array;
  /** Counts expanded image tokens. */
  promptTokens: number;
  finishReason: 'stop' | 'length' | 'abort';
  usage: { promptTokens: number; completionTokens: number; totalTokens: number };
  /** Milliseconds. */
  timings: { preprocess: number; vision: number; prefill: number; decode: number; total: number };
}

export interface StreamChunk {
  text: string;
  tokenId: number;
}

export interface ScoreResult {
  inputIds: Int32Array;
  labels: Int32Array;
  /** One per labelled token, natural logarithm. */
  logprobs: Float32Array;
  /** Mean of −logprobs. */
  loss: number;
  /** With `logits: true`: rows that predict the labelled tokens, `[labelled, vocabulary]`. */
  logits?: { data: Float32Array; shape: number[] };
}

export interface PrepareResult {
  inputIds: Int32Array;
  labels?: Int32Array;
  pixels: Record<string, { data: Float32Array; shape: number[] }>;
}

export interface Model extends AsyncDisposable {
  readonly modelType: string;
  readonly device: string;
  readonly dtype: 'float32' | 'bfloat16' | 'float16';
  readonly parameters: number;
  readonly adapters: string[];
  readonly disposed: boolean;
  generate(options: GenerateOptions): Promise<GenerateResult>;
  /**
   * Answers several requests, in their order, 16 at once: each step computes one token of every answer that has not ended. Faster than one by one on
   * a GPU; takes the memory of as many contexts. In float32 greedy answers are those of `generate`; in 16 bits a sum may round
   * otherwise, and two tokens of nearly the same probability change places. A request that cannot be answered fails the call.
   */
  generateBatch(
    requests: Omit<GenerateOptions, 'adapter' | 'signal'>[],
    options?: GenerateBatchOptions,
  ): Promise<GenerateResult[]>;
  /** Leaving the loop cancels. */
  stream(options: GenerateOptions): AsyncIterableIterator<StreamChunk>;
  score(options: PromptOptions & { logits?: boolean }): Promise<ScoreResult>;
  prepare(options: PromptOptions & { for?: 'train' | 'generate' }): Promise<PrepareResult>;
  /**
   * The boxes of an answer in pixels of its picture; the model's limits give the size that the network saw. `answer`: text, or token ids (which keep
   * the tags that `text` leaves out); `adapter`: as in `generate`. Throws `ERR_MARTLET_USAGE` when a box begins and is none, or the family has no form for boxes.
   */
  parseBoxes(
    answer: string | ArrayLike<number>,
    picture: { width: number; height: number; adapter?: string | null } & Omit<
      VisionOptions,
      'normBbox' | 'bboxFormat'
    >,
  ): ParsedBox[];
  loadAdapter(name: string, dir: string): Promise<void>;
  unloadAdapter(name: string): Promise<void>;
  memory(): Promise<MemoryStats>;
  dispose(): Promise<void>;
}

export interface TrainOptions {
  signal?: AbortSignal;
  /** As `--set`: `{ 'lora_rank': 16 }` or `['lora_rank=16']`. */
  overrides?: Record<string, unknown> | string[];
}

export type TrainEvent =
  | {
      type: 'start';
      config: TrainConfig;
      outputDir: string;
      steps: number;
      epochs: number;
      rows: number;
      trainableParams: number;
      totalParams: number;
      parts: { vision: number; projector: number; language: number };
      targets: number;
      /** The first row with its labels marked: what is trained in [[ ]]. */
      sample: string;
    }
  | {
      type: 'step';
      step: number;
      epoch: number;
      loss: number;
      /** before clipping; NaN in a float16 step that overflowed (null in JSON) */
      gradNorm: number;
      learningRate: number;
      /** labelled tokens predicted right, 0–1 */
      tokenAccuracy: number;
      tokens: number;
      tokensPerSecond: number;
      /** loss smoothed over steps (exponential mean, 0.9), for display */
      smoothedLoss: number;
      samplesPerSecond: number;
      labelledTokensPerSecond: number;
      /** share of the time in which the engine waited for rows, 0–1 */
      dataWait: number;
      /** bytes: the most reserved so far */
      memory: number;
      /** bytes: the most in tensors so far */
      memoryAllocated: number;
      /** float16: what the loss is multiplied by; else 1 */
      lossScale: number;
      /** steps so far that changed nothing: overflows in float16, losses that were not finite */
      skippedSteps: number;
      /** GPU only: share of the device's measured product rate that the step's arithmetic (vision tower left out) comes to */
      modelFlopUtilisation?: number;
      /** pictures whose features were kept or had to be computed, since the model was loaded, evaluation included; bytes kept. Absent with `vision_cache: off` */
      visionCache?: VisionCacheCounts;
      /** seconds */
      elapsed: number;
      remaining: number;
    }
  | {
      type: 'eval';
      step: number;
      epoch: number;
      loss: number;
      tokenAccuracy: number;
      seconds: number;
      /** With predict_with_generate, 0–1. */
      exactMatch?: number;
      rougeL?: number;
      bleu?: number;
    }
  | { type: 'checkpoint'; step: number; dir: string }
  | { type: 'warning'; message: string; details?: Record<string, unknown> }
  | ({ type: 'done' } & TrainResult);

export interface TrainResult {
  outputDir: string;
  /** The folder PEFT loads; for `full` the model folder. */
  adapterDir: string;
  steps: number;
  finalLoss: number;
  /** Of the checkpoints that were evaluated, the best by metric_for_best_model. With load_best_model_at_end its weights are in adapterDir. */
  bestCheckpoint?: string;
  trainableParams: number;
  totalParams: number;
  /** Rows left out (on_bad_row: skip, or longer than max_length), each with its reason. */
  skipped: { file: string; row: number; code: string; message: string }[];
  /** Absent with `vision_cache: off`. */
  visionCache?: VisionCacheCounts;
  /** Steps that changed nothing: overflows in float16, losses that were not finite (non_finite: skip, rollback). */
  skippedSteps: number;
  /** True when stop() or a signal ended the run before its last step. */
  stopped: boolean;
  /** True when early_stop_interval ended it. */
  stoppedEarly: boolean;
}

/** Awaitable and async-iterable. Leaving the loop by break stops the run as an abort does. */
export interface TrainRun extends PromiseLike<TrainResult>, AsyncIterable<TrainEvent> {
  readonly result: Promise<TrainResult>;
  /** Finishes the step, saves, resolves. */
  stop(): void;
}

export interface MergeOptions {
  /** Defaults to the base model named in the adapter's args.yaml or adapter_config.json. */
  model?: string;
  adapter: string;
  outputDir: string;
  /** Defaults to the dtype stored. */
  dtype?: 'float32' | 'bfloat16' | 'float16';
  /** Bytes or `5GB`. Defaults to `5GB`. */
  maxShardSize?: number | string;
  /** `quantized`: into the weights that a qlora or fp8 adapter was trained against (quantised and back); the result is as large. Defaults to `original`. */
  base?: 'original' | 'quantized';
  /** Where the sums are computed, one weight at a time. Defaults to `auto`: the first CUDA device, else the CPU. */
  device?: 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;
  /** Write into a folder that already holds files. Defaults to false. */
  overwrite?: boolean;
  signal?: AbortSignal;
  onProgress?: (progress: { done: number; total: number }) => void;
}

export interface MergeReport {
  outputDir: string;
  shards: string[];
  mergedTensors: number;
  /** Largest distance of a stored weight from the exact sum. */
  maxAbsError: number;
  seconds: number;
}

export interface QuantizeOptions {
  model: string;
  outputDir: string;
  quantization: 'nf4' | 'int8';
  /** NF4: scales in 8 bits too. Defaults to true. */
  doubleQuantization?: boolean;
  /** Of what is not quantised, and of the arithmetic later. Defaults to bfloat16. */
  dtype?: 'float32' | 'bfloat16' | 'float16';
  /** Where the codes are computed. Defaults to `auto`. */
  device?: 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;
  /** Bytes or `5GB`. Defaults to `5GB`. */
  maxShardSize?: number | string;
  /** Write into a folder that already holds files. Defaults to false. */
  overwrite?: boolean;
  signal?: AbortSignal;
  onProgress?: (progress: { done: number; total: number }) => void;
}

export interface QuantizeReport {
  outputDir: string;
  shards: string[];
  quantizedTensors: number;
  /** Of all weights. */
  bytes: number;
  seconds: number;
}

export interface ConvertOptions {
  /** Model folder or hub id. */
  model: string;
  outputDir: string;
  /** Defaults to the dtype stored. */
  dtype?: 'float32' | 'bfloat16' | 'float16';
  /** Bytes or `5GB`. Defaults to `5GB`. */
  maxShardSize?: number | string;
  /** Write into a folder that already holds files. Defaults to false. */
  overwrite?: boolean;
  signal?: AbortSignal;
  onProgress?: (progress: { done: number; total: number }) => void;
}

export interface ConvertReport {
  outputDir: string;
  shards: string[];
  tensors: number;
  seconds: number;
}

/** A question of {@link infer}. */
export interface InferQuestion {
  image?: ImageSource | ImageSource[];
  /** Each a list of frames. */
  videos?: VideoSource[];
  text: string;
}

export interface InferOptions
  extends Omit<LoadModelOptions, 'adapters' | 'onProgress'>,
    Omit<GenerateOptions, 'messages' | 'id' | 'images' | 'videos' | 'adapter'>,
    InferQuestion {
  model: string;
  adapter?: string;
}

export interface InferBatchOptions extends Omit<InferOptions, keyof InferQuestion> {
  questions: InferQuestion[];
  /** Answered at once, see {@link Model.generateBatch}. Defaults to 8. */
  batchSize?: number;
}
