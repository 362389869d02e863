import { MartletError } from '../errors.js';
import { parseBoxes as parse } from '../processing/grounding.js';
import type { ParsedBox } from '../processing/index.js';
import { QWEN_VL_GROUNDING } from '../processing/qwen_vl.js';
import { QWEN2_5_VL } from '../processing/qwen2_5_vl.js';
import { QWEN2_VL } from '../processing/qwen2_vl.js';
import { QWEN3_VL } from '../processing/qwen3_vl.js';
import { smartResize } from '../processing/smart-resize.js';
import { checkOptions } from './options.js';

const FAMILIES = { qwen_vl: QWEN_VL_GROUNDING, qwen2_vl: QWEN2_VL, qwen2_5_vl: QWEN2_5_VL, qwen3_vl: QWEN3_VL };

export interface ParseBoxesOptions {
  /** Says how coordinates are meant, unless `normBbox` does. */
  family?: keyof typeof FAMILIES;
  /** `norm1000`: thousandths of the picture's sides; `none`: pixels of the resized picture. Defaults to the family's. */
  normBbox?: 'norm1000' | 'none';
  /** Of the picture as it was given, in pixels. */
  width: number;
  height: number;
  /** For `none`: the size that the network saw. Defaults to Qwen2.5-VL's resize within `minPixels` and `maxPixels`. */
  resized?: { width: number; height: number };
  /** Defaults to 3136, as the released Qwen2.5-VL checkpoints have it. */
  minPixels?: number;
  /** Defaults to 12845056, as the released Qwen2.5-VL checkpoints have it. */
  maxPixels?: number;
}

/**
 * The boxes of an answer in pixels of its picture, for answers from anywhere (a server, a file): `model.parseBoxes` knows the model's own limits.
 * Reads Qwen's tags, JSON with `bbox_2d` or `point_2d`, and bare coordinates; no box is an empty list.
 *
 * @throws ERR_MARTLET_USAGE when a box begins and is none, `family` and `normBbox` are missing, or a size is none
 * @throws ERR_MARTLET_IMAGE when no family would take a picture of this shape
 */
export function parseBoxes(text: string, options: ParseBoxesOptions): ParsedBox[] {
  if (typeof text !== 'string') {
    throw new MartletError(
      'ERR_MARTLET_USAGE',
      `parseBoxes takes the text of an answer, not ${typeof text}: model.parseBoxes takes token ids too.`,
      { field: 'text' },
    );
  }
  checkOptions('parseBoxes', options);
  const { family, width, height, minPixels = 3136, maxPixels = 12_845_056 } = options;
  const normBbox =
    options.normBbox ??
    (family !== undefined && Object.hasOwn(FAMILIES, family) ? FAMILIES[family].normBbox : undefined);
  if (normBbox !== 'norm1000' && normBbox !== 'none') {
    throw new MartletError(
      'ERR_MARTLET_USAGE',
      `parseBoxes needs family (${Object.keys(FAMILIES).join(', ')}) or normBbox (norm1000, none).`,
      options.normBbox === undefined ? { field: 'family', value: family } : { field: 'normBbox', value: normBbox },
    );
  }
  const numbers = {
    width,
    height,
    minPixels,
    maxPixels,
    ...(options.resized && { 'resized.width': options.resized.width, 'resized.height': options.resized.height }),
  };
  for (const [field, value] of Object.entries(numbers)) {
    if (Number.isFinite(value) && value > 0) continue;
    throw new MartletError('ERR_MARTLET_USAGE', `${field} must be in pixels, a number above 0, not ${value}.`, {
      field,
      value,
    });
  }
  const size = { width, height };
  const resized =
    options.resized ?? (normBbox === 'none' ? smartResize(size, 28, { min: minPixels, max: maxPixels }) : size);
  return parse(text, { ...size, resized, normBbox });
}
