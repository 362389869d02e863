/** The native BLIP-2 against transformers 5.17 and PEFT 0.21 (test/reference/make_blip2.py), in float32. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { cp, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import sharp from 'sharp';
import { mergeAdapter } from '../../lib/index.js';
import type { ImageArg, LoadArgs, SampleArg, TrainBeginArgs } from '../../lib/native/binding.js';
import { Engine } from '../../lib/native/engine.js';
import { BLIP2_FORMS, type Blip2Form, blip2Case, blip2Cases, blip2Dir, blip2Image } from '../support/blip2.js';
import { maxDifference, relativeError } from '../support/fixtures.js';
import { GREEDY } from '../support/greedy.js';
import { using } from '../support/reference.js';
import { type FixtureTensor, readSafetensors } from '../support/safetensors.js';

interface Curve {
  learningRate: number;
  weightDecay: number;
  maxGradNorm: number;
  steps: { rows: string[]; loss: number; gradNorm: number; learningRate: number }[];
}
interface Norms {
  rows: string[];
  loss: number;
  norms: Record<string, number>;
}
interface Expected {
  losses: Record<string, { loss: number; labelled: number }>;
  oldLosses: Record<string, number>;
  greedy: Record<string, number[]>;
  oldGreedy: Record<string, number[]>;
  adapterGreedy: Record<string, number[]>;
  packed: { rows: string[] };
  loraGradients: { rows: string[]; loss: number };
  loraCurve: Curve & { warmupSteps: number; totalSteps: number };
  mergedNorms: Record<string, number>;
  allGradients: Norms;
  alignerGradients: Norms;
  alignerCurve: Curve & { undecayed: string[] };
  jointCurve: Curve;
  fullGradients: Norms;
  fullCurve: Curve & { undecayed: string[] };
}

const SIDE = 28;
const norm = (values: Float32Array) => Math.sqrt(values.reduce((sum, x) => sum + x * x, 0));
/** Zero in exact arithmetic: a constant on all keys cancels in the softmax. */
const isNoise = (name: string) => /(\.key|k_proj)\.bias$/.test(name);

class Fixture {
  readonly json: Expected;
  readonly tensors: Map<string, FixtureTensor>;
  readonly pixels = readSafetensors(blip2Dir('opt', 'pixels.safetensors'));
  readonly cases;

  constructor(readonly form: Blip2Form) {
    this.json = JSON.parse(readFileSync(blip2Dir(form, 'expected.json'), 'utf8'));
    this.tensors = readSafetensors(blip2Dir(form, 'expected.safetensors'));
    this.cases = blip2Cases(form);
  }

  dir(name: string): string {
    return blip2Dir(this.form, name);
  }

  tensor(name: string): FixtureTensor {
    const found = this.tensors.get(name);
    assert(found, `no expected tensor ${name}`);
    return found;
  }

  /** Ids of the old layout are fed with places for the pictures in front, of the first id that has no embedding. */
  async sample(name: string, buffers: ArrayBufferView[], purpose: 'train' | 'generate', oldVocabulary?: number) {
    const row = blip2Case(this.form, name);
    const { inputIds, labels, promptIds } = oldVocabulary === undefined ? row.default : row.old;
    const places = oldVocabulary === undefined ? 0 : row.images.length * this.cases.imageTokens;
    const add = (ids: number[], front: number | undefined) =>
      buffers.push(Int32Array.from([...(front === undefined ? [] : Array(places).fill(front)), ...ids])) - 1;
    const out: SampleArg = {
      inputIds: add(purpose === 'train' ? inputIds : promptIds, oldVocabulary),
      ...(purpose === 'train' && { labels: add(labels, this.form === 'opt' ? -100 : undefined) }),
      images: await Promise.all(row.images.map((image) => this.image(image, buffers))),
      id: name,
    };
    return out;
  }

  async image(name: string, buffers: ArrayBufferView[]): Promise<ImageArg> {
    const { data, info } = await sharp(blip2Image(name))
      .autoOrient()
      .toColourspace('srgb')
      .removeAlpha()
      .raw()
      .toBuffer({ resolveWithObject: true });
    return {
      buffer: buffers.push(data) - 1,
      width: info.width,
      height: info.height,
      plan: {
        resize: { height: SIDE, width: SIDE, backend: 'torchvision' },
        rescale: 0.00392156862745098,
        mean: [0.48145466, 0.4578275, 0.40821073],
        std: [0.26862954, 0.26130258, 0.27577711],
      },
    };
  }

  async open(folder = 'model-new', load: Partial<LoadArgs> = {}): Promise<Engine> {
    const engine = new Engine();
    await engine.call('load', { modelDir: this.dir(folder), device: 'cpu', dtype: 'float32', ...load });
    return engine;
  }

  async score(engine: Engine, name: string, adapter?: string, oldVocabulary?: number) {
    const buffers: ArrayBufferView[] = [];
    const sample = await this.sample(name, buffers, 'train', oldVocabulary);
    const { result, buffers: out } = await engine.call(
      'score',
      { sample, logits: true, ...(adapter !== undefined && { adapter }) },
      { buffers },
    );
    assert(result.logits);
    return { loss: result.loss, logits: new Float32Array(out[result.logits.buffer] as ArrayBuffer) };
  }

  async greedy(engine: Engine, name: string, adapter?: string, oldVocabulary?: number) {
    const buffers: ArrayBufferView[] = [];
    const sample = await this.sample(name, buffers, 'generate', oldVocabulary);
    const { result, buffers: out } = await engine.call(
      'generate',
      {
        sample,
        maxNewTokens: 24,
        ...GREEDY,
        stopTokenIds: [this.cases.endToken],
        ...(adapter !== undefined && { adapter }),
      },
      { buffers },
    );
    return [...new Int32Array(out[result.tokenIds] as ArrayBuffer)];
  }

  async micro(batches: string[][]) {
    const buffers: ArrayBufferView[] = [];
    const microBatches: SampleArg[][] = [];
    for (const rows of batches) {
      const micro: SampleArg[] = [];
      for (const name of rows) micro.push(await this.sample(name, buffers, 'train'));
      microBatches.push(micro);
    }
    return { microBatches, buffers };
  }

  async gradients(engine: Engine, rows: string[]) {
    const { microBatches, buffers } = await this.micro([rows]);
    const { result, buffers: out } = await engine.call('train.gradients', { microBatches }, { buffers });
    return {
      loss: result.loss,
      gradients: new Map(result.gradients.map((g) => [g.name, new Float32Array(out[g.buffer] as ArrayBuffer)])),
    };
  }

  /** Gradients whose norms, and some of them whole, are given. */
  async checkGradients(engine: Engine, expected: Norms, prefix: string) {
    const { loss, gradients } = await this.gradients(engine, expected.rows);
    assert(Math.abs(loss - expected.loss) < 1e-5, `${loss} ${expected.loss}`);
    assert.deepEqual([...gradients.keys()].sort(), Object.keys(expected.norms).sort());
    for (const [name, gradient] of gradients) {
      const [found, wanted] = [norm(gradient), expected.norms[name] as number];
      const slack = isNoise(name) ? 1e-5 : 1e-4 * wanted + 1e-7;
      assert(Math.abs(found - wanted) <= slack, `${name}: ${found} ${wanted}`);
    }
    let whole = 0;
    for (const [key, { data }] of this.tensors) {
      if (!key.startsWith(`${prefix}.`)) continue;
      const gradient = gradients.get(key.slice(prefix.length + 1));
      assert(gradient, key);
      assert(relativeError(gradient, data) < 1e-4, `${key}: ${relativeError(gradient, data)}`);
      whole++;
    }
    assert(whole > 0, prefix);
  }

  /**
   * AdamW turns rounding noise of gradients near zero into whole steps. transformers itself, with sdpa in place of eager attention, ends the ten steps of
   * T5's aligner curve with norms 2.5e-3 away and losses 2e-5 away: `norms` is wider there.
   */
  async checkCurve(engine: Engine, { steps }: Curve, { split = false, norms = 5e-4 } = {}) {
    for (const step of steps) {
      const batches = split ? [step.rows.slice(0, 2), step.rows.slice(2)] : [step.rows];
      const { microBatches, buffers } = await this.micro(batches);
      const { result } = await engine.call('train.step', { microBatches }, { buffers });
      const at = `step ${result.step}`;
      assert(Math.abs(result.learningRate - step.learningRate) <= 1e-12 + 1e-7 * step.learningRate, at);
      assert(Math.abs(result.loss / step.loss - 1) < 1e-4, `${at}: ${result.loss} ${step.loss}`);
      assert(Math.abs(result.gradNorm / step.gradNorm - 1) < norms, `${at}: ${result.gradNorm} ${step.gradNorm}`);
    }
  }

  trainArgs(changes: Partial<TrainBeginArgs>): TrainBeginArgs {
    return {
      method: 'lora',
      lora: { r: 4, alpha: 8, dropout: 0, useRslora: false, targetModules: ['q', 'v', 'q_proj', 'v_proj'] },
      freeze: { vision: true, projector: true, language: false },
      optimizer: { name: 'adamw', beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1 },
      schedule: { type: 'constant', warmupSteps: 0, totalSteps: 10 },
      learningRate: 1e-3,
      maxGradNorm: 1,
      dropout: 0,
      recompute: 'none',
      seed: 42,
      deterministic: false,
      ...changes,
    };
  }

  get loraArgs(): TrainBeginArgs {
    const { warmupSteps, totalSteps, learningRate } = this.json.loraCurve;
    return this.trainArgs({
      adapterDir: this.dir('adapter-peft'),
      schedule: { type: 'cosine', warmupSteps, totalSteps },
      learningRate,
    });
  }

  get fullArgs(): TrainBeginArgs {
    const { lora, ...rest } = this.trainArgs({
      method: 'full',
      freeze: { vision: false, projector: false, language: false },
      learningRate: this.json.fullCurve.learningRate,
    });
    return rest;
  }
}

for (const form of BLIP2_FORMS) {
  const fixture = new Fixture(form);
  const { json } = fixture;
  const close = (found: number, wanted: number, what: string) =>
    assert(Math.abs(found - wanted) < 1e-4, `${what}: ${found} ${wanted}`);

  describe(`BLIP-2 with ${form}`, () => {
    let root: string;
    before(async () => {
      root = await mkdtemp(join(tmpdir(), 'martlet-'));
    });
    after(() => rm(root, { recursive: true }));

    test('pixels equal the torchvision backend float for float', async () => {
      await using(Promise.resolve(new Engine()), async (engine) => {
        for (const [name, expected] of fixture.pixels) {
          if (/\.jpe?g$/.test(name)) continue; // decoders differ in the last bit
          const buffers: ArrayBufferView[] = [];
          const image = await fixture.image(name, buffers);
          const { result, buffers: out } = await engine.call('preprocess', { images: [image] }, { buffers });
          assert.deepEqual(result.pixels[0]?.shape, expected.shape);
          const pixels = new Float32Array(out[result.pixels[0]?.buffer as number] as ArrayBuffer);
          assert.equal(maxDifference(pixels, expected.data), 0, name);
        }
      });
    });

    for (const folder of ['model-new', 'model-5x']) {
      test(`${folder}: losses of all rows, logits, greedy tokens with and without a prompt`, async () => {
        await using(fixture.open(folder), async (engine) => {
          for (const [name, { loss }] of Object.entries(json.losses)) {
            const found = await fixture.score(engine, name);
            close(found.loss, loss, name);
            const expected = fixture.tensors.get(`labelled.${name}`);
            if (expected) assert(maxDifference(found.logits, expected.data) < 1e-4, name);
          }
          for (const [name, tokens] of Object.entries(json.greedy))
            assert.deepEqual(await fixture.greedy(engine, name), tokens, name);
        });
      });
    }

    test('model-old: features in front of the text, one table for embedding and head', async () => {
      await using(fixture.open('model-old'), async (engine) => {
        const config = JSON.parse(await readFile(fixture.dir('model-old/config.json'), 'utf8'));
        const rows = config.text_config.vocab_size as number;
        for (const [name, loss] of Object.entries(json.oldLosses)) {
          const found = await fixture.score(engine, name, undefined, rows);
          close(found.loss, loss, name);
          const expected = fixture.tensors.get(`old.labelled.${name}`);
          if (expected) assert(maxDifference(found.logits, expected.data) < 1e-4, name);
        }
        for (const [name, tokens] of Object.entries(json.oldGreedy))
          assert.deepEqual(await fixture.greedy(engine, name, undefined, rows), tokens, name);
      });
    });

    test("PEFT's adapters: on the language model, everywhere, and with a whole Q-Former", async () => {
      await using(fixture.open(), async (engine) => {
        for (const [adapter, prefix, names] of [
          ['adapter-peft', 'adapter', ['single', 'text-only']],
          ['adapter-all', 'all', ['two-images']],
          ['adapter-aligner', 'aligner', ['single']],
        ] as const) {
          await engine.call('adapter.load', { name: adapter, dir: fixture.dir(adapter) });
          for (const name of names) {
            const { logits } = await fixture.score(engine, name, adapter);
            assert(maxDifference(logits, fixture.tensor(`${prefix}.labelled.${name}`).data) < 1e-4, adapter);
          }
        }
        for (const [name, tokens] of Object.entries(json.adapterGreedy))
          assert.deepEqual(await fixture.greedy(engine, name, 'adapter-peft'), tokens, name);
        const { logits } = await fixture.score(engine, 'single');
        assert(maxDifference(logits, fixture.tensor('labelled.single').data) < 1e-4, 'the base stays as it was');
      });
    });

    for (const recompute of ['none', 'cheap', 'mlp', 'layer'] as const) {
      test(`LoRA: every gradient equals PEFT's, rows packed, recompute: ${recompute}`, async () => {
        await using(fixture.open(), async (engine) => {
          await engine.call('train.begin', { ...fixture.loraArgs, recompute });
          const { loss, gradients } = await fixture.gradients(engine, json.loraGradients.rows);
          close(loss, json.loraGradients.loss, 'loss');
          const expected = [...fixture.tensors.keys()].filter((name) => name.startsWith('grad.'));
          assert.deepEqual([...gradients.keys()].map((name) => `grad.${name}`).sort(), expected.sort());
          for (const [name, gradient] of gradients)
            assert(relativeError(gradient, fixture.tensor(`grad.${name}`).data) < 1e-4, name);
        });
      });
    }

    test('LoRA: a 20-step curve and the adapter after it', async () => {
      await using(fixture.open(), async (engine) => {
        await engine.call('train.begin', fixture.loraArgs);
        assert.equal(json.loraCurve.steps.length, 20);
        await fixture.checkCurve(engine, json.loraCurve, { split: true });
        const dir = join(root, 'lora');
        await mkdir(dir);
        await engine.call('train.save', { dir, baseModel: 'base', maxShardSize: 1e9 });
        const saved = readSafetensors(join(dir, 'adapter_model.safetensors'));
        const peft = readSafetensors(fixture.dir('adapter-peft/adapter_model.safetensors'));
        assert.deepEqual([...saved.keys()].sort(), [...peft.keys()].sort());
        for (const [key, { data }] of fixture.tensors) {
          if (!key.startsWith('final.')) continue;
          const found = saved.get(key.replace('final.', 'base_model.model.'));
          assert(found, key);
          assert(maxDifference(found.data, data) < 2e-4, key);
        }
      });
    });

    test('LoRA everywhere: gradients of vision, Q-Former, projection and language model', async () => {
      await using(fixture.open(), async (engine) => {
        await engine.call(
          'train.begin',
          fixture.trainArgs({
            adapterDir: fixture.dir('adapter-all'),
            lora: { r: 4, alpha: 8, dropout: 0, useRslora: false, targetModules: ['query', 'value'] },
            freeze: { vision: false, projector: false, language: false },
          }),
        );
        await fixture.checkGradients(engine, json.allGradients, 'allGrad');
      });
    });

    test('targets: names reach where PEFT puts pairs; all-linear is the language model without its head', async () => {
      await using(fixture.open(), async (engine) => {
        const begin = async (targetModules: string[] | string, freeze: Partial<TrainBeginArgs['freeze']> = {}) => {
          const lora = { r: 4, alpha: 8, dropout: 0, useRslora: false, targetModules };
          const args = fixture.trainArgs({
            lora,
            freeze: { vision: true, projector: true, language: false, ...freeze },
          });
          const { result } = await engine.call('train.begin', args);
          await engine.call('train.end', {});
          return result;
        };
        const keys = (folder: string) =>
          [...readSafetensors(fixture.dir(`${folder}/adapter_model.safetensors`)).keys()].flatMap((key) =>
            key.endsWith('.lora_A.weight') ? key.slice('base_model.model.'.length, -'.lora_A.weight'.length) : [],
          );
        const peft = await begin(['q', 'v', 'q_proj', 'v_proj']);
        assert.deepEqual([...peft.targets].sort(), keys('adapter-peft').sort());
        const everywhere = await begin(['q', 'v', 'q_proj', 'v_proj', 'query', 'value', 'language_projection', 'qkv'], {
          vision: false,
          projector: false,
        });
        assert.deepEqual([...everywhere.targets].sort(), keys('adapter-all').sort());
        const all = await begin('all-linear');
        assert(all.targets.every((path) => path.startsWith('language_model.') && !path.endsWith('lm_head')));
        assert.equal(all.targets.length, form === 'opt' ? 2 * 6 : 3 * 7 + 2 * 11);
        // Beside the pairs, the thawed projector is trained as a whole.
        const thawed = await begin('all-linear', { projector: false });
        assert.deepEqual(thawed.targets, all.targets);
        const { numel } = await projectorSize(engine, fixture.dir('model-new'));
        assert.equal(thawed.parts.projector, numel);
      });
    });

    test("BLIP-2's second stage: Q-Former, projection and query tokens alone", async () => {
      await using(fixture.open(), async (engine) => {
        await engine.call('train.begin', {
          ...fixture.fullArgs,
          freeze: { vision: true, projector: false, language: true },
          learningRate: json.alignerCurve.learningRate,
        });
        await fixture.checkGradients(engine, json.alignerGradients, 'alignerGrad');
        await fixture.checkCurve(engine, json.alignerCurve, { norms: 1e-2 });
        const dir = join(root, 'stage');
        await mkdir(dir);
        await engine.call('train.save', { dir, baseModel: 'base', maxShardSize: 1e9 });
        const saved = readSafetensors(join(dir, 'model.safetensors')).get('query_tokens');
        const expected = fixture.tensor('alignerFinal.query_tokens');
        assert.deepEqual(saved?.shape, expected.shape);
        // written in bfloat16, as the base is
        assert(relativeError(saved?.data ?? [], expected.data) < 4e-3);
      });
    });

    test('the same beside LoRA: freeze_aligner: false', async () => {
      await using(fixture.open(), async (engine) => {
        await engine.call(
          'train.begin',
          fixture.trainArgs({
            adapterDir: fixture.dir('adapter-peft'),
            freeze: { vision: true, projector: false, language: false },
          }),
        );
        await fixture.checkCurve(engine, json.jointCurve, { norms: 1e-2 });
        const dir = join(root, 'joint');
        await mkdir(dir);
        await engine.call('train.save', { dir, baseModel: 'base', maxShardSize: 1e9 });
        const saved = readSafetensors(join(dir, 'adapter_model.safetensors'));
        const peft = readSafetensors(fixture.dir('adapter-aligner/adapter_model.safetensors'));
        assert.deepEqual([...saved.keys()].sort(), [...peft.keys()].sort());
        for (const [name, { data, shape }] of peft) {
          assert.deepEqual(saved.get(name)?.shape, shape, name);
          // Rounding noise turned into steps of the learning rate's size: 10 steps of 1e-3.
          const found = saved.get(name)?.data ?? [];
          if (isNoise(name)) assert(maxDifference(found, data) < 0.02, name);
          else assert(relativeError(found, data) < 6e-3, `${name}: ${relativeError(found, data)}`);
        }
        const config = JSON.parse(await readFile(join(dir, 'adapter_config.json'), 'utf8'));
        assert.deepEqual(config.modules_to_save, ['qformer', 'language_projection']);
        await engine.call('train.end', {});
        await engine.call('adapter.load', { name: 'joint', dir });
        const { logits } = await fixture.score(engine, 'single', 'joint');
        assert(maxDifference(logits, fixture.tensor('aligner.labelled.single').data) < 0.2);
      });
    });

    test('full training: gradients of every parameter and a 5-step curve', async () => {
      await using(fixture.open(), async (engine) => {
        await engine.call('train.begin', fixture.fullArgs);
        await fixture.checkGradients(engine, json.fullGradients, 'full');
        await fixture.checkCurve(engine, json.fullCurve);
      });
      await using(fixture.open(), async (engine) => {
        await engine.call('train.begin', { ...fixture.fullArgs, recompute: 'layer' });
        await fixture.checkGradients(engine, json.fullGradients, 'full');
      });
    });

    test('rows packed together have the loss that they have alone', async () => {
      await using(fixture.open(), async (engine) => {
        const names = [...json.packed.rows, 'two-images', 'caption', 'chinese'];
        const { microBatches, buffers } = await fixture.micro([names]);
        await engine.call('train.begin', fixture.loraArgs);
        const { result } = await engine.call('train.evaluate', { microBatches }, { buffers });
        await engine.call('train.end', {});
        let sum = 0;
        let labelled = 0;
        await engine.call('adapter.load', { name: 'peft', dir: fixture.dir('adapter-peft') });
        for (const name of names) {
          const count = json.losses[name]?.labelled as number;
          sum += (await fixture.score(engine, name, 'peft')).loss * count;
          labelled += count;
        }
        assert.equal(result.labelledTokens, labelled);
        close(result.loss, sum / labelled, 'packed');
      });
    });

    test('dropout as in config.json, another rate, none: alike for one seed, whatever is recomputed', async () => {
      const run = (changes: Partial<TrainBeginArgs>) =>
        using(fixture.open(), async (engine) => {
          await engine.call('train.begin', { ...fixture.loraArgs, ...changes });
          return fixture.gradients(engine, ['single', 'caption', 'multi-turn']);
        });
      const { dropout, ...own } = fixture.loraArgs;
      const as = (changes: Partial<TrainBeginArgs>) =>
        using(fixture.open(), async (engine) => {
          await engine.call('train.begin', { ...own, ...changes });
          return fixture.gradients(engine, ['single', 'caption', 'multi-turn']);
        });
      const none = await run({ dropout: 0 });
      const config = await as({});
      assert(Math.abs(config.loss - none.loss) > 1e-3, 'it is live');
      assert.deepEqual(await as({ dropout: null }), config);
      assert.deepEqual((await run({ dropout: 0.1 })).loss, config.loss, "all of config.json's rates are 0.1");
      assert.notEqual((await run({ dropout: 0.3 })).loss, config.loss);
      assert.notEqual((await as({ seed: 43 })).loss, config.loss);
      for (const recompute of ['cheap', 'mlp', 'layer'] as const) {
        const again = await as({ recompute });
        assert.equal(again.loss, config.loss);
        for (const [name, gradient] of again.gradients)
          assert(relativeError(gradient, config.gradients.get(name) as Float32Array) < 1e-5, `${recompute} ${name}`);
      }
    });

    test('merged weights: float32 norms, bfloat16 bits, and the logits of the adapter', async () => {
      const outputDir = join(root, 'merged');
      const report = await mergeAdapter({
        model: fixture.dir('model-new'),
        adapter: fixture.dir('adapter-peft'),
        outputDir,
        dtype: 'float32',
      });
      assert.equal(report.mergedTensors, Object.keys(json.mergedNorms).length);
      const merged = await shards(outputDir);
      for (const [name, wanted] of Object.entries(json.mergedNorms)) {
        const found = norm(merged.get(name)?.data as Float32Array);
        assert(Math.abs(found / wanted - 1) < 1e-5, name);
      }
      const [name] = [...fixture.tensors.keys()].filter((key) => key.startsWith('merged16.')) as [string];
      const half = join(root, 'merged16');
      await mergeAdapter({ model: fixture.dir('model-new'), adapter: fixture.dir('adapter-peft'), outputDir: half });
      assert.deepEqual((await shards(half)).get(name.slice('merged16.'.length))?.data, fixture.tensor(name).data);
      await using(fixture.open(outputDir, { modelDir: outputDir }), async (engine) => {
        const { logits } = await fixture.score(engine, 'single');
        assert(maxDifference(logits, fixture.tensor('adapter.labelled.single').data) < 1e-4);
      });
      const whole = join(root, 'merged-aligner');
      await mergeAdapter({
        model: fixture.dir('model-new'),
        adapter: fixture.dir('adapter-aligner'),
        outputDir: whole,
      });
      const query = readSafetensors(fixture.dir('adapter-aligner/adapter_model.safetensors'));
      assert.deepEqual((await shards(whole)).get('query_tokens'), query.get('base_model.model.query_tokens'));
    });

    test('a fully trained old checkpoint keeps its spelling; every copy of a tied weight is written', async () => {
      await using(fixture.open('model-old'), async (engine) => {
        await engine.call('train.begin', fixture.fullArgs);
        const { microBatches, buffers } = await fixture.micro([['text-only']]);
        await engine.call('train.step', { microBatches }, { buffers });
        const dir = join(root, 'old-full');
        await mkdir(dir);
        await engine.call('train.save', { dir, baseModel: 'base', maxShardSize: 1e9 });
        const saved = readSafetensors(join(dir, 'model.safetensors'));
        const base = readSafetensors(fixture.dir('model-old/model.safetensors'));
        assert.deepEqual([...saved.keys()].sort(), [...base.keys()].sort());
        const name = form === 'opt' ? 'language_model.lm_head.weight' : 'language_model.shared.weight';
        assert.notDeepEqual(saved.get(name)?.data, base.get(name)?.data);
        if (form === 't5')
          assert.deepEqual(
            saved.get('language_model.encoder.embed_tokens.weight')?.data,
            saved.get('language_model.shared.weight')?.data,
          );
      });
    });

    for (const quantization of ['nf4', 'int8'] as const) {
      test(`QLoRA over ${quantization}: near the loss of the whole weights at first, and it learns`, async () => {
        const rows = ['single', 'text-only'];
        const losses = (options: Partial<LoadArgs>, steps: number) =>
          using(fixture.open('model-new', options), async (engine) => {
            const schedule = { type: 'constant', warmupSteps: 0, totalSteps: steps } as const;
            await engine.call('train.begin', { ...fixture.loraArgs, schedule });
            const out: number[] = [];
            for (let i = 0; i < steps; i++) {
              const { microBatches, buffers } = await fixture.micro([rows]);
              out.push((await engine.call('train.step', { microBatches }, { buffers })).result.loss);
            }
            return out;
          });
        const [whole] = (await losses({}, 1)) as [number];
        const found = await losses({ quantization }, 8);
        const [first, last] = [found[0], found.at(-1)] as [number, number];
        assert(first !== whole && Math.abs(first - whole) < 0.3, `${first} ${whole}`);
        assert(last < first - 0.05, found.join(' '));
      });
    }

    test('bad input has coded errors that name the row', async () => {
      await using(fixture.open(), async (engine) => {
        const refused = async (
          change: (sample: SampleArg, buffers: ArrayBufferView[]) => void,
          code: string,
          text: RegExp,
        ) => {
          const buffers: ArrayBufferView[] = [];
          const sample = await fixture.sample('single', buffers, 'train');
          change(sample, buffers);
          await assert.rejects(engine.call('score', { sample }, { buffers }), { code, message: text });
        };
        const { imageToken } = fixture.cases;
        const ids = (sample: SampleArg, buffers: ArrayBufferView[]) => [...(buffers[sample.inputIds] as Int32Array)];
        const labels = (sample: SampleArg, buffers: ArrayBufferView[]) => [
          ...(buffers[sample.labels as number] as Int32Array),
        ];
        const set = (sample: SampleArg, buffers: ArrayBufferView[], inputIds: number[], targets: number[]) => {
          buffers[sample.inputIds] = Int32Array.from(inputIds);
          buffers[sample.labels as number] = Int32Array.from(targets);
        };
        await refused(
          (sample, buffers) => {
            const at = ids(sample, buffers).indexOf(imageToken);
            const cut = (list: number[]) => list.filter((_, i) => i !== at);
            set(
              sample,
              buffers,
              cut(ids(sample, buffers)),
              form === 'opt' ? cut(labels(sample, buffers)) : labels(sample, buffers),
            );
          },
          'ERR_MARTLET_IMAGE',
          /single.*7 image tokens.*8 query tokens/,
        );
        await refused(
          (sample, buffers) => {
            const inputIds = ids(sample, buffers);
            inputIds[inputIds.length - 2] = 5000;
            set(sample, buffers, inputIds, labels(sample, buffers));
          },
          'ERR_MARTLET_TOKENIZER',
          /5000.*single/,
        );
        await refused(
          (sample, buffers) => {
            const targets = labels(sample, buffers);
            targets[targets.length - 1] = 5000;
            set(sample, buffers, ids(sample, buffers), targets);
          },
          'ERR_MARTLET_TOKENIZER',
          /5000.*single/,
        );
        const long = (sample: SampleArg, buffers: ArrayBufferView[]) => {
          const filler = Array(100).fill(40);
          set(
            sample,
            buffers,
            [...ids(sample, buffers), ...filler],
            form === 'opt' ? [...labels(sample, buffers), ...filler] : labels(sample, buffers),
          );
        };
        if (form === 'opt') {
          await refused(long, 'ERR_MARTLET_CONFIG', /single.*154 tokens.*96 positions/);
        } else {
          const buffers: ArrayBufferView[] = [];
          const sample = await fixture.sample('single', buffers, 'train');
          long(sample, buffers);
          const { result } = await engine.call('score', { sample }, { buffers });
          assert(Number.isFinite(result.loss), 'T5 has no longest row');
        }
      });
      const broken = join(root, 'broken');
      await cp(fixture.dir('model-5x'), broken, { recursive: true });
      const path = join(broken, 'config.json');
      const config = JSON.parse(await readFile(path, 'utf8'));
      const load = async (change: (config: Record<string, Record<string, unknown>>) => void) => {
        const changed = structuredClone(config);
        change(changed);
        await writeFile(path, JSON.stringify(changed));
        await fixture.open('', { modelDir: broken });
      };
      await assert.rejects(
        load((c) => Object.assign(c.text_config ?? {}, { vocab_size: 400 })),
        { code: 'ERR_MARTLET_WEIGHTS' },
      );
      await assert.rejects(
        load((c) => Object.assign(c.text_config ?? {}, { model_type: 'llama' })),
        {
          code: 'ERR_MARTLET_UNSUPPORTED_MODEL',
        },
      );
      await assert.rejects(
        load((c) => Object.assign(c.qformer_config ?? {}, { use_qformer_text_input: true })),
        {
          code: 'ERR_MARTLET_UNSUPPORTED_MODEL',
        },
      );
    });
  });
}

async function projectorSize(engine: Engine, modelDir: string) {
  const { result } = await engine.call('describe', { modelDir });
  const projector = result.parameters.filter(({ part }) => part === 'projector');
  return { numel: projector.reduce((sum, { numel }) => sum + numel, 0) };
}

/** Tensors of all shards of a model folder. */
async function shards(dir: string): Promise<Map<string, FixtureTensor>> {
  const index = JSON.parse(await readFile(join(dir, 'model.safetensors.index.json'), 'utf8').catch(() => '{}'));
  const files = new Set<string>(index.weight_map ? Object.values(index.weight_map) : ['model.safetensors']);
  return new Map([...files].flatMap((file) => [...readSafetensors(join(dir, file))]));
}
