/** The public API. Everything that is not exported here may change without notice. */
export { type ParseBoxesOptions, parseBoxes } from './api/boxes.js';
export { convertCheckpoint } from './api/convert.js';
export { type DrawBoxesOptions, drawBoxes } from './api/draw-boxes.js';
export { infer } from './api/infer.js';
export { mergeAdapter } from './api/merge.js';
export { loadModel } from './api/model.js';
export { type PlanOptions, planTraining, type TrainingPlan } from './api/plan.js';
export { quantizeModel } from './api/quantize.js';
export { getSystemInfo } from './api/system-info.js';
export { trainLoRA, trainLoRA as train } from './api/train.js';
export type {
  ChatMessage,
  ConvertOptions,
  ConvertReport,
  GenerateBatchOptions,
  GenerateOptions,
  GenerateResult,
  GroundingObjects,
  ImageSource,
  InferBatchOptions,
  InferOptions,
  InferQuestion,
  LoadModelOptions,
  MergeOptions,
  MergeReport,
  Model,
  ParsedBox,
  PrepareResult,
  PromptOptions,
  QuantizeOptions,
  QuantizeReport,
  ScoreResult,
  StreamChunk,
  TrainEvent,
  TrainOptions,
  TrainResult,
  TrainRun,
  VideoSource,
  VisionOptions,
} from './api/types.js';
export type { TrainConfig, TrainConfigInput } from './config/index.js';
export { ERROR_CODES, type ErrorCode, type ErrorDetails, MartletError } from './errors.js';
export type { MemoryStats } from './native/binding.js';
export { createProgressRenderer, type ProgressRenderer, type ProgressStream } from './report/progress.js';
