/** Paths and readers of test/fixtures/llava (made by test/reference/make_llava.py), and comparisons. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import sharp from 'sharp';
import type { ImageArg, SampleArg } from '../../lib/native/binding.js';
import { type FixtureTensor, readSafetensors } from './safetensors.js';

/** The project's folder, from dist/test/support. */
export const projectRoot = fileURLToPath(new URL('../../../', import.meta.url));
export const llava = join(projectRoot, 'test/fixtures/llava');

export interface Case {
  name: string;
  images: string[];
  messages: { role: 'system' | 'user' | 'assistant'; content: string }[];
  default: { inputIds: number[]; labels: number[]; promptIds: number[] };
  'ms-swift': { inputIds: number[]; labels: number[]; promptIds: number[] };
}

const file = <T>(name: string): T => JSON.parse(readFileSync(join(llava, name), 'utf8')) as T;
export const cases = new Map(file<{ cases: Case[] }>('cases.json').cases.map((c) => [c.name, c]));
export const expectedJson = file<{
  losses: Record<string, { loss: number; labelled: number }>;
  greedy: Record<string, number[]>;
  adapterGreedy: Record<string, number[]>;
  loraGradients: { rows: string[]; loss: number };
  loraCurve: {
    warmupSteps: number;
    totalSteps: number;
    learningRate: number;
    weightDecay: number;
    maxGradNorm: number;
    steps: { rows: string[]; loss: number; gradNorm: number; learningRate: number }[];
  };
  fullGradients: { rows: string[]; loss: number; norms: Record<string, number> };
  fullCurve: { rows: string[]; learningRate: number; weightDecay: number; steps: { loss: number; gradNorm: number }[] };
}>('expected.json');
export const expected = readSafetensors(join(llava, 'expected.safetensors'));
export const expectedPixels = readSafetensors(join(llava, 'pixels.safetensors'));

export function getCase(name: string): Case {
  const found = cases.get(name);
  assert(found, `no case ${name}`);
  return found;
}

export function tensor(name: string): FixtureTensor {
  const found = expected.get(name);
  assert(found, `no expected tensor ${name}`);
  return found;
}

/** Largest |a − b|. */
export function maxDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  assert.equal(a.length, b.length, 'lengths differ');
  let worst = 0;
  for (let i = 0; i < a.length; i++) {
    const distance = Math.abs((a[i] as number) - (b[i] as number));
    if (!(distance <= worst)) worst = distance; // a NaN sticks
  }
  return worst;
}

/** ‖a − b‖ / ‖b‖ */
export function relativeError(a: ArrayLike<number>, b: ArrayLike<number>): number {
  assert.equal(a.length, b.length, 'lengths differ');
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < a.length; i++) {
    difference += ((a[i] as number) - (b[i] as number)) ** 2;
    norm += (b[i] as number) ** 2;
  }
  return Math.sqrt(difference / norm);
}

/** ⟨a, b⟩ / (‖a‖ ‖b‖) */
export function cosine(a: ArrayLike<number>, b: ArrayLike<number>): number {
  assert.equal(a.length, b.length, 'lengths differ');
  let [dot, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    dot += (a[i] as number) * (b[i] as number);
    aa += (a[i] as number) ** 2;
    bb += (b[i] as number) ** 2;
  }
  return dot / Math.sqrt(aa * bb);
}

const MEAN: [number, number, number] = [0.48145466, 0.4578275, 0.40821073];
const STD: [number, number, number] = [0.26862954, 0.26130258, 0.27577711];

/** The fixture processor's plan: shortest edge 56, centre crop 56. */
export async function decodeFixtureImage(name: string): Promise<{ data: Uint8Array; width: number; height: number }> {
  const { data, info } = await sharp(join(llava, 'images', name))
    .toColourspace('srgb')
    .removeAlpha()
    .raw()
    .toBuffer({ resolveWithObject: true });
  return { data, width: info.width, height: info.height };
}

/** Buffers and arguments of native jobs, from cases of the fixture. */
export class NativeSamples {
  readonly buffers: ArrayBufferView[] = [];

  async image(name: string): Promise<ImageArg> {
    const { data, width, height } = await decodeFixtureImage(name);
    const size = 56;
    const [w, h] =
      width <= height ? [size, Math.trunc((size * height) / width)] : [Math.trunc((size * width) / height), size];
    return {
      buffer: this.buffers.push(data) - 1,
      width,
      height,
      plan: {
        resize: { width: w, height: h, backend: 'torchvision' },
        crop: { top: Math.trunc((h - size) / 2), left: Math.trunc((w - size) / 2), width: size, height: size },
        rescale: 0.00392156862745098,
        mean: MEAN,
        std: STD,
      },
    };
  }

  async sample(name: string, key: 'inputIds' | 'promptIds' = 'inputIds'): Promise<SampleArg> {
    const row = getCase(name);
    const images: ImageArg[] = [];
    for (const image of row.images) images.push(await this.image(image));
    return {
      inputIds: this.buffers.push(Int32Array.from(row.default[key])) - 1,
      ...(key === 'inputIds' && { labels: this.buffers.push(Int32Array.from(row.default.labels)) - 1 }),
      images,
      id: name,
    };
  }
}
