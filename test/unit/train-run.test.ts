import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { promisify } from 'node:util';
import { type RunControl, startRun } from '../../lib/api/train-run.js';
import type { TrainEvent, TrainResult } from '../../lib/api/types.js';

const RESULT: TrainResult = {
  outputDir: 'out',
  adapterDir: 'out',
  steps: 3,
  finalLoss: 1,
  trainableParams: 1,
  totalParams: 2,
  skipped: [],
  skippedSteps: 0,
  stopped: false,
  stoppedEarly: false,
};
const warning = (message: string): TrainEvent => ({ type: 'warning', message });

/** Steps until it is stopped or aborted, at most `count` of them. */
function ticking(count: number) {
  const seen = { steps: 0, cleanedUp: false };
  const body = async (control: RunControl) => {
    try {
      while (seen.steps < count && !control.stopSignal.aborted) {
        await sleep(2);
        control.signal.throwIfAborted();
        control.emit(warning(String(++seen.steps)));
      }
      return { ...RESULT, steps: seen.steps, stopped: control.stopSignal.aborted };
    } finally {
      await sleep(5);
      seen.cleanedUp = true;
    }
  };
  return { seen, body };
}

test('awaiting gives the result, iterating the events, the last of which is the result', async () => {
  const run = startRun(ticking(3).body);
  const events: TrainEvent[] = [];
  for await (const event of run) events.push(event);
  assert.deepEqual(
    events.map((event) => event.type),
    ['warning', 'warning', 'warning', 'done'],
  );
  assert.deepEqual(events.at(-1), { type: 'done', ...(await run) });
  assert.equal((await run.result).steps, 3);
});

test('a loop that starts late still gets every event', async () => {
  const run = startRun(ticking(3).body);
  await run;
  let count = 0;
  for await (const _ of run) count++;
  assert.equal(count, 4);
});

test('leaving the loop aborts the run and waits until it has wound down', async () => {
  const { seen, body } = ticking(1000);
  const run = startRun(body);
  for await (const event of run) if (event.type === 'warning' && event.message === '3') break;
  assert.equal(seen.cleanedUp, true);
  assert.ok(seen.steps < 10);
  await assert.rejects(run.result, { name: 'AbortError' });
});

test('stop() lets the run end by itself', async () => {
  const { body } = ticking(1000);
  const run = startRun(body);
  setTimeout(() => run.stop(), 10);
  const result = await run;
  assert.equal(result.stopped, true);
  assert.ok(result.steps < 1000);
});

test('the signal of the caller reaches the run', async () => {
  const abort = new AbortController();
  const run = startRun(ticking(1000).body, abort.signal);
  setTimeout(() => abort.abort(new Error('enough')), 10);
  await assert.rejects(async () => void (await run), /enough/);
});

test('a failure is thrown in the loop, after the events before it', async () => {
  const run = startRun(async (control) => {
    control.emit(warning('before'));
    await sleep(1);
    throw new Error('broken');
  });
  const events: TrainEvent[] = [];
  await assert.rejects(async () => {
    for await (const event of run) events.push(event);
  }, /broken/);
  assert.equal(events.length, 1);
});

/** Exit code of a script that uses a failing run in some way. */
async function exitCodeOf(use: string): Promise<number> {
  const module = pathToFileURL(new URL('../../lib/api/train-run.js', import.meta.url).pathname).href;
  const script = `import { startRun } from ${JSON.stringify(module)};
    const run = startRun(async () => { await new Promise((r) => setTimeout(r, 5)); throw new Error('broken'); });
    ${use}`;
  try {
    await promisify(execFile)(process.execPath, ['--input-type=module', '-e', script]);
    return 0;
  } catch (error) {
    return (error as { code: number }).code;
  }
}

test('a failing run that is only iterated leaves no unhandled rejection; one that nobody watches does', async () => {
  assert.equal(await exitCodeOf('(async () => { try { for await (const _ of run); } catch {} })();'), 0);
  assert.equal(await exitCodeOf('run.then(() => {}, () => {});'), 0);
  assert.equal(await exitCodeOf(''), 1);
});
