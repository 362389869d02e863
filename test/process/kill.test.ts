/** SIGKILL while a checkpoint is written: what was whole stays whole, and nothing half-written gets a final name. */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync, watch } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { Rng } from '../../lib/api/rng.js';
import { CALM, runChild } from '../support/process.js';
import { readSafetensors } from '../support/safetensors.js';
import { digest, smallConfig, train } from '../support/train.js';

Object.assign(process.env, CALM);

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

const checkpoints = (out: string): number[] =>
  readdirSync(out)
    .flatMap((name) => /^checkpoint-(\d+)$/.exec(name)?.[1] ?? [])
    .map(Number)
    .sort((a, b) => a - b);

/** Every file of a checkpoint is there and reads to its end. */
function checkWhole(out: string, step: number): void {
  const dir = join(out, `checkpoint-${step}`);
  assert.deepEqual(readdirSync(dir).sort(), [
    'adapter_config.json',
    'adapter_model.safetensors',
    'args.yaml',
    'optimizer.safetensors',
    'trainer_state.json',
  ]);
  assert.ok(readSafetensors(join(dir, 'adapter_model.safetensors')).size > 0);
  assert.ok(readSafetensors(join(dir, 'optimizer.safetensors')).size > 0);
  assert.equal(JSON.parse(readFileSync(join(dir, 'trainer_state.json'), 'utf8')).global_step, step);
}

test('a run that is killed again and again while it saves ends with the bits of one that was not', async () => {
  const STEPS = 20;
  const changes = { lora_rank: 16, max_steps: STEPS, save_steps: 1, learning_rate: 1e-4 };
  const whole = join(root, 'whole');
  await mkdir(whole);
  await train(smallConfig(whole, changes));

  const dir = join(root, 'killed');
  const out = join(dir, 'out');
  await mkdir(out, { recursive: true });
  const config = smallConfig(dir, changes);
  let unfinished = 0;
  for (const delay of [0, 0, 1, 2, 4, 8]) {
    const done = checkpoints(out);
    // the first checkpoint of this process comes through, the second one is hit
    const earlier = readdirSync(out);
    const begun = new Set<string>();
    let kill = () => {};
    const watcher = watch(out, (_, name) => {
      if (!name?.startsWith('.checkpoint-') || earlier.includes(name) || begun.has(name)) return;
      begun.add(name);
      if (begun.size === 2) setTimeout(kill, delay);
    });
    const { code, signal, stdout } = await runChild(
      'train',
      { ...config, ...(done.length > 0 && { resume_from_checkpoint: true }) },
      {
        onLine: (_, killChild) => {
          kill = killChild;
        },
      },
    );
    watcher.close();
    assert.deepEqual({ code, signal }, { code: null, signal: 'SIGKILL' }, stdout);
    const left = checkpoints(out);
    assert.ok(left.length > done.length, `after ${delay} ms: ${left}`);
    assert.deepEqual(
      left,
      Array.from({ length: left.length }, (_, i) => i + 1),
      'none is lost',
    );
    for (const step of left) checkWhole(out, step);
    if (readdirSync(out).some((name) => /^\.checkpoint-.*\.tmp$/.test(name))) unfinished++;
  }
  assert.ok(unfinished > 0, 'no kill hit a checkpoint in the middle: nothing was tested');

  const { result } = await train({ ...config, resume_from_checkpoint: true });
  assert.equal(result.steps, STEPS);
  for (const name of ['adapter_model.safetensors', `checkpoint-${STEPS}/optimizer.safetensors`]) {
    assert.equal(digest(join(out, name)), digest(join(whole, 'out', name)), name);
  }
  assert.deepEqual(
    readdirSync(out).filter((name) => name.startsWith('.')),
    [],
    'what the killed ones left is gone',
  );
});

test('20 kills at random moments: the run ends with the bits of one that was not killed', async () => {
  const STEPS = 400;
  const changes = {
    lora_rank: 8,
    max_steps: STEPS,
    save_steps: 5,
    save_total_limit: 3,
    optim: 'adamw_8bit',
    neftune_noise_alpha: 5,
    logging_steps: 7,
    learning_rate: 1e-4,
  };
  const whole = join(root, 'whole-random');
  await mkdir(whole);
  await train(smallConfig(whole, changes));

  const dir = join(root, 'killed-random');
  const out = join(dir, 'out');
  await mkdir(out, { recursive: true });
  const config = smallConfig(dir, changes);
  const rng = new Rng(1);
  const reached: number[] = [];
  let idle = 0; // kills in a row before anything new was saved: a busy machine needs longer
  for (let kills = 0; kills < 20; kills++) {
    const resume = checkpoints(out).length > 0;
    const delay = rng.below(250) * (1 + idle);
    let armed = false;
    const { code, signal, stdout } = await runChild(
      'train',
      { ...config, ...(resume ? { resume_from_checkpoint: true } : { overwrite_output_dir: true }) },
      {
        // loading may not be what the kill hits
        onLine: (_, killChild) => {
          if (!armed) setTimeout(killChild, delay);
          armed = true;
        },
      },
    );
    assert.deepEqual({ code, signal }, { code: null, signal: 'SIGKILL' }, `kill ${kills}: ${stdout.slice(-500)}`);
    const done = checkpoints(out);
    for (const step of done) checkWhole(out, step);
    idle = (done.at(-1) ?? 0) > (reached.at(-1) ?? 0) ? 0 : idle + 1;
    reached.push(done.at(-1) ?? 0);
  }
  assert.ok((reached.at(-1) as number) > 0, `no checkpoint was ever reached: ${reached}`);
  assert.ok(new Set(reached).size > 5, `the kills did not hit different moments: ${reached}`);
  const { result } = await train({ ...config, resume_from_checkpoint: true });
  assert.equal(result.steps, STEPS);
  for (const name of ['adapter_model.safetensors', `checkpoint-${STEPS}/optimizer.safetensors`]) {
    assert.equal(digest(join(out, name)), digest(join(whole, 'out', name)), name);
  }
  const history = (folder: string) =>
    JSON.parse(readFileSync(join(folder, `checkpoint-${STEPS}`, 'trainer_state.json'), 'utf8')).log_history;
  assert.deepEqual(history(out), history(join(whole, 'out')));
});
