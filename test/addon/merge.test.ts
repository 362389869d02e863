import assert from 'node:assert/strict';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { loadModel, mergeAdapter } from '../../lib/index.js';
import { getCase, llava } from '../support/fixtures.js';

const MODEL = join(llava, 'model-4x');
const ADAPTER = join(llava, 'adapter-peft');

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

const row = () => {
  const { messages, images } = getCase('single');
  return { messages, images: images.map((image) => join(llava, 'images', image)) };
};

test("files that are no weights are kept whatever their ending; weights and a trainer's state are not", async () => {
  const base = join(root, 'endings');
  await cp(MODEL, base, { recursive: true });
  const kept = ['vocab.bin', 'tokenizer.bin', 'assets/table.bin'];
  const dropped = [
    'pytorch_model.bin',
    'pytorch_model-00001-of-00002.bin',
    'open_clip_pytorch_model.bin',
    'training_args.bin',
    'optimizer.pt',
    'rng_state.pth',
    'old/part-a.bin',
  ];
  await mkdir(join(base, 'assets'));
  await mkdir(join(base, 'old'));
  for (const name of [...kept, ...dropped]) await writeFile(join(base, name), name);
  await writeFile(join(base, 'old', 'weights.bin.index.json'), '{"weight_map": {"a.weight": "part-a.bin"}}');
  const outputDir = join(root, 'kept');
  await mergeAdapter({ model: base, adapter: ADAPTER, outputDir });
  const names = await readdir(outputDir, { recursive: true });
  for (const name of kept) assert.equal(await readFile(join(outputDir, name), 'utf8'), name);
  for (const name of [...dropped, 'old/weights.bin.index.json']) assert.ok(!names.includes(name), name);

  // in a folder that is written over: no weights of the model before, every other file
  await writeFile(join(outputDir, 'pytorch_model.bin'), 'of before');
  await writeFile(join(outputDir, 'shard-x.bin'), 'of before');
  await writeFile(join(outputDir, 'pytorch_model.bin.index.json'), '{"weight_map": {"a.weight": "shard-x.bin"}}');
  await mergeAdapter({ model: base, adapter: ADAPTER, outputDir, overwrite: true });
  const left = await readdir(outputDir);
  for (const name of ['pytorch_model.bin', 'shard-x.bin', 'pytorch_model.bin.index.json'])
    assert.ok(!left.includes(name), name);
  for (const name of ['vocab.bin', 'tokenizer.bin']) assert.ok(left.includes(name), name);
});

test('a merged model answers as base and adapter do, and keeps every other file byte for byte', async () => {
  const base = join(root, 'base');
  await cp(MODEL, base, { recursive: true });
  await mkdir(join(base, 'assets'));
  await writeFile(join(base, 'assets', 'font.ttf'), Buffer.from([0, 255, 1]));
  await writeFile(join(base, 'pytorch_model.bin'), 'old weights');
  const outputDir = join(root, 'merged');
  const progress: { done: number; total: number }[] = [];
  const report = await mergeAdapter({ model: base, adapter: ADAPTER, outputDir, onProgress: (p) => progress.push(p) });

  assert.equal(report.outputDir, outputDir);
  assert.equal(report.mergedTensors, 21, '7 linears in each of 3 layers');
  assert.ok(report.maxAbsError >= 0 && report.maxAbsError < 1e-6, 'float32 is rounded once');
  assert.ok(report.seconds > 0);
  assert.equal(progress.at(-1)?.done, progress.at(-1)?.total);
  const names = (await readdir(outputDir)).sort();
  const kept = (await readdir(MODEL)).filter((name) => !/safetensors/.test(name));
  assert.deepEqual(
    names,
    [...kept, 'assets', ...report.shards, ...(report.shards.length > 1 ? ['model.safetensors.index.json'] : [])].sort(),
  );
  for (const name of kept) {
    assert.ok((await readFile(join(outputDir, name))).equals(await readFile(join(MODEL, name))), name);
  }
  assert.deepEqual(await readFile(join(outputDir, 'assets', 'font.ttf')), Buffer.from([0, 255, 1]));

  const adapted = await loadModel(MODEL, { device: 'cpu', adapters: { a: ADAPTER } });
  const merged = await loadModel(outputDir, { device: 'cpu' });
  try {
    const [one, two, bare] = [
      await adapted.score(row()),
      await merged.score(row()),
      await adapted.score({ ...row(), adapter: null }),
    ];
    assert.ok(Math.abs(one.loss - two.loss) < 1e-5, `${one.loss} and ${two.loss}`);
    assert.ok(Math.abs(one.loss - bare.loss) > 0.1, 'the adapter does something');
  } finally {
    await adapted.dispose();
    await merged.dispose();
  }
});

test('small shards and another dtype', async () => {
  const outputDir = join(root, 'small');
  const report = await mergeAdapter({
    model: MODEL,
    adapter: ADAPTER,
    outputDir,
    dtype: 'bfloat16',
    maxShardSize: '200KB',
  });
  assert.ok(report.shards.length > 1);
  const { weight_map } = JSON.parse(await readFile(join(outputDir, 'model.safetensors.index.json'), 'utf8'));
  assert.deepEqual([...new Set(Object.values(weight_map))].sort(), [...report.shards].sort());
  const model = await loadModel(outputDir, { device: 'cpu' });
  assert.equal(model.dtype, 'bfloat16');
  await model.dispose();
});

test('refusals: no adapter, no base model, a folder in use, sizes that are none; nothing is left behind', async () => {
  const outputDir = join(root, 'refused');
  const good = { model: MODEL, adapter: ADAPTER, outputDir };
  await assert.rejects(mergeAdapter({ ...good, adapter: MODEL }), { code: 'ERR_MARTLET_ADAPTER' });
  await assert.rejects(mergeAdapter({ ...good, model: undefined }), {
    code: 'ERR_MARTLET_ADAPTER',
    message: /base model/,
  });
  await assert.rejects(mergeAdapter({ ...good, model: '/no/such' }), { code: 'ERR_MARTLET_MODEL_NOT_FOUND' });
  await assert.rejects(mergeAdapter({ ...good, outputDir: MODEL, overwrite: true }), { code: 'ERR_MARTLET_IO' });
  await assert.rejects(mergeAdapter({ ...good, outputDir: llava, overwrite: true }), { code: 'ERR_MARTLET_IO' });
  await assert.rejects(mergeAdapter({ ...good, maxShardSize: '5 apples' }), { code: 'ERR_MARTLET_USAGE' });
  await assert.rejects(mergeAdapter({ ...good, base: 'quantized' }), { code: 'ERR_MARTLET_USAGE' });
  await assert.rejects(mergeAdapter({ ...good, signal: AbortSignal.abort() }), { code: 'ERR_MARTLET_ABORTED' });
  const broken = join(root, 'broken-adapter');
  await cp(ADAPTER, broken, { recursive: true });
  await writeFile(join(broken, 'adapter_model.safetensors'), Buffer.alloc(100));
  await assert.rejects(mergeAdapter({ ...good, adapter: broken }), (error: Error & { code: string }) =>
    ['ERR_MARTLET_WEIGHTS', 'ERR_MARTLET_ADAPTER'].includes(error.code),
  );
  const names = await readdir(root);
  assert.ok(!names.some((name) => name.includes('refused')), names.join());
});

test('a folder with files is refused; with overwrite the new files take their place, the others stay', async () => {
  const outputDir = join(root, 'used');
  await mkdir(outputDir);
  await writeFile(join(outputDir, 'notes.txt'), 'mine');
  await writeFile(join(outputDir, 'model-00001-of-00009.safetensors'), 'of another model');
  await assert.rejects(mergeAdapter({ model: MODEL, adapter: ADAPTER, outputDir }), {
    code: 'ERR_MARTLET_IO',
    message: /overwrite/,
  });
  await mergeAdapter({ model: MODEL, adapter: ADAPTER, outputDir, overwrite: true });
  assert.equal(await readFile(join(outputDir, 'notes.txt'), 'utf8'), 'mine');
  await assert.rejects(readFile(join(outputDir, 'model-00001-of-00009.safetensors')), { code: 'ENOENT' });
  const model = await loadModel(outputDir, { device: 'cpu' });
  await model.dispose();
});
