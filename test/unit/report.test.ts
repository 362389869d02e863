import assert from 'node:assert/strict';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import type { TrainEvent } from '../../lib/api/types.js';
import { bytes, duration, significant } from '../../lib/report/format.js';
import { plotSvg } from '../../lib/report/plots.js';
import { createProgressRenderer } from '../../lib/report/progress.js';
import { RunLog } from '../../lib/report/run-log.js';

const step: TrainEvent = {
  type: 'step',
  step: 46,
  epoch: 0.736,
  loss: 1.049,
  gradNorm: 0.6095,
  learningRate: 9.035e-5,
  tokenAccuracy: 0.7018,
  tokens: 120_000,
  tokensPerSecond: 1234.5,
  smoothedLoss: 1.1,
  samplesPerSecond: 2.5,
  labelledTokensPerSecond: 456,
  dataWait: 0.02,
  memory: 3.25 * 2 ** 30,
  memoryAllocated: 3 * 2 ** 30,
  lossScale: 1,
  skippedSteps: 0,
  elapsed: 1074,
  remaining: 3338,
};
const start = {
  type: 'start',
  config: {},
  outputDir: 'out',
  steps: 189,
  epochs: 3,
  rows: 1000,
  trainableParams: 1_000_000,
  totalParams: 50_000_000,
  parts: { vision: 0, projector: 0, language: 1_000_000 },
  targets: 14,
  sample: 'USER: hi ASSISTANT: [[hello</s>]]',
} as unknown as TrainEvent;

class Screen {
  text = '';
  constructor(
    readonly isTTY: boolean,
    readonly columns = 120,
  ) {}
  write(text: string): void {
    this.text += text;
  }
}

test('durations, sizes and numbers read as ms-swift prints them', () => {
  assert.deepEqual([0, 59.6, 1074, 7503, 90_000, Number.NaN].map(duration), [
    '0s',
    '1m 0s',
    '17m 54s',
    '2h 5m 3s',
    '1d 1h 0m',
    '?',
  ]);
  assert.deepEqual([5e8, 3.25 * 2 ** 30].map(bytes), ['477 MiB', '3.25 GiB']);
  assert.deepEqual([1.04912, 9.0351e-5, 1e-4, 0, 123456].map(significant), [
    '1.049',
    '9.035e-05',
    '1e-04',
    '0',
    '123500',
  ]);
});

test('on a terminal the bar is redrawn in place and keeps within the width', () => {
  for (const columns of [120, 80, 30]) {
    const screen = new Screen(true, columns);
    const progress = createProgressRenderer(screen);
    progress.handle(start);
    const before = screen.text.length;
    progress.handle(step);
    const drawn = screen.text.slice(before);
    assert.ok(drawn.startsWith('\r\x1b[2K'), 'the line is cleared first');
    assert.ok(!drawn.includes('\n'), 'no new line');
    assert.ok(drawn.length - '\r\x1b[2K'.length < columns, `fits into ${columns} columns`);
  }
  const unknown = new Screen(true, 0);
  const plain = createProgressRenderer(unknown);
  plain.handle(start);
  plain.handle(step);
  assert.ok(unknown.text.includes('46/189'), 'a terminal that does not know its width shows a bar too');
  const wide = new Screen(true, 140);
  const progress = createProgressRenderer(wide);
  progress.handle(start);
  progress.handle(step);
  for (const part of ['24%', '46/189', 'loss 1.049', 'lr 9.035e-05', '3.25 GiB', '1,235 tok/s', 'left 55m 38s']) {
    assert.ok(wide.text.includes(part), part);
  }
  progress.handle({ type: 'checkpoint', step: 46, dir: 'out/checkpoint-46' });
  assert.match(wide.text, /checkpoint: out\/checkpoint-46\n.*46\/189/s, 'the bar comes back below the message');
});

test('elsewhere every event is a plain line', () => {
  const screen = new Screen(false);
  const progress = createProgressRenderer(screen);
  progress.handle(start);
  progress.handle(step);
  progress.handle({ type: 'warning', message: 'only 8 rows' });
  progress.close();
  assert.ok(!screen.text.includes('\r') && !screen.text.includes('\x1b'));
  assert.match(screen.text, /\nstep 46\/189 {2}loss 1\.049 .*\nwarning: only 8 rows\n$/);
  assert.ok(screen.text.includes('[[hello</s>]]'));
});

test("logging.jsonl has ms-swift's keys, train.log the time, runs/ an event file; reopening appends", async () => {
  const dir = await mkdtemp(join(tmpdir(), 'martlet-'));
  try {
    const log = await RunLog.open({ outputDir: dir, totalSteps: 189, resumedStep: 0, tensorboard: true });
    await log.event(start);
    await log.event(step);
    await log.event({ type: 'eval', step: 46, epoch: 0.736, loss: 1.5, tokenAccuracy: 0.5, seconds: 2 });
    await log.close();
    const again = await RunLog.open({ outputDir: dir, totalSteps: 189, resumedStep: 46, tensorboard: false });
    await again.event({ ...step, step: 47 } as TrainEvent);
    await again.close();
    const lines = (await readFile(join(dir, 'logging.jsonl'), 'utf8'))
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line));
    assert.deepEqual(lines[0], {
      loss: 1.049,
      grad_norm: 0.6095,
      learning_rate: 9.035e-5,
      token_acc: 0.7018,
      epoch: 0.736,
      'global_step/max_steps': '46/189',
      elapsed_time: '17m 54s',
      remaining_time: '55m 38s',
      'memory(GiB)': 3.25,
      'train_speed(s/it)': 23.3478,
      'memory_allocated(GiB)': 3,
      tokens_per_second: 1234.5,
      labelled_tokens_per_second: 456,
      samples_per_second: 2.5,
      data_wait: 0.02,
    });
    assert.deepEqual(
      [lines[1].eval_loss, lines[1].eval_token_acc, lines[1].eval_runtime, lines[1]['global_step/max_steps']],
      [1.5, 0.5, 2, '46/189'],
    );
    assert.equal(lines[2]['global_step/max_steps'], '47/189');
    assert.equal(lines[2]['train_speed(s/it)'], 1074, 'steps of an earlier process do not count');
    const text = (await readFile(join(dir, 'logs', 'train.log'), 'utf8')).trimEnd().split('\n');
    assert.equal(text.length, 6);
    for (const line of text) assert.match(line, /^\d{4}-\d\d-\d\dT[\d:.]+Z {2}\S/);
    assert.deepEqual(
      (await readdir(join(dir, 'runs'))).map((name) => /^events\.out\.tfevents\.\d+\./.test(name)),
      [true],
    );
    const plots = await readdir(join(dir, 'images'));
    const loss = await readFile(join(dir, 'images', 'train_loss.svg'), 'utf8');
    assert.equal(/points="([^"]*)"/.exec(loss)?.[1]?.split(' ').length, 2, 'the curve goes on where it was left');
    for (const name of ['train_loss.svg', 'train_memory.svg', 'train_data_wait.svg', 'eval_loss.svg']) {
      assert.ok(plots.includes(name), `${name}: ${plots}`);
    }
  } finally {
    await rm(dir, { recursive: true });
  }
});

test('a plot holds the curve, its smoothed form and round ticks, whatever the values', () => {
  const curve = Array.from({ length: 5000 }, (_, i) => ({ step: i + 1, value: 3 / (1 + i / 500) }));
  const svg = plotSvg('train/loss <a>', curve, 0.9);
  assert.equal(svg.split('<polyline').length, 3);
  assert.ok(svg.includes('train/loss &lt;a>') && svg.includes('>2000<') && svg.includes('>1<'));
  const points = /points="([^"]*)"/.exec(svg)?.[1]?.split(' ') ?? [];
  assert.ok(points.length > 1000 && points.length <= 2001);
  const [x, y] = (points[0] as string).split(',').map(Number);
  assert.ok(
    Math.abs((x as number) - 78) < 0.2 && Math.abs((y as number) - 34) < 0.2,
    'the highest value is at the top left',
  );
  for (const values of [[1], [2, 2, 2], [0, 0], [-1e-9, 1e-9], [1e300, 2e300]]) {
    const flat = plotSvg(
      'x',
      values.map((value, i) => ({ step: i, value })),
    );
    assert.ok(!/NaN|Infinity|undefined/.test(flat), flat);
  }
});
