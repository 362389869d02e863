/** Command lines: snake_case and kebab-case alike, aliases, values of booleans, lists, "did you mean". */
import { parseArgs } from 'node:util';
import type { LoadModelOptions } from '../api/types.js';
import { MartletError } from '../errors.js';
import { nearest } from '../suggest.js';

export interface OptionSpec {
  /** `flag`: true without a value, and takes true/false; `value`: needs one; `config`: a config key, whose value may be missing (true) or several (a list). */
  kind: 'flag' | 'value' | 'config';
  /** May be given more than once. */
  multiple?: boolean;
  aliases?: string[];
  /** Shown in the help as `--name PLACEHOLDER`. Without `help` the option is not listed. */
  placeholder?: string;
  help?: string;
}

export type OptionSpecs = Record<string, OptionSpec>;

export interface ParsedArgs {
  /** Options by canonical name, in the order given; a flag's value is `true` or `false`. */
  options: { name: string; value: string }[];
  positionals: string[];
}

export function usageError(message: string, details: Record<string, unknown> = {}): MartletError {
  return new MartletError('ERR_MARTLET_USAGE', message, details);
}

/** Parses what follows the verb. Throws `ERR_MARTLET_USAGE`. */
export function parseCommandLine(argv: string[], specs: OptionSpecs): ParsedArgs {
  const canonical = new Map<string, string>();
  for (const [name, spec] of Object.entries(specs)) {
    for (const spelling of [name, ...(spec.aliases ?? [])]) canonical.set(spelling, name);
  }
  const { tokens } = parseArgs({
    args: spellOut(argv, canonical, specs),
    options: Object.fromEntries(Object.keys(specs).map((name) => [name, { type: 'string' as const, multiple: true }])),
    allowPositionals: true,
    tokens: true,
  });
  const options: ParsedArgs['options'] = [];
  const positionals: string[] = [];
  for (const token of tokens) {
    if (token.kind === 'positional') positionals.push(token.value);
    if (token.kind !== 'option') continue;
    if (!specs[token.name]?.multiple && options.some((option) => option.name === token.name)) {
      throw usageError(`--${token.name} is given twice.`, { option: token.name });
    }
    options.push({ name: token.name, value: token.value as string });
  }
  return { options, positionals };
}

/** Rewrites every option as `--canonical=value`, which leaves nothing to guess. */
function spellOut(argv: string[], canonical: Map<string, string>, specs: OptionSpecs): string[] {
  const out: string[] = [];
  const rest = [...argv];
  while (rest.length > 0) {
    const arg = rest.shift() as string;
    if (arg === '--') return [...out, '--', ...rest];
    if (!arg.startsWith('--')) {
      if (/^-[A-Za-z]/.test(arg)) throw unknownOption(arg, canonical);
      out.push(arg);
      continue;
    }
    const [, spelled = '', inline] = /^--([^=]*)(?:=([\s\S]*))?$/.exec(arg) ?? [];
    const name = canonical.get(spelled.replaceAll('-', '_'));
    if (name === undefined) throw unknownOption(arg.split('=')[0] as string, canonical);
    const spec = specs[name] as OptionSpec;
    const value = inline ?? takeValue(name, spec, rest);
    out.push(`--${name}=${spec.kind === 'flag' ? flagValue(name, value) : value}`);
  }
  return out;
}

function takeValue(name: string, spec: OptionSpec, rest: string[]): string {
  const isValue = (arg: string | undefined): arg is string => arg !== undefined && !arg.startsWith('--');
  if (spec.kind === 'flag') return /^(true|false)$/i.test(rest[0] ?? '') ? (rest.shift() as string) : 'true';
  if (spec.kind === 'value') {
    if (isValue(rest[0])) return rest.shift() as string;
    throw usageError(`--${name} needs a value.`, { option: name });
  }
  const values: string[] = [];
  while (isValue(rest[0])) values.push(rest.shift() as string);
  if (values.length === 0) return 'true';
  return values.length === 1 ? (values[0] as string) : JSON.stringify(values);
}

function flagValue(name: string, value: string): string {
  if (/^(true|false)$/i.test(value)) return value.toLowerCase();
  throw usageError(`--${name} is true or false, not ${value}.`, { option: name, value });
}

function unknownOption(option: string, canonical: Map<string, string>): MartletError {
  const near = nearest(option.replace(/^-+/, '').replaceAll('-', '_'), [...canonical.keys()]);
  return usageError(
    `unknown option ${option}.${near === undefined ? '' : ` Did you mean --${near}?`} --help lists the options.`,
    { option, ...(near !== undefined && { didYouMean: `--${near}` }) },
  );
}

/** The options part of a help text. */
export function describeOptions(specs: OptionSpecs): string {
  const listed = Object.entries(specs).filter(([, spec]) => spec.help !== undefined);
  const left = listed.map(([name, spec]) => {
    const spellings = [name, ...(spec.aliases ?? [])].map((spelling) => `--${spelling}`).join(', ');
    return `  ${spellings}${spec.placeholder === undefined ? '' : ` ${spec.placeholder}`}`;
  });
  return listed
    .map(([, spec], i) => {
      const head = left[i] as string;
      const gap = head.length < 34 ? ' '.repeat(34 - head.length) : `\n${' '.repeat(34)}`;
      return head + gap + (spec.help as string).replaceAll('\n', `\n${' '.repeat(34)}`);
    })
    .join('\n');
}

const DTYPES: Record<string, 'auto' | 'float32' | 'bfloat16' | 'float16'> = {
  auto: 'auto',
  float32: 'float32',
  bfloat16: 'bfloat16',
  float16: 'float16',
  fp32: 'float32',
  bf16: 'bfloat16',
  fp16: 'float16',
};

/** Typed access to parsed options. */
export class Options {
  readonly #options: ParsedArgs['options'];

  constructor(parsed: ParsedArgs) {
    this.#options = parsed.options;
  }

  /** As given, in order. */
  all(): ParsedArgs['options'] {
    return [...this.#options];
  }

  string(name: string): string | undefined {
    return this.#options.find((option) => option.name === name)?.value;
  }

  strings(name: string): string[] {
    return this.#options.filter((option) => option.name === name).map((option) => option.value);
  }

  flag(name: string): boolean {
    return this.string(name) === 'true';
  }

  number(name: string): number | undefined {
    const text = this.string(name);
    if (text === undefined) return undefined;
    const value = Number(text);
    if (text.trim() === '' || !Number.isFinite(value)) {
      throw usageError(`--${name} must be a number, not ${text}.`, { option: name, value: text });
    }
    return value;
  }

  /** A precision, under any of its usual names. */
  dtype(name: string): (typeof DTYPES)[string] | undefined {
    const text = this.choice(name, Object.keys(DTYPES));
    return text === undefined ? undefined : DTYPES[text];
  }

  device(name: string): LoadModelOptions['device'] {
    const text = this.string(name);
    if (text === undefined || /^(auto|cpu|cuda(:\d+)?)$/.test(text)) return text as LoadModelOptions['device'];
    throw usageError(`--${name} must be auto, cpu, cuda or cuda:N, not ${text}.`, { option: name });
  }

  choice<T extends string>(name: string, choices: readonly T[]): T | undefined {
    const text = this.string(name);
    if (text === undefined || (choices as readonly string[]).includes(text)) return text as T | undefined;
    throw usageError(`--${name} must be one of ${choices.join(', ')}, not ${text}.`, { option: name, value: text });
  }
}
