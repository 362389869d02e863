import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { cli, jsonLines, MAIN } from '../support/cli.js';
import { temporaryFolders } from '../support/folders.js';
import { smallConfig } from '../support/train.js';

const folder = temporaryFolders();

/** A folder with `config.json`, which is YAML too. */
async function project(changes: Record<string, unknown> = {}): Promise<{ dir: string; file: string; out: string }> {
  const dir = await folder();
  const file = join(dir, 'config.yaml');
  writeFileSync(file, JSON.stringify(smallConfig(dir, changes)));
  return { dir, file, out: join(dir, 'out') };
}

test('train --json prints one event a line, the last one the result', async () => {
  const { file, out } = await project();
  const { code, stdout, stderr } = await cli([
    'train',
    '--config',
    file,
    '--json',
    '--set',
    'lora_rank=2',
    '--max-steps',
    '3',
    '--target_modules',
    'q_proj',
    'v_proj',
  ]);
  assert.equal(code, 0, stderr);
  assert.equal(stderr, '');
  const events = jsonLines(stdout) as unknown as {
    type: string;
    config: Record<string, unknown>;
    targets: number;
    steps: number;
    outputDir: string;
  }[];
  const types = events.map(({ type }) => type);
  assert.deepEqual(
    types.filter((type) => type !== 'warning'),
    ['start', 'step', 'step', 'step', 'checkpoint', 'done'],
  );
  assert.deepEqual([events[0]?.config.lora_rank, events[0]?.targets], [2, 6]);
  assert.deepEqual([events.at(-1)?.type, events.at(-1)?.steps, events.at(-1)?.outputDir], ['done', 3, out]);
});

test('train shows its progress on standard error; sft and a config file without --config are taken too', async () => {
  const { file } = await project();
  const { code, stdout, stderr } = await cli(['sft', file, '--max_steps', '2']);
  assert.equal(code, 0, stderr);
  assert.equal(stdout, '');
  for (const part of ['9 rows', 'step 2/2', 'loss ', 'lr ', 'mem ', 'tok/s', 'left 0s', 'done after 2 steps'])
    assert.ok(stderr.includes(part), part);
});

test('--dry-run prints the resolved config and the plan, and writes nothing', async () => {
  const { file, out } = await project({ split_dataset_ratio: 0.2, warmup_ratio: 0.5 });
  const json = await cli(['train', '--config', file, '--dry-run', '--json']);
  assert.equal(json.code, 0, json.stderr);
  const { config, plan } = JSON.parse(json.stdout);
  assert.deepEqual([config.lora_rank, config.lora_alpha, config.adam_beta2], [4, 32, 0.95]);
  assert.deepEqual(
    [plan.rows, plan.evalRows, plan.steps, plan.stepsPerEpoch, plan.rowsPerStep, plan.warmupSteps],
    [7, 2, 6, 2, 4, 3],
  );
  assert.ok(plan.tokens.shortest >= 30 && plan.tokens.longest <= 72 && plan.tokens.mean > plan.tokens.shortest);
  assert.match(plan.sample, /\[\[.+\]\]/);
  const text = await cli(['train', '--config', file, '--dry-run']);
  assert.match(text.stdout, /^lora_rank: 4$/m);
  assert.match(text.stdout, /^steps: 6 /m);
  assert.ok(!existsSync(out));
});

test('a wrong config exits with 2 and names file, line and what was meant', async () => {
  const { dir, file } = await project();
  writeFileSync(join(dir, 'wrong.yaml'), 'model: x\ndataset: y\nlora_rnak: 8\n');
  const { code, stderr } = await cli(['train', '--config', join(dir, 'wrong.yaml'), '--json']);
  assert.equal(code, 2);
  const { error } = JSON.parse(stderr);
  assert.deepEqual([error.code, error.details.line], ['ERR_MARTLET_CONFIG', 3]);
  assert.match(error.message, /did you mean lora_rank/);
  assert.equal((await cli(['train', '--config', file, '--lora_rnak', '8'])).code, 2);
  assert.equal((await cli(['train', '--config', file, '--lora_rank', 'many'])).code, 2);
  assert.equal((await cli(['train', '--config', join(dir, 'none.yaml')])).code, 2);
  const missing = await cli(['train', '--config', file, '--set', `dataset=${join(dir, 'none.json')}`]);
  assert.equal(missing.code, 1);
});

for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  test(`${signal} finishes the step, saves, and exits with 0; the run can be continued`, async () => {
    const { file, out } = await project({ max_steps: 100_000, save_strategy: 'no' });
    let sent = false;
    const stopped = await cli(['train', '--config', file], {
      onOutput: (text, kill) => {
        if (!sent && text.includes('step 3/')) kill(signal);
        sent ||= text.includes('step 3/');
      },
    });
    assert.equal(stopped.code, 0, stopped.stderr);
    assert.match(stopped.stderr, /finishing this step.*\n(.*\n)*stopped after \d+ steps/);
    const checkpoint = readdirSync(out).find((name) => name.startsWith('checkpoint-')) as string;
    assert.ok(existsSync(join(out, 'adapter_model.safetensors')));
    const { global_step: step } = JSON.parse(readFileSync(join(out, checkpoint, 'trainer_state.json'), 'utf8'));
    const again = await cli([
      'train',
      '--config',
      file,
      '--resume_from_checkpoint',
      'true',
      '--max_steps',
      String(step + 1),
      '--json',
    ]);
    assert.equal(again.code, 0, again.stderr);
    assert.equal(jsonLines(again.stdout).at(-1)?.steps, step + 1);
  });
}

test('a second Ctrl-C ends the run at once, without a half-written file', async () => {
  const { file, out } = await project({ max_steps: 100_000, save_steps: 2 });
  let sent = 0;
  const { code } = await cli(['train', '--config', file], {
    onOutput: (text, kill) => {
      if ((sent === 0 && text.includes('step 3/')) || (sent === 1 && text.includes('press Ctrl-C again'))) {
        sent++;
        kill('SIGINT');
      }
    },
  });
  assert.ok(code === 130 || code === 0, `${code}: 0 when the run had stopped by itself before`);
  assert.deepEqual(
    readdirSync(out).filter((name) => name.startsWith('.')),
    [],
  );
});

test('a run that is killed leaves its finished checkpoints, and its folder free', async () => {
  const { file, out } = await project({ max_steps: 100_000, save_steps: 1, save_total_limit: 2 });
  let sent = false;
  await cli(['train', '--config', file], {
    onOutput: (text, kill) => {
      if (!sent && text.includes('checkpoint-4')) kill('SIGKILL');
      sent ||= text.includes('checkpoint-4');
    },
  });
  assert.ok(existsSync(join(out, '.martlet.lock')), 'nobody could tidy up');
  const newest = Math.max(...readdirSync(out).flatMap((name) => Number(/^checkpoint-(\d+)$/.exec(name)?.[1] ?? [])));
  const again = await cli([
    'train',
    '--config',
    file,
    '--resume_from_checkpoint',
    'true',
    '--max_steps',
    String(newest + 1),
    '--json',
  ]);
  assert.equal(again.code, 0, again.stderr);
  assert.deepEqual(
    readdirSync(out).filter((name) => name.startsWith('.')),
    [],
  );
});

test('a run goes on when nobody reads its output any more, and saves', async () => {
  for (const stream of ['stdout', 'stderr'] as const) {
    const { file, out } = await project({ max_steps: 30, save_strategy: 'no' });
    const args = [MAIN, 'train', '--config', file, ...(stream === 'stdout' ? ['--json'] : [])];
    const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'pipe'] });
    child[stream].once('data', () => child[stream].destroy());
    const [code] = (await once(child, 'close')) as [number];
    assert.equal(code, 0);
    assert.ok(existsSync(join(out, 'adapter_model.safetensors')), stream);
    assert.match(readFileSync(join(out, 'logs', 'train.log'), 'utf8'), /done after 30 steps/);
  }
});
