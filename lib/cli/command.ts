/** What a verb of the command line is, and how it speaks to the world. */
import type { MartletError } from '../errors.js';
import type { OptionSpecs, Options } from './args.js';

export interface CliIo {
  stdin: NodeJS.ReadableStream & { isTTY?: boolean };
  stdout: NodeJS.WritableStream & { isTTY?: boolean };
  stderr: NodeJS.WritableStream & { isTTY?: boolean; columns?: number };
}

export interface Invocation {
  options: Options;
  positionals: string[];
  io: CliIo;
}

export interface Command {
  /** After `martlet `. */
  usage: string;
  /** One or more paragraphs. */
  description: string;
  options: () => OptionSpecs | Promise<OptionSpecs>;
  /** Below the options: examples. */
  footer?: string;
  /** Resolves to the exit code. */
  run(invocation: Invocation): Promise<number>;
  /** Goes on when nobody reads its output any more. */
  outlivesReader?: boolean;
}

/** Options that every verb has. */
export const COMMON_OPTIONS: OptionSpecs = {
  json: { kind: 'flag', help: 'print JSON on standard output, errors as JSON on standard error' },
  help: { kind: 'flag', help: 'show this text' },
};

/** One line of JSON. */
export function printJson(io: CliIo, value: unknown): void {
  io.stdout.write(`${JSON.stringify(value)}\n`);
}

/** Exit code of what Ctrl-C ended, as shells count it: 128 + SIGINT. */
export const INTERRUPTED = 130;

/** 2 = the command line or the config is wrong, 1 = the work failed, 130 = interrupted. */
export function exitCode(error: MartletError): number {
  if (error.code === 'ERR_MARTLET_ABORTED') return INTERRUPTED;
  return error.code === 'ERR_MARTLET_USAGE' || error.code === 'ERR_MARTLET_CONFIG' ? 2 : 1;
}
