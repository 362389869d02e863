import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Rng } from '../../lib/api/rng.js';
import { Schedule, type SchedulePlan, warmupSteps } from '../../lib/api/train-schedule.js';

const plan = (changes: Partial<SchedulePlan>): SchedulePlan => ({
  rows: 10,
  batchSize: 1,
  accumulation: 1,
  epochs: 1,
  maxSteps: -1,
  shuffleDataset: false,
  shuffleEpochs: false,
  dataSeed: 42,
  seed: 42,
  packingLength: 0,
  groupByLength: false,
  ...changes,
});

const all = (schedule: Schedule) => Array.from({ length: schedule.totalSteps }, (_, i) => schedule.step(i + 1));

test('steps are counted as transformers counts them', () => {
  // rows, batch, accumulation, epochs, max_steps → steps an epoch, steps
  const cases: [number, number, number, number, number, number, number][] = [
    [10, 1, 4, 3, -1, 3, 9],
    [10, 3, 2, 1, -1, 2, 2],
    [10, 4, 16, 3, -1, 1, 3],
    [1000, 1, 16, 3, -1, 63, 189],
    [10, 1, 4, 0.5, -1, 3, 2],
    [10, 1, 4, 3, 5, 3, 5],
    [10, 1, 4, 1, 20, 3, 20],
  ];
  for (const [rows, batchSize, accumulation, epochs, maxSteps, perEpoch, total] of cases) {
    const schedule = new Schedule(plan({ rows, batchSize, accumulation, epochs, maxSteps }));
    assert.deepEqual([schedule.stepsPerEpoch, schedule.totalSteps], [perEpoch, total]);
  }
});

test('the last step of an epoch takes what is left, and no row is lost or doubled', () => {
  const schedule = new Schedule(plan({ rows: 10, batchSize: 3, accumulation: 3, epochs: 2 }));
  const steps = all(schedule);
  assert.deepEqual(
    steps.map((step) => step.microBatches.map((batch) => batch.length)),
    [[3, 3, 3], [1], [3, 3, 3], [1]],
  );
  assert.deepEqual(
    steps.map((step) => step.epochProgress),
    [0.75, 1, 1.75, 2],
  );
  assert.deepEqual(
    steps.slice(0, 2).flatMap((step) => step.microBatches.flat()),
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
  );
});

test('every epoch is another permutation; the seeds decide it; any step can be asked for first', () => {
  const shuffled = plan({ rows: 50, epochs: 2, shuffleDataset: true, shuffleEpochs: true });
  const order = all(new Schedule(shuffled)).map((step) => step.microBatches[0]?.[0]);
  const [first, second] = [order.slice(0, 50), order.slice(50)];
  assert.notDeepEqual(first, second);
  for (const epoch of [first, second]) {
    assert.deepEqual(
      [...epoch].sort((a, b) => (a as number) - (b as number)),
      Array.from({ length: 50 }, (_, i) => i),
    );
  }
  assert.deepEqual(
    all(new Schedule(shuffled)).map((step) => step.microBatches[0]?.[0]),
    order,
  );
  assert.equal(new Schedule(shuffled).step(77).microBatches[0]?.[0], order[76]);
  for (const change of [{ seed: 43 }, { dataSeed: 43 }, { shuffleDataset: false }]) {
    const other = all(new Schedule({ ...shuffled, ...change })).map((step) => step.microBatches[0]?.[0]);
    assert.notDeepEqual(other, order, JSON.stringify(change));
  }
  const once = all(new Schedule({ ...shuffled, shuffleEpochs: false })).map((step) => step.microBatches[0]?.[0]);
  assert.deepEqual(once.slice(0, 50), once.slice(50), 'without train_dataloader_shuffle every epoch has one order');
  assert.notDeepEqual(
    once.slice(0, 50),
    Array.from({ length: 50 }, (_, i) => i),
  );
});

test('warm-up steps win over the ratio, which is rounded up', () => {
  assert.deepEqual([warmupSteps(189, 0, 0.05), warmupSteps(189, 7, 0.05), warmupSteps(189, 0, 0)], [10, 7, 0]);
});

test('the generator is uniform and its streams differ', () => {
  const counts = new Array(6).fill(0);
  const rng = new Rng(1);
  for (let i = 0; i < 60_000; i++) counts[rng.below(6)]++;
  for (const count of counts) assert.ok(Math.abs(count - 10_000) < 500, String(counts));
  const heads = new Set([0, 1, 2].flatMap((seed) => [0, 1, 2].map((stream) => new Rng(seed, stream).uint32())));
  assert.equal(heads.size, 9);
});
