import { loadModel } from './model.js';
import type { GenerateResult, InferOptions } from './types.js';

/**
 * Loads a model, answers one question about zero or more images, and frees everything: for scripts. A program that asks more than once
 * keeps the model from {@link loadModel}.
 */
export async function infer(options: InferOptions): Promise<GenerateResult> {
  const { model, adapter, image, text, device, dtype, quantization, template, system, exifOrientation, ...generation } =
    options;
  const images = image === undefined ? [] : Array.isArray(image) ? image : [image];
  const loaded = await loadModel(model, {
    device,
    dtype,
    quantization,
    template,
    system,
    exifOrientation,
    ...(adapter !== undefined && { adapters: { default: adapter } }),
    signal: generation.signal,
  });
  try {
    return await loaded.generate({ ...generation, messages: [userMessage(text, images.length)], images });
  } finally {
    await loaded.dispose();
  }
}

/** A question about `images` pictures. Marks that the text lacks are put in front of it, each on its own line as the training data has them. */
export function userMessage(text: string, images: number): { role: 'user'; content: string } {
  const marks = text.split('<image>').length - 1;
  return { role: 'user', content: '<image>\n'.repeat(Math.max(0, images - marks)) + text };
}
