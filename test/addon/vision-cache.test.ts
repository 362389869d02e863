import assert from 'node:assert/strict';
import { copyFileSync, cpSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import sharp from 'sharp';
import { loadModel, trainLoRA } from '../../lib/index.js';
import { getCase, llava } from '../support/fixtures.js';
import { temporaryFolders } from '../support/folders.js';
import { digest, losses, MODEL, smallConfig, steps, train } from '../support/train.js';

const folder = temporaryFolders();
const adapterOf = (dir: string) => digest(join(dir, 'out', 'adapter_model.safetensors'));
const EPOCHS = { max_steps: 12, split_dataset_ratio: 0.2, eval_steps: 4 };

/** Losses and adapter of a run, and what the cache counted. */
async function outcome(changes: Record<string, unknown>) {
  const dir = await folder();
  const { events, result } = await train(smallConfig(dir, { ...EPOCHS, ...changes }));
  return { dir, events, cache: result.visionCache, learnt: { losses: losses(events), adapter: adapterOf(dir) } };
}

test('a run with the cache learns to the bit what one without it learns, in memory, on disk and from disk', async () => {
  const without = await outcome({ vision_cache: 'off' });
  assert.equal(without.cache, undefined);
  assert.equal(steps(without.events)[0]?.visionCache, undefined);

  const memory = await outcome({});
  assert.deepEqual(memory.learnt, without.learnt);
  assert.ok(memory.cache && memory.cache.hits > memory.cache.misses && memory.cache.bytes > 0, String(memory.cache));
  const counts = steps(memory.events).map(({ visionCache }) => visionCache);
  assert.equal(counts.at(-1)?.misses, counts[5]?.misses, 'each picture once: no miss after the first epochs');

  const place = { vision_cache: 'disk', vision_cache_dir: await folder() };
  const first = await outcome(place);
  const second = await outcome(place);
  assert.deepEqual([first.learnt, second.learnt], [without.learnt, without.learnt]);
  assert.ok((first.cache?.misses ?? 0) > 0);
  assert.equal(second.cache?.misses, 0);
});

test('a run cut off and resumed with the cache ends as one in a piece', async () => {
  const whole = await outcome({});
  const dir = await folder();
  const run = trainLoRA(smallConfig(dir, EPOCHS));
  for await (const event of run) if (event.type === 'checkpoint' && event.step === 6) break;
  await train(smallConfig(dir, { ...EPOCHS, resume_from_checkpoint: true }));
  assert.equal(adapterOf(dir), whole.learnt.adapter);
});

test('where the projector or the tower is trained, nothing is kept', async () => {
  for (const trained of [{ freeze_aligner: false }, { freeze_vit: false }]) {
    const without = await outcome({ ...trained, max_steps: 4, vision_cache: 'off' });
    const asked = await outcome({ ...trained, max_steps: 4 });
    assert.deepEqual(asked.learnt, without.learnt);
    assert.equal(asked.cache, undefined);
  }
});

/** Gives one number of the vision tower another value. */
function changeTower(model: string): void {
  for (const name of readdirSync(model).filter((file) => file.endsWith('.safetensors'))) {
    const path = join(model, name);
    const bytes = readFileSync(path);
    const length = Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.toString('utf8', 8, 8 + length)) as Record<
      string,
      { data_offsets: [number, number] }
    >;
    const [tensor] = Object.keys(header).filter((key) => /vision_tower.*layers\.0\..*weight$/.test(key));
    if (tensor === undefined) continue;
    bytes.writeFloatLE(0.25, 8 + length + (header[tensor]?.data_offsets[0] as number));
    writeFileSync(path, bytes);
    return;
  }
  assert.fail('no weight of a vision tower');
}

test('other pixels, settings or weights are misses; the bound holds; damaged and foreign files are misses', async () => {
  const dir = await folder();
  const cacheDir = await folder();
  const picture = join(dir, 'picture.png');
  const [source] = getCase('single').images;
  copyFileSync(join(llava, 'images', source as string), picture);
  writeFileSync(join(dir, 'one.json'), JSON.stringify([{ messages: getCase('single').messages, images: [picture] }]));
  const other = join(dir, 'model');
  cpSync(MODEL, other, { recursive: true });
  const run = async (changes: Record<string, unknown> = {}) => {
    const { cache, learnt } = await outcome({
      dataset: join(dir, 'one.json'),
      split_dataset_ratio: 0,
      max_steps: 2,
      gradient_accumulation_steps: 1,
      vision_cache: 'disk',
      vision_cache_dir: cacheDir,
      ...changes,
    });
    return { misses: cache?.misses, bytes: cache?.bytes ?? 0, learnt };
  };
  // the first look at a picture, and the one with grey in its place, which has no key
  assert.equal((await run()).misses, 1);
  const known = await run();
  assert.equal(known.misses, 0);

  const files = () =>
    readdirSync(cacheDir, { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => join(entry.parentPath, entry.name));
  const [file] = files() as [string];
  const whole = readFileSync(file);
  for (const bytes of [whole.subarray(0, 100), Buffer.from('not ours'), Buffer.from(whole).fill(7, whole.length - 9)]) {
    writeFileSync(file, bytes);
    const again = await run();
    assert.equal(again.misses, 1);
    assert.deepEqual(again.learnt, known.learnt);
    assert.deepEqual(readFileSync(file), whole);
  }

  const small = await run({ vision_cache_size: String(statSync(file).size - 1) });
  assert.ok((small.misses ?? 0) > 0 && small.bytes === 0, 'too large for the bound');
  assert.equal(files().length, 0);

  await run();
  changeTower(other);
  assert.equal((await run({ model: other })).misses, 1, 'another tower');
  assert.equal((await run()).misses, 0);

  await sharp(picture).negate().toFile(join(dir, 'negative.png'));
  copyFileSync(join(dir, 'negative.png'), picture);
  assert.equal((await run()).misses, 1, 'another picture under the same name');
});

test('a model asked again about a picture takes its features from the cache, and answers alike', async () => {
  const { messages, images } = getCase('single');
  const question = {
    messages: messages.slice(0, -1),
    images: images.map((image) => join(llava, 'images', image)),
    temperature: 0,
    maxNewTokens: 8,
  };
  const without = await loadModel(MODEL, { device: 'cpu', visionCache: 'off' });
  const expected = await without.generate(question);
  assert.equal((await without.memory()).visionCache, undefined);
  await without.dispose();

  const model = await loadModel(MODEL, { device: 'cpu' });
  for (const hits of [0, 1, 2]) {
    const answer = await model.generate(question);
    assert.deepEqual(answer.tokenIds, expected.tokenIds);
    const { visionCache } = await model.memory();
    assert.deepEqual([visionCache?.hits, visionCache?.misses], [hits, 1]);
  }
  await model.dispose();
});
