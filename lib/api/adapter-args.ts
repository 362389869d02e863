/** What an adapter folder says about how it was trained. */
import { readFile } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { load } from 'js-yaml';
import type { TrainConfig } from '../config/index.js';
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
  base_dtype?: 'auto' | 'fp8';
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
    const {
      model,
      template,
      system,
      exif_orientation,
      quant_bits,
      bnb_4bit_use_double_quant,
      base_dtype,
      torch_dtype,
    } = args as Record<string, unknown>;
    const dtype = (['auto', 'float32', 'bfloat16', 'float16'] as const).find((name) => name === torch_dtype);
    return {
      vision: savedVision(args as Record<string, unknown>, path),
      ...(typeof model === 'string' && { model }),
      ...((template === 'default' || template === 'ms-swift') && { template }),
      ...(typeof system === 'string' && { system }),
      ...(typeof exif_orientation === 'boolean' && { exif_orientation }),
      ...(typeof quant_bits === 'number' && { quant_bits }),
      ...(typeof bnb_4bit_use_double_quant === 'boolean' && { bnb_4bit_use_double_quant }),
      ...((base_dtype === 'auto' || base_dtype === 'fp8') && { base_dtype }),
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

/** `adapter_config.json`'s names of what an adapter settles. */
const SETTLED = {
  lora_rank: 'r',
  lora_alpha: 'lora_alpha',
  use_rslora: 'use_rslora',
  use_dora: 'use_dora',
  lora_bias: 'bias',
} as const;

/** Options that a run from an adapter takes from the adapter, where the config says otherwise: `given` are the keys that it sets. */
export async function warmStartWarnings(config: TrainConfig, given: ReadonlySet<string>): Promise<string[]> {
  const [dir] = config.adapters;
  if (dir === undefined) return [];
  let own: Record<string, unknown>;
  try {
    own = JSON.parse(await readFile(join(dir, 'adapter_config.json'), 'utf8')) as Record<string, unknown>;
  } catch {
    return []; // loading it says what is wrong
  }
  const list = (value: unknown) => (Array.isArray(value) ? [...(value as string[])].sort() : value);
  const saved = (own.modules_to_save ?? []) as string[];
  const differs = [
    ...(Object.entries(SETTLED) as [keyof typeof SETTLED, string][]).filter(
      ([key, name]) => own[name] !== undefined && own[name] !== config[key],
    ),
    ...(config.target_modules === 'all-linear' ||
    JSON.stringify(list(config.target_modules)) === JSON.stringify(list(own.target_modules))
      ? []
      : [['target_modules']]),
    ...(config.modules_to_save.every((name) => saved.includes(name)) ? [] : [['modules_to_save']]),
    ...(config.sft_type === 'lora_llm' && saved.length === 0 ? [['sft_type']] : []),
    ...(config.trainable_parameters.length > 0 ? [['trainable_parameters']] : []),
    ...(config.trainable_parameters_regex !== null ? [['trainable_parameters_regex']] : []),
  ].flatMap(([key]) => (given.has(key as string) ? [key] : []));
  if (differs.length === 0) return [];
  return [`${differs.join(', ')}: without effect, what is trained is what the adapter in ${dir} holds.`];
}
