/** What an adapter folder says about how it was trained. */
import { readFile } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { load } from 'js-yaml';
import { MartletError } from '../errors.js';
import { exists } from '../files.js';
import { checkVisionOptions, type VisionOptions, visionOptionsFromKeys } from '../processing/vision-options.js';

/** The resolved config of a run, in its folder. */
export const ARGS_FILE = 'args.yaml';

/** What of `args.yaml` loading and merging need. */
export interface AdapterArgs {
  model?: string;
  template?: 'default' | 'ms-swift';
  system?: string;
  exif_orientation?: boolean;
  /** How the base was quantised in training. */
  quant_bits?: number;
  bnb_4bit_use_double_quant?: boolean;
  torch_dtype?: 'auto' | 'float32' | 'bfloat16' | 'float16';
  /** Pixel limits and the like; in the file under their own keys (`max_pixels`, …). */
  vision: VisionOptions;
}

/**
 * Reads `args.yaml` in the folder of an adapter or a trained model, or above it for a checkpoint. Folders that martlet did not write have
 * none: the result is empty then.
 *
 * @throws ERR_MARTLET_ADAPTER for a file that cannot be read or holds a limit that is none
 */
export async function readAdapterArgs(folder: string): Promise<AdapterArgs> {
  const isCheckpoint = /^checkpoint-\d+$/.test(basename(resolve(folder)));
  for (const dir of isCheckpoint ? [folder, dirname(resolve(folder))] : [folder]) {
    const path = join(dir, ARGS_FILE);
    if (!(await exists(path))) continue;
    let args: unknown;
    try {
      args = load(await readFile(path, 'utf8'));
    } catch (cause) {
      throw new MartletError(
        'ERR_MARTLET_ADAPTER',
        `cannot read ${path}: ${(cause as Error).message}`,
        { path },
        { cause },
      );
    }
    if (typeof args !== 'object' || args === null) continue;
    const { model, template, system, exif_orientation, quant_bits, bnb_4bit_use_double_quant, torch_dtype } =
      args as Record<string, unknown>;
    const dtype = (['auto', 'float32', 'bfloat16', 'float16'] as const).find((name) => name === torch_dtype);
    return {
      vision: savedVision(args as Record<string, unknown>, path),
      ...(typeof model === 'string' && { model }),
      ...((template === 'default' || template === 'ms-swift') && { template }),
      ...(typeof system === 'string' && { system }),
      ...(typeof exif_orientation === 'boolean' && { exif_orientation }),
      ...(typeof quant_bits === 'number' && { quant_bits }),
      ...(typeof bnb_4bit_use_double_quant === 'boolean' && { bnb_4bit_use_double_quant }),
      ...(dtype !== undefined && { torch_dtype: dtype }),
    };
  }
  return { vision: {} };
}

function savedVision(args: Record<string, unknown>, path: string): VisionOptions {
  try {
    return checkVisionOptions(visionOptionsFromKeys(args), 'snake_case');
  } catch (cause) {
    const { message, details } = cause as MartletError;
    throw new MartletError('ERR_MARTLET_ADAPTER', `${path}: ${message}`, { ...details, path }, { cause });
  }
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
    throw new MartletError(
      'ERR_MARTLET_ADAPTER',
      `cannot read ${path}: ${(cause as Error).message}`,
      { path },
      { cause },
    );
  }
  if (typeof base === 'string' && base !== '') return base;
  throw new MartletError('ERR_MARTLET_ADAPTER', `${path} does not name its base model: give it as \`model\`.`, {
    path,
  });
}
