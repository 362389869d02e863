/** The size that Qwen2-VL and its successors give a picture: sides in whole merged patches, pixels within limits, shape kept (transformers' `smart_resize`). */
import { MartletError } from '../errors.js';

const MAX_RATIO = 200;

export interface Size {
  width: number;
  height: number;
}

export interface PixelLimits {
  min: number;
  max: number;
}

/** Python's `round`: a half goes to the even neighbour. */
export function roundHalfEven(value: number): number {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest !== 0.5) return rest < 0.5 ? floor : floor + 1;
  return floor % 2 === 0 ? floor : floor + 1;
}

/**
 * `factor`: pixels of a merged patch's side. `frames`: limits on the pixels of this many frames together; `wholeFrames`: the same as rounded to
 * temporal patches, for the comparison with the limits. `label` names the picture in messages.
 *
 * @throws ERR_MARTLET_IMAGE for a picture more than 200 times as long as wide
 */
export function smartResize(
  { width, height }: Size,
  factor: number,
  limits: PixelLimits,
  { frames = 1, wholeFrames = frames, label = 'given' }: { frames?: number; wholeFrames?: number; label?: string } = {},
): Size {
  const ratio = Math.max(height, width) / Math.min(height, width);
  if (!(ratio <= MAX_RATIO)) {
    throw new MartletError(
      'ERR_MARTLET_IMAGE',
      `The picture ${label} is ${width}×${height}: one side is ${Math.round(ratio)} times the other, more than the ${MAX_RATIO} that the model takes. Crop it, or leave the row out.`,
      { path: label, width, height },
    );
  }
  const whole = { height: roundHalfEven(height / factor) * factor, width: roundHalfEven(width / factor) * factor };
  const pixels = wholeFrames * whole.height * whole.width;
  if (pixels > limits.max) {
    const beta = Math.sqrt((frames * height * width) / limits.max);
    const fit = (side: number) => Math.max(factor, Math.floor(side / beta / factor) * factor);
    return { height: fit(height), width: fit(width) };
  }
  if (pixels < limits.min) {
    const beta = Math.sqrt(limits.min / (frames * height * width));
    const fill = (side: number) => Math.ceil((side * beta) / factor) * factor;
    return { height: fill(height), width: fill(width) };
  }
  return whole;
}
