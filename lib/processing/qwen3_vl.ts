/** Qwen3-VL: patches of 16 pixels, a video's limits are those of all its frames together, every temporal patch stands behind its time in text. */
import { CLIP_MEAN, CLIP_STD, createQwenVlProcessor, type QwenVlTraits } from './qwen_vl_common.js';
import type { ProcessorFactory } from './registry.js';
import { roundHalfEven, smartResize } from './smart-resize.js';

const HALF: [number, number, number] = [0.5, 0.5, 0.5];

export const QWEN3_VL: QwenVlTraits = {
  family: 'qwen3_vl',
  defaultSystem: undefined,
  normBbox: 'norm1000',
  // The image processor is Qwen2-VL's class; the checkpoints' files say patch 16 and mean 0.5.
  image: { patch: 14, limits: { min: 56 * 56, max: 28 * 28 * 1280 }, mean: CLIP_MEAN, std: CLIP_STD },
  video: { patch: 16, limits: { min: 128 * 32 * 32, max: 32 * 32 * 768 }, mean: HALF, std: HALF, maxTokens: 768 },
  videoSize(size, given, factor, { size: whole, frame, total, capTokens }, label) {
    const frames = Math.max(given, 2); // a single frame is shown twice
    let { min, max } = whole;
    if (capTokens !== undefined) {
      const share = Math.min(capTokens * factor ** 2, Math.floor(max / frames));
      max = Math.max(share, Math.floor(min * 1.05)) * frames;
    }
    if (frame.max !== undefined || total !== undefined) {
      const shares = [frame.max, total === undefined ? undefined : Math.floor((total * 2) / frames), max / frames];
      max = Math.floor(Math.min(...shares.filter((share) => share !== undefined))) * frames;
    }
    if (frame.min !== undefined) min = frame.min * frames;
    min = Math.min(min, max);
    // A side below one merged patch is first brought up to it.
    const scale = Math.max(1, factor / size.height, factor / size.width);
    return smartResize(
      { width: Math.trunc(size.width * scale), height: Math.trunc(size.height * scale) },
      factor,
      { min, max },
      { frames, wholeFrames: roundHalfEven(frames / 2) * 2, label },
    );
  },
  time: 'text',
};

export const createQwen3VlProcessor: ProcessorFactory = (modelDir, config, options) =>
  createQwenVlProcessor(modelDir, config, options, QWEN3_VL);
