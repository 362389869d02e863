import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { findCheckpoint, laterCheckpoints, readTrainerState, removeOldCheckpoints } from '../../lib/api/checkpoint.js';
import { checkOutputDir, listCheckpoints, lockOutputDir, removeRun } from '../../lib/api/output-dir.js';
import { removeUnfinished, writeDirAtomic, writeFileAtomic } from '../../lib/files.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

let counter = 0;
async function folder(files: string[]): Promise<string> {
  const dir = join(root, `dir${counter++}`);
  for (const file of files) {
    await mkdir(join(dir, file, '..'), { recursive: true });
    await writeFile(join(dir, file), file);
  }
  return dir;
}
const none = { resume: false, overwrite: false, inputs: [], create: true };

test('a folder with another run is refused with all three ways out; with other files it is not', async () => {
  for (const file of ['adapter_config.json', 'checkpoint-5/x', 'args.yaml', 'model-00001-of-00002.safetensors']) {
    await assert.rejects(
      checkOutputDir(await folder([file]), none),
      (error: Error & { code: string; details: { path: string } }) => {
        assert.equal(error.code, 'ERR_MARTLET_IO');
        for (const word of ['output_dir', 'resume_from_checkpoint', 'overwrite_output_dir'])
          assert.ok(error.message.includes(word));
        return true;
      },
    );
  }
  await checkOutputDir(await folder(['notes.txt', 'data.json']), none);
  await checkOutputDir(await folder(['args.yaml']), { ...none, resume: true });
  await checkOutputDir(await folder(['args.yaml']), { ...none, overwrite: true });
  const absent = join(root, 'not', 'there', 'yet');
  await checkOutputDir(absent, { ...none, create: false });
  assert.ok(!(await readdir(root)).includes('not'), 'a dry run creates nothing');
  await checkOutputDir(absent, none);
  assert.deepEqual(await readdir(absent), []);
});

test('a folder that is not writable, or a file in its place, is refused', async () => {
  const file = join(await folder(['file']), 'file');
  await assert.rejects(checkOutputDir(file, none), { code: 'ERR_MARTLET_IO' });
  await assert.rejects(checkOutputDir(join(file, 'below'), none), { code: 'ERR_MARTLET_IO' });
  await assert.rejects(checkOutputDir('/proc/martlet', none), { code: 'ERR_MARTLET_IO' });
});

test('a run may not overwrite what it reads', async () => {
  const model = await folder(['config.json', 'model.safetensors']);
  await assert.rejects(checkOutputDir(model, { ...none, overwrite: true, inputs: [model] }), {
    code: 'ERR_MARTLET_IO',
  });
  const run = await folder(['checkpoint-5/adapter_config.json']);
  const checkpoint = join(run, 'checkpoint-5');
  await assert.rejects(checkOutputDir(run, { ...none, overwrite: true, inputs: [checkpoint] }), {
    code: 'ERR_MARTLET_IO',
  });
  await checkOutputDir(run, { ...none, resume: true, inputs: [checkpoint] });
});

test('overwriting removes the files of a run and nothing else', async () => {
  const dir = await folder([
    'args.yaml',
    'checkpoint-5/x',
    'logs/train.log',
    'runs/e',
    'logging.jsonl',
    'data.json',
    'checkpoint-x',
    'my/adapter_config.json',
  ]);
  await removeRun(dir);
  assert.deepEqual((await readdir(dir)).sort(), ['checkpoint-x', 'data.json', 'my']);
});

test('two runs cannot share a folder; the lock of a dead process is taken over', async () => {
  const dir = await folder(['x']);
  const unlock = await lockOutputDir(dir);
  await assert.rejects(lockOutputDir(dir), { code: 'ERR_MARTLET_IO', message: /another training run/ });
  await unlock();
  const lock = join(dir, '.martlet.lock');
  await (await lockOutputDir(dir))();
  await assert.rejects(readFile(lock), { code: 'ENOENT' });

  const child = spawn(process.execPath, ['-e', '']);
  await once(child, 'exit');
  await writeFile(lock, JSON.stringify({ pid: child.pid, host: hostname(), started: '1' }));
  await (await lockOutputDir(dir))();
  // the same process id, but another process: ids come again after a restart
  await writeFile(lock, JSON.stringify({ pid: process.pid, host: hostname(), started: '1' }));
  await (await lockOutputDir(dir))();
  await writeFile(lock, '{"pid":');
  await (await lockOutputDir(dir))();
  await writeFile(lock, JSON.stringify({ pid: 1, host: 'another-machine', started: '1' }));
  await assert.rejects(lockOutputDir(dir), { code: 'ERR_MARTLET_IO' });
});

test('checkpoints are found and thinned out: the newest and the best stay', async () => {
  const files = [5, 10, 15, 20, 100].map((step) => `checkpoint-${step}/x`);
  const dir = await folder([...files, 'checkpoint-7.tmp/x']);
  const left = async () => (await listCheckpoints(dir)).map(({ step }) => step);
  assert.deepEqual(await left(), [5, 10, 15, 20, 100]);
  assert.equal(await findCheckpoint(dir, true), join(dir, 'checkpoint-100'));
  const newest = join(dir, 'checkpoint-100');
  await removeOldCheckpoints(dir, 3, { newest, best: join(dir, 'checkpoint-5') });
  assert.deepEqual(await left(), [5, 20, 100]);
  await removeOldCheckpoints(dir, 1, { newest, best: join(dir, 'checkpoint-5') });
  assert.deepEqual(await left(), [5, 100]);
  await removeOldCheckpoints(dir, 1, { newest, best: newest });
  assert.deepEqual(await left(), [100], 'the newest is the best: one is enough');
  await assert.rejects(findCheckpoint(await folder(['x']), true), { code: 'ERR_MARTLET_IO' });
});

test('continued from before the last checkpoint, a run keeps its own and lets the later ones go', async () => {
  const dir = await folder([2, 4, 6].map((step) => `checkpoint-${step}/x`));
  assert.deepEqual(await laterCheckpoints(dir, join(dir, 'checkpoint-2')), ['checkpoint-4', 'checkpoint-6']);
  assert.deepEqual(await laterCheckpoints(dir, join(dir, 'checkpoint-6')), []);
  assert.deepEqual(await laterCheckpoints(dir, join(root, 'elsewhere', 'checkpoint-2')), []);
  await mkdir(join(dir, 'checkpoint-3'));
  await removeOldCheckpoints(dir, 2, { newest: join(dir, 'checkpoint-3'), best: null });
  assert.deepEqual(
    (await listCheckpoints(dir)).map(({ step }) => step),
    [2, 3],
  );
  await assert.rejects(readTrainerState(join(dir, 'checkpoint-9')), {
    code: 'ERR_MARTLET_IO',
    message: /there is no checkpoint/,
  });
});

test('a checkpoint without its state is refused with the way to use its weights', async () => {
  for (const files of [
    ['adapter_model.safetensors'],
    ['trainer_state.json'],
    ['trainer_state.json', 'optimizer.safetensors'],
  ]) {
    await assert.rejects(readTrainerState(await folder(files)), { code: 'ERR_MARTLET_IO' });
  }
});

test('a failed write leaves neither the file nor a temporary one; a folder appears whole or not at all', async () => {
  const dir = await folder(['kept']);
  await mkdir(join(dir, 'taken'));
  await assert.rejects(writeFileAtomic(join(dir, 'taken'), 'x'), { code: 'ERR_MARTLET_IO' });
  await writeFileAtomic(join(dir, 'kept'), 'new');
  assert.equal(await readFile(join(dir, 'kept'), 'utf8'), 'new');

  const target = join(dir, 'whole');
  const half = async (inside: string) => {
    await writeFile(join(inside, 'a'), 'half');
    throw new Error('cut off');
  };
  await assert.rejects(writeDirAtomic(target, 'replace', half));
  assert.deepEqual((await readdir(dir)).sort(), ['kept', 'taken']);
  await writeDirAtomic(target, 'replace', (inside) => writeFile(join(inside, 'a'), '1'));
  await assert.rejects(writeDirAtomic(target, 'replace', half));
  assert.equal(await readFile(join(target, 'a'), 'utf8'), '1');
  await writeDirAtomic(target, 'merge', (inside) => writeFile(join(inside, 'b'), '2'));
  assert.deepEqual((await readdir(target)).sort(), ['a', 'b']);
  await writeDirAtomic(target, 'replace', (inside) => writeFile(join(inside, 'c'), '3'));
  assert.deepEqual(await readdir(target), ['c']);
  assert.deepEqual((await readdir(dir)).sort(), ['kept', 'taken', 'whole']);
});

test('what a killed process left unfinished is swept away', async () => {
  const dir = await folder([
    '.checkpoint-5.123-0a1b2c3d.tmp/x',
    '.adapter.1-00000000.tmp',
    'adapter_model.safetensors.tmp-7',
    'a.tmp',
    'checkpoint-5/x',
  ]);
  await removeUnfinished(dir);
  assert.deepEqual((await readdir(dir)).sort(), ['a.tmp', 'checkpoint-5']);
});
