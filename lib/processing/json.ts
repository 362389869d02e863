import { readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { type ErrorCode, MartletError } from '../errors.js';

/** Tokenizers of 150,000 entries with merges reach 20 MB. */
const LIMIT = 128 * 2 ** 20;

/** transformers' AutoProcessor refuses a folder without it; the class's defaults would be those of another model. */
export function requireImageProcessor(modelDir: string, settings: Record<string, unknown>): void {
  if (Object.keys(settings).length > 0) return;
  const path = join(modelDir, 'preprocessor_config.json');
  throw new MartletError(
    'ERR_MARTLET_MODEL_NOT_FOUND',
    `${path} is missing (or empty), and no processor_config.json with an image_processor stands in for it: it says how pictures are prepared. Download it with the checkpoint, or copy it from the base model that these weights were trained from.`,
    { path },
  );
}

/** A JSON object from a checkpoint's folder; `optional`: an absent file is an empty object. */
export async function readJsonFile(
  path: string,
  code: ErrorCode,
  remedy: string,
  options: { optional?: boolean } = {},
): Promise<Record<string, unknown>> {
  let text: string;
  try {
    const { size } = await stat(path);
    if (size > LIMIT) throw new Error(`it has ${size} bytes, more than ${LIMIT}`);
    text = await readFile(path, 'utf8');
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
    if (missing && options.optional) return {};
    throw new MartletError(
      code,
      `${path} ${missing ? 'is missing' : `cannot be read: ${(cause as Error).message}`}. ${remedy}`,
      { path },
      { cause },
    );
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new MartletError(
      code,
      `${path} is not valid JSON: ${(cause as Error).message}. ${remedy}`,
      { path },
      { cause },
    );
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new MartletError(code, `${path} does not hold a JSON object. ${remedy}`, { path });
  }
  return value as Record<string, unknown>;
}
