#!/usr/bin/env node
/** The `martlet` command. Starts fast: a verb's code is imported only when that verb runs. */
import { readFile } from 'node:fs/promises';
import { MartletError } from '../errors.js';
import { nearest } from '../suggest.js';
import { describeOptions, Options, parseCommandLine, usageError } from './args.js';
import { type CliIo, COMMON_OPTIONS, type Command, exitCode } from './command.js';

interface Verb {
  aliases: string[];
  summary: string;
  load: () => Promise<Command>;
}

const VERBS: Record<string, Verb> = {
  train: {
    aliases: ['sft'],
    summary: 'fine-tune a model as a YAML file says',
    load: async () => (await import('./train.js')).command,
  },
  infer: {
    aliases: [],
    summary: 'ask a model about images: once, from a file, or in a conversation',
    load: async () => (await import('./infer.js')).command,
  },
  export: {
    aliases: ['merge-lora'],
    summary: 'merge an adapter into its base model',
    load: async () => (await import('./export.js')).command,
  },
  plan: {
    aliases: [],
    summary: 'say which settings fit a GPU, without loading the model',
    load: async () => (await import('./plan.js')).command,
  },
  libtorch: {
    aliases: [],
    summary: 'install libtorch, or show which one is used',
    load: async () => (await import('./libtorch.js')).command,
  },
  doctor: {
    aliases: [],
    summary: 'show what martlet finds on this machine',
    load: async () => (await import('./doctor.js')).command,
  },
};

function overview(): string {
  const lines = Object.entries(VERBS).map(
    ([name, { aliases, summary }]) => `  ${[name, ...aliases].join(', ').padEnd(22)}${summary}`,
  );
  return `Usage: martlet VERB [options]

${lines.join('\n')}

  --version             print the version
  --help                show this text; martlet VERB --help shows a verb's options

Options may be written with - or _. Exit code: 0 = done, 1 = failed, 2 = the command line or the config is wrong.
`;
}

async function help(command: Command): Promise<string> {
  const options = describeOptions({ ...(await command.options()), ...COMMON_OPTIONS });
  const footer = command.footer === undefined ? '' : `\n${command.footer}\n`;
  return `Usage: martlet ${command.usage}\n\n${command.description}\n\nOptions:\n${options}\n${footer}`;
}

function findVerb(name: string): Verb {
  const spelled = name.replaceAll('_', '-');
  const verb = VERBS[spelled] ?? Object.values(VERBS).find(({ aliases }) => aliases.includes(spelled));
  if (verb) return verb;
  const near = nearest(
    spelled,
    Object.entries(VERBS).flatMap(([key, { aliases }]) => [key, ...aliases]),
  );
  throw usageError(
    `unknown verb ${name}.${near === undefined ? '' : ` Did you mean ${near}?`} martlet --help lists them.`,
    {
      verb: name,
      ...(near !== undefined && { didYouMean: near }),
    },
  );
}

/** Runs one command line; resolves to the exit code. */
async function main(argv: string[], io: CliIo): Promise<number> {
  const [first, ...rest] = argv;
  if (first === undefined || first === '--help' || first === '-h' || first === 'help') {
    (first === undefined ? io.stderr : io.stdout).write(overview());
    return first === undefined ? 2 : 0;
  }
  if (first === '--version' || first === '-v' || first === '-V') {
    // dist/lib/cli/main.js → package.json
    const manifest = await readFile(new URL('../../../package.json', import.meta.url), 'utf8');
    io.stdout.write(`${(JSON.parse(manifest) as { version: string }).version}\n`);
    return 0;
  }
  if (first.startsWith('-'))
    throw usageError(`unknown option ${first}. martlet --help lists what there is.`, { option: first });
  const command = await findVerb(first).load();
  if (rest.includes('--help') || rest.includes('-h')) {
    io.stdout.write(await help(command));
    return 0;
  }
  const parsed = parseCommandLine(rest, { ...(await command.options()), ...COMMON_OPTIONS });
  outlivesReader = command.outlivesReader === true;
  return command.run({ options: new Options(parsed), positionals: parsed.positionals, io });
}

function report(error: unknown, json: boolean): number {
  const known = error instanceof MartletError;
  const shown = known
    ? error
    : new MartletError('ERR_MARTLET_INTERNAL', (error as Error)?.message ?? String(error), {}, { cause: error });
  if (json) {
    process.stderr.write(`${JSON.stringify({ error: shown.toJSON() })}\n`);
  } else {
    process.stderr.write(`error: ${shown.message}\n       [${shown.code}]\n`);
    // a failure that nobody foresaw is a bug: its stack belongs in the report
    if (!known && error instanceof Error) process.stderr.write(`${error.stack}\n`);
  }
  return exitCode(shown);
}

let outlivesReader = false;

// a reader that goes away (`martlet infer … | head`) is no failure; a training run goes on without it: its files hold what it would have read
for (const stream of [process.stdout, process.stderr]) {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE' && error.code !== 'ERR_STREAM_DESTROYED') throw error;
    if (!outlivesReader) process.exit(0);
  });
}

const argv = process.argv.slice(2);
main(argv, process).then(
  (code) => {
    process.exitCode = code;
  },
  (error) => {
    process.exitCode = report(
      error,
      argv.some((arg) => /^--json(=true)?$/.test(arg)),
    );
  },
);
