/** The event files of a run, read by TensorBoard's own reader. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { promisify } from 'node:util';
import { projectRoot } from '../support/fixtures.js';
import { smallConfig, steps, train } from '../support/train.js';

test('TensorBoard reads every scalar of a run, at its step', async () => {
  const dir = await mkdtemp(join(tmpdir(), 'martlet-'));
  try {
    const { events } = await train(
      smallConfig(dir, { report_to: 'tensorboard', eval_strategy: 'steps', eval_steps: 3, split_dataset_ratio: 0.3 }),
    );
    const python = join(projectRoot, '.venv-interop/bin/python');
    const script = join(projectRoot, 'test/reference/read_tensorboard.py');
    const { stdout } = await promisify(execFile)(python, [script, join(dir, 'out/runs')]);
    const scalars = JSON.parse(stdout) as Record<string, [step: number, value: number][]>;
    const expected = (value: (event: ReturnType<typeof steps>[number]) => number) =>
      steps(events).map((event) => [event.step, Math.fround(value(event))]);
    assert.deepEqual(
      scalars['train/loss'],
      expected(({ loss }) => loss),
    );
    assert.deepEqual(
      scalars['train/learning_rate'],
      expected(({ learningRate }) => learningRate),
    );
    const evaluations = events.filter((event) => event.type === 'eval');
    assert.ok(evaluations.length > 0);
    assert.deepEqual(
      scalars['eval/loss'],
      evaluations.map(({ step, loss }) => [step, Math.fround(loss)]),
    );
  } finally {
    await rm(dir, { recursive: true });
  }
});
