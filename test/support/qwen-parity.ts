/** The native Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers 5.17 and PEFT 0.21 (test/reference/make_qwen_vl.py), on any device. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import sharp from 'sharp';
import type {
  Dtype,
  GenerateRequest,
  GenerateResult,
  ImageArg,
  SampleArg,
  TrainBeginArgs,
} from '../../lib/native/binding.js';
import { Engine } from '../../lib/native/engine.js';
import { maxDifference, relativeError } from './fixtures.js';
import { GREEDY } from './greedy.js';
import { QWEN_FAMILIES, type QwenFamily, qwenCases, qwenDir, qwenImage } from './qwen-vl.js';
import { type FixtureTensor, readSafetensors } from './safetensors.js';

const PATCH = 4;
const CLIP = { mean: [0.48145466, 0.4578275, 0.40821073], std: [0.26862954, 0.26130258, 0.27577711] };
const HALF = { mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5] };

interface Expected {
  losses: Record<string, { loss: number; labelled: number }>;
  greedy: Record<string, number[]>;
  adapterGreedy: Record<string, number[]>;
  packed: { rows: string[] };
  loraGradients: { rows: string[]; loss: number };
  loraCurve: {
    warmupSteps: number;
    totalSteps: number;
    learningRate: number;
    weightDecay: number;
    maxGradNorm: number;
    steps: { rows: string[]; loss: number; gradNorm: number; learningRate: number }[];
  };
  mergedNorms: Record<string, number>;
  visionLoraGradients: { rows: string[]; loss: number; norms: Record<string, number> };
  fullGradients: { rows: string[]; loss: number; norms: Record<string, number> };
  fullCurve: { rows: string[]; learningRate: number; weightDecay: number; steps: { loss: number; gradNorm: number }[] };
}

const norm = (values: Float32Array) => Math.sqrt(values.reduce((sum, x) => sum + x * x, 0));

async function rgb(name: string): Promise<{ data: Uint8Array; width: number; height: number }> {
  const { data, info } = await sharp(qwenImage(name))
    .toColourspace('srgb')
    .removeAlpha()
    .raw()
    .toBuffer({ resolveWithObject: true });
  return { data, width: info.width, height: info.height };
}

/** The fixtures of one family, and its rows as arguments of native jobs. */
export class QwenFixture {
  readonly expectedJson: Expected;
  readonly pixels: Map<string, FixtureTensor>;
  private readonly tensors: Map<string, FixtureTensor>;
  private readonly rows: ReturnType<typeof qwenCases>;

  constructor(
    readonly family: QwenFamily,
    private readonly device: string,
    private readonly dtype: Dtype,
  ) {
    this.expectedJson = JSON.parse(readFileSync(qwenDir(family, 'expected.json'), 'utf8'));
    this.tensors = readSafetensors(qwenDir(family, 'expected.safetensors'));
    this.pixels = readSafetensors(qwenDir(family, 'pixels.safetensors'));
    this.rows = qwenCases(family);
  }

  tensor(name: string): FixtureTensor {
    const found = this.tensors.get(name);
    assert(found, `no expected tensor ${name}`);
    return found;
  }

  has(name: string): boolean {
    return this.tensors.has(name);
  }

  case(name: string) {
    const found = this.rows.cases.find((row) => row.name === name);
    assert(found, `no case ${name}`);
    return found;
  }

  get names(): string[] {
    return this.rows.cases.map(({ name }) => name);
  }

  /** Rows of the expected logits of every token that predict labelled ones. */
  labelledRows(name: string, key: string): Float32Array {
    const { labels } = this.case(name).default;
    const { data, shape } = this.tensor(key);
    const vocab = shape[1] as number;
    const rows = labels.flatMap((label, i) => (i > 0 && label !== -100 ? [i - 1] : []));
    return Float32Array.from(rows.flatMap((row) => [...data.subarray(row * vocab, (row + 1) * vocab)]));
  }

  private plan(grid: readonly number[], backend: 'torchvision' | 'pillow' = 'torchvision'): ImageArg['plan'] {
    const [, h, w] = grid as [number, number, number];
    return {
      resize: { height: h * PATCH, width: w * PATCH, backend },
      rescale: 0.00392156862745098,
      patches: { size: PATCH, temporal: 2, merge: 2 },
      ...((this.family === 'qwen3_vl' ? HALF : CLIP) as Pick<ImageArg['plan'], 'mean' | 'std'>),
    };
  }

  async image(
    name: string,
    buffers: ArrayBufferView[],
    backend: 'torchvision' | 'pillow' = 'torchvision',
  ): Promise<ImageArg> {
    const { data, width, height } = await rgb(name);
    return { buffer: buffers.push(data) - 1, width, height, plan: this.plan(this.rows.grids[name] ?? [], backend) };
  }

  async video(row: string, index: number, buffers: ArrayBufferView[]): Promise<ImageArg> {
    const { videos = [], videoGrids, secondPerGrid } = this.case(row);
    const frames = await Promise.all((videos[index] ?? []).map(rgb));
    const [first] = frames;
    assert(first);
    return {
      buffer: buffers.push(Buffer.concat(frames.map(({ data }) => data))) - 1,
      width: first.width,
      height: first.height,
      frames: frames.length,
      ...(secondPerGrid && { secondsPerGrid: secondPerGrid[index] as number }),
      plan: this.plan(videoGrids[index] ?? []),
    };
  }

  async sample(
    name: string,
    buffers: ArrayBufferView[],
    key: 'inputIds' | 'promptIds' = 'inputIds',
  ): Promise<SampleArg> {
    const row = this.case(name);
    const ids = row.default[key];
    const pictures = await Promise.all(row.images.map((image) => this.image(image, buffers)));
    const videos = await Promise.all((row.videos ?? []).map((_, i) => this.video(name, i, buffers)));
    const { imageToken, videoToken } = this.rows;
    // In the order of their places; a video of Qwen3-VL has several.
    const videoFirst = ids.indexOf(videoToken) >= 0 && ids.indexOf(videoToken) < ids.indexOf(imageToken);
    return {
      inputIds: buffers.push(Int32Array.from(ids)) - 1,
      ...(key === 'inputIds' && { labels: buffers.push(Int32Array.from(row.default.labels)) - 1 }),
      images: videoFirst ? [...videos, ...pictures] : [...pictures, ...videos],
      id: name,
    };
  }

  async samples(names: string[], buffers: ArrayBufferView[]): Promise<SampleArg[]> {
    const out: SampleArg[] = [];
    for (const name of names) out.push(await this.sample(name, buffers));
    return out;
  }

  async open(dir: string): Promise<Engine> {
    const engine = new Engine();
    await engine.call('load', { modelDir: qwenDir(this.family, dir), device: this.device, dtype: this.dtype });
    return engine;
  }

  async logits(engine: Engine, name: string, adapter?: string) {
    const buffers: ArrayBufferView[] = [];
    const sample = await this.sample(name, buffers);
    const args = { sample, logits: true, ...(adapter !== undefined && { adapter }) };
    const { result, buffers: out } = await engine.call('score', args, { buffers });
    assert(result.logits);
    return { loss: result.loss, logits: new Float32Array(out[result.logits.buffer] as ArrayBuffer) };
  }

  async greedy(engine: Engine, name: string, adapter?: string): Promise<number[]> {
    return (await this.greedyBatch(engine, [name], adapter))[0] as number[];
  }

  /** One row by `generate`, several by `generate.batch`. */
  async greedyBatch(engine: Engine, names: string[], adapter?: string): Promise<number[][]> {
    const buffers: ArrayBufferView[] = [];
    const { eos_token_id: stopTokenIds } = JSON.parse(
      readFileSync(qwenDir(this.family, 'model-4x/generation_config.json'), 'utf8'),
    ) as { eos_token_id: number[] };
    const settings = {
      maxNewTokens: 24,
      ...GREEDY,
      stopTokenIds,
    };
    const requests: GenerateRequest[] = [];
    for (const name of names) requests.push({ sample: await this.sample(name, buffers, 'promptIds'), ...settings });
    const [only, ...others] = requests as [GenerateRequest, ...GenerateRequest[]];
    const using = adapter !== undefined && { adapter };
    const tokens = (answer: GenerateResult, out: ArrayBuffer[]) =>
      Array.from(new Int32Array(out[answer.tokenIds] as ArrayBuffer));
    if (others.length === 0) {
      const { result, buffers: out } = await engine.call('generate', { ...only, ...using }, { buffers });
      return [tokens(result, out)];
    }
    const { result, buffers: out } = await engine.call('generate.batch', { requests, ...using }, { buffers });
    return result.answers.map((answer) => tokens(answer, out));
  }

  async gradients(engine: Engine, names: string[]) {
    const buffers: ArrayBufferView[] = [];
    const microBatches = [await this.samples(names, buffers)];
    const { result, buffers: out } = await engine.call('train.gradients', { microBatches }, { buffers });
    const gradients = new Map(
      result.gradients.map((g) => [g.name, new Float32Array(out[g.buffer] as ArrayBuffer)] as const),
    );
    return { loss: result.loss, gradients };
  }

  /** The 20 steps of the reference's curve, each beside what is expected of it. */
  async trainingCurve(engine: Engine) {
    const done = [];
    for (const step of this.expectedJson.loraCurve.steps) {
      const buffers: ArrayBufferView[] = [];
      const all = await this.samples(step.rows, buffers);
      const microBatches = [all.slice(0, 2), all.slice(2)];
      const { result } = await engine.call('train.step', { microBatches }, { buffers });
      done.push({ step, result });
    }
    return done;
  }

  /** The run that the fixture's LoRA gradients and curve come from. */
  lora(adapter: string): TrainBeginArgs {
    const curve = this.expectedJson.loraCurve;
    return {
      method: 'lora',
      lora: { r: 4, alpha: 8, dropout: 0, useRslora: false, targetModules: 'all-linear' },
      adapterDir: qwenDir(this.family, adapter),
      freeze: { vision: true, projector: true, language: false },
      optimizer: { name: 'adamw', beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: curve.weightDecay },
      schedule: { type: 'cosine', warmupSteps: curve.warmupSteps, totalSteps: curve.totalSteps },
      learningRate: curve.learningRate,
      maxGradNorm: curve.maxGradNorm,
      recompute: 'none',
      seed: 42,
      deterministic: false,
    };
  }
}

export async function using(engine: Promise<Engine>, body: (engine: Engine) => Promise<void>): Promise<void> {
  const opened = await engine;
  try {
    await body(opened);
  } finally {
    await opened.close();
  }
}

/** Registers the float32 tests: pixels, logits, greedy tokens, gradients and curves are the reference's to float32 rounding. */
export function qwenFloat32Parity(device: string): void {
  for (const family of QWEN_FAMILIES) {
    describe(family, () => {
      const fixture = new QwenFixture(family, device, 'float32');
      const { expectedJson } = fixture;
      const adapters = family === 'qwen3_vl' ? ['adapter-peft'] : ['adapter-peft', 'adapter-old'];

      describe('forward', () => {
        let engine: Engine;
        before(async () => {
          engine = await fixture.open('model-4x');
        });
        after(() => engine.close());

        const preprocessed = async (image: ImageArg, buffers: ArrayBufferView[]) => {
          const { result, buffers: out } = await engine.call('preprocess', { images: [image] }, { buffers });
          return new Map(
            result.pixels.map(({ name, shape, buffer }) => [
              name,
              { shape, data: new Float32Array(out[buffer] as ArrayBuffer) },
            ]),
          );
        };

        test('patches and grids equal the processor float for float', async () => {
          const pictures = [...fixture.pixels.keys()].filter(
            (name) => name.endsWith('.png') && !name.startsWith('grid.'),
          );
          assert(pictures.length > 0);
          for (const name of pictures) {
            const buffers: ArrayBufferView[] = [];
            const made = await preprocessed(await fixture.image(name, buffers), buffers);
            assert.deepEqual([...made.keys()], ['pixel_values', 'image_grid_thw']);
            assert.deepEqual(made.get('pixel_values')?.shape, fixture.pixels.get(name)?.shape);
            assert.equal(
              maxDifference(made.get('pixel_values')?.data ?? [], fixture.pixels.get(name)?.data ?? []),
              0,
              name,
            );
            assert.deepEqual(made.get('image_grid_thw')?.data, fixture.pixels.get(`grid.${name}`)?.data);
          }
          // Three frames: the last temporal patch repeats its last frame.
          for (const name of ['video', 'video-slow']) {
            const buffers: ArrayBufferView[] = [];
            const made = await preprocessed(await fixture.video(name, 0, buffers), buffers);
            assert.deepEqual([...made.keys()], ['pixel_values_videos', 'video_grid_thw']);
            assert.equal(
              maxDifference(made.get('pixel_values_videos')?.data ?? [], fixture.pixels.get(name)?.data ?? []),
              0,
              name,
            );
            assert.deepEqual(made.get('video_grid_thw')?.data, fixture.pixels.get(`grid.${name}`)?.data);
          }
        });

        if (family === 'qwen2_vl') {
          test('patches of the Pillow backend float for float', async () => {
            const pillow = readSafetensors(qwenDir(family, 'pixels-pillow.safetensors'));
            for (const name of ['tiny.png', 'half.png']) {
              const buffers: ArrayBufferView[] = [];
              const made = await preprocessed(await fixture.image(name, buffers, 'pillow'), buffers);
              assert.equal(maxDifference(made.get('pixel_values')?.data ?? [], pillow.get(name)?.data ?? []), 0, name);
            }
          });
        }

        for (const name of ['single', 'text-only', 'two-images', 'video', 'image-video']) {
          test(`logits: ${name}`, async () => {
            const { logits } = await fixture.logits(engine, name);
            assert(maxDifference(logits, fixture.tensor(`labelled.${name}`).data) < 1e-4);
          });
        }

        // Decoders of JPEG differ in the last bit.
        test('losses of all rows without a JPEG: every picture, several, videos, text alone', async () => {
          for (const name of fixture.names.filter((row) => row !== 'jpeg')) {
            const { loss } = await fixture.logits(engine, name);
            const expected = expectedJson.losses[name]?.loss as number;
            assert(Math.abs(loss / expected - 1) < 1e-4, `${name}: ${loss} ${expected}`);
          }
        });

        test('a row of text gives the logits of the plain language model', async () => {
          const { logits } = await fixture.logits(engine, 'empty-system');
          assert(maxDifference(logits, fixture.labelledRows('empty-system', 'logits.empty-system')) < 1e-4);
        });

        for (const [name, tokens] of Object.entries(expectedJson.greedy)) {
          test(`greedy tokens: ${name}`, async () => {
            assert.deepEqual(await fixture.greedy(engine, name), tokens);
          });
        }

        test('greedy tokens: all rows at once, each twice', async () => {
          const names = [...Object.keys(expectedJson.greedy), ...Object.keys(expectedJson.greedy)];
          assert.deepEqual(
            await fixture.greedyBatch(engine, names),
            names.map((name) => expectedJson.greedy[name]),
          );
        });

        test('two adapters, in both spellings, give the reference logits and tokens, and leave the base as it was', async () => {
          for (const dir of adapters) await engine.call('adapter.load', { name: dir, dir: qwenDir(family, dir) });
          for (const dir of adapters) {
            const { logits } = await fixture.logits(engine, 'single', dir);
            assert(maxDifference(logits, fixture.tensor('adapter.labelled.single').data) < 1e-4, dir);
            for (const [name, tokens] of Object.entries(expectedJson.adapterGreedy))
              assert.deepEqual(await fixture.greedy(engine, name, dir), tokens, `${dir} ${name}`);
          }
          const { logits } = await fixture.logits(engine, 'single');
          assert(maxDifference(logits, fixture.tensor('labelled.single').data) < 1e-4);
          for (const dir of adapters) await engine.call('adapter.unload', { name: dir });
        });

        test('tokens and pictures that do not fit are ERR_MARTLET_IMAGE naming the row', async () => {
          const buffers: ArrayBufferView[] = [];
          const sample = await fixture.sample('two-images', buffers);
          const [first, second] = sample.images as [ImageArg, ImageArg];
          for (const [images, message] of [
            [[], /two-images.*no picture is left/],
            [[first], /two-images.*no picture is left/],
            [[second, first], /two-images.*places for \d+ features/],
            [[first, second, first], /two-images.*places for fewer/],
            [[first, { ...second, frames: 1 }], /two-images.*what comes next/],
          ] as [ImageArg[], RegExp][]) {
            await assert.rejects(engine.call('score', { sample: { ...sample, images } }, { buffers }), {
              code: 'ERR_MARTLET_IMAGE',
              message,
            });
          }
          const odd = {
            ...first,
            plan: { ...first.plan, resize: { height: 12, width: 16, backend: 'pillow' as const } },
          };
          await assert.rejects(engine.call('preprocess', { images: [odd] }, { buffers }), {
            code: 'ERR_MARTLET_IMAGE',
            message: /12.*multiple of 8/,
          });
          const { patches, ...whole } = first.plan;
          assert(patches);
          for (const plan of [whole, { ...first.plan, patches: { ...patches, temporal: 1 } }]) {
            await assert.rejects(
              engine.call('score', { sample: { ...sample, images: [{ ...first, plan }, second] } }, { buffers }),
              { code: 'ERR_MARTLET_IMAGE' },
            );
          }
        });
      });

      test('the key and config spelling of transformers 5, the head untied or tied the other way', async () => {
        await using(fixture.open('model-5x'), async (engine) => {
          const { logits } = await fixture.logits(engine, 'two-images');
          assert(maxDifference(logits, fixture.tensor('labelled.5x.two-images').data) < 1e-4);
        });
      });

      describe('LoRA training', () => {
        for (const recompute of ['none', 'cheap', 'mlp', 'layer'] as const) {
          test(`every gradient equals PEFT's, recompute: ${recompute}`, async () => {
            await using(fixture.open('model-4x'), async (engine) => {
              const begun = await engine.call('train.begin', {
                ...fixture.lora('adapter-peft'),
                recompute,
              });
              assert.deepEqual([begun.result.parts.vision, begun.result.parts.projector], [0, 0]);
              const { loss, gradients } = await fixture.gradients(engine, expectedJson.loraGradients.rows);
              assert(Math.abs(loss / expectedJson.loraGradients.loss - 1) < 1e-4);
              assert.equal(gradients.size, 3 * 7 * 2);
              for (const [name, gradient] of gradients)
                assert(relativeError(gradient, fixture.tensor(`grad.${name}`).data) < 1e-4, name);
            });
          });

          test(`on vision and merger too, recompute: ${recompute}`, async () => {
            const { rows, loss: expected, norms } = expectedJson.visionLoraGradients;
            await using(fixture.open('model-4x'), async (engine) => {
              const begun = await engine.call('train.begin', {
                ...fixture.lora('adapter-vision'),
                freeze: { vision: false, projector: false, language: false },
                recompute,
              });
              assert(begun.result.parts.vision > 0 && begun.result.parts.projector > 0);
              const { loss, gradients } = await fixture.gradients(engine, rows);
              assert(Math.abs(loss / expected - 1) < 1e-4);
              assert.deepEqual([...gradients.keys()].sort(), Object.keys(norms).sort());
              let whole = 0;
              for (const [name, gradient] of gradients) {
                const reference = norms[name] as number;
                assert(Math.abs(norm(gradient) - reference) <= 1e-4 * reference + 1e-6, name);
                if (!/\.visual\.(blocks\.[03]|merger|deepstack_merger_list)\./.test(name)) continue;
                assert(relativeError(gradient, fixture.tensor(`visionGrad.${name}`).data) < 1e-4, name);
                ++whole;
              }
              assert(whole >= 2 * 4 * 2);
            });
          });
        }

        test('a 20-step curve: losses, gradient norms, learning rates, final weights', async () => {
          await using(fixture.open('model-4x'), async (engine) => {
            await engine.call('train.begin', fixture.lora('adapter-peft'));
            for (const { step, result } of await fixture.trainingCurve(engine)) {
              assert(Math.abs(result.learningRate - step.learningRate) <= 1e-12 + 1e-7 * step.learningRate);
              assert(Math.abs(result.loss / step.loss - 1) < 1e-4, `step ${result.step}: ${result.loss} ${step.loss}`);
              assert(Math.abs(result.gradNorm / step.gradNorm - 1) < 1e-3, `step ${result.step}: norm`);
            }
            const dir = await mkdtemp(join(tmpdir(), 'martlet-qwen-'));
            try {
              await engine.call('train.save', { dir, baseModel: 'base', maxShardSize: 1e9 });
              const saved = readSafetensors(join(dir, 'adapter_model.safetensors'));
              let compared = 0;
              for (const [name, { data }] of saved) {
                const path = name.replace('base_model.model.', '');
                if (!/layers\.0\.self_attn\.q_proj|layers\.2\.mlp\.down_proj/.test(path)) continue;
                assert(relativeError(data, fixture.tensor(`final.${path}`).data) < 1e-3, path);
                ++compared;
              }
              assert.equal(compared, 4);
            } finally {
              await rm(dir, { recursive: true });
            }
          });
        });

        test('packed rows have the loss of each alone', async () => {
          const { rows } = expectedJson.packed;
          const loss = async (engine: Engine, names: string[]) => {
            const buffers: ArrayBufferView[] = [];
            const microBatches = [await fixture.samples(names, buffers)];
            return (await engine.call('train.evaluate', { microBatches }, { buffers })).result;
          };
          await using(fixture.open('model-4x'), async (engine) => {
            const { adapterDir: _, ...fresh } = fixture.lora('adapter-peft'); // B is zero: the base
            await engine.call('train.begin', fresh);
            for (const names of [rows, ['video', 'two-images', 'image-video', 'emoji']]) {
              const packed = await loss(engine, names);
              const apart = names.map((name) => expectedJson.losses[name] as { loss: number; labelled: number });
              const labelled = apart.reduce((sum, row) => sum + row.labelled, 0);
              const mean = apart.reduce((sum, row) => sum + row.loss * row.labelled, 0) / labelled;
              assert.equal(packed.labelledTokens, labelled);
              assert(Math.abs(packed.loss / mean - 1) < 1e-5, `${names}: ${packed.loss} ${mean}`);
            }
          });
        });
      });

      test('default targets are the linears of the language model', async () => {
        await using(fixture.open('model-4x'), async (engine) => {
          const { adapterDir: _, ...fresh } = fixture.lora('adapter-peft');
          const { result } = await engine.call('train.begin', fresh);
          assert.equal(result.targets.length, 3 * 7);
          assert(result.targets.every((path) => path.startsWith('model.language_model.layers.')));
        });
      });

      test('merged weights, with the keys of the base', async () => {
        const outputDir = await mkdtemp(join(tmpdir(), 'martlet-qwen-'));
        try {
          await using(Promise.resolve(new Engine()), async (engine) => {
            const { result } = await engine.call('merge', {
              modelDir: qwenDir(family, 'model-4x'),
              adapterDir: qwenDir(family, 'adapter-peft'),
              outputDir,
              dtype: 'float32',
              maxShardSize: 20_000,
            });
            assert.equal(result.mergedTensors, 3 * 7);
            assert(result.shards.length > 1);
            const merged = new Map(result.shards.flatMap((shard) => [...readSafetensors(join(outputDir, shard))]));
            const index = JSON.parse(readFileSync(qwenDir(family, 'model-4x/model.safetensors.index.json'), 'utf8'));
            assert.deepEqual([...merged.keys()].sort(), Object.keys(index.weight_map).sort());
            const stored = (name: string) => {
              const key = family === 'qwen3_vl' ? name : name.replace('model.language_model.', 'model.');
              const found = merged.get(key);
              assert(found, key);
              return found.data;
            };
            for (const [name, expected] of Object.entries(expectedJson.mergedNorms))
              assert(Math.abs(norm(stored(name)) / expected - 1) < 1e-5, name);
            const name = 'model.language_model.layers.1.self_attn.v_proj.weight';
            assert(maxDifference(stored(name), fixture.tensor(`merged.${name}`).data) < 1e-6);
          });
        } finally {
          await rm(outputDir, { recursive: true });
        }
      });

      test('full training: gradients and a 5-step curve', async () => {
        await using(fixture.open('model-4x'), async (engine) => {
          const { lora: _, adapterDir: __, ...base } = fixture.lora('adapter-peft');
          const { fullCurve, fullGradients } = expectedJson;
          await engine.call('train.begin', {
            ...base,
            method: 'full',
            freeze: { vision: false, projector: false, language: false },
            schedule: { type: 'constant', warmupSteps: 0, totalSteps: 5 },
            learningRate: fullCurve.learningRate,
          });
          const { loss, gradients } = await fixture.gradients(engine, fullGradients.rows);
          assert(Math.abs(loss / fullGradients.loss - 1) < 1e-4);
          assert.deepEqual([...gradients.keys()].sort(), Object.keys(fullGradients.norms).sort());
          let whole = 0;
          for (const [name, gradient] of gradients) {
            const expected = fullGradients.norms[name] as number;
            assert(
              Math.abs(norm(gradient) - expected) <= 1e-4 * expected + 1e-6,
              `${name}: ${norm(gradient)} ${expected}`,
            );
            if (!fixture.has(`full.${name}`)) continue;
            assert(relativeError(gradient, fixture.tensor(`full.${name}`).data) < 1e-4, name);
            ++whole;
          }
          assert(whole >= 10);
          for (const step of fullCurve.steps) {
            const buffers: ArrayBufferView[] = [];
            const microBatches = [await fixture.samples(fullCurve.rows, buffers)];
            const { result } = await engine.call('train.step', { microBatches }, { buffers });
            assert(Math.abs(result.loss / step.loss - 1) < 1e-4, `step ${result.step}: ${result.loss} ${step.loss}`);
            assert(Math.abs(result.gradNorm / step.gradNorm - 1) < 1e-3, `step ${result.step}: norm`);
          }
        });
      });
    });
  }
}
