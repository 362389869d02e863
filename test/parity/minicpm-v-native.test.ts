/** The native MiniCPM-V 2.6 against the model's own code, in float32 (../shared/reference/minicpm_v_2_6 says how it was run). */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import sharp from 'sharp';
import { JobBuffers } from '../../lib/api/samples.js';
import { loadModel, mergeAdapter } from '../../lib/index.js';
import { Engine } from '../../lib/native/engine.js';
import { loadProcessor } from '../../lib/processing/index.js';
import type { EncodedSample } from '../../lib/processing/types.js';
import { maxDifference, projectRoot } from '../support/fixtures.js';
import {
  gradients,
  greedy,
  labelledRows,
  Reference,
  type ReferenceRow,
  score,
  shareOfLargest,
  step,
  textSample,
  trainArgs,
  using,
} from '../support/reference.js';
import { readSafetensors } from '../support/safetensors.js';
import { sharedReference } from '../support/shared.js';

const fixture = join(projectRoot, 'test/fixtures/minicpm_v');
const sha256 = (bytes: ArrayBuffer | Uint8Array) =>
  createHash('sha256')
    .update(bytes instanceof ArrayBuffer ? new Uint8Array(bytes) : bytes)
    .digest('hex');

interface Picture {
  name: string;
  width: number;
  height: number;
  grid: [number, number] | null;
}

/** What the native engine makes of a picture, as the model's processor names it. */
async function preprocessed(engine: Engine, modelDir: string, image: Buffer | string, exifOrientation = true) {
  const processor = await loadProcessor(modelDir, { exifOrientation });
  const messages = [{ role: 'user' as const, content: '<image>' }];
  const { images } = await processor.encode({ messages, images: [image] }, { for: 'generate' });
  const job = new JobBuffers();
  const args = { images: images.map((view) => job.image(view)) };
  const { result, buffers } = await engine.call('preprocess', args, { buffers: job.buffers });
  const of = (name: string) =>
    result.pixels
      .filter((pixel) => pixel.name === name)
      .map(({ shape, buffer }) => ({ shape, bytes: buffers[buffer] as ArrayBuffer }));
  return {
    images,
    pixels: of('pixel_values'),
    sizes: of('tgt_sizes').map(({ bytes }) => [...new Float32Array(bytes)]),
  };
}

describe('pixels of MiniCPM-V, bit for bit', () => {
  let engine: Engine;
  let published: string;
  before(async () => {
    engine = new Engine(); // preprocesses without a model
    published = await mkdtemp(join(tmpdir(), 'martlet-'));
    await cp(join(fixture, 'model'), published, { recursive: true });
    const path = join(published, 'preprocessor_config.json');
    const file = JSON.parse(await readFile(path, 'utf8'));
    await rm(path);
    await writeFile(path, JSON.stringify({ ...file, scale_resolution: 448 }));
  });
  after(async () => {
    await engine.close();
    await rm(published, { recursive: true });
  });

  test('pictures of the reference, with the EXIF orientation and without', async () => {
    const pictures = JSON.parse(readFileSync(join(fixture, 'pictures.json'), 'utf8')) as Record<
      string,
      { rgb_sha256: string; tgt_sizes: number[][]; pixel_values_sha256: string[]; exif_ignored?: (typeof pictures)[''] }
    >;
    for (const [name, picture] of Object.entries(pictures)) {
      for (const [expected, exif] of [
        [picture, true],
        [picture.exif_ignored, false],
      ] as const) {
        if (!expected) continue;
        const made = await preprocessed(engine, join(fixture, 'model'), join(fixture, name), exif);
        assert.equal(sha256(made.images[0]?.data as Uint8Array), expected.rgb_sha256, `${name}, decoded`);
        assert.deepEqual(made.sizes, expected.tgt_sizes, name);
        assert.deepEqual(
          made.pixels.map(({ bytes }) => sha256(bytes)),
          expected.pixel_values_sha256,
          name,
        );
      }
    }
  });

  test('slices of large pictures with the published parameters', async () => {
    const { cases } = JSON.parse(readFileSync(join(fixture, 'pixels/pixels.json'), 'utf8')) as {
      cases: (Picture & {
        source: string;
        sha256: string;
        slices: { width: number; height: number; sha256: string; pixel_values_sha256: string }[];
      })[];
    };
    for (const { name, source, width, height, sha256: whole, slices } of cases) {
      const rgb = source === 'formula' ? formula(width, height) : undefined;
      if (rgb) assert.equal(sha256(rgb), whole, `${name}: the formula`);
      const image = rgb
        ? await sharp(rgb, { raw: { width, height, channels: 3 } })
            .png()
            .toBuffer()
        : join(fixture, source);
      const made = await preprocessed(engine, published, image);
      assert.deepEqual(
        made.sizes,
        slices.map((slice) => [slice.height / 14, slice.width / 14]),
        name,
      );
      for (const [i, slice] of slices.entries()) {
        const pixels = made.pixels[i];
        assert.deepEqual(pixels?.shape, [3, 14, (slice.height * slice.width) / 14]);
        assert.equal(sha256(pixels?.bytes as ArrayBuffer), slice.pixel_values_sha256, `${name} ${i}`);
      }
    }
  });
});

/** value(x, y, c) = (x·(7+2c) + y·(13−3c) + ⌊x·y / (17+c)⌋) & 255 */
function formula(width: number, height: number): Uint8Array {
  const out = new Uint8Array(width * height * 3);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < 3; c++)
        out[i++] = (x * (7 + 2 * c) + y * (13 - 3 * c) + Math.floor((x * y) / (17 + c))) & 255;
    }
  }
  return out;
}

const { dir, skip } = sharedReference('minicpm_v_2_6');
const read = <T>(path: string): T => JSON.parse(readFileSync(join(dir, path), 'utf8')) as T;
const NAMES = ['small', 'wide', 'two', 'history', 'text', 'strip'];

describe('MiniCPM-V 2.6', { skip }, () => {
  const rows = skip ? [] : read<{ samples: ReferenceRow[] }>('case.json').samples;
  const reference = new Reference(dir, rows, { template: 'ms-swift' });
  let root: string;
  before(async () => {
    root = await mkdtemp(join(tmpdir(), 'martlet-'));
  });
  after(() => rm(root, { recursive: true }));

  describe('forward', () => {
    let engine: Engine;
    before(async () => {
      engine = await reference.open();
    });
    after(() => engine.close());

    for (const name of NAMES) {
      test(`logits, loss and greedy tokens: ${name}`, async () => {
        const path = `expected/${name}`;
        const sample = await reference.encode(name);
        const { loss, logits } = await score(engine, sample);
        const distance = maxDifference(logits, labelledRows(sample, reference.tensor(path, 'logits')));
        assert(distance < 5e-5, `${distance}`);
        assert(Math.abs(loss - (reference.tensor(path, 'loss').data[0] as number)) < 1e-5);
        assert.deepEqual(await greedy(engine, await reference.encode(name, 'generate'), 24), [
          ...reference.tensor(path, 'greedy_tokens').data,
        ]);
      });
    }

    test('a token of id 0 in the prompt is a token like any other', async () => {
      const path = 'expected/token_id_0';
      const ids = reference.tensor(path, 'prompt_ids').data;
      assert(ids.includes(0));
      assert.deepEqual(await greedy(engine, textSample(ids), 24), [
        ...reference.tensor(path, 'greedy_tokens_unmasked').data,
      ]);
    });

    test('the adapter gives the logits and tokens of PEFT, and leaves the base as it was', async () => {
      const sample = await reference.encode('small');
      await engine.call('adapter.load', { name: 'final', dir: join(dir, 'lora/final') });
      const { logits } = await score(engine, sample, 'final');
      assert(maxDifference(logits, labelledRows(sample, reference.tensor('expected/adapted', 'logits'))) < 1e-4);
      assert.deepEqual(await greedy(engine, await reference.encode('small', 'generate'), 24, 'final'), [
        ...reference.tensor('expected/adapted', 'greedy_tokens').data,
      ]);
      await engine.call('adapter.load', { name: 'initial', dir: join(dir, 'lora/initial') });
      const initial = await score(engine, sample, 'initial');
      assert(
        maxDifference(initial.logits, labelledRows(sample, reference.tensor('expected/adapted', 'logits_initial'))) <
          1e-4,
      );
      const base = await score(engine, sample);
      assert(maxDifference(base.logits, labelledRows(sample, reference.tensor('expected/small', 'logits'))) < 5e-5);
    });

    test('all rows in one batch, pictures and slices of every size packed', async () => {
      const names = ['small', 'wide', 'two', 'history', 'text'];
      const samples: EncodedSample[] = [];
      for (const name of names) samples.push(await reference.encode(name));
      await engine.call('train.begin', trainArgs({}));
      const { loss } = await gradients(engine, samples);
      assert(Math.abs(loss - (reference.tensor('expected/batch_right', 'loss').data[0] as number)) < 1e-5);
      await engine.call('train.end', {});
    });
  });

  test('gradients of every parameter', async () => {
    const { norms, loss } = read<{ norms: Record<string, number>; loss: number }>('grad_norms.json');
    await using(reference.open(), async (engine) => {
      await engine.call(
        'train.begin',
        trainArgs({ method: 'full', freeze: { vision: false, projector: false, language: false } }),
      );
      const found = await gradients(engine, [await reference.encode('wide')]);
      assert(Math.abs(found.loss - loss) < 1e-5);
      assert.deepEqual([...found.gradients.keys()].sort(), Object.keys(norms).sort());
      // zero in exact arithmetic
      const noise = (name: string) => /^vpm.*k_proj\.bias$/.test(name);
      for (const [name, gradient] of found.gradients) {
        const norm = Math.sqrt(gradient.reduce((sum, x) => sum + x * x, 0));
        const expected = norms[name] as number;
        if (!noise(name)) assert(Math.abs(norm - expected) < 1e-4 * expected + 1e-7, `${name} ${norm} ${expected}`);
      }
      const table = 'vpm.embeddings.position_embedding.weight';
      for (const name of reference.names('grads')) {
        const { data } = reference.tensor('grads', name);
        if (name.startsWith(table)) continue;
        const gradient = found.gradients.get(name);
        assert(gradient, name);
        if (noise(name)) continue;
        if (name === 'resampler.attn.in_proj_bias') {
          const third = data.length / 3;
          for (const i of [0, 2]) {
            const part = (values: Float32Array) => values.subarray(i * third, (i + 1) * third);
            assert(shareOfLargest(part(gradient), part(data)) < 5e-5, name);
          }
          continue;
        }
        const share = shareOfLargest(gradient, data);
        assert(share < 5e-5, `${name} ${share}`);
      }
      const ids = [...reference.tensor('grads', `${table}.rows`).data];
      const { data, shape } = reference.tensor('grads', `${table}.rows_grad`);
      const width = shape[1] as number;
      const whole = found.gradients.get(table) as Float32Array;
      const touched = ids.flatMap((row) => [...whole.subarray(row * width, (row + 1) * width)]);
      assert(shareOfLargest(touched, data) < 5e-5);
      const others = whole.reduce((sum, x, i) => (ids.includes(Math.floor(i / width)) ? sum : sum + Math.abs(x)), 0);
      assert.equal(others, 0, 'rows of the table that no patch looked up');
    });
  });

  test('LoRA: first gradients, 20 steps, the adapter after them', async () => {
    const { steps } = read<{ steps: { sample: string; loss: number; grad_norm: number }[] }>('lora/curve.json');
    await using(reference.open(), async (engine) => {
      await engine.call('train.begin', trainArgs({ adapterDir: join(dir, 'lora/initial') }));
      const first = await gradients(engine, [await reference.encode('small')]);
      const names = reference.names('lora/grads_step1');
      assert.equal(names.length, 28);
      for (const name of names) {
        const gradient = first.gradients.get(name.replace('base_model.model.', ''));
        assert(gradient, name);
        assert(shareOfLargest(gradient, reference.tensor('lora/grads_step1', name).data) < 5e-5, name);
      }
      assert.equal(steps.length, 20);
      for (const { sample, loss, grad_norm } of steps) {
        const result = await step(engine, [await reference.encode(sample)]);
        assert(Math.abs(result.loss / loss - 1) < 1e-5, `${sample}: ${result.loss} ${loss}`);
        assert(Math.abs(result.gradNorm / grad_norm - 1) < 1e-4, `${sample}: ${result.gradNorm} ${grad_norm}`);
      }
      const saved = join(root, 'adapter');
      await mkdir(saved);
      await engine.call('train.save', { dir: saved, baseModel: join(dir, 'model'), maxShardSize: 1e9 });
      const ours = readSafetensors(join(saved, 'adapter_model.safetensors'));
      const theirs = readSafetensors(join(dir, 'lora/final/adapter_model.safetensors'));
      assert.deepEqual([...ours.keys()].sort(), [...theirs.keys()].sort());
      for (const [name, { data }] of theirs) assert(maxDifference(ours.get(name)?.data ?? [], data) < 2e-4, name);
    });
  });

  test('LoRA targets: the official script, and all linears of the language model', async () => {
    await using(reference.open(), async (engine) => {
      const begin = async (targetModules: string[] | string) => {
        const lora = { r: 8, alpha: 16, dropout: 0, useRslora: false, targetModules };
        const { result } = await engine.call('train.begin', trainArgs({ lora }));
        await engine.call('train.end', {});
        return result.targets;
      };
      const official = await begin('llm\\..*layers\\.\\d+\\.self_attn\\.(q_proj|k_proj|v_proj)');
      assert.equal(official.length, 6);
      const all = await begin('all-linear');
      assert.equal(all.length, 14);
      assert(all.every((name) => name.startsWith('llm.model.layers.')));
    });
  });

  test('merged weights equal the reference bit for bit; the remote code stays byte for byte', async () => {
    const model = join(root, 'base');
    await cp(join(dir, 'model'), model, { recursive: true });
    await writeFile(join(model, 'modeling_minicpmv.py'), '# remote code\r\n');
    const outputDir = join(root, 'merged');
    const report = await mergeAdapter({ model, adapter: join(dir, 'lora/final'), outputDir });
    assert.equal(report.mergedTensors, 14);
    const merged = readSafetensors(join(outputDir, 'model.safetensors'));
    const expected = readSafetensors(join(dir, 'merged/model.safetensors'));
    const plain = readSafetensors(join(model, 'model.safetensors'));
    assert.deepEqual([...merged.keys()].sort(), [...plain.keys()].sort());
    for (const [name, { data }] of merged) assert.deepEqual(data, (expected.get(name) ?? plain.get(name))?.data, name);
    for (const name of await readdir(model)) {
      if (name === 'model.safetensors') continue;
      assert.deepEqual(await readFile(join(outputDir, name)), await readFile(join(model, name)));
    }
  });

  test('the public API: prepare names what the processor names, generate answers, options count', async () => {
    const model = await loadModel(join(dir, 'model'), { device: 'cpu', template: 'ms-swift' });
    try {
      const { messages, images } = reference.row('wide');
      const pictures = images.map((image) => join(dir, image));
      const prepared = await model.prepare({ messages, images: pictures, for: 'train' });
      const sizes = reference.tensor('expected/wide', 'tgt_sizes');
      assert.deepEqual(prepared.pixels.tgt_sizes, { data: sizes.data, shape: sizes.shape });
      for (let i = 0; i < (sizes.shape[0] as number); i++) {
        const { data, shape } = reference.tensor('expected/wide', `pixel_values.${i}`);
        assert.deepEqual(prepared.pixels[`pixel_values.${i}`], { data, shape });
      }
      const answer = await model.generate({
        messages: messages.slice(0, -1),
        images: pictures,
        temperature: 0,
        maxNewTokens: 24,
      });
      assert.deepEqual([...answer.tokenIds], [...reference.tensor('expected/wide', 'greedy_tokens').data]);
      const few = await model.prepare({ messages, images: pictures, maxSliceNums: 1, useImageId: false });
      assert.deepEqual(few.pixels.pixel_values?.shape.length, 4);
      assert.equal(few.pixels.tgt_sizes?.shape[0], 1);
    } finally {
      await model.dispose();
    }
  });
});
