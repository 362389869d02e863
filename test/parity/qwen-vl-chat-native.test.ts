/** The native Qwen-VL-Chat against the model's own code of 2023, in float32 (../shared/reference/qwen_vl_chat says how it was run). */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { JobBuffers } from '../../lib/api/samples.js';
import { convertCheckpoint, mergeAdapter } from '../../lib/index.js';
import type { Engine } from '../../lib/native/engine.js';
import { maxDifference } from '../support/fixtures.js';
import {
  assertBatchIsEachAlone,
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

const { dir, skip } = sharedReference('qwen_vl_chat');
const read = <T>(path: string): T => JSON.parse(readFileSync(join(dir, path), 'utf8')) as T;
const NAMES = ['one_image', 'two_images', 'history', 'text_only', 'grounding'];

describe('Qwen-VL-Chat', { skip }, () => {
  // Its code knows no EXIF orientation.
  const options = { template: 'ms-swift', exifOrientation: false } as const;
  const rows = skip ? [] : read<{ samples: ReferenceRow[] }>('case.json').samples;
  const reference = new Reference(dir, rows, options);
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

    test('pixels, from PNG and JPEG', async () => {
      for (const name of NAMES) {
        const { images } = await reference.encode(name);
        if (images.length === 0) continue;
        const job = new JobBuffers();
        const args = { images: images.map((image) => job.image(image)) };
        const { result, buffers } = await engine.call('preprocess', args, { buffers: job.buffers });
        const { data, shape } = reference.tensor(`expected/${name}`, 'pixel_values');
        const size = data.length / images.length;
        for (const [i, pixel] of result.pixels.entries()) {
          assert.equal(pixel.name, 'pixel_values');
          assert.deepEqual(pixel.shape, shape.slice(1));
          const pixels = new Float32Array(buffers[pixel.buffer] as ArrayBuffer);
          assert.equal(maxDifference(pixels, data.subarray(i * size, (i + 1) * size)), 0, `${name} ${i}`);
        }
      }
    });

    for (const name of NAMES) {
      test(`logits, losses and greedy tokens: ${name}`, async () => {
        const path = `expected/${name}`;
        for (const [labels, key] of [
          ['labels', 'loss'],
          ['labels_official', 'loss_official'],
        ] as const) {
          const sample = await reference.encode(name);
          sample.labels = Int32Array.from(reference.tensor(path, labels).data);
          const { loss, logits } = await score(engine, sample);
          assert(maxDifference(logits, labelledRows(sample, reference.tensor(path, 'logits'))) < 5e-5);
          assert(Math.abs(loss - (reference.tensor(path, key).data[0] as number)) < 1e-5);
        }
        assert.deepEqual(await greedy(engine, await reference.encode(name, 'generate'), 24), [
          ...reference.tensor(path, 'greedy_tokens').data,
        ]);
      });
    }

    test('the adapter gives the logits and tokens of PEFT, and leaves the base as it was', async () => {
      await engine.call('adapter.load', { name: 'final', dir: join(dir, 'lora/final') });
      const sample = await reference.encode('one_image');
      const { loss, logits } = await score(engine, sample, 'final');
      assert(maxDifference(logits, labelledRows(sample, reference.tensor('expected/adapted', 'logits'))) < 5e-5);
      assert(Math.abs(loss - (reference.tensor('expected/adapted', 'loss').data[0] as number)) < 1e-5);
      assert.deepEqual(await greedy(engine, await reference.encode('one_image', 'generate'), 24, 'final'), [
        ...reference.tensor('expected/adapted', 'greedy_tokens').data,
      ]);
      const base = await score(engine, sample);
      assert(maxDifference(base.logits, labelledRows(sample, reference.tensor('expected/one_image', 'logits'))) < 5e-5);
    });
  });

  describe('prompts longer than seq_length', () => {
    /** The model under the reference's config of seq_length 64. */
    async function longModel(changes: object = {}): Promise<string> {
      const model = await mkdtemp(join(root, 'long-'));
      await cp(join(dir, 'model'), model, { recursive: true });
      await rm(join(model, 'config.json'));
      await writeFile(join(model, 'config.json'), JSON.stringify({ ...read<object>('long/config.json'), ...changes }));
      return model;
    }
    const text = () => textSample(reference.tensor('long/text', 'input_ids').data);
    const long = (name: string) => reference.tensor('long/text', name);

    test('log-n attention and dynamic NTK, together and each alone', async () => {
      await using(reference.open(await longModel()), async (engine) => {
        const sample = text();
        const { logits } = await score(engine, sample);
        assert(maxDifference(logits, labelledRows(sample, long('logits'))) < 5e-5);
        const prompt = textSample(long('prompt_ids').data);
        assert.deepEqual(await greedy(engine, prompt, 24), [...long('greedy_tokens').data]);
        // Each row turns by the alpha of its own prompt, and is scaled by its own position.
        const ids = [...long('prompt_ids').data];
        await assertBatchIsEachAlone(engine, [
          textSample(ids.slice(0, 20)),
          prompt,
          textSample(ids.slice(0, 66)),
          textSample(ids.slice(0, 5)),
          textSample(ids.slice(0, 58)),
          prompt,
        ]);
      });
      for (const [changes, name] of [
        [{ use_logn_attn: false }, 'logits_only_ntk'],
        [{ use_dynamic_ntk: false }, 'logits_only_logn'],
      ] as const) {
        await using(reference.open(await longModel(changes)), async (engine) => {
          const { logits } = await score(engine, text());
          const { data, shape } = long(name); // the last 16 places; the last one predicts nothing
          const vocabulary = shape[1] as number;
          const last = logits.subarray(logits.length - 15 * vocabulary);
          assert(maxDifference(last, data.subarray(0, 15 * vocabulary)) < 5e-5, name);
        });
      }
    });

    test('each token decoded by a prompt of its own: alpha grows with the prompt', async () => {
      await using(reference.open(await longModel()), async (engine) => {
        const ids = [...long('prompt_ids').data];
        for (const expected of long('greedy_tokens_without_cache').data) {
          assert.deepEqual(await greedy(engine, textSample(ids), 1), [expected]);
          ids.push(expected);
        }
      });
    });

    test('training has neither', async () => {
      await using(reference.open(await longModel()), async (engine) => {
        await engine.call('train.begin', trainArgs({}));
        const { loss } = await gradients(engine, [text()]);
        const expected = crossEntropy(long('logits_train'), [...long('input_ids').data]);
        assert(Math.abs(loss - expected) < 1e-5, `${loss} ${expected}`);
      });
    });

    test('several rows of different lengths in one batch: each its own alpha', async () => {
      await using(reference.open(await longModel()), async (engine) => {
        const rows = [text(), textSample(long('prompt_ids').data), textSample(long('prompt_ids').data.slice(0, 40))];
        let sum = 0;
        let count = 0;
        for (const row of rows) {
          const { loss } = await score(engine, row);
          sum += loss * (row.inputIds.length - 1);
          count += row.inputIds.length - 1;
        }
        await engine.call('train.begin', trainArgs({}));
        const job = new JobBuffers();
        const microBatches = [rows.map((row) => job.sample(row))];
        const { result } = await engine.call('train.evaluate', { microBatches }, { buffers: job.buffers });
        assert(Math.abs(result.loss - sum / count) < 1e-5, `${result.loss} ${sum / count}`);
      });
    });

    test('with a picture', async () => {
      await using(reference.open(await longModel()), async (engine) => {
        const path = 'long/one_image';
        const sample = await reference.encode('one_image');
        sample.labels = sample.inputIds;
        const { logits } = await score(engine, sample);
        const { data, shape } = reference.tensor(path, 'logits_last_64');
        const vocabulary = shape[1] as number;
        const last = logits.subarray(logits.length - 63 * vocabulary);
        assert(maxDifference(last, data.subarray(0, 63 * vocabulary)) < 5e-5);
        const tokens = reference.tensor(path, 'greedy_tokens').data;
        assert.deepEqual(await greedy(engine, await reference.encode('one_image', 'generate'), tokens.length), [
          ...tokens,
        ]);
        await engine.call('train.begin', trainArgs({}));
        const { loss } = await gradients(engine, [await reference.encode('one_image')]);
        assert(Math.abs(loss - (reference.tensor(path, 'loss').data[0] as number)) < 1e-5);
      });
    });
  });

  test('gradients of every parameter', async () => {
    const summary = read<{
      loss: number;
      parameters: Record<string, { l2: number; flat_index: number[]; values: number[] } | null>;
    }>('expected/grads_summary.json');
    await using(reference.open(), async (engine) => {
      await engine.call(
        'train.begin',
        trainArgs({ method: 'full', freeze: { vision: false, projector: false, language: false } }),
      );
      const found = await gradients(engine, [await reference.encode('one_image')]);
      assert(Math.abs(found.loss - summary.loss) < 1e-5);
      const trained = Object.entries(summary.parameters).flatMap(([name, gradient]) => (gradient ? [name] : []));
      assert.deepEqual([...found.gradients.keys()].sort(), trained.sort());
      assert(!found.gradients.has('transformer.visual.attn_pool.pos_embed'), 'a table that is never trained');
      for (const [name, gradient] of found.gradients) {
        const { l2, flat_index, values } = summary.parameters[name] as {
          l2: number;
          flat_index: number[];
          values: number[];
        };
        const norm = Math.sqrt(gradient.reduce((sum, x) => sum + x * x, 0));
        assert(Math.abs(norm - l2) < 5e-5 * l2 + 1e-7, `${name} ${norm} ${l2}`);
        const share = shareOfLargest(
          flat_index.map((i) => gradient[i] as number),
          values,
        );
        if (values.some((value) => Math.abs(value) > 1e-6)) assert(share < 1e-3, `${name} ${share}`);
        if (!reference.names('expected/grads').includes(name)) continue;
        const whole = shareOfLargest(gradient, reference.tensor('expected/grads', name).data);
        assert(whole < 5e-5, `${name} ${whole}`);
      }
    });
  });

  test('LoRA: first gradients, 20 steps, the adapter after them', async () => {
    const { steps } = read<{ steps: { sample: string; loss: number; grad_norm: number }[] }>('lora/curve.json');
    await using(reference.open(), async (engine) => {
      await engine.call('train.begin', trainArgs({ adapterDir: join(dir, 'lora/initial') }));
      const first = await gradients(engine, [await reference.encode('one_image')]);
      const names = reference.names('lora/first_step_grads').filter((name) => name.includes('.lora_'));
      assert.equal(names.length, 16);
      for (const name of names) {
        const gradient = first.gradients.get(name.replace('base_model.model.', '').replace('.default', ''));
        assert(gradient, name);
        assert(shareOfLargest(gradient, reference.tensor('lora/first_step_grads', name).data) < 5e-5, name);
      }
      for (const { sample, loss, grad_norm } of steps) {
        const result = await step(engine, [await reference.encode(sample)]);
        assert(Math.abs(result.loss - loss) < 1e-5 * Math.max(1, loss), `${sample}: ${result.loss} ${loss}`);
        assert(Math.abs(result.gradNorm / grad_norm - 1) < 1e-4, `${sample}: ${result.gradNorm} ${grad_norm}`);
      }
      const saved = join(root, 'adapter');
      await cp(join(dir, 'lora/initial'), saved, { recursive: true });
      for (const name of await readdir(saved)) await rm(join(saved, name));
      await engine.call('train.save', { dir: saved, baseModel: join(dir, 'model'), maxShardSize: 1e9 });
      const ours = readSafetensors(join(saved, 'adapter_model.safetensors'));
      const theirs = readSafetensors(join(dir, 'lora/final/adapter_model.safetensors'));
      assert.deepEqual([...ours.keys()].sort(), [...theirs.keys()].sort());
      for (const [name, { data }] of theirs) assert(maxDifference(ours.get(name)?.data ?? [], data) < 2e-4, name);
    });
  });

  test('LoRA targets by the names of the official script and of the tutorial', async () => {
    await using(reference.open(), async (engine) => {
      const begin = async (targetModules: string[] | string) => {
        const lora = { r: 8, alpha: 16, dropout: 0, useRslora: false, targetModules };
        const { result } = await engine.call('train.begin', trainArgs({ lora }));
        await engine.call('train.end', {});
        return result;
      };
      const official = await begin(['c_attn', 'attn.c_proj', 'w1', 'w2']);
      assert.equal(official.targets.length, 8);
      assert.deepEqual(official.unmatched, []);
      const tutorial = await begin(['c_attn', 'qkv_proj']);
      assert.deepEqual(tutorial.targets, ['transformer.h.0.attn.c_attn', 'transformer.h.1.attn.c_attn']);
      assert.deepEqual(
        tutorial.unmatched.map(({ name }) => name),
        ['qkv_proj'],
      );
      const all = await begin('all-linear');
      assert.equal(all.targets.length, 10, 'c_attn, both c_proj, w1 and w2 of two layers');
    });
  });

  test('merged weights equal the reference bit for bit; other files and the remote code stay byte for byte', async () => {
    const model = join(root, 'base');
    await cp(join(dir, 'model'), model, { recursive: true });
    await writeFile(join(model, 'modeling_qwen.py'), '# remote code\r\n');
    await writeFile(join(model, 'SimSun.ttf'), Buffer.from([0, 1, 255]));
    const outputDir = join(root, 'merged');
    const report = await mergeAdapter({ model, adapter: join(dir, 'lora/final'), outputDir });
    assert.equal(report.mergedTensors, 8);
    const merged = readSafetensors(join(outputDir, 'model.safetensors'));
    const expected = readSafetensors(join(dir, 'lora/merged/model.safetensors'));
    const base = join(root, 'converted');
    await convertCheckpoint({ model, outputDir: base });
    const plain = readSafetensors(join(base, 'model.safetensors'));
    assert.equal(merged.size, plain.size);
    for (const [name, { data }] of merged) assert.deepEqual(data, (expected.get(name) ?? plain.get(name))?.data, name);
    const kept = (await readdir(model)).filter((name) => !/\.bin/.test(name));
    assert.deepEqual((await readdir(outputDir)).sort(), [...kept, 'model.safetensors'].sort());
    for (const name of kept) assert.deepEqual(await readFile(join(outputDir, name)), await readFile(join(model, name)));
    await using(reference.open(outputDir), async (engine) => {
      const sample = await reference.encode('one_image');
      const { logits } = await score(engine, sample);
      assert(maxDifference(logits, labelledRows(sample, reference.tensor('expected/adapted', 'logits'))) < 5e-5);
    });
  });
});

/** Mean over the places that predict a next token. */
function crossEntropy({ data, shape }: { data: Float32Array; shape: number[] }, ids: number[]): number {
  const vocabulary = shape[1] as number;
  let sum = 0;
  for (let i = 0; i + 1 < ids.length; i++) {
    const row = data.subarray(i * vocabulary, (i + 1) * vocabulary);
    const largest = Math.max(...row);
    const total = row.reduce((all, x) => all + Math.exp(x - largest), 0);
    sum += Math.log(total) + largest - (row[ids[i + 1] as number] as number);
  }
  return sum / (ids.length - 1);
}
