/** Finds libtorch and the addon, and loads both; once a process, at first use. */
import { existsSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { MartletError } from '../errors.js';
import type { Addon } from './binding.js';
import { findLibtorch, type LibtorchLocation } from './libtorch.js';

const require = createRequire(import.meta.url);
/** The package's folder, two above dist/lib/native. */
export const packageRoot = findPackageRoot();

export interface LoadedAddon {
  addon: Addon;
  /** The .node file. */
  path: string;
  libtorch: LibtorchLocation;
}

let loaded: LoadedAddon | undefined;

/**
 * The native addon, with libtorch loaded and threads set.
 *
 * @throws ERR_MARTLET_LIBTORCH_NOT_FOUND, ERR_MARTLET_LIBTORCH_MISMATCH; `details.trace` says what was tried.
 */
export function loadAddon(): LoadedAddon {
  loaded ??= load();
  return loaded;
}

function findPackageRoot(): string {
  let dir = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(dir, 'package.json'))) {
    const parent = dirname(dir);
    if (parent === dir) return dirname(fileURLToPath(import.meta.url));
    dir = parent;
  }
  return dir;
}

function load(): LoadedAddon {
  const trace: string[] = [];
  const libtorch = findLibtorch(trace);
  if (!libtorch) {
    throw new MartletError(
      'ERR_MARTLET_LIBTORCH_NOT_FOUND',
      [
        'libtorch was not found. Do one of these:',
        '  1. npx martlet libtorch install            (CPU build, through pip, into the cache)',
        '  2. npx martlet libtorch install --cuda     (CUDA build)',
        '  3. set LIBTORCH=/path/to/libtorch          (a folder with lib/libtorch_cpu.so)',
        '  4. set LIBTORCH_USE_PYTORCH=1              (the torch of python3)',
        `Looked in: ${trace.join('; ')}`,
      ].join('\n'),
      { trace },
    );
  }
  const path = findAddon(libtorch, trace);
  preload(libtorch, dirname(path), trace);
  let addon: Addon;
  try {
    addon = require(path) as Addon;
  } catch (cause) {
    throw new MartletError(
      'ERR_MARTLET_LIBTORCH_MISMATCH',
      `The addon ${path} could not be loaded with libtorch ${libtorch.version ?? '(version unknown)'} in ${libtorch.root}: ${(cause as Error).message}. ` +
        'Build it again for this libtorch (npm rebuild martlet), or point LIBTORCH to the version it was built for.',
      { addon: path, libtorch: libtorch.root, version: libtorch.version, trace },
      { cause },
    );
  }
  const compiled = addon.compiledTorchVersion;
  const minor = (version: string) => version.split('.').slice(0, 2).join('.');
  if (libtorch.version !== undefined && minor(libtorch.version) !== minor(compiled)) {
    throw new MartletError(
      'ERR_MARTLET_LIBTORCH_MISMATCH',
      `The addon was compiled against libtorch ${compiled}, but ${libtorch.root} is ${libtorch.version}. ` +
        `Build it again for this libtorch (npm rebuild martlet), or install libtorch ${compiled} (npx martlet libtorch install --version ${compiled}).`,
      { compiled, found: libtorch.version, libtorch: libtorch.root },
    );
  }
  const threads = threadCount();
  addon.initialize({
    libtorchLib: libtorch.lib,
    cuda: process.env.MARTLET_DEVICE !== 'cpu',
    threads,
    threadsBesideGpu: wantedThreads() ?? Math.min(threads, THREADS_BESIDE_GPU),
  });
  return { addon, path, libtorch };
}

/**
 * What is left to the host beside a GPU is small, and OpenMP's threads spin after each of it: with 16 on 16 cores they took the cores from the threads
 * that feed the GPU (steps of BLIP-2 OPT-2.7B of 8 rows on an H100: 227 ms with 16, 74 ms with 2 or 4).
 */
const THREADS_BESIDE_GPU = 4;

function wantedThreads(): number | undefined {
  const wanted = Number(process.env.MARTLET_NUM_THREADS);
  return Number.isInteger(wanted) && wanted > 0 ? wanted : undefined;
}

/** `MARTLET_NUM_THREADS`, else the physical cores. */
export function threadCount(): number {
  return wantedThreads() ?? Math.max(1, Math.min(physicalCores(), availableParallelism()));
}

function physicalCores(): number {
  try {
    const cores = new Set<string>();
    for (const block of readFileSync('/proc/cpuinfo', 'utf8').split('\n\n')) {
      const field = (name: string) => new RegExp(`^${name}\\s*: (.*)$`, 'm').exec(block)?.[1];
      if (field('processor') !== undefined)
        cores.add(`${field('physical id') ?? 0}:${field('core id') ?? field('processor')}`);
    }
    return cores.size || availableParallelism();
  } catch {
    return availableParallelism();
  }
}

/** build/Release of a checkout, else the prebuild for this libtorch minor version. */
function findAddon(libtorch: LibtorchLocation, trace: string[]): string {
  const nodeGypBuild = require('node-gyp-build') as { resolve(dir: string): string };
  const minor = libtorch.version?.split('.').slice(0, 2).join('.');
  const dirs = [packageRoot, ...(minor ? [join(packageRoot, 'prebuilds', `torch${minor}`)] : [])];
  for (const dir of dirs) {
    try {
      return nodeGypBuild.resolve(dir);
    } catch (error) {
      trace.push(`no addon under ${dir}: ${(error as Error).message.split('\n')[0]}`);
    }
  }
  throw new MartletError(
    'ERR_MARTLET_LIBTORCH_MISMATCH',
    `libtorch ${libtorch.version ?? ''} is in ${libtorch.root}, but there is no addon built for it. Build one: npm rebuild martlet (needs g++ and CMake).`,
    { libtorch: libtorch.root, version: libtorch.version, trace },
  );
}

/** Opens libtorch's libraries by absolute path, so that the addon finds them without LD_LIBRARY_PATH. */
function preload(libtorch: LibtorchLocation, addonDir: string, trace: string[]): void {
  const file = join(addonDir, 'martlet_preload.so');
  if (!existsSync(file)) {
    trace.push(`no preloader beside the addon (${file})`);
    return;
  }
  const module = { exports: {} as { load(path: string): string } };
  process.dlopen(module, file);
  for (const name of ['libc10.so', 'libtorch_cpu.so']) {
    const error = module.exports.load(join(libtorch.lib, name));
    if (error !== '') {
      throw new MartletError(
        'ERR_MARTLET_LIBTORCH_NOT_FOUND',
        `${join(libtorch.lib, name)} could not be loaded: ${error}. The libtorch in ${libtorch.root} is incomplete; install it again: npx martlet libtorch install`,
        { libtorch: libtorch.root, trace },
      );
    }
  }
}
