/** martlet in worker_threads: the same results, and a terminated worker takes nothing else with it. */
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { lastJson, runChild, slowConfig } from '../support/process.js';
import { MODEL, smallConfig } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtemp(join(root, 'run-'));

test('two workers at once, one training and one answering, give what the main thread gives', async () => {
  const jobs = [
    { kind: 'train', config: smallConfig(await folder(), { max_steps: 4 }) },
    { kind: 'generate', model: MODEL, tokens: 40 },
  ];
  const { code, signal, stdout, stderr } = await runChild('workers', { scenario: 'results', jobs });
  assert.deepEqual({ code, signal, stderr }, { code: 0, signal: null, stderr: '' });
  const { inWorkers, here } = lastJson<{ inWorkers: number[][]; here: number[][] }>(stdout);
  assert.deepEqual(
    here.map((list) => list.length),
    [4, 40],
  );
  assert.deepEqual(inWorkers, here);
});

for (const kind of ['train', 'generate'] as const) {
  test(`terminate() in the middle of ${kind}: it resolves, and main thread and new workers go on`, async () => {
    const jobs = [
      kind === 'train' ? { kind, config: slowConfig(await folder()) } : { kind, model: MODEL, tokens: 100_000 },
      { kind: 'generate', model: MODEL, tokens: 8 },
    ];
    const { code, signal, stdout, stderr } = await runChild('workers', { scenario: 'terminate', jobs });
    assert.deepEqual({ code, signal, stderr }, { code: 0, signal: null, stderr: '' });
    const { seconds, finished, after } = lastJson<{ seconds: number; finished: boolean; after: number[][] }>(stdout);
    assert.equal(finished, false, 'the job was in its middle');
    assert.ok(seconds < 5, `${seconds} s`);
    assert.equal(after[0]?.length, 8);
    assert.deepEqual(after[1], after[0]);
  });
}
