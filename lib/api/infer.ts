import { MartletError } from '../errors.js';
import { pickVisionOptions } from '../processing/vision-options.js';
import { loadModel } from './model.js';
import { checkOptions } from './options.js';
import type { GenerateResult, InferBatchOptions, InferOptions, InferQuestion } from './types.js';

/**
 * Loads a model, answers one question about zero or more images, and frees everything: for scripts. With `questions` it answers all of them,
 * `batchSize` at once, in their order. A program that asks more than once keeps the model from {@link loadModel}.
 */
export function infer(options: InferBatchOptions): Promise<GenerateResult[]>;
export function infer(options: InferOptions): Promise<GenerateResult>;
export async function infer(options: InferOptions | InferBatchOptions): Promise<GenerateResult | GenerateResult[]> {
  checkInferOptions(options);
  const { model, adapter, ...others } = options;
  const { device, dtype, quantization, template, labels, system, exifOrientation, ...unloaded } = others;
  const { visionCache, visionCacheSize, normBbox, bboxFormat, ...rest } = unloaded;
  const { signal } = rest;
  const loaded = await loadModel(model, {
    device,
    dtype,
    quantization,
    template,
    labels,
    system,
    exifOrientation,
    visionCache,
    visionCacheSize,
    ...pickVisionOptions(options),
    ...(adapter !== undefined && { adapters: { default: adapter } }),
    signal,
  });
  try {
    if (!('questions' in rest)) {
      const { image, videos, text, ...generation } = rest;
      return await loaded.generate({ ...generation, ...prompt({ image, videos, text }) });
    }
    const { questions, batchSize = DEFAULT_BATCH_SIZE, signal: _, ...generation } = rest;
    const answers: GenerateResult[] = [];
    for (let i = 0; i < questions.length; i += batchSize) {
      const asked = questions.slice(i, i + batchSize).map((question) => ({ ...generation, ...prompt(question) }));
      answers.push(...(await loaded.generateBatch(asked, { signal })));
    }
    return answers;
  } finally {
    await loaded.dispose();
  }
}

const DEFAULT_BATCH_SIZE = 8;

/** All of them before a model is loaded. */
function checkInferOptions(options: InferOptions | InferBatchOptions): void {
  if (typeof options !== 'object' || options === null || !('questions' in options)) {
    checkOptions('infer', options);
    checkText(options);
    return;
  }
  checkOptions('infer with questions', options);
  if (!Array.isArray(options.questions)) {
    throw new MartletError('ERR_MARTLET_USAGE', `questions must be a list, not ${typeof options.questions}.`, {
      field: 'questions',
    });
  }
  for (const question of options.questions) {
    checkOptions('a question of infer', question);
    checkText(question);
  }
  checkBatchSize(options.batchSize);
}

function checkText({ text }: InferQuestion): void {
  if (typeof text === 'string') return;
  throw new MartletError('ERR_MARTLET_USAGE', `text must be a text, not ${typeof text}.`, { field: 'text' });
}

function checkBatchSize(size: number | undefined): void {
  if (size === undefined || (Number.isInteger(size) && size >= 1)) return;
  throw new MartletError('ERR_MARTLET_USAGE', `batchSize must be a whole number of at least 1, not ${size}.`, {
    field: 'batchSize',
    value: size,
  });
}

function prompt({ image, videos = [], text }: InferQuestion) {
  const images = image === undefined ? [] : Array.isArray(image) ? image : [image];
  return { messages: [userMessage(text, images.length, videos.length)], images, videos };
}

/** A question about pictures and videos. Marks that the text lacks are put in front of it, each on its own line as the training data has them. */
export function userMessage(text: string, images: number, videos = 0): { role: 'user'; content: string } {
  const missing = (mark: string, wanted: number) =>
    `${mark}\n`.repeat(Math.max(0, wanted - (text.split(mark).length - 1)));
  return { role: 'user', content: missing('<image>', images) + missing('<video>', videos) + text };
}
