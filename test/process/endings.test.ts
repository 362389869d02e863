/** However a process ends in the middle of a job, it ends as a Node process does: its own code, no signal, no crash. */
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { QUICKSTART_MODEL, runChild, slowConfig } from '../support/process.js';
import { MODEL } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const config = async () => slowConfig(await mkdtemp(join(root, 'run-')));

/** A cancelled job ends within a second; a second more for a busy machine to start and end Node. */
const limit = 40_000;

for (const job of ['train', 'generate', 'load'] as const) {
  const model = job === 'generate' ? MODEL : QUICKSTART_MODEL;
  test(`process.exit() in the middle of ${job} ends with its code`, async () => {
    const { code, signal, stdout, stderr } = await runChild(
      'endings',
      { job, ending: 'exit', model, config: await config() },
      { limit },
    );
    assert.equal(stdout, 'in mid-job\n');
    assert.deepEqual({ code, signal, stderr }, { code: 7, signal: null, stderr: '' });
  });

  test(`an uncaught exception in the middle of ${job} ends with 1 and says what was thrown`, async () => {
    const { code, signal, stdout, stderr } = await runChild(
      'endings',
      { job, ending: 'throw', model, config: await config() },
      { limit },
    );
    assert.equal(stdout, 'in mid-job\n');
    assert.deepEqual({ code, signal }, { code: 1, signal: null });
    assert.match(stderr, /Error: thrown on purpose\n/);
  });
}

test('a loaded model that does nothing does not hold the process', async () => {
  const { code, signal, stdout, stderr } = await runChild(
    'endings',
    { job: 'none', ending: 'return', model: MODEL, config: {} },
    { limit },
  );
  assert.deepEqual({ code, signal, stdout, stderr }, { code: 5, signal: null, stdout: 'loaded\n', stderr: '' });
});
