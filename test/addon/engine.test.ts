/** The engine's promises: jobs in order, prompt aborts, an event loop that is free, memory that comes back. */
import assert from 'node:assert/strict';
import { readdirSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { loadModel, mergeAdapter, trainLoRA } from '../../lib/index.js';
import { Engine } from '../../lib/native/engine.js';
import { expectedJson, getCase, llava } from '../support/fixtures.js';
import {
  CALM,
  coreWait,
  LONG_QUESTION,
  lastJson,
  QUICKSTART_MODEL,
  runChild,
  slowConfig,
  talkative,
} from '../support/process.js';
import { MODEL } from '../support/train.js';

Object.assign(process.env, CALM);

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtemp(join(root, 'run-'));

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
/** Rejection of `promise` and the milliseconds until it came, less those in which a thread waited for a core. */
async function rejection(
  promise: Promise<unknown>,
): Promise<{ error: { code?: string; cause?: unknown }; ms: number }> {
  const started = performance.now();
  const waited = coreWait();
  try {
    await promise;
  } catch (error) {
    return { error: error as { code?: string }, ms: performance.now() - started - waited() };
  }
  waited();
  return assert.fail('was not rejected');
}

test('jobs of one engine run one after another, in the order of the calls; two engines run side by side', async () => {
  const [one, two] = [new Engine(), new Engine()];
  const ended: string[] = [];
  const sleep = (engine: Engine, name: string, ms: number) => engine.call('sleep', { ms }).then(() => ended.push(name));
  const started = performance.now();
  await Promise.all([sleep(one, 'a', 300), sleep(one, 'b', 100), sleep(one, 'c', 0), sleep(two, 'other', 150)]);
  const took = performance.now() - started;
  assert.deepEqual(
    ended.filter((name) => name !== 'other'),
    ['a', 'b', 'c'],
  );
  assert.ok(ended.indexOf('other') < ended.indexOf('b'), ended.join());
  assert.ok(took >= 400, `${took} ms: a and b did not overlap`);
  await Promise.all([one.close(), two.close()]);
});

test('questions asked at once are answered in their order, each as if it were alone', async () => {
  const model = await loadModel(MODEL, { device: 'cpu' });
  const ended: string[] = [];
  const names = Object.keys(expectedJson.greedy);
  await Promise.all(
    names.map(async (name) => {
      const { messages, images } = getCase(name);
      const out = await model.generate({
        messages: messages.slice(0, -1),
        images: images.map((image) => join(llava, 'images', image)),
        temperature: 0,
        maxNewTokens: 24,
      });
      assert.deepEqual([...out.tokenIds], expectedJson.greedy[name], name);
      ended.push(name);
    }),
  );
  assert.equal(ended.length, names.length);
  await model.dispose();
});

test('a job that fails leaves the engine as it was', async () => {
  const engine = new Engine();
  await assert.rejects(engine.call('load', { modelDir: join(root, 'none'), device: 'cpu', dtype: 'auto' }), {
    code: /^ERR_MARTLET_/,
  });
  await assert.rejects(engine.call('no.such.method' as 'stats', {}), { code: /^ERR_MARTLET_/ });
  await assert.rejects(
    engine.call('stats', [] as never).then(() => engine.call('generate', {} as never)),
    {
      code: /^ERR_MARTLET_/,
    },
  );
  await engine.call('load', { modelDir: MODEL, device: 'cpu', dtype: 'auto' });
  await engine.close();
});

test('an abort, or an error of the listener, in the middle of loading or merging ends it; nothing is left', async () => {
  const reason = new Error('enough');
  const load = (onProgress: () => void, signal?: AbortSignal) =>
    loadModel(QUICKSTART_MODEL, { device: 'cpu', onProgress, ...(signal && { signal }) });
  const merge = (onProgress: () => void, signal?: AbortSignal) =>
    mergeAdapter({
      model: MODEL,
      adapter: join(llava, 'adapter-peft'),
      outputDir: join(root, 'merged'),
      onProgress,
      ...(signal && { signal }),
    });
  for (const job of [load, merge]) {
    const abort = new AbortController();
    const { error, ms } = await rejection(job(() => abort.abort(reason), abort.signal));
    assert.deepEqual([error.code, error.cause], ['ERR_MARTLET_ABORTED', reason]);
    assert.ok(ms < 5000, `${ms} ms`);
    const listener = () => {
      throw reason;
    };
    assert.equal((await rejection(job(listener))).error, reason);
  }
  assert.ok(readdirSync(root).every((name) => !name.includes('merged')));
});

for (const [what, rows, microBatches] of [
  ['of many small batches', 2, 64],
  ['of one batch that takes seconds', 32, 1],
] as const) {
  test(`an abort in the middle of a training step ${what} settles within 1 s`, async () => {
    const abort = new AbortController();
    const reason = new Error('enough');
    const config = {
      ...slowConfig(await folder(), rows * microBatches),
      per_device_train_batch_size: rows,
      gradient_accumulation_steps: microBatches,
    };
    const run = trainLoRA(config, { signal: abort.signal });
    let steps = 0;
    const ended = (async () => {
      for await (const event of run) {
        if (event.type === 'start') setTimeout(() => abort.abort(reason), 800);
        if (event.type === 'step') steps++;
      }
    })();
    ended.catch(() => {});
    await new Promise((resolve) => abort.signal.addEventListener('abort', resolve));
    const { error, ms } = await rejection(ended);
    assert.deepEqual([error.code, error.cause], ['ERR_MARTLET_ABORTED', reason]);
    assert.equal(steps, 0, 'the first step was running');
    assert.ok(ms < 1000, `${ms} ms`);
  });
}

test('an abort of a generation, and of one that waits behind it, settles within 1 s; the model goes on', async () => {
  const model = await loadModel(talkative(root), { device: 'cpu' });
  const abort = new AbortController();
  let tokens = 0;
  const running = (async () => {
    for await (const _ of model.stream({ ...LONG_QUESTION, signal: abort.signal })) if (++tokens === 3) abort.abort();
  })();
  const waiting = rejection(model.generate({ ...LONG_QUESTION, signal: abort.signal }));
  running.catch(() => {});
  await new Promise((resolve) => abort.signal.addEventListener('abort', resolve));
  const { error, ms } = await rejection(running);
  assert.equal(error.code, 'ERR_MARTLET_ABORTED');
  assert.ok(ms < 1000, `${ms} ms`);
  assert.equal((await waiting).error.code, 'ERR_MARTLET_ABORTED');
  assert.equal((await model.generate({ ...LONG_QUESTION, maxNewTokens: 3 })).usage.completionTokens, 3);
  await model.dispose();
});

test('a job that waits behind a long one is aborted within 1 s, the long one goes on', async () => {
  const engine = new Engine();
  const abort = new AbortController();
  const long = engine.call('sleep', { ms: 2500 });
  const waiting = rejection(engine.call('sleep', { ms: 0 }, { signal: abort.signal }));
  await pause(20);
  abort.abort();
  const { error, ms } = await waiting;
  assert.equal(error.code, 'ERR_MARTLET_ABORTED');
  assert.ok(ms < 1000, `${ms} ms`);
  await long;
  await engine.close();
});

test('close() ends what runs and what waits within 1 s, may be called again and at once', async () => {
  const engine = new Engine();
  const jobs = Array.from({ length: 3 }, () => rejection(engine.call('sleep', { ms: 60_000 })));
  await pause(50);
  const started = performance.now();
  const waited = coreWait();
  await Promise.all([engine.close(), engine.close()]);
  await engine.close();
  assert.ok(performance.now() - started - waited() < 1000);
  for (const { error } of await Promise.all(jobs)) assert.equal(error.code, 'ERR_MARTLET_DISPOSED');
  assert.equal(engine.closed, true);
  await assert.rejects(engine.call('stats', {}), { code: 'ERR_MARTLET_DISPOSED' });
});

test('dispose() during loading of adapters, scoring and questions: each settles, with DISPOSED or its result', async () => {
  const model = await loadModel(MODEL, { device: 'cpu' });
  const { messages, images } = getCase('single');
  const row = { messages, images: images.map((image) => join(llava, 'images', image)) };
  const jobs = [
    model.loadAdapter('a', join(llava, 'adapter-peft')),
    ...Array.from({ length: 20 }, () => model.score(row)),
    ...Array.from({ length: 5 }, () => model.generate(LONG_QUESTION)),
  ];
  const settled = Promise.allSettled(jobs);
  await pause(30);
  await model.dispose();
  const failures = (await settled).filter((job) => job.status === 'rejected').map(({ reason }) => reason.code);
  assert.ok(failures.length > 0, 'all were done before: nothing was tested');
  assert.deepEqual([...new Set(failures)], ['ERR_MARTLET_DISPOSED']);
});

test('jobs hold up the event loop for less than 50 ms', async (t) => {
  type Job = 'load' | 'train' | 'generate' | 'blocked';
  type Delays = Record<Job, { measured: number; own: number; waited: number; turns: number }>;
  const jobs = ['load', 'train', 'generate'] as const;
  const keeps = (delays: Delays) =>
    jobs.every((job) => delays[job].own < 50 && delays[job].measured < 50 + delays[job].waited);
  const attempts: Delays[] = [];
  // Other work on the machine can only make a delay longer, a loop that martlet blocks is blocked every time: the best of three counts.
  do {
    const config = { ...slowConfig(await folder(), 6), max_steps: 2, save_strategy: 'steps', save_steps: 1 };
    const { code, stdout, stderr } = await runChild('responsive', { config, model: MODEL, block: 100 });
    assert.equal(code, 0, stderr);
    const delays = lastJson<Delays>(stdout);
    assert.ok(delays.train.turns > 50 && delays.generate.turns > 20, `jobs too short: ${stdout}`);
    assert.ok(delays.blocked.measured > 50 && delays.blocked.own > 50, 'the measurement sees a loop that is blocked');
    t.diagnostic(`longest delays in ms: ${stdout.trim()}`);
    attempts.push(delays);
  } while (!keeps(attempts.at(-1) as Delays) && attempts.length < 3);
  assert.ok(keeps(attempts.at(-1) as Delays), JSON.stringify(attempts));
});

test('a hundred rounds of load, question, dispose leave the memory flat', async () => {
  const rounds = 100;
  const image = join(llava, 'images/exact.png');
  const { code, stdout, stderr } = await runChild(
    'rounds',
    { model: QUICKSTART_MODEL, rounds, image },
    { nodeArgs: ['--expose-gc'] },
  );
  assert.equal(code, 0, stderr);
  const resident = lastJson<number[]>(stdout);
  assert.equal(resident.length, rounds);
  const growth = (resident[rounds - 1] as number) - (resident[19] as number);
  // One round holds 14 MB (13 MB of float32 weights): two that were not freed would show.
  assert.ok(growth < 24, `${growth} MB more after round 100 than after round 20`);
});
