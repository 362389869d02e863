/** YAML, JSON or an object → one validated {@link TrainConfig}. */
import { readFile, stat } from 'node:fs/promises';
import { dump } from 'js-yaml';
import type { z } from 'zod';
import { MartletError } from '../errors.js';
import type { Quantization } from '../native/binding.js';
import { contradictions } from './contradictions.js';
import { describe, flatten, type Problem, schemaOf } from './dialects.js';
import { type TrainConfig, type TrainConfigInput, trainConfigSchema } from './schema.js';
import { type Position, parseYaml, YamlSyntaxError } from './yaml.js';

export { type DatasetSpec, TRAIN_CONFIG_KEYS, type TrainConfig, type TrainConfigInput } from './schema.js';

const MAX_BYTES = 2 ** 20;
const SHOWN_PROBLEMS = 5;

export interface LoadedConfig {
  config: TrainConfig;
  /** Keys without effect, and the like. */
  warnings: string[];
  /** Keys that the file or the overrides set. */
  given: ReadonlySet<string>;
  file?: string;
}

export interface LoadConfigOptions {
  /** `['lora_rank=16']` or `{ lora_rank: 16 }`: win over the file. */
  overrides?: Record<string, unknown> | string[] | undefined;
}

interface Where {
  file?: string | undefined;
  positions?: Map<string, Position> | undefined;
}

/**
 * Reads and checks a config. All problems of a file are reported at once, in `details.problems` with path, line and column.
 *
 * @throws ERR_MARTLET_CONFIG
 */
export async function loadTrainConfig(
  source: string | TrainConfigInput,
  options: LoadConfigOptions = {},
): Promise<LoadedConfig> {
  const where: Where = {};
  let raw: unknown = source;
  if (typeof source === 'string') {
    where.file = source;
    const parsed = parseFile(source, await readConfig(source));
    raw = parsed.value;
    where.positions = parsed.positions;
  }
  return resolveTrainConfig(raw, where, options);
}

async function readConfig(file: string): Promise<string> {
  if (!/\.(ya?ml|json)$/i.test(file)) {
    throw new MartletError('ERR_MARTLET_CONFIG', `A config file ends in .yaml, .yml or .json; ${file} does not.`, {
      file,
    });
  }
  try {
    const { size } = await stat(file);
    if (size > MAX_BYTES) throw new Error(`it has ${size} bytes; a config has less than ${MAX_BYTES}`);
    return await readFile(file, 'utf8');
  } catch (cause) {
    throw new MartletError(
      'ERR_MARTLET_CONFIG',
      `The config ${file} cannot be read: ${(cause as Error).message}.`,
      { file },
      { cause },
    );
  }
}

function parseFile(file: string, text: string) {
  try {
    return parseYaml(text);
  } catch (cause) {
    if (!(cause instanceof YamlSyntaxError)) throw cause;
    const { position } = cause;
    const at = position ? `${file}:${position.line}:${position.column}` : file;
    throw new MartletError(
      'ERR_MARTLET_CONFIG',
      `${at}: not valid YAML: ${cause.message}.`,
      { file, ...position, problems: [{ path: '', ...position, message: cause.message }] },
      { cause },
    );
  }
}

/** Checks a config that is parsed already. */
export function resolveTrainConfig(raw: unknown, where: Where = {}, options: LoadConfigOptions = {}): LoadedConfig {
  if (typeof raw !== 'object' || raw === null || Array.isArray(raw)) {
    const what = raw === undefined || raw === null ? 'is empty' : `holds ${describe(raw)} at the top`;
    throw new MartletError(
      'ERR_MARTLET_CONFIG',
      `${where.file ?? 'The config'} ${what}; it must hold keys such as model, dataset and output_dir.`,
      {
        file: where.file,
      },
    );
  }
  const flat = flatten(raw as Record<string, unknown>);
  const set = overrides(options.overrides);
  for (const problem of set.problems) flat.problems.push(problem);
  for (const [key, value] of Object.entries(set.values)) {
    flat.values[key] = value;
    flat.origin.set(key, set.origin.get(key) as string);
  }
  const parsed = trainConfigSchema.safeParse(flat.values);
  if (!parsed.success) {
    for (const issue of parsed.error.issues) {
      const [key, ...rest] = issue.path.map(String);
      const path = [flat.origin.get(key ?? '') ?? key, ...rest].join('.');
      flat.problems.push({ path, message: issueMessage(issue, path, flat.values) });
    }
  }
  if (parsed.success) {
    for (const { path, message } of contradictions(parsed.data, flat.origin)) flat.problems.push({ path, message });
  }
  if (flat.problems.length > 0 || !parsed.success) throw problemsError(flat.problems, where);
  return {
    config: complete(parsed.data),
    warnings: [...flat.warnings, ...set.warnings],
    given: new Set(flat.origin.keys()),
    ...(where.file !== undefined && { file: where.file }),
  };
}

function issueMessage(issue: z.core.$ZodIssue, path: string, values: Record<string, unknown>): string {
  const given = issue.path.reduce<unknown>(
    (value, key) => (value as Record<PropertyKey, unknown> | undefined)?.[key],
    values,
  );
  const nameless = /^(.*)\.path$/.exec(path)?.[1];
  if (given === undefined && nameless !== undefined) return `${nameless} names no file: give it a file_name or path`;
  if (given === undefined) return `${path} is missing`;
  if (
    typeof given === 'string' &&
    given.trim() !== '' &&
    Number.isFinite(Number(given)) &&
    /number/.test(issue.message)
  )
    return `${path} is ${describe(given)}: write the number without quotes`;
  if (issue.code === 'invalid_union') return `${path} is ${describe(given)}, which is not of a form that it takes`;
  return `${path} is ${describe(given)}: ${issue.message.replace(/^(Invalid (input|option|string)|Too (small|big)): /, '')}`;
}

/** `a.b=c` (the value is YAML) or an object, as flat keys. */
function overrides(given: LoadConfigOptions['overrides']) {
  // without a prototype, so that `__proto__.x=1` is an unknown key and nothing more
  const section = (): Record<string, unknown> => Object.create(null);
  const raw = section();
  const problems: Problem[] = [];
  if (Array.isArray(given)) {
    for (const item of given) {
      const at = item.indexOf('=');
      if (at < 1) {
        problems.push({ path: `--set ${item}`, message: `--set ${item}: write KEY=VALUE` });
        continue;
      }
      const keys = item.slice(0, at).split('.');
      let value: unknown;
      try {
        value = parseYaml(item.slice(at + 1)).value ?? null;
      } catch (error) {
        problems.push({
          path: `--set ${item}`,
          message: `--set ${item}: the value is not valid YAML: ${(error as Error).message}`,
        });
        continue;
      }
      value = asText(keys.at(-1) as string, item.slice(at + 1), value);
      let target = raw;
      for (const key of keys.slice(0, -1)) {
        if (typeof target[key] !== 'object' || target[key] === null) target[key] = section();
        target = target[key] as Record<string, unknown>;
      }
      target[keys.at(-1) as string] = value;
    }
  } else if (given) {
    Object.assign(raw, given);
  }
  const flat = flatten(raw);
  for (const problem of flat.problems)
    problems.push({ path: `--set ${problem.path}`, message: `--set ${problem.message}` });
  return {
    values: flat.values,
    origin: new Map([...flat.origin].map(([key, path]) => [key, `--set ${path}`])),
    problems,
    warnings: flat.warnings,
  };
}

/** `--set output_dir=2024` and `--system "Answer: briefly"` are not YAML's number and section: where only text will do, text is meant. */
function asText(key: string, text: string, value: unknown): unknown {
  const schema = schemaOf(key);
  if (!schema || value === null || schema.safeParse(value).success) return value;
  return schema.safeParse(text).success ? text : value;
}

function problemsError(problems: Problem[], { file, positions }: Where): MartletError {
  const placed = problems.map((problem) => {
    const position = positionOf(problem.path, positions);
    return {
      ...problem,
      ...position,
      text: `${[file, position?.line, position?.column].filter((part) => part !== undefined).join(':')}${file ? ': ' : ''}${problem.message}.`,
    };
  });
  placed.sort((a, b) => (a.line ?? 0) - (b.line ?? 0) || (a.column ?? 0) - (b.column ?? 0));
  const lines = placed.slice(0, SHOWN_PROBLEMS).map(({ text }) => text);
  if (placed.length > SHOWN_PROBLEMS) lines.push(`… and ${placed.length - SHOWN_PROBLEMS} more (details.problems)`);
  const first = placed[0];
  return new MartletError('ERR_MARTLET_CONFIG', lines.join('\n').replace(/\?\.$/gm, '?'), {
    file,
    path: first?.path,
    line: first?.line,
    column: first?.column,
    problems: placed.map(({ text: _, ...problem }) => problem),
  });
}

/** Of the key itself, else of the nearest section around it. */
function positionOf(path: string, positions: Map<string, Position> | undefined): Position | undefined {
  for (let at = path; at !== ''; at = at.includes('.') ? at.slice(0, at.lastIndexOf('.')) : '') {
    const found = positions?.get(at);
    if (found) return found;
  }
  return undefined;
}

/** Defaults that depend on other keys. */
function complete(config: z.infer<typeof trainConfigSchema>): TrainConfig {
  const evaluates = config.val_dataset.length > 0 || config.split_dataset_ratio > 0;
  const bits = config.quant_bits ?? (config.sft_type === 'qlora' || config.quant_method !== null ? 4 : null);
  return {
    ...config,
    quant_bits: bits,
    quant_method: bits === null ? null : 'bnb',
    gradient_accumulation_steps:
      config.gradient_accumulation_steps ?? Math.ceil(16 / config.per_device_train_batch_size),
    learning_rate: config.learning_rate ?? (config.sft_type === 'full' ? 1e-5 : 1e-4),
    eval_strategy: evaluates ? (config.eval_strategy ?? config.save_strategy) : 'no',
    eval_steps: config.eval_steps ?? config.save_steps,
  };
}

/** What native code quantises the language model's weights to. */
export function quantizationOf(config: Pick<TrainConfig, 'base_dtype' | 'quant_bits'>): Quantization {
  const { base_dtype, quant_bits } = config;
  if (base_dtype === 'fp8') return 'fp8';
  return quant_bits === null ? 'none' : quant_bits === 8 ? 'int8' : 'nf4';
}

/** The text of args.yaml: a config file that gives this config again. */
export function configToYaml(config: TrainConfig): string {
  return dump(config, { lineWidth: -1 });
}
