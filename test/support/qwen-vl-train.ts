/** Small training sets on the tiny Qwen-VL models of the fixtures. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { caseRow, type QwenFamily, qwenCases, qwenDir } from './qwen-vl.js';

/** Writes `data.json` with every case of the family: pictures of many sizes, text alone, videos, boxes. Gives its path. */
export function writeQwenData(dir: string, family: QwenFamily): string {
  const path = join(dir, 'data.json');
  writeFileSync(path, JSON.stringify(qwenCases(family).cases.map(caseRow)));
  return path;
}

/** A run of a few steps; keys given win. */
export function qwenConfig(
  dir: string,
  family: QwenFamily,
  changes: Record<string, unknown> = {},
): Record<string, unknown> {
  return {
    model: qwenDir(family, 'model-4x'),
    dataset: writeQwenData(dir, family),
    output_dir: join(dir, 'out'),
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
    ...changes,
  };
}
