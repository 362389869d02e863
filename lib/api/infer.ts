import { pickVisionOptions } from '../processing/vision-options.js';
import { loadModel } from './model.js';
import type { GenerateResult, InferOptions } from './types.js';

/**
 * Loads a model, answers one question about zero or more images, and frees everything: for scripts. A program that asks more than once
 * keeps the model from {@link loadModel}.
 */
export async function infer(options: InferOptions): Promise<GenerateResult> {
  const { model, adapter, image, videos = [], text, ...rest } = options;
  const { device, dtype, quantization, template, system, exifOrientation, ...generation } = rest;
  const images = image === undefined ? [] : Array.isArray(image) ? image : [image];
  const loaded = await loadModel(model, {
    device,
    dtype,
    quantization,
    template,
    system,
    exifOrientation,
    ...pickVisionOptions(options),
    ...(adapter !== undefined && { adapters: { default: adapter } }),
    signal: generation.signal,
  });
  try {
    const messages = [userMessage(text, images.length, videos.length)];
    return await loaded.generate({ ...generation, messages, images, videos });
  } finally {
    await loaded.dispose();
  }
}

/** A question about pictures and videos. Marks that the text lacks are put in front of it, each on its own line as the training data has them. */
export function userMessage(text: string, images: number, videos = 0): { role: 'user'; content: string } {
  const missing = (mark: string, wanted: number) =>
    `${mark}\n`.repeat(Math.max(0, wanted - (text.split(mark).length - 1)));
  return { role: 'user', content: missing('<image>', images) + missing('<video>', videos) + text };
}
