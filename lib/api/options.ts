/** Options of functions, as a program without types may give them: one that is not known is an error, as an unknown key of a config is. */
import { MartletError } from '../errors.js';
import { VISION_OPTION_NAMES, type VisionOptionName } from '../processing/vision-options.js';
import { nearest } from '../suggest.js';
import type { ParseBoxesOptions } from './boxes.js';
import type { DrawBoxesOptions } from './draw-boxes.js';
import type { PlanOptions } from './plan.js';
import type {
  ConvertOptions,
  GenerateBatchOptions,
  GenerateOptions,
  InferBatchOptions,
  InferOptions,
  InferQuestion,
  LoadModelOptions,
  MergeOptions,
  PromptOptions,
  QuantizeOptions,
  TrainOptions,
} from './types.js';

type Keys = readonly string[];

/** All keys of a type: one that is added there and forgotten here does not compile. */
const keysOf = <T>(keys: Record<keyof T, true>): Keys => Object.keys(keys);
const without = (keys: Keys, ...left: string[]): Keys => keys.filter((key) => !left.includes(key));

/** Of one prompt or picture: how boxes are written is the model's own. */
const LIMITS = without(VISION_OPTION_NAMES, 'normBbox', 'bboxFormat');
const PROMPT: Keys = [
  ...LIMITS,
  ...keysOf<Omit<PromptOptions, VisionOptionName>>({
    messages: true,
    id: true,
    images: true,
    videos: true,
    objects: true,
    adapter: true,
    signal: true,
  }),
];
const GENERATE: Keys = [
  ...PROMPT,
  ...keysOf<Omit<GenerateOptions, keyof PromptOptions>>({
    maxNewTokens: true,
    temperature: true,
    topP: true,
    topK: true,
    repetitionPenalty: true,
    seed: true,
    stop: true,
    skipSpecialTokens: true,
  }),
];
const LOAD_MODEL: Keys = [
  ...VISION_OPTION_NAMES,
  ...keysOf<Omit<LoadModelOptions, VisionOptionName>>({
    device: true,
    dtype: true,
    quantization: true,
    adapters: true,
    template: true,
    labels: true,
    system: true,
    exifOrientation: true,
    visionCache: true,
    visionCacheSize: true,
    signal: true,
    onProgress: true,
  }),
];
const QUESTION = keysOf<InferQuestion>({ image: true, videos: true, text: true });
const INFER: Keys = [
  ...without(LOAD_MODEL, 'adapters', 'onProgress'),
  ...without(GENERATE, 'messages', 'id', 'images', 'videos'),
  ...keysOf<
    Omit<InferOptions, Exclude<keyof LoadModelOptions | keyof GenerateOptions, 'adapter'> | keyof InferQuestion>
  >({ model: true, adapter: true }),
];

/** What each function takes. */
export const OPTIONS = {
  loadModel: LOAD_MODEL,
  generate: GENERATE,
  stream: GENERATE,
  generateBatch: keysOf<GenerateBatchOptions>({ adapter: true, signal: true, onChunk: true }),
  'a request of generateBatch': without(GENERATE, 'adapter', 'signal'),
  // a question can be looked at as it was asked: what steers the answer has no part in the prompt
  score: [...GENERATE, 'logits'],
  prepare: [...GENERATE, 'for'],
  'model.parseBoxes': [...LIMITS, 'width', 'height', 'adapter'],
  infer: [...INFER, ...QUESTION],
  'infer with questions': [
    ...INFER,
    ...keysOf<Pick<InferBatchOptions, 'questions' | 'batchSize'>>({ questions: true, batchSize: true }),
  ],
  'a question of infer': QUESTION,
  trainLoRA: keysOf<TrainOptions>({ signal: true, overrides: true }),
  planTraining: keysOf<PlanOptions>({ gpu: true, overrides: true, signal: true }),
  mergeAdapter: keysOf<MergeOptions>({
    model: true,
    adapter: true,
    outputDir: true,
    dtype: true,
    maxShardSize: true,
    base: true,
    device: true,
    overwrite: true,
    signal: true,
    onProgress: true,
  }),
  quantizeModel: keysOf<QuantizeOptions>({
    model: true,
    outputDir: true,
    quantization: true,
    doubleQuantization: true,
    dtype: true,
    device: true,
    maxShardSize: true,
    overwrite: true,
    signal: true,
    onProgress: true,
  }),
  convertCheckpoint: keysOf<ConvertOptions>({
    model: true,
    outputDir: true,
    dtype: true,
    maxShardSize: true,
    overwrite: true,
    signal: true,
    onProgress: true,
  }),
  drawBoxes: keysOf<DrawBoxesOptions>({ output: true, exifOrientation: true, signal: true }),
  parseBoxes: keysOf<ParseBoxesOptions>({
    family: true,
    normBbox: true,
    width: true,
    height: true,
    resized: true,
    minPixels: true,
    maxPixels: true,
  }),
} satisfies Record<string, Keys>;

/**
 * Checks that `options` is an object whose keys `function_` knows. A key with the value undefined is absent.
 *
 * @throws ERR_MARTLET_USAGE with `details.field` and, for a name that is nearly one of them, `details.didYouMean`
 */
export function checkOptions(function_: keyof typeof OPTIONS, options: unknown): void {
  if (typeof options !== 'object' || options === null || Array.isArray(options)) {
    const given = options === null ? 'null' : Array.isArray(options) ? 'a list' : typeof options;
    throw new MartletError('ERR_MARTLET_USAGE', `${function_} takes an object with its options, not ${given}.`, {
      value: options,
    });
  }
  const known = OPTIONS[function_];
  for (const [field, value] of Object.entries(options)) {
    if (value === undefined || known.includes(field)) continue;
    const didYouMean = nearest(field, known);
    throw new MartletError(
      'ERR_MARTLET_USAGE',
      `${function_} has no option ${field}${didYouMean === undefined ? `; it has ${known.join(', ')}.` : `: did you mean ${didYouMean}?`}`,
      { field, ...(didYouMean !== undefined && { didYouMean }) },
    );
  }
}
