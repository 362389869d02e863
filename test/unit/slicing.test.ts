/** How MiniCPM-V cuts pictures, against its own code (test/reference/take_small.py). */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { slicePicture } from '../../lib/processing/slicing.js';
import { projectRoot } from '../support/fixtures.js';

interface Row {
  width: number;
  height: number;
  grid: [number, number] | null;
  source: [number, number];
  refine: [number, number] | null;
  tgt_sizes: [number, number][];
}

const table = JSON.parse(readFileSync(join(projectRoot, 'test/fixtures/minicpm_v/slicing.json'), 'utf8')) as {
  scale_resolution: number;
  patch_size: number;
  max_slice_nums: number;
  rows: Row[];
};
const options = {
  maxSliceNums: table.max_slice_nums,
  scaleResolution: table.scale_resolution,
  patchSize: table.patch_size,
};

test('grid, sizes and patches of every size in the table', () => {
  assert.equal(table.rows.length, 102);
  for (const { width, height, grid, source, refine, tgt_sizes } of table.rows) {
    const slicing = slicePicture({ width, height }, options);
    assert.deepEqual(
      {
        grid: slicing.grid ? [slicing.grid.columns, slicing.grid.rows] : null,
        source: [slicing.source.width, slicing.source.height],
        refine: slicing.refine ? [slicing.refine.width, slicing.refine.height] : null,
        tgt_sizes: slicing.patches.map(({ rows, columns }) => [rows, columns]),
      },
      { grid, source, refine, tgt_sizes },
      `${width} × ${height}`,
    );
  }
});

test('ties that only the last bit of a logarithm decides', () => {
  // With Python's math.log; JavaScript's Math.log gives 6 × 2 for the second.
  const cases: [number, number, number, [number, number]][] = [
    [1143, 1143, 9, [3, 2]],
    [2110, 1055, 16, [4, 3]],
  ];
  for (const [width, height, maxSliceNums, [columns, rows]] of cases)
    assert.deepEqual(slicePicture({ width, height }, { ...options, maxSliceNums }).grid, { columns, rows });
});

test('max_slice_nums 1 never cuts', () => {
  assert.equal(slicePicture({ width: 4000, height: 3000 }, { ...options, maxSliceNums: 1 }).grid, undefined);
});
