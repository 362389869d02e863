import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { MartletError } from '../../lib/index.js';
import { QWEN3_VL } from '../../lib/processing/qwen3_vl.js';
import { roundHalfEven, type Size, smartResize } from '../../lib/processing/smart-resize.js';
import { projectRoot } from '../support/fixtures.js';

/** transformers' results (test/reference/make_smart_resize.py); null = ValueError. */
const table = JSON.parse(readFileSync(join(projectRoot, 'test/fixtures/smart_resize.json'), 'utf8')) as {
  /** factor, min, max, height, width, [height, width] */
  pictures: [number, number, number, number, number, [number, number] | null][];
  /** factor, min, max, frames, height, width, [height, width] */
  videos: [number, number, number, number, number, number, [number, number] | null][];
};

function check(resize: () => Size, wanted: [number, number] | null, what: string): void {
  if (wanted !== null) {
    const { height, width } = resize();
    assert.deepEqual([height, width], wanted, what);
    return;
  }
  assert.throws(resize, (error: MartletError) => error.code === 'ERR_MARTLET_IMAGE' && /200/.test(error.message), what);
}

test('sizes of pictures: as transformers for every pair of sides and limits', () => {
  assert.ok(table.pictures.some(([, , , , , wanted]) => wanted === null));
  for (const [factor, min, max, height, width, wanted] of table.pictures)
    check(() => smartResize({ height, width }, factor, { min, max }), wanted, `${height}×${width} by ${factor}`);
});

test("sizes of Qwen3-VL's videos: limits on all frames together, as transformers", () => {
  for (const [factor, min, max, frames, height, width, wanted] of table.videos) {
    const limits = { size: { min, max }, frame: {}, total: undefined, capTokens: undefined };
    const resize = () => QWEN3_VL.videoSize({ height, width }, frames, factor, limits, 'video');
    check(resize, wanted, `${frames} of ${height}×${width} by ${factor}`);
  }
});

test('a half is rounded to the even neighbour', () => {
  assert.deepEqual([0.5, 1.5, 2.5, 2.49, 2.51, 3].map(roundHalfEven), [0, 2, 2, 2, 3, 3]);
});

test('the message of a picture that is too long names it, its size and the limit', () => {
  assert.throws(
    () => smartResize({ width: 4000, height: 10 }, 28, { min: 1, max: 1e6 }, { label: 'strip.png' }),
    (error: unknown) => {
      assert.ok(error instanceof MartletError);
      assert.match(error.message, /strip\.png is 4000×10.*400 times.*200/);
      assert.deepEqual(error.details, { path: 'strip.png', width: 4000, height: 10 });
      return true;
    },
  );
});
