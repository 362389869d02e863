/** Qwen2-VL: patches of 14 pixels, every video frame resized as a picture is. */
import { CLIP_MEAN, CLIP_STD, checkLimits, createQwenVlProcessor, type QwenVlTraits } from './qwen_vl_common.js';
import type { ProcessorFactory } from './registry.js';
import { smartResize } from './smart-resize.js';

export const QWEN2_VL: QwenVlTraits = {
  family: 'qwen2_vl',
  defaultSystem: 'You are a helpful assistant.',
  normBbox: 'norm1000',
  image: { patch: 14, limits: { min: 56 * 56, max: 28 * 28 * 1280 }, mean: CLIP_MEAN, std: CLIP_STD },
  video: {
    patch: 14,
    limits: { min: 128 * 28 * 28, max: 28 * 28 * 768 },
    mean: CLIP_MEAN,
    std: CLIP_STD,
    maxTokens: 128_000,
  },
  // Limits are a frame's. A total, the option's or that of cap_pixels_per_frame, is shared among temporal patches (qwen_vl_utils' fetch_video).
  videoSize(size, frames, factor, limits, label) {
    const min = limits.frame.min ?? limits.size.min;
    let max = limits.frame.max ?? limits.size.max;
    const total =
      limits.total ?? (limits.capTokens === undefined ? undefined : Math.floor(limits.capTokens * factor ** 2 * 0.9));
    if (total !== undefined) max = Math.max(Math.min(max, Math.floor((total * 2) / frames)), Math.floor(min * 1.05));
    checkLimits({ min, max }, 'videoMaxPixels');
    return smartResize(size, factor, { min, max }, { label });
  },
  time: 'none',
};

export const createQwen2VlProcessor: ProcessorFactory = (modelDir, config, options) =>
  createQwenVlProcessor(modelDir, config, options, QWEN2_VL);
