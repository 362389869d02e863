/** What an adapter folder says about how it was trained. */
import { readFile } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { load } from 'js-yaml';
import { MartletError } from '../errors.js';
import { exists } from '../files.js';

/** The keys of `args.yaml` that loading and merging need. */
export interface AdapterArgs {
  model?: string;
  template?: 'default' | 'ms-swift';
  system?: string;
  exif_orientation?: boolean;
}

/** Reads `args.yaml` in the adapter's folder, or beside it for a checkpoint. PEFT's own adapters have none: the result is empty then. */
export async function readAdapterArgs(adapterDir: string): Promise<AdapterArgs> {
  for (const dir of [adapterDir, dirname(resolve(adapterDir))]) {
    const path = join(dir, 'args.yaml');
    if (!(await exists(path))) continue;
    let args: unknown;
    try {
      args = load(await readFile(path, 'utf8'));
    } catch (cause) {
      throw new MartletError('ERR_MARTLET_ADAPTER', `cannot read ${path}: ${(cause as Error).message}`, { path }, { cause });
    }
    if (typeof args !== 'object' || args === null) continue;
    const { model, template, system, exif_orientation } = args as Record<string, unknown>;
    return {
      ...(typeof model === 'string' && { model }),
      ...((template === 'default' || template === 'ms-swift') && { template }),
      ...(typeof system === 'string' && { system }),
      ...(typeof exif_orientation === 'boolean' && { exif_orientation }),
    };
  }
  return {};
}

/** The base model that an adapter was trained on: `args.yaml`'s, else the one in `adapter_config.json`. */
export async function adapterBaseModel(adapterDir: string): Promise<string> {
  const { model } = await readAdapterArgs(adapterDir);
  if (model !== undefined) return model;
  const path = join(adapterDir, 'adapter_config.json');
  let base: unknown;
  try {
    base = (JSON.parse(await readFile(path, 'utf8')) as Record<string, unknown>).base_model_name_or_path;
  } catch (cause) {
    throw new MartletError('ERR_MARTLET_ADAPTER', `cannot read ${path}: ${(cause as Error).message}`, { path }, { cause });
  }
  if (typeof base === 'string' && base !== '') return base;
  throw new MartletError('ERR_MARTLET_ADAPTER', `${path} does not name its base model: give it as \`model\`.`, { path });
}
