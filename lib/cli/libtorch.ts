import { installLibtorch, libtorchStatus } from '../native/libtorch.js';
import { type OptionSpecs, usageError } from './args.js';
import { type Command, type Invocation, printJson } from './command.js';
import { interruptible } from './jobs.js';

const OPTIONS: OptionSpecs = {
  cuda: { kind: 'flag', help: 'install: the CUDA build, with the NVIDIA libraries it needs' },
  cpu: { kind: 'flag', help: 'install: the CPU build (the default)' },
  version: { kind: 'value', placeholder: 'X.Y.Z', help: 'install: this version' },
  force: { kind: 'flag', help: 'install: even if it is there already' },
};

export const command: Command = {
  usage: 'libtorch install [--cuda] [--version X.Y.Z] | libtorch status',
  description: `install  fetches libtorch with pip into martlet's cache. Nothing else of Python is used, then or later.
status   shows which libtorch is used and where it was looked for.`,
  options: () => OPTIONS,
  run,
};

async function run({ options, positionals, io }: Invocation): Promise<number> {
  const [action, ...extra] = positionals;
  if (extra.length > 0) throw usageError(`unexpected argument ${extra[0]}.`);
  const json = options.flag('json');
  if (action === 'status') {
    const status = libtorchStatus();
    if (json) {
      printJson(io, status);
    } else if (status.found) {
      const { version, cuda, root, source } = status.found;
      io.stdout.write(
        `libtorch ${version ?? '(version unknown)'}, ${cuda ? 'CUDA' : 'CPU'} build, in ${root} (found by: ${source})\n`,
      );
    } else {
      io.stdout.write(`no libtorch found; run: martlet libtorch install\nlooked in:\n  ${status.trace.join('\n  ')}\n`);
    }
    return status.found ? 0 : 1;
  }
  if (action !== 'install') {
    throw usageError(
      action === undefined
        ? 'say libtorch install or libtorch status.'
        : `unknown action ${action}: install or status.`,
    );
  }
  if (options.flag('cuda') && options.flag('cpu')) throw usageError('--cuda and --cpu exclude each other.');
  const version = options.string('version');
  const location = await interruptible((signal) =>
    installLibtorch({
      cuda: options.flag('cuda'),
      ...(version !== undefined && { version }),
      force: options.flag('force'),
      onLine: (line) => io.stderr.write(`${line}\n`),
      signal,
    }),
  );
  if (json) printJson(io, location);
  else io.stdout.write(`libtorch ${location.version} is in ${location.root}\n`);
  return 0;
}
