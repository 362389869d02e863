/** Paths and values of test/fixtures/engine (made by test/reference/make_engine.py). */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot } from './fixtures.js';
import { readSafetensors } from './safetensors.js';

export const engineFixtures = join(projectRoot, 'test/fixtures/engine');

export interface Curve {
  rows: string[];
  loss: number;
  norms: Record<string, number>;
  curve: { rows: string[]; loss: number; gradNorm: number }[];
}
export const adapterResults = JSON.parse(readFileSync(join(engineFixtures, 'adapters.json'), 'utf8')) as Record<
  'dora' | 'rslora' | 'saved' | 'bias' | 'bias-lora',
  Curve
> & { pissa: { rows: string[]; losses: number[] }; loraPlus: { rows: string[]; losses: number[] } };
export const adapterTensors = readSafetensors(join(engineFixtures, 'adapters.safetensors'));
