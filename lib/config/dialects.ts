/** Two dialects in, flat keys out: the tutorial's nested YAML, and ms-swift's flat keys under any of their names. */
import { join } from 'node:path';
import type { z } from 'zod';
import { VISION_OPTIONS, WITHOUT_EFFECT } from '../processing/vision-options.js';
import { nearest } from '../suggest.js';
import { ALIASES, IGNORED, TRAIN_CONFIG_KEYS, type TrainConfig, trainConfigSchema, UNSUPPORTED } from './schema.js';

export interface Problem {
  /** Path in the file as written, e.g. `train_args.learning_rat`. */
  path: string;
  message: string;
}

export interface FlatConfig {
  values: Record<string, unknown>;
  /** Flat key → path in the file. */
  origin: Map<string, string>;
  problems: Problem[];
  warnings: string[];
  /** `torch_dtype: int8` and the like. */
  quantBits?: { bits: 4 | 8; path: string };
}

/** Sections of the tutorial's YAML whose keys are flat keys. */
export const SECTIONS = new Set(['model_args', 'lora_args', 'train_args']);
/** ms-swift's sections of environment variables. */
const ENV_SECTIONS = new Set(['model_kwargs', 'ENV']);
const KEY_OF_VARIABLE = new Map(Object.values(VISION_OPTIONS).flatMap(({ key, env }) => (env ? [[env, key]] : [])));
const KNOWN_KEYS = [
  ...TRAIN_CONFIG_KEYS,
  ...Object.keys(ALIASES),
  ...Object.keys(UNSUPPORTED),
  ...Object.keys(IGNORED),
  ...SECTIONS,
  'fp16',
  'bf16',
  'strict',
  ...ENV_SECTIONS,
];

const DTYPES: Record<string, string> = {
  fp16: 'float16',
  half: 'float16',
  bf16: 'bfloat16',
  fp32: 'float32',
  float: 'float32',
};

const snakeCase = (key: string) =>
  key.replaceAll(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`).replaceAll('-', '_');
const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);
/** `all` is LLaMA-Factory's word for it. */
const isAllLinear = (value: unknown) =>
  ['all', 'all-linear'].includes((Array.isArray(value) && value.length === 1 ? value[0] : value) as string);
/** A name's other spelling, if it is in the table: names come from outside, so `constructor` must not find Object's. */
const spelling = (table: Record<string, string>, name: string) =>
  Object.hasOwn(table, name) ? (table[name] as string) : name;
const sameValue = (a: unknown, b: unknown) => JSON.stringify(a) === JSON.stringify(b);

export function flatten(raw: Record<string, unknown>): FlatConfig {
  const flat: FlatConfig = { values: {}, origin: new Map(), problems: [], warnings: [] };
  const precision: { path: string; dtype: string }[] = [];

  let loraTarget: string | undefined;

  const set = (key: string, value: unknown, path: string) => {
    if (flat.origin.has(key) && !sameValue(flat.values[key], value)) {
      flat.problems.push({
        path,
        message: `${path} contradicts ${flat.origin.get(key)}, which sets the same option: keep one of them`,
      });
      return;
    }
    flat.values[key] = value;
    flat.origin.set(key, path);
  };

  /** `MAX_PIXELS: '1003520'`: texts, as a shell has them. */
  const takeVariables = (given: unknown, path: string) => {
    const value = typeof given === 'string' ? jsonOr(given) : given;
    if (value === null) return;
    if (!isObject(value)) {
      flat.problems.push({
        path,
        message: `${path} must be a section with names of variables, not ${describe(value)}`,
      });
      return;
    }
    for (const [name, inner] of Object.entries(value)) {
      const key = KEY_OF_VARIABLE.get(name.toUpperCase());
      const number = typeof inner === 'string' && inner.trim() !== '' ? Number(inner) : Number.NaN;
      if (key !== undefined) set(key, Number.isNaN(number) ? inner : number, `${path}.${name}`);
      else if (WITHOUT_EFFECT.includes(name.toUpperCase()))
        flat.warnings.push(`${path}.${name} has no effect: all frames of a list are taken.`);
      else {
        const meant = nearest(name, KEY_OF_VARIABLE.keys());
        flat.problems.push({
          path: `${path}.${name}`,
          message: `${path}.${name} is not a variable that is read from here${meant ? `: did you mean ${meant}?` : ': set it in the shell'}`,
        });
      }
    }
  };

  const take = (written: string, value: unknown, path: string) => {
    if (ENV_SECTIONS.has(written)) {
      takeVariables(value, path);
      return;
    }
    const key = snakeCase(written);
    if (SECTIONS.has(key)) {
      if (value === null) return;
      if (!isObject(value))
        flat.problems.push({ path, message: `${path} must be a section with keys, not ${describe(value)}` });
      else for (const [name, inner] of Object.entries(value)) take(name, inner, `${path}.${name}`);
      return;
    }
    if (key === 'fp16' || key === 'bf16') {
      if (typeof value !== 'boolean')
        flat.problems.push({ path, message: `${path} must be true or false, not ${describe(value)}` });
      else if (value) precision.push({ path, dtype: key === 'fp16' ? 'float16' : 'bfloat16' });
      return;
    }
    if (key === 'strict' && typeof value === 'boolean') {
      set('on_bad_row', value ? 'error' : 'skip', path);
      return;
    }
    if (path === 'lora_args.dropout') {
      // beside lora_rank and lora_alpha it means the adapters'
      flat.problems.push({ path, message: `${path} is not a known key: did you mean lora_dropout?` });
      return;
    }
    const target = spelling(ALIASES, key);
    if ((TRAIN_CONFIG_KEYS as string[]).includes(target)) {
      if (value === undefined) return;
      if (key === 'lora_target') {
        // LLaMA-Factory's way to say it; the tutorial gives it beside a list, which is more exact
        if (isAllLinear(value) && flat.origin.has('target_modules')) return;
        loraTarget = path;
      } else if (target === 'target_modules' && loraTarget !== undefined && isAllLinear(flat.values[target])) {
        flat.origin.delete(target);
      }
      const nested = target === 'dataset' && isObject(value) && 'train' in value;
      set(target, convert(target, value, path, flat), nested ? `${path}.train` : path);
    } else if (Object.hasOwn(UNSUPPORTED, key)) {
      if (!UNSUPPORTED[key]?.some((fallback) => sameValue(fallback, value))) {
        flat.problems.push({
          path,
          message: `${path}: ${JSON.stringify(value)} is not supported yet. Leave the key out`,
        });
      }
    } else if (Object.hasOwn(IGNORED, key)) {
      if (value !== null) flat.warnings.push(`${path} has no effect: ${IGNORED[key]}.`);
    } else {
      const meant = nearest(key, KNOWN_KEYS);
      flat.problems.push({
        path,
        message: `${path} is not a known key${meant ? `: did you mean ${meant}?` : '. docs/configuration.md lists the keys'}`,
      });
    }
  };

  for (const [key, value] of Object.entries(raw)) take(key, value, key);
  for (const { path, dtype } of precision) {
    const now = flat.values.torch_dtype;
    if (now !== undefined && now !== 'auto' && now !== dtype) {
      flat.problems.push({
        path,
        message: `${path}: true means torch_dtype ${dtype}, but ${flat.origin.get('torch_dtype')} says ${now}: keep one of them`,
      });
    } else {
      flat.values.torch_dtype = dtype;
      if (!flat.origin.has('torch_dtype')) flat.origin.set('torch_dtype', path);
    }
  }
  if (flat.quantBits) {
    const { bits, path } = flat.quantBits;
    const now = flat.values.quant_bits;
    if (now !== undefined && now !== null && now !== bits) {
      flat.problems.push({
        path,
        message: `${path} means quant_bits ${bits}, but ${flat.origin.get('quant_bits')} says ${now}: keep one of them`,
      });
    } else {
      flat.values.quant_bits = bits;
      flat.origin.set('quant_bits', path);
    }
  }
  return flat;
}

/** What a key's value must be, by any of the key's names. */
export function schemaOf(name: string): z.ZodType | undefined {
  const target = spelling(ALIASES, snakeCase(name));
  return Object.hasOwn(trainConfigSchema.shape, target)
    ? trainConfigSchema.shape[target as keyof TrainConfig]
    : undefined;
}

function jsonOr(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** Spellings of a value: names of dtypes, one item for a list, the tutorial's dataset section. */
function convert(key: string, value: unknown, path: string, flat: FlatConfig): unknown {
  switch (key) {
    case 'torch_dtype': {
      if (value === null) return 'auto';
      // the tutorial: quantised weights, and with them qlora
      if (value === 'int8' || value === 'int4' || value === 'nf4') {
        flat.quantBits = { bits: value === 'int8' ? 8 : 4, path };
        return 'auto';
      }
      const name = typeof value === 'string' ? value.replace(/^torch\./, '') : value;
      return typeof name === 'string' ? spelling(DTYPES, name) : name;
    }
    case 'quant_bits':
      return value === 0 ? null : value;
    case 'lora_dtype': {
      const name = typeof value === 'string' ? value.replace(/^torch\./, '') : value;
      return typeof name === 'string' ? spelling(DTYPES, name) : name;
    }
    case 'optim':
      return value === null ? undefined : value;
    case 'neftune_noise_alpha':
      return value === 0 ? null : value;
    case 'lr_scheduler_kwargs':
      if (typeof value !== 'string') return value;
      try {
        return value.trim() === '' ? null : JSON.parse(value);
      } catch {
        return value;
      }
    case 'modules_to_save':
    case 'trainable_parameters':
    case 'freeze_parameters':
      return value === null ? [] : typeof value === 'string' ? [value] : value;
    case 'device':
      return value === null ? 'auto' : value === 'gpu' ? 'cuda' : value;
    case 'template':
      // Names registered in ms-swift mean its templates.
      return typeof value === 'string' &&
        !['default', 'ms-swift', 'auto'].includes(value) &&
        /^[a-z][\w.-]*$/.test(value)
        ? 'ms-swift'
        : value === 'auto' || value === null
          ? 'default'
          : value;
    case 'eval_strategy':
    case 'save_strategy':
      return value === false ? 'no' : value;
    case 'adapters':
    case 'report_to':
      return value === null ? [] : Array.isArray(value) ? value : [value];
    case 'target_modules':
      if (isAllLinear(value)) return 'all-linear';
      // A plain name as a regular expression over whole paths would match nothing.
      return typeof value === 'string' && /^[\w.]+$/.test(value) ? [value] : value;
    case 'dataset':
      if (isObject(value) && ('train' in value || 'eval' in value)) {
        for (const [name, files] of Object.entries(value)) {
          if (name === 'eval' && files !== null) {
            flat.values.val_dataset = datasets(files, `${path}.eval`, flat);
            flat.origin.set('val_dataset', `${path}.eval`);
          } else if (name !== 'train' && name !== 'eval') {
            const meant = nearest(name, ['train', 'eval']);
            flat.problems.push({
              path: `${path}.${name}`,
              message: `${path}.${name} is not a known key${meant ? `: did you mean ${meant}?` : ''}`,
            });
          }
        }
        return datasets(value.train, `${path}.train`, flat);
      }
      return datasets(value, path, flat);
    case 'val_dataset':
      return value === null ? [] : datasets(value, path, flat);
    default:
      return value;
  }
}

const DATASET_KEYS = ['path', 'file_name', 'dataset_root', 'image_folder', 'sample', 'type', 'name'];

function datasets(value: unknown, path: string, flat: FlatConfig): unknown {
  if (value === null || value === undefined) return [];
  return (Array.isArray(value) ? value : [value]).map((entry, i) => {
    const at = Array.isArray(value) ? `${path}.${i}` : path;
    if (typeof entry === 'string') {
      const [, file, count] = /^(.*?)(?:#(\d+))?$/s.exec(entry) as RegExpExecArray;
      return { path: file, ...(count !== undefined && { sample: Number(count) }) };
    }
    if (!isObject(entry)) return entry;
    const out: Record<string, unknown> = {};
    for (const [written, inner] of Object.entries(entry)) {
      const key = snakeCase(written);
      if (!DATASET_KEYS.includes(key)) {
        const meant = nearest(key, DATASET_KEYS);
        flat.problems.push({
          path: `${at}.${written}`,
          message: `${at}.${written} is not a known key${meant ? `: did you mean ${meant}?` : ''}`,
        });
      } else if (inner !== null && key !== 'type' && key !== 'name' && key !== 'file_name') {
        out[key] = inner;
      }
    }
    const { file_name: file, dataset_root: root } = entry as { file_name?: unknown; dataset_root?: unknown };
    if (typeof file === 'string') out.path = typeof root === 'string' ? join(root, file) : file;
    return out;
  });
}

/** A value in a message: `the string "5"`, `a list`. */
export function describe(value: unknown): string {
  if (value === null) return 'null';
  if (Array.isArray(value)) return 'a list';
  if (typeof value === 'object') return 'a section';
  return typeof value === 'string' ? `the text ${JSON.stringify(value)}` : String(value);
}
