/** A small training set on the tiny LLaVA of test/fixtures/llava, and runs over it. */
import { createHash } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type TrainEvent, type TrainResult, type TrainRun, trainLoRA } from '../../lib/index.js';
import { cases, llava } from './fixtures.js';

export const MODEL = join(llava, 'model-4x');

/** Writes `data.json` with every case of the fixture into `dir`; gives its path. */
export function writeData(dir: string): string {
  const path = join(dir, 'data.json');
  const rows = [...cases.values()].map(({ name, messages, images }) => ({
    id: name,
    messages,
    images: images.map((image) => join(llava, 'images', image)),
  }));
  writeFileSync(path, JSON.stringify(rows));
  return path;
}

/** A run of a few steps on the CPU; the model, the data and the folder come from the caller. */
export const FEW_STEPS = {
  device: 'cpu',
  torch_dtype: 'float32',
  lora_rank: 4,
  learning_rate: 5e-3,
  gradient_accumulation_steps: 2,
  per_device_train_batch_size: 2,
  max_steps: 6,
  logging_steps: 1,
  save_steps: 3,
  report_to: 'none',
};

/** FEW_STEPS on the tiny LLaVA; keys given win. */
export function smallConfig(dir: string, changes: Record<string, unknown> = {}): Record<string, unknown> {
  return {
    model: MODEL,
    dataset: writeData(dir),
    output_dir: join(dir, 'out'),
    ...FEW_STEPS,
    ...changes,
  };
}

export type StepEvent = Extract<TrainEvent, { type: 'step' }>;

export async function collect(run: TrainRun): Promise<{ events: TrainEvent[]; result: TrainResult }> {
  const events: TrainEvent[] = [];
  for await (const event of run) events.push(event);
  return { events, result: await run };
}

export const train = (config: Record<string, unknown>) => collect(trainLoRA(config));

export const steps = (events: TrainEvent[]): StepEvent[] => events.filter((event) => event.type === 'step');
export const losses = (events: TrainEvent[]): number[] => steps(events).map(({ loss }) => loss);

export function digest(path: string): string {
  return createHash('sha256').update(readFileSync(path)).digest('hex');
}
