/** Small training sets on the tiny Qwen-VL models of the fixtures. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { caseRow, type QwenFamily, qwenCases, qwenDir } from './qwen-vl.js';
import { FEW_STEPS } from './train.js';

/** Writes `data.json` with every case of the family: pictures of many sizes, text alone, videos, boxes. Gives its path. */
export function writeQwenData(dir: string, family: QwenFamily): string {
  const path = join(dir, 'data.json');
  writeFileSync(path, JSON.stringify(qwenCases(family).cases.map(caseRow)));
  return path;
}

/** FEW_STEPS on a tiny Qwen-VL; keys given win. */
export function qwenConfig(
  dir: string,
  family: QwenFamily,
  changes: Record<string, unknown> = {},
): Record<string, unknown> {
  return {
    model: qwenDir(family, 'model-4x'),
    dataset: writeQwenData(dir, family),
    output_dir: join(dir, 'out'),
    ...FEW_STEPS,
    ...changes,
  };
}
