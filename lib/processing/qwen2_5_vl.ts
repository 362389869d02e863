/** Qwen2.5-VL: Qwen2-VL's pictures and videos, time in the positions of videos, boxes in pixels of the resized picture. */

import { createQwenVlProcessor, type QwenVlTraits } from './qwen_vl_common.js';
import { QWEN2_VL } from './qwen2_vl.js';
import type { ProcessorFactory } from './registry.js';

export const QWEN2_5_VL: QwenVlTraits = { ...QWEN2_VL, family: 'qwen2_5_vl', normBbox: 'none', time: 'positions' };

export const createQwen25VlProcessor: ProcessorFactory = (modelDir, config, options) =>
  createQwenVlProcessor(modelDir, config, options, QWEN2_5_VL);
