import assert from 'node:assert/strict';
import { test } from 'node:test';
import { firstFit, groupByLength } from '../../lib/api/packing.js';
import { Rng } from '../../lib/api/rng.js';
import { Schedule } from '../../lib/api/train-schedule.js';
import { cutSample } from '../../lib/data/truncate.js';
import type { EncodedSample } from '../../lib/processing/types.js';

const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);

test('first fit: every row once, no bin over its capacity, each row in the first bin with room', () => {
  const rng = new Rng(3);
  const lengths = Array.from({ length: 500 }, () => 1 + rng.below(100));
  const order = new Rng(4).permutation(500);
  const bins = firstFit(order, lengths, 128);
  // the plain rule, bin by bin
  const plain: number[][] = [];
  const room: number[] = [];
  for (const row of Array.from(order).sort((a, b) => (lengths[b] as number) - (lengths[a] as number))) {
    const length = lengths[row] as number;
    let bin = room.findIndex((left) => left >= length);
    if (bin < 0) bin = room.push(128) - 1;
    room[bin] = (room[bin] as number) - length;
    plain[bin] = [...(plain[bin] ?? []), row];
  }
  assert.deepEqual(bins, plain);
  assert.ok(room.every((left) => left >= 0));
  assert.ok(sum(lengths) / (128 * bins.length) > 0.95);
  assert.deepEqual(firstFit([0, 1, 2], [200, 5, 5], 100), [[0], [1, 2]], 'a row that is too long has a bin to itself');
});

test('a packed schedule: the same bins in every epoch in another order, reproducible; a step sees whole bins', () => {
  const lengths = Array.from({ length: 40 }, (_, i) => 10 + ((i * 7) % 30));
  const plan = {
    rows: 40,
    batchSize: 2,
    accumulation: 2,
    epochs: 2,
    maxSteps: -1,
    shuffleDataset: true,
    shuffleEpochs: true,
    dataSeed: 1,
    seed: 2,
    packingLength: 64,
    groupByLength: false,
  };
  const schedule = new Schedule(plan, lengths);
  const steps = [...schedule.from(1)];
  assert.equal(steps.length, 2 * schedule.stepsPerEpoch);
  const epoch = (n: number) => steps.filter((step) => step.epoch === n).flatMap(({ microBatches }) => microBatches);
  for (const n of [0, 1]) {
    assert.deepEqual(
      epoch(n)
        .flat()
        .sort((a, b) => a - b),
      lengths.map((_, i) => i),
    );
    for (const micro of epoch(n)) assert.ok(sum(micro.map((row) => lengths[row] as number)) <= 128);
  }
  assert.notDeepEqual(epoch(0), epoch(1));
  assert.deepEqual([...new Schedule(plan, lengths).from(1)], steps);
});

test('grouping by length: transformers’ rule, every row once, the longest first, neighbours alike', () => {
  const rng = new Rng(5);
  const lengths = Array.from({ length: 400 }, () => 1 + rng.below(1000));
  const order = Array.from(groupByLength(new Rng(9), lengths, 8));
  assert.deepEqual(
    [...order].sort((a, b) => a - b),
    lengths.map((_, i) => i),
  );
  assert.equal(lengths[order[0] as number], Math.max(...lengths));
  const spread = (rows: number[]) => {
    const values = rows.map((row) => lengths[row] as number);
    return Math.max(...values) - Math.min(...values);
  };
  const batches = Array.from({ length: 49 }, (_, i) => order.slice(8 * (i + 1), 8 * (i + 2)));
  assert.ok(sum(batches.map(spread)) / batches.length < 250, 'random batches of 8 span about 780');
  assert.deepEqual(Array.from(groupByLength(new Rng(9), lengths, 8)), order);
});

/** Ids 0…n−1, pictures at the spans, every token outside them labelled. */
function sample(n: number, spans: [number, number][]): EncodedSample {
  const inSpan = (i: number) => spans.some(([from, to]) => i >= from && i < to);
  return {
    inputIds: Int32Array.from({ length: n }, (_, i) => i),
    labels: Int32Array.from({ length: n }, (_, i) => (inSpan(i) || i === 0 ? -100 : i)),
    images: spans.map(([from]) => ({
      data: Uint8Array.of(from),
      width: 1,
      height: 1,
    })) as unknown as EncodedSample['images'],
    mediaSpans: spans,
  };
}
const shape = (piece: EncodedSample) => [
  piece.inputIds[0],
  piece.inputIds.at(-1),
  piece.images.map(({ data }) => data[0]),
  piece.mediaSpans,
];

test('cut right and left: at most max_length, a picture at the edge goes as a whole with its pixels', () => {
  const row = sample(20, [
    [2, 6],
    [12, 16],
  ]);
  assert.deepEqual(cutSample(row, 20, 'right'), [row]);
  assert.deepEqual(cutSample(row, 13, 'right').map(shape), [[0, 11, [2], [[2, 6]]]]);
  assert.deepEqual(cutSample(row, 16, 'right').map(shape), [
    [
      0,
      15,
      [2, 12],
      [
        [2, 6],
        [12, 16],
      ],
    ],
  ]);
  assert.deepEqual(cutSample(row, 4, 'right').map(shape), [[0, 1, [], []]]);
  const [left] = cutSample(row, 16, 'left');
  assert.deepEqual(shape(left as EncodedSample), [6, 19, [12], [[6, 10]]]);
  assert.equal((left as EncodedSample).labels?.[0], -100, 'nothing stands before the first token');
});

test('split: pieces in order, all text kept, no picture cut; one that is too large for any piece is dropped', () => {
  const row = sample(20, [
    [4, 10],
    [12, 14],
  ]);
  const pieces = cutSample(row, 7, 'split');
  assert.deepEqual(pieces.map(shape), [
    [0, 3, [], []],
    [4, 10, [4], [[0, 6]]],
    [11, 17, [12], [[1, 3]]],
    [18, 19, [], []],
  ]);
  assert.deepEqual(cutSample(row, 5, 'split').map(shape), [
    [0, 3, [], []],
    [10, 14, [12], [[2, 4]]],
    [15, 19, [], []],
  ]);
});
