/** Copies of the tiny LLaVA with something wrong in the weights. */
import { cpSync } from 'node:fs';
import { join } from 'node:path';
import { getCase } from './fixtures.js';
import { patchTensor } from './safetensors.js';
import { MODEL } from './train.js';

const SHARD = 'model-00001-of-00002.safetensors';

/** A token that only the fixture's row `name` has. */
export function tokenOnlyIn(name: string, others: string[]): number {
  const elsewhere = new Set(
    others.filter((other) => other !== name).flatMap((other) => getCase(other).default.inputIds),
  );
  const token = getCase(name).default.inputIds.find((id) => !elsewhere.has(id));
  if (token === undefined) throw new Error(`${name} has no token of its own`);
  return token;
}

/** The embedding of one token is not a number: rows that hold it have no finite loss. */
export function modelWithBadToken(dir: string, token: number): string {
  cpSync(MODEL, dir, { recursive: true });
  patchTensor(join(dir, SHARD), 'language_model.model.embed_tokens.weight', (data, [, width]) => {
    data[token * (width as number)] = Number.NaN;
  });
  return dir;
}

/** A head `factor` times as large: its float16 gradients overflow at the first loss scales. */
export function modelWithLargeHead(dir: string, factor: number): string {
  cpSync(MODEL, dir, { recursive: true });
  patchTensor(join(dir, SHARD), 'language_model.lm_head.weight', (data) => {
    for (let i = 0; i < data.length; i++) data[i] = (data[i] as number) * factor;
  });
  return dir;
}
