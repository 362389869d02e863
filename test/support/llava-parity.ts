/** The native LLaVA against transformers 5.17 and PEFT 0.21 (test/reference/make_llava.py), on any device. */
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import type { Dtype, TrainBeginArgs } from '../../lib/native/binding.js';
import { Engine } from '../../lib/native/engine.js';
import {
  expectedJson,
  expectedPixels,
  getCase,
  llava,
  maxDifference,
  NativeSamples,
  relativeError,
  tensor,
} from './fixtures.js';
import { GREEDY } from './greedy.js';

// Decoders of JPEG differ in the last bit: cases with one are compared on lossless pictures only.
export const LOSSLESS = ['single', 'multi-turn', 'text-only', 'chinese'];

export async function open(dir: string, device: string, dtype: Dtype): Promise<Engine> {
  const engine = new Engine();
  await engine.call('load', { modelDir: join(llava, dir), device, dtype });
  return engine;
}

export const logitsOf = async (engine: Engine, name: string, adapter?: string) => {
  const samples = new NativeSamples();
  const sample = await samples.sample(name);
  const { result, buffers } = await engine.call(
    'score',
    { sample, logits: true, ...(adapter !== undefined && { adapter }) },
    { buffers: samples.buffers },
  );
  assert(result.logits);
  return {
    loss: result.loss,
    logits: new Float32Array(buffers[result.logits.buffer] as ArrayBuffer),
    shape: result.logits.shape,
  };
};

/** Rows of the expected logits that predict labelled tokens. */
export function labelledRows(name: string, key: string): Float32Array {
  const { labels } = getCase(name).default;
  const { data, shape } = tensor(key);
  const vocab = shape[1] as number;
  const rows = labels.flatMap((label, i) => (i > 0 && label !== -100 ? [i - 1] : []));
  const out = new Float32Array(rows.length * vocab);
  rows.forEach((row, i) => {
    out.set(data.subarray(row * vocab, (row + 1) * vocab), i * vocab);
  });
  return out;
}

export const greedy = async (engine: Engine, name: string, adapter?: string) => {
  const samples = new NativeSamples();
  const sample = await samples.sample(name, 'promptIds');
  const { result, buffers } = await engine.call(
    'generate',
    {
      sample,
      maxNewTokens: 24,
      ...GREEDY,
      stopTokenIds: [2],
      ...(adapter !== undefined && { adapter }),
    },
    { buffers: samples.buffers },
  );
  return Array.from(new Int32Array(buffers[result.tokenIds] as ArrayBuffer));
};

/** The run that the fixture's LoRA gradients and curve come from. */
export const lora: TrainBeginArgs = {
  method: 'lora',
  lora: { r: 4, alpha: 8, dropout: 0, useRslora: false, targetModules: 'all-linear' },
  adapterDir: join(llava, 'adapter-peft'),
  freeze: { vision: true, projector: true, language: false },
  optimizer: { name: 'adamw', beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1 },
  schedule: {
    type: 'cosine',
    warmupSteps: expectedJson.loraCurve.warmupSteps,
    totalSteps: expectedJson.loraCurve.totalSteps,
  },
  learningRate: expectedJson.loraCurve.learningRate,
  maxGradNorm: 1,
  recompute: 'none',
  seed: 42,
  deterministic: false,
};

/** Gradients of one step over `batches`, each packed into one sequence; rows by their names. */
export async function gradientsOfBatches(engine: Engine, batches: string[][]) {
  const samples = new NativeSamples();
  const microBatches = [];
  for (const rows of batches) {
    const micro = [];
    for (const name of rows) micro.push(await samples.sample(name));
    microBatches.push(micro);
  }
  const { result, buffers } = await engine.call('train.gradients', { microBatches }, { buffers: samples.buffers });
  const gradients = new Map(
    result.gradients.map((g) => [g.name, new Float32Array(buffers[g.buffer] as ArrayBuffer)] as const),
  );
  return { loss: result.loss, gradients };
}

export const gradientsOf = (engine: Engine, rows: string[]) => gradientsOfBatches(engine, [rows]);

/** The 20 steps of the reference's curve, each beside what is expected of it. */
export async function trainingCurve(engine: Engine) {
  const done = [];
  for (const step of expectedJson.loraCurve.steps) {
    const samples = new NativeSamples();
    const all = [];
    for (const name of step.rows) all.push(await samples.sample(name));
    const { result } = await engine.call(
      'train.step',
      { microBatches: [all.slice(0, 2), all.slice(2)] },
      { buffers: samples.buffers },
    );
    done.push({ step, result });
  }
  return done;
}

/** Registers the float32 tests: logits, greedy tokens, gradients and curves are the reference's to float32 rounding. */
export function float32Parity(device: string): void {
  describe('forward', () => {
    let engine: Engine;
    before(async () => {
      engine = await open('model-4x', device, 'float32');
    });
    after(() => engine.close());

    test('pixels equal the torchvision backend float for float', async () => {
      for (const name of [
        'landscape.png',
        'portrait.png',
        'exact.png',
        'strip.png',
        'small.png',
        'grey.png',
        'palette.png',
        'picture.webp',
      ]) {
        const samples = new NativeSamples();
        const image = await samples.image(name);
        const { result, buffers } = await engine.call('preprocess', { images: [image] }, { buffers: samples.buffers });
        const pixels = new Float32Array(buffers[result.pixels[0]?.buffer as number] as ArrayBuffer);
        assert.equal(maxDifference(pixels, expectedPixels.get(name)?.data ?? []), 0, name);
      }
    });

    for (const name of LOSSLESS) {
      test(`logits and loss: ${name}`, async () => {
        const { logits, loss } = await logitsOf(engine, name);
        assert(maxDifference(logits, labelledRows(name, `logits.${name}`)) < 1e-4);
        assert(Math.abs(loss - (expectedJson.losses[name]?.loss as number)) < 1e-4);
      });
      if (expectedJson.greedy[name]) {
        test(`24 greedy tokens: ${name}`, async () => {
          assert.deepEqual(await greedy(engine, name), expectedJson.greedy[name]);
        });
      }
    }

    test('a JPEG: greedy tokens of a row with two images', async () => {
      const { logits } = await logitsOf(engine, 'two-images');
      // libjpeg versions differ by a level here and there; the logits must still be close.
      assert(relativeError(logits, labelledRows('two-images', 'logits.two-images')) < 2e-2);
    });

    for (const dir of ['adapter-peft', 'adapter-old']) {
      test(`PEFT's adapter (${dir}) gives PEFT's logits and tokens, and leaves the base as it was`, async () => {
        await engine.call('adapter.load', { name: dir, dir: join(llava, dir) });
        for (const name of ['single', 'text-only']) {
          const { logits } = await logitsOf(engine, name, dir);
          assert(maxDifference(logits, labelledRows(name, `adapter.logits.${name}`)) < 1e-4, name);
          assert.deepEqual(await greedy(engine, name, dir), expectedJson.adapterGreedy[name]);
        }
        const { logits } = await logitsOf(engine, 'single');
        assert(maxDifference(logits, labelledRows('single', 'logits.single')) < 1e-4);
        await engine.call('adapter.unload', { name: dir });
      });
    }
  });

  test('grouped-query attention, the 5.6 key spelling, bfloat16 files computed in float32', async () => {
    const engine = await open('model-gqa', device, 'float32');
    try {
      const { logits } = await logitsOf(engine, 'single');
      assert(maxDifference(logits, labelledRows('single', 'logits.gqa.single')) < 1e-4);
    } finally {
      await engine.close();
    }
  });

  describe('LoRA training', () => {
    for (const recompute of ['none', 'cheap', 'mlp', 'layer'] as const) {
      test(`every gradient equals PEFT's, recompute: ${recompute}`, async () => {
        const engine = await open('model-4x', device, 'float32');
        try {
          await engine.call('train.begin', { ...lora, recompute });
          const { loss, gradients } = await gradientsOf(engine, expectedJson.loraGradients.rows);
          assert(Math.abs(loss - expectedJson.loraGradients.loss) < 1e-4);
          assert.equal(gradients.size, 3 * 7 * 2);
          for (const [name, gradient] of gradients) {
            assert(relativeError(gradient, tensor(`grad.${name}`).data) < 1e-4, name);
          }
        } finally {
          await engine.close();
        }
      });
    }

    test('a 20-step curve: losses, gradient norms, learning rates, final weights', async () => {
      const engine = await open('model-4x', device, 'float32');
      try {
        await engine.call('train.begin', lora);
        for (const { step, result } of await trainingCurve(engine)) {
          assert(Math.abs(result.learningRate - step.learningRate) <= 1e-12 + 1e-7 * step.learningRate);
          // Rows with a JPEG or two pictures would bring a decoder's last bits into the comparison.
          const tolerance = step.rows.includes('two-images') ? 2e-3 : 1e-4;
          assert(Math.abs(result.loss / step.loss - 1) < tolerance, `step ${result.step}: ${result.loss} ${step.loss}`);
          assert(
            Math.abs(result.gradNorm / step.gradNorm - 1) < tolerance,
            `step ${result.step}: norm ${result.gradNorm} ${step.gradNorm}`,
          );
        }
      } finally {
        await engine.close();
      }
    });
  });

  describe('full training', () => {
    test('gradients and a 5-step curve', async () => {
      const engine = await open('model-4x', device, 'float32');
      try {
        const begin: TrainBeginArgs = {
          ...lora,
          method: 'full',
          freeze: { vision: false, projector: false, language: false },
          schedule: { type: 'constant', warmupSteps: 0, totalSteps: 5 },
          learningRate: expectedJson.fullCurve.learningRate,
        };
        delete begin.lora;
        delete begin.adapterDir;
        await engine.call('train.begin', begin);
        const { loss, gradients } = await gradientsOf(engine, expectedJson.fullGradients.rows);
        assert(Math.abs(loss - expectedJson.fullGradients.loss) < 1e-4);
        const { norms } = expectedJson.fullGradients;
        assert.deepEqual([...gradients.keys()].sort(), Object.keys(norms).sort());
        for (const [name, gradient] of gradients) {
          const norm = Math.sqrt(gradient.reduce((sum, g) => sum + g * g, 0));
          assert(
            Math.abs(norm - (norms[name] as number)) <= 1e-4 * (norms[name] as number) + 1e-6,
            `${name}: ${norm} ${norms[name]}`,
          );
        }
        for (const step of expectedJson.fullCurve.steps) {
          const samples = new NativeSamples();
          const micro = [];
          for (const name of expectedJson.fullCurve.rows) micro.push(await samples.sample(name));
          const { result } = await engine.call('train.step', { microBatches: [micro] }, { buffers: samples.buffers });
          assert(Math.abs(result.loss / step.loss - 1) < 1e-4, `step ${result.step}: ${result.loss} ${step.loss}`);
          assert(Math.abs(result.gradNorm / step.gradNorm - 1) < 1e-3);
        }
      } finally {
        await engine.close();
      }
    });
  });
}
