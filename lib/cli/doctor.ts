import { getSystemInfo, type MartletSystemInfo } from '../api/system-info.js';
import { MartletError } from '../errors.js';
import { libtorchStatus } from '../native/libtorch.js';
import { bytes } from '../report/format.js';
import { usageError } from './args.js';
import { type Command, type Invocation, printJson } from './command.js';

export const command: Command = {
  usage: 'doctor',
  description:
    'Shows what martlet finds on this machine: libtorch, the addon that is loaded, devices, memory. Exit code 1 if it cannot run.',
  options: () => ({}),
  run,
};

async function run({ options, positionals, io }: Invocation): Promise<number> {
  if (positionals.length > 0) throw usageError(`unexpected argument ${positionals[0]}.`);
  let system: MartletSystemInfo | undefined;
  let problem: MartletError | undefined;
  try {
    system = getSystemInfo();
  } catch (error) {
    if (!(error instanceof MartletError)) throw error;
    problem = error;
  }
  if (options.flag('json')) {
    printJson(io, {
      ok: system !== undefined,
      libtorch: libtorchStatus(),
      ...(system && { system }),
      ...(problem && { error: problem.toJSON() }),
    });
  } else {
    io.stdout.write(system ? describe(system) : `martlet cannot run here.\n${problem?.message}\n`);
  }
  return system ? 0 : 1;
}

function describe(system: MartletSystemInfo): string {
  const kernels =
    system.cudaKernelsError === undefined ? '' : `, without martlet's kernels: ${system.cudaKernelsError}`;
  const cuda = system.cudaAvailable
    ? `available${kernels}`
    : `not available${system.cudaError === undefined ? '' : `: ${system.cudaError}`}`;
  const rows: [string, string][] = [
    ['node', system.nodeVersion],
    ['libtorch', `${system.torchVersion} in ${system.libtorchPath} (found by: ${system.libtorchSource})`],
    ['addon', `${system.addonPath} (compiled against ${system.compiledTorchVersion})`],
    ['cuda', cuda],
    ['threads', `${system.threads} (MARTLET_NUM_THREADS changes it), ${system.cpuCapability}`],
    ...system.devices.map(({ name, description, totalMemory, freeMemory }): [string, string] => [
      name,
      `${description}, ${bytes(freeMemory)} of ${bytes(totalMemory)} free`,
    ]),
  ];
  return `${rows.map(([name, value]) => `${name.padEnd(10)}${value}`).join('\n')}\n`;
}
