/** How MiniCPM-V cuts pictures: one whole view, and for large pictures a grid of slices of a view with more pixels. Arithmetic: image_processing_minicpmv.py of 2.6. */

export interface SliceOptions {
  /** Most slices of one picture, the whole view not counted. */
  maxSliceNums: number;
  /** Side of the square whose area one slice has, about. */
  scaleResolution: number;
  patchSize: number;
}

export interface Size {
  width: number;
  height: number;
}

export interface Slicing {
  /** Absent: the picture is not cut. */
  grid?: { columns: number; rows: number };
  /** Of the whole view. */
  source: Size;
  /** Of the view that is cut. */
  refine?: Size;
  /** Of each slice, the whole view first, then row by row: patches down and across. */
  patches: { rows: number; columns: number }[];
}

export function slicePicture({ width, height }: Size, options: SliceOptions): Slicing {
  const { maxSliceNums, scaleResolution, patchSize } = options;
  const patchesOf = (size: Size) => ({ rows: size.height / patchSize, columns: size.width / patchSize });
  const ratio = (width * height) / (scaleResolution * scaleResolution);
  const multiple = Math.min(Math.ceil(ratio), maxSliceNums);
  const grid = multiple <= 1 ? undefined : bestGrid(log(width / height), multiple, maxSliceNums);
  const source = bestResize({ width, height }, scaleResolution, patchSize, multiple <= 1);
  if (grid === undefined) return { source, patches: [patchesOf(source)] };
  const { columns, rows } = grid;
  // The picture is widened to whole slices, one slice is fitted, and the view is made of as many of them.
  const cell = {
    width: divisible(width, columns) / columns,
    height: divisible(height, rows) / rows,
  };
  const slice = bestResize(cell, scaleResolution, patchSize, true);
  return {
    grid,
    source,
    refine: { width: slice.width * columns, height: slice.height * rows },
    patches: [patchesOf(source), ...new Array(columns * rows).fill(patchesOf(slice))],
  };
}

/** The grid whose shape is nearest the picture's, of those with one slice less, as many, or one more than its area asks for. */
function bestGrid(logRatio: number, multiple: number, maxSliceNums: number): { columns: number; rows: number } {
  let best = { columns: 1, rows: 1 };
  let least = Number.POSITIVE_INFINITY;
  for (const slices of [multiple - 1, multiple, multiple + 1]) {
    if (slices === 1 || slices > maxSliceNums) continue;
    for (let columns = 1; columns <= slices; columns++) {
      if (slices % columns !== 0) continue;
      const rows = slices / columns;
      const error = Math.abs(logRatio - log(columns / rows));
      if (error < least) {
        least = error;
        best = { columns, rows };
      }
    }
  }
  return best;
}

/** The size of the same shape with the area of one slice, in whole patches; a smaller one stays unless it may grow. */
function bestResize({ width, height }: Size, scaleResolution: number, patchSize: number, mayGrow: boolean): Size {
  let size = { width, height };
  if (width * height > scaleResolution * scaleResolution || mayGrow) {
    const ratio = width / height;
    const down = Math.trunc(scaleResolution / Math.sqrt(ratio));
    size = { width: Math.trunc(down * ratio), height: down };
  }
  return { width: divisible(size.width, patchSize), height: divisible(size.height, patchSize) };
}

/** The nearest multiple, at least one. */
function divisible(length: number, unit: number): number {
  return Math.max(roundHalfEven(length / unit) * unit, unit);
}

/** Python's round. */
function roundHalfEven(value: number): number {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 === 0 ? below : below + 1;
}

const PRECISION = 120n;
const LN2 = 2n * atanh((1n << PRECISION) / 3n);

/**
 * The natural logarithm, rounded correctly, as Python's is: its last bit decides between grids of equal error (a square: 2 × 3 or 3 × 2).
 * JavaScript's Math.log may be off by that bit.
 */
function log(value: number): number {
  const exponent = Math.floor(Math.log2(value));
  const mantissa = BigInt((value / 2 ** exponent) * 2 ** 52);
  const one = 2n ** 52n;
  const fixed = 2n * atanh(((mantissa - one) << PRECISION) / (mantissa + one)) + BigInt(exponent) * LN2;
  return Number(fixed) / 2 ** Number(PRECISION);
}

/** Of a fixed-point number of at most 1/3 or so. */
function atanh(z: bigint): bigint {
  const square = (z * z) >> PRECISION;
  let sum = 0n;
  for (let power = z, k = 1n; power !== 0n && power !== -1n; power = (power * square) >> PRECISION, k += 2n)
    sum += power / k;
  return sum;
}
