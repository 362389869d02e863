/** Shortage of memory, simulated by a ceiling on CPU tensors (MARTLET_CPU_MEMORY_LIMIT). */
import assert from 'node:assert/strict';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import type { TrainEvent } from '../../lib/index.js';
import { runChild } from '../support/process.js';
import { losses, smallConfig } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

const CHANGES = {
  max_steps: 3,
  save_strategy: 'no',
  lora_dropout: 0,
  per_device_train_batch_size: 8,
  gradient_accumulation_steps: 1,
  gradient_checkpointing: false,
};

async function run(name: string, limit: number | undefined, changes: Record<string, unknown> = {}) {
  const dir = join(root, name);
  await mkdir(dir);
  const { code, stdout } = await runChild('train', smallConfig(dir, { ...CHANGES, ...changes }), {
    env: limit === undefined ? {} : { MARTLET_CPU_MEMORY_LIMIT: String(limit) },
  });
  const lines = stdout
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
  return { code, events: lines as TrainEvent[], last: lines.at(-1) };
}

test('a step that does not fit is done in halves, with the same loss; one row that does not fit ends the run with advice', async () => {
  const free = await run('free', 1e12);
  assert.equal(free.code, 0);
  const peak = Math.max(...free.events.flatMap((event) => (event.type === 'step' ? [event.memoryAllocated] : [])));
  const single = await run('single', 1e12, { per_device_train_batch_size: 1, gradient_accumulation_steps: 8 });
  const least = Math.max(...single.events.flatMap((event) => (event.type === 'step' ? [event.memoryAllocated] : [])));
  assert.ok(least < 0.8 * peak, `${least} ${peak}`);

  const tight = await run('tight', Math.round((peak + least) / 2));
  assert.equal(tight.code, 0, JSON.stringify(tight.last));
  const warning = tight.events.find((event) => event.type === 'warning' && /out of memory/.test(event.message));
  assert.ok(warning, 'nothing ran out: nothing was tested');
  assert.match((warning as { message: string }).message, /with 8 rows at a time .*data\.json row \d+.* tokens/);
  const [a, b] = [losses(free.events), losses(tight.events)];
  a.forEach((loss, i) => void assert.ok(Math.abs(loss - (b[i] as number)) < 1e-4, `${a} ${b}`));

  const weights = free.events.find((event) => event.type === 'start');
  assert.ok(weights);
  const none = await run('none', Math.round(least * 0.97));
  assert.equal(none.code, 3);
  assert.equal(none.last.code, 'ERR_MARTLET_OUT_OF_MEMORY');
  assert.match(none.last.message, /one row at a time/);
  assert.match(none.last.message, /gradient_checkpointing: layer saves about/);
});

test('an evaluation that does not fit is done in halves, with the same loss', async () => {
  const changes = {
    per_device_train_batch_size: 1,
    gradient_checkpointing: true,
    max_steps: 1,
    eval_strategy: 'steps',
    eval_steps: 1,
    per_device_eval_batch_size: 64,
  };
  const dir = join(root, 'rows');
  await mkdir(dir);
  const row = {
    messages: [
      { role: 'user', content: 'Count.' },
      { role: 'assistant', content: 'one two '.repeat(40) },
    ],
  };
  await writeFile(join(dir, 'val.json'), JSON.stringify(Array.from({ length: 64 }, () => row)));
  const evaluate = { ...changes, val_dataset: join(dir, 'val.json') };
  const most = (events: TrainEvent[]) =>
    Math.max(...events.flatMap((event) => (event.type === 'step' ? [event.memoryAllocated] : [])));
  const loss = (events: TrainEvent[]) => events.find((event) => event.type === 'eval')?.loss as number;
  const free = await run('eval-free', 1e12, evaluate);
  const tight = await run('eval-tight', Math.round(2 * most(free.events)), evaluate);
  assert.equal(tight.code, 0, JSON.stringify(tight.last));
  const said = tight.events.flatMap((event) => (event.type === 'warning' ? [event.message] : [])).join('\n');
  assert.match(said, /evaluation at step 1: out of memory with 64 rows at a time\. Going on with 32\./);
  assert.ok(Math.abs(loss(free.events) - loss(tight.events)) < 1e-4, `${loss(free.events)} ${loss(tight.events)}`);
});
