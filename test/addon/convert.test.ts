import assert from 'node:assert/strict';
import { copyFile, cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { convertCheckpoint } from '../../lib/index.js';
import { cli } from '../support/cli.js';
import { projectRoot } from '../support/fixtures.js';

const TORCH = join(projectRoot, 'test/fixtures/torch');

let root: string;
let model: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
  model = join(root, 'model');
  await mkdir(join(model, 'assets'), { recursive: true });
  await copyFile(join(TORCH, 'state_dict.bin'), join(model, 'pytorch_model.bin'));
  await writeFile(join(model, 'config.json'), '{"model_type": "qwen"}\n');
  await writeFile(join(model, 'modeling_qwen.py'), '# remote code\r\n');
  await writeFile(join(model, 'assets', 'font.ttf'), Buffer.from([0, 255, 1]));
});
after(() => rm(root, { recursive: true }));

/** Names, dtypes, shapes and bytes. */
async function tensors(path: string): Promise<Record<string, unknown>> {
  const bytes = await readFile(path);
  const end = 8 + Number(bytes.readBigUInt64LE());
  const { __metadata__: _, ...header } = JSON.parse(bytes.toString('utf8', 8, end));
  return Object.fromEntries(
    Object.entries<{ data_offsets: [number, number] }>(header).map(
      ([
        name,
        {
          data_offsets: [from, to],
          ...info
        },
      ]) => [name, { ...info, bytes: bytes.toString('hex', end + from, end + to) }],
    ),
  );
}

test('weights of torch.save become safetensors, every other file stays as it was', async () => {
  const outputDir = join(root, 'converted');
  const progress: { done: number; total: number }[] = [];
  const report = await convertCheckpoint({ model, outputDir, onProgress: (p) => progress.push(p) });
  assert.deepEqual(report.shards, ['model.safetensors']);
  assert.equal(report.tensors, 4);
  assert.equal(progress.length, 4);
  assert.deepEqual((await readdir(outputDir)).sort(), [
    'assets',
    'config.json',
    'model.safetensors',
    'modeling_qwen.py',
  ]);
  for (const name of ['config.json', 'modeling_qwen.py', 'assets/font.ttf'])
    assert.deepEqual(await readFile(join(outputDir, name)), await readFile(join(model, name)));
  assert.deepEqual(
    await tensors(join(outputDir, 'model.safetensors')),
    await tensors(join(TORCH, 'state_dict.safetensors')),
  );
});

test('another dtype', async () => {
  const outputDir = join(root, 'half');
  await convertCheckpoint({ model, outputDir, dtype: 'float16' });
  for (const info of Object.values(await tensors(join(outputDir, 'model.safetensors'))))
    assert.equal((info as { dtype: string }).dtype, 'F16');
});

test('martlet export --safetensors', async () => {
  const outputDir = join(root, 'by-command');
  const { code, stdout } = await cli([
    'export',
    '--safetensors',
    '--model',
    model,
    '--output_dir',
    outputDir,
    '--json',
  ]);
  assert.equal(code, 0);
  assert.equal(JSON.parse(stdout).tensors, 4);
  assert.deepEqual(
    await tensors(join(outputDir, 'model.safetensors')),
    await tensors(join(TORCH, 'state_dict.safetensors')),
  );
  for (const args of [
    [],
    ['--model', model],
    ['--output_dir', outputDir],
    ['--model', model, '--output_dir', 'x', '--adapters', 'a'],
  ]) {
    const wrong = await cli(['export', '--safetensors', ...args]);
    assert.equal(wrong.code, 2, wrong.stderr);
  }
});

test('what cannot be converted leaves nothing behind', async () => {
  const broken = join(root, 'broken');
  await cp(model, broken, { recursive: true });
  await copyFile(join(TORCH, 'module.bin'), join(broken, 'pytorch_model.bin'));
  const refused = { code: 'ERR_MARTLET_WEIGHTS', message: /torch\.nn\.modules\.container\.Sequential/ };
  await assert.rejects(convertCheckpoint({ model: broken, outputDir: join(root, 'none') }), refused);
  await assert.rejects(convertCheckpoint({ model, outputDir: join(root, 'converted') }), { code: 'ERR_MARTLET_IO' });
  await assert.rejects(convertCheckpoint({ model, outputDir: root }), {
    code: 'ERR_MARTLET_IO',
    message: /which is read/,
  });
  await assert.rejects(convertCheckpoint({ model, outputDir: join(root, 'none'), signal: AbortSignal.abort() }), {
    code: 'ERR_MARTLET_ABORTED',
  });
  assert.deepEqual(
    (await readdir(root)).filter((name) => name.includes('none')),
    [],
  );
});
