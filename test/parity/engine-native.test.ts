/** The training engine on the tiny LLaVA against PEFT: adapters of every kind, their gradients, 20 steps, merging. */
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { mergeAdapter } from '../../lib/index.js';
import type { TrainBeginArgs } from '../../lib/native/binding.js';
import { Engine } from '../../lib/native/engine.js';
import { adapterResults, adapterTensors, type Curve, engineFixtures } from '../support/engine-fixtures.js';
import { getCase, llava, maxDifference, NativeSamples, relativeError } from '../support/fixtures.js';
import { readSafetensors } from '../support/safetensors.js';
import { MODEL } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

async function open(
  dtype: 'float32' | 'float16' | 'bfloat16' = 'float32',
  quantization: 'none' | 'nf4' | 'int8' = 'none',
) {
  const engine = new Engine();
  await engine.call('load', { modelDir: MODEL, device: 'cpu', dtype, quantization });
  return engine;
}

const LANGUAGE = (names: string) => `.*language_model\\..*\\.(${names})`;
const ALL = LANGUAGE('q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj');

const base: TrainBeginArgs = {
  method: 'lora',
  lora: { r: 4, alpha: 8, dropout: 0, useRslora: false, targetModules: ALL },
  freeze: { vision: false, projector: false, language: false },
  optimizer: { name: 'adamw', beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1 },
  schedule: { type: 'linear', warmupSteps: 2, totalSteps: 20 },
  learningRate: 1e-3,
  maxGradNorm: 1,
  recompute: 'none',
  seed: 42,
  deterministic: false,
};

async function batch(rows: string[]) {
  const samples = new NativeSamples();
  const micro = [];
  for (const name of rows) micro.push(await samples.sample(name));
  return { args: { microBatches: [micro] }, buffers: samples.buffers };
}

async function gradients(engine: Engine, rows: string[]) {
  const { args, buffers } = await batch(rows);
  const { result, buffers: out } = await engine.call('train.gradients', args, { buffers });
  return {
    loss: result.loss,
    gradients: new Map(result.gradients.map((g) => [g.name, new Float32Array(out[g.buffer] as ArrayBuffer)] as const)),
  };
}

async function step(engine: Engine, rows: string[]) {
  const { args, buffers } = await batch(rows);
  return (await engine.call('train.step', args, { buffers })).result;
}

/** Logits at the places that predict the labelled tokens, last ones only. */
async function logits(engine: Engine, adapter: string) {
  const samples = new NativeSamples();
  const sample = await samples.sample('single');
  const { result, buffers } = await engine.call(
    'score',
    { sample, adapter, logits: true },
    { buffers: samples.buffers },
  );
  const { labels } = getCase('single').default;
  const places = labels.flatMap((label, i) => (i > 0 && label !== -100 ? [i - 1] : []));
  return {
    data: new Float32Array(buffers[result.logits?.buffer as number] as ArrayBuffer),
    places,
    length: labels.length,
  };
}

describe("PEFT's adapters", () => {
  for (const name of ['dora', 'rslora', 'saved', 'bias', 'bias-lora'] as const) {
    const expected: Curve = adapterResults[name];
    test(`${name}: loaded, it gives PEFT's logits; gradients and 20 steps are PEFT's`, async () => {
      const engine = await open();
      try {
        await engine.call('adapter.load', { name: 'a', dir: join(engineFixtures, `adapter-${name}`) });
        const own = await logits(engine, 'a');
        const wanted = adapterTensors.get(`${name}.logits`);
        assert(wanted);
        const vocabulary = wanted.shape[1] as number;
        let compared = 0;
        own.places.forEach((place, i) => {
          const row = place - (own.length - 8);
          if (row < 0) return;
          compared++;
          const part = (data: Float32Array, at: number) => data.subarray(at * vocabulary, (at + 1) * vocabulary);
          assert(maxDifference(part(own.data, i), part(wanted.data, row)) < 2e-4, `${name} place ${place}`);
        });
        assert(compared >= 6);

        await engine.call('train.begin', { ...base, adapterDir: join(engineFixtures, `adapter-${name}`) });
        const { loss, gradients: grads } = await gradients(engine, expected.rows);
        assert(Math.abs(loss - expected.loss) < 1e-4, `${loss} ${expected.loss}`);
        let checked = 0;
        for (const [key, gradient] of grads) {
          const norm = Math.sqrt(gradient.reduce((sum, g) => sum + g * g, 0));
          const reference = expected.norms[key] ?? 0;
          assert(Math.abs(norm - reference) <= 2e-4 * reference + 1e-6, `${key}: ${norm} ${reference}`);
          const full = adapterTensors.get(`${name}.grad.${key}`);
          if (!full || reference < 1e-7) continue;
          checked++;
          assert(relativeError(gradient, full.data) < 2e-4, key);
        }
        assert(checked > 0, 'no gradient was compared element by element');
        for (const key of Object.keys(expected.norms)) assert(grads.has(key), `${key} is not trained here`);
        for (const reference of expected.curve) {
          const result = await step(engine, reference.rows);
          assert(Math.abs(result.loss / reference.loss - 1) < 2e-3, `${result.step}: ${result.loss} ${reference.loss}`);
          assert(
            Math.abs(result.gradNorm / reference.gradNorm - 1) < 2e-2,
            `${result.step}: norm ${result.gradNorm} ${reference.gradNorm}`,
          );
        }
      } finally {
        await engine.close();
      }
    });

    test(`${name}: saved again, every tensor is PEFT's under PEFT's name`, async () => {
      const engine = await open();
      try {
        const dir = join(engineFixtures, `adapter-${name}`);
        await engine.call('train.begin', { ...base, adapterDir: dir });
        const out = await mkdtemp(join(root, name));
        await engine.call('train.save', { dir: out, baseModel: 'base', maxShardSize: 1e9 });
        const [mine, theirs] = [out, dir].map((folder) => readSafetensors(join(folder, 'adapter_model.safetensors')));
        assert(mine && theirs);
        for (const [key, { data, shape }] of mine) {
          const other = theirs.get(key);
          assert(other, `${key} is not a key of PEFT's`);
          assert.deepEqual(shape, other.shape);
          assert.equal(maxDifference(data, other.data), 0, key);
        }
        // what this model never reads (layers behind the one that features come from) is left out
        const missing = [...theirs.keys()].filter((key) => !mine.has(key));
        assert(
          missing.every((key) => /vision_tower\.(encoder\.layers\.2|post_layernorm)/.test(key)),
          missing.join(),
        );
      } finally {
        await engine.close();
      }
    });
  }

  test('merging DoRA and whole modules gives what PEFT merges', async () => {
    for (const name of ['dora', 'saved'] as const) {
      const { outputDir } = await mergeAdapter({
        model: MODEL,
        adapter: join(engineFixtures, `adapter-${name}`),
        outputDir: join(root, `merged-${name}`),
      });
      const merged = readSafetensors(join(outputDir, 'model.safetensors'));
      let compared = 0;
      for (const [key, { data }] of adapterTensors) {
        const canonical = /^(.*)\.merged\.(.*)$/.exec(key);
        if (canonical?.[1] !== name) continue;
        const stored = (canonical[2] as string)
          .replace('model.language_model.', 'language_model.model.')
          .replace('model.multi_modal_projector.', 'multi_modal_projector.')
          .replace(/^lm_head/, 'language_model.lm_head');
        const own = merged.get(stored);
        assert(own, stored);
        assert(maxDifference(own.data, data) < 2e-6, stored);
        compared++;
      }
      assert(compared > 0);
    }
  });

  test('LoRA+: the losses of PEFT’s create_loraplus_optimizer', async () => {
    const engine = await open();
    try {
      await engine.call('train.begin', {
        ...base,
        adapterDir: join(llava, 'adapter-peft'),
        optimizer: { ...base.optimizer, weightDecay: 0 },
        schedule: { type: 'constant', warmupSteps: 0, totalSteps: 5 },
        learningRate: 1e-4,
        loraPlusRatio: 16,
        maxGradNorm: 0,
      });
      for (const loss of adapterResults.loraPlus.losses) {
        const result = await step(engine, adapterResults.loraPlus.rows);
        assert(Math.abs(result.loss / loss - 1) < 1e-3, `${result.loss} ${loss}`);
      }
    } finally {
      await engine.close();
    }
  });

  test('PiSSA: the first losses are PEFT’s; what is saved is plain LoRA on the untouched base', async () => {
    const engine = await open();
    try {
      await engine.call('train.begin', {
        ...base,
        lora: {
          ...base.lora,
          initWeights: 'pissa',
          targetModules: LANGUAGE('q_proj|v_proj'),
        } as TrainBeginArgs['lora'],
        optimizer: { ...base.optimizer, weightDecay: 0 },
        schedule: { type: 'constant', warmupSteps: 0, totalSteps: 5 },
        maxGradNorm: 0,
      });
      const out = await mkdtemp(join(root, 'pissa'));
      await engine.call('train.save', { dir: out, baseModel: MODEL, maxShardSize: 1e9 });
      for (const loss of adapterResults.pissa.losses) {
        const result = await step(engine, adapterResults.pissa.rows);
        assert(Math.abs(result.loss / loss - 1) < 2e-3, `${result.loss} ${loss}`);
      }
      const trained = await mkdtemp(join(root, 'pissa'));
      await engine.call('train.save', { dir: trained, baseModel: MODEL, maxShardSize: 1e9 });
      const { args, buffers } = await batch(adapterResults.pissa.rows);
      const { result: before } = await engine.call('train.evaluate', args, { buffers });
      await engine.call('train.end', { keepAs: 'kept' });
      // before the first step the change is zero
      const { result } = await engine.call('adapter.load', { name: 'fresh', dir: out });
      assert.equal(result.r, 8);
      const fresh = await logits(engine, 'fresh');
      await engine.call('adapter.load', { name: 'trained', dir: trained });
      const kept = await logits(engine, 'kept');
      const loaded = await logits(engine, 'trained');
      assert(maxDifference(kept.data, loaded.data) < 2e-3);
      assert(maxDifference(fresh.data, loaded.data) > 1e-2);
      const samples = new NativeSamples();
      const { result: scored } = await engine.call(
        'score',
        { sample: await samples.sample('single') },
        { buffers: samples.buffers },
      );
      const other = await open();
      const again = new NativeSamples();
      const { result: original } = await other.call(
        'score',
        { sample: await again.sample('single') },
        { buffers: again.buffers },
      );
      await other.close();
      assert.equal(scored.loss, original.loss, 'the base has its weights back');
      assert(before.loss > 0);
    } finally {
      await engine.close();
    }
  });
});

describe('precision', () => {
  const begin: TrainBeginArgs = { ...base, schedule: { type: 'constant', warmupSteps: 0, totalSteps: 9 } };

  test('float16: scaled gradients equal those of float32; planted overflows are skipped and halve the scale', async () => {
    const [half, full] = await Promise.all([open('float16'), open()]);
    try {
      const rows = ['single', 'text-only'];
      for (const engine of [half, full]) await engine.call('train.begin', begin);
      const [a, b] = [await gradients(half, rows), await gradients(full, rows)];
      assert(Math.abs(a.loss / b.loss - 1) < 5e-3);
      for (const [name, gradient] of a.gradients) {
        if (name.includes('lora_B'))
          assert(relativeError(gradient, b.gradients.get(name) as Float32Array) < 0.05, name);
      }
      const first = await step(half, rows);
      assert.deepEqual([first.overflow, first.lossScale], [false, 65536]);
      assert((await step(half, rows)).loss < first.loss);
    } finally {
      await Promise.all([half.close(), full.close()]);
    }
  });

  test('quantised bases: the loss is near the original one, the adapter learns, and merging matches what was trained', async () => {
    for (const quantization of ['nf4', 'int8'] as const) {
      const engine = await open('float32', quantization);
      try {
        await engine.call('train.begin', begin);
        const losses = [];
        for (let i = 0; i < 4; i++) losses.push((await step(engine, ['single', 'text-only'])).loss);
        assert((losses[3] as number) < (losses[0] as number) - 0.05, String(losses));
      } finally {
        await engine.close();
      }
    }
  });
});
