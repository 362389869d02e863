/** Where libtorch is, and how it gets into martlet's cache. */
import { execFile, execFileSync, spawn } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rename, rm } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join, resolve } from 'node:path';
import { promisify } from 'node:util';
import { MartletError } from '../errors.js';

export const DEFAULT_TORCH_VERSION = '2.13.0';

export interface LibtorchLocation {
  /** Folder with include/ and lib/. */
  root: string;
  lib: string;
  /** e.g. `2.13.0`; absent when nothing says it. */
  version?: string;
  cuda: boolean;
  /** Which rule found it. */
  source: 'LIBTORCH' | 'LIBTORCH_USE_PYTORCH' | 'cache' | 'system';
}

/** `MARTLET_CACHE`, else `XDG_CACHE_HOME/martlet`, else `~/.cache/martlet`. */
export function cacheDir(): string {
  if (process.env.MARTLET_CACHE) return process.env.MARTLET_CACHE;
  return join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'martlet');
}

/** LIBTORCH, then LIBTORCH_USE_PYTORCH=1, then the cache (newest CUDA build first), then the system. `trace` receives what was tried. */
export function findLibtorch(trace: string[] = []): LibtorchLocation | undefined {
  const { LIBTORCH, LIBTORCH_USE_PYTORCH } = process.env;
  if (LIBTORCH) return inspect([LIBTORCH, join(LIBTORCH, 'torch')], 'LIBTORCH', trace);
  if (LIBTORCH_USE_PYTORCH === '1') {
    const dir = pythonTorch(trace);
    return dir ? inspect([dir], 'LIBTORCH_USE_PYTORCH', trace) : undefined;
  }
  return (
    inspect(
      cachedBuilds().map((build) => join(build, 'torch')),
      'cache',
      trace,
    ) ?? inspect(['/usr', '/usr/local'], 'system', trace)
  );
}

function cachedBuilds(): string[] {
  const dir = join(cacheDir(), 'libtorch');
  if (!existsSync(dir)) return [];
  const version = (name: string) => name.split('-')[0]?.split('.').map(Number) ?? [];
  return readdirSync(dir)
    .filter((name) => /^\d+\.\d+\.\d+-(cpu|cuda)/.test(name))
    .sort((a, b) => {
      const byDevice = Number(b.includes('-cuda')) - Number(a.includes('-cuda'));
      if (byDevice !== 0) return byDevice;
      const [va, vb] = [version(a), version(b)];
      return (vb[0] ?? 0) - (va[0] ?? 0) || (vb[1] ?? 0) - (va[1] ?? 0) || (vb[2] ?? 0) - (va[2] ?? 0);
    })
    .map((name) => join(dir, name));
}

function pythonTorch(trace: string[]): string | undefined {
  const code = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])";
  try {
    return execFileSync('python3', ['-c', code], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim();
  } catch {
    trace.push('LIBTORCH_USE_PYTORCH=1, but python3 has no torch');
    return undefined;
  }
}

function inspect(roots: string[], source: LibtorchLocation['source'], trace: string[]): LibtorchLocation | undefined {
  for (const root of roots) {
    const lib = join(root, 'lib');
    if (existsSync(join(lib, 'libtorch_cpu.so')) && existsSync(join(lib, 'libc10.so'))) {
      const version = versionOf(root);
      return {
        root: resolve(root),
        lib: resolve(lib),
        ...(version !== undefined && { version }),
        cuda: existsSync(join(lib, 'libtorch_cuda.so')),
        source,
      };
    }
    trace.push(`${lib} (${source}): no libtorch_cpu.so`);
  }
  if (roots.length === 0) trace.push(`${join(cacheDir(), 'libtorch')} (${source}): empty`);
  return undefined;
}

/** From version.py of a wheel, build-version of the zip, or the headers. */
function versionOf(root: string): string | undefined {
  for (const [file, pattern] of [
    ['version.py', /__version__ = '(\d+\.\d+\.\d+)/],
    ['build-version', /(\d+\.\d+\.\d+)/],
  ] as const) {
    try {
      const found = pattern.exec(readFileSync(join(root, file), 'utf8'))?.[1];
      if (found) return found;
    } catch {
      // the next place may say it
    }
  }
  try {
    const header = readFileSync(join(root, 'include/torch/headeronly/version.h'), 'utf8');
    const part = (name: string) => new RegExp(`TORCH_VERSION_${name} (\\d+)`).exec(header)?.[1];
    const version = [part('MAJOR'), part('MINOR'), part('PATCH')];
    return version.every((n) => n !== undefined) ? version.join('.') : undefined;
  } catch {
    return undefined;
  }
}

export interface InstallLibtorchOptions {
  /** CUDA build with the NVIDIA libraries it needs. Defaults to false. */
  cuda?: boolean;
  /** Defaults to 2.13.0. */
  version?: string;
  /** Install again even if it is there. Defaults to false. */
  force?: boolean;
  signal?: AbortSignal;
  /** Receives pip's output line by line. */
  onLine?: (line: string) => void;
}

/**
 * Puts a libtorch into the cache with pip: `pip install --target <cache> --no-deps torch==X`. Whole or not at all: a temporary folder, renamed.
 *
 * @throws ERR_MARTLET_LIBTORCH_NOT_FOUND when pip is missing or fails.
 */
export async function installLibtorch(options: InstallLibtorchOptions = {}): Promise<LibtorchLocation> {
  const { cuda = false, version = DEFAULT_TORCH_VERSION, force = false, signal, onLine = () => {} } = options;
  if (!/^\d+\.\d+\.\d+$/.test(version)) {
    throw new MartletError(
      'ERR_MARTLET_USAGE',
      `--version takes a version such as ${DEFAULT_TORCH_VERSION}, not "${version}".`,
    );
  }
  const dir = join(cacheDir(), 'libtorch', `${version}-${cuda ? 'cuda' : 'cpu'}`);
  if (!force && existsSync(join(dir, 'torch', 'lib', 'libtorch_cpu.so'))) {
    onLine(`libtorch ${version} is in ${dir} already`);
    return located(dir);
  }
  await mkdir(join(cacheDir(), 'libtorch'), { recursive: true });
  const temporary = await mkdtemp(join(cacheDir(), 'libtorch', '.tmp-'));
  try {
    await pip(['install', '--target', temporary, '--no-deps', `torch==${version}`], onLine, signal);
    for (const requirement of await cudaRequirements(temporary, cuda)) {
      await pip(['install', '--target', temporary, '--no-deps', '--upgrade', requirement], onLine, signal);
    }
    if (cuda && !existsSync(join(temporary, 'torch', 'lib', 'libtorch_cuda.so'))) {
      throw new MartletError(
        'ERR_MARTLET_LIBTORCH_NOT_FOUND',
        `The torch ${version} that pip gave is a CPU build. Point pip at an index with CUDA builds (PIP_INDEX_URL), or set LIBTORCH to one.`,
      );
    }
    await rm(dir, { recursive: true, force: true });
    await rename(temporary, dir);
  } finally {
    await rm(temporary, { recursive: true, force: true });
  }
  return located(dir);
}

function located(dir: string): LibtorchLocation {
  const found = inspect([join(dir, 'torch')], 'cache', []);
  if (!found)
    throw new MartletError(
      'ERR_MARTLET_LIBTORCH_NOT_FOUND',
      `The libtorch in ${dir} is incomplete: install it again with --force.`,
    );
  return found;
}

/** What a CUDA wheel needs beside it; for CPU use, only the small libraries that its libtorch_cpu.so names. */
async function cudaRequirements(dir: string, cuda: boolean): Promise<string[]> {
  if (!existsSync(join(dir, 'torch', 'lib', 'libtorch_cuda.so'))) return [];
  const info = readdirSync(dir).find((name) => /^torch-.*\.dist-info$/.test(name));
  if (!info) return [];
  const metadata = await readFile(join(dir, info, 'METADATA'), 'utf8');
  const needed = [...metadata.matchAll(/^Requires-Dist: ((?:nvidia|cuda)-[^;\n]+)/gm)].map((match) =>
    (match[1] ?? '').replaceAll(/[()\s]/g, ''),
  );
  return cuda ? needed : needed.filter((name) => /cuda-runtime|cuda-cupti|cuda-toolkit/.test(name));
}

async function pip(args: string[], onLine: (line: string) => void, signal?: AbortSignal): Promise<void> {
  try {
    await promisify(execFile)('python3', ['-m', 'pip', '--version']);
  } catch (cause) {
    throw new MartletError(
      'ERR_MARTLET_LIBTORCH_NOT_FOUND',
      'python3 with pip is needed to fetch libtorch (only now, never at run time). Install it: apt-get install python3-pip. Or unpack libtorch yourself and set LIBTORCH.',
      {},
      { cause },
    );
  }
  const child = spawn('python3', ['-m', 'pip', '--disable-pip-version-check', ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    signal,
    env: { ...process.env, PIP_ROOT_USER_ACTION: 'ignore' },
  });
  const tail: string[] = [];
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => {
      for (const line of text.split('\n').filter(Boolean)) {
        tail.push(line);
        onLine(line);
      }
    });
  }
  const code = await new Promise<number | null>((done, failed) => child.on('error', failed).on('close', done));
  if (code !== 0) {
    throw new MartletError(
      'ERR_MARTLET_LIBTORCH_NOT_FOUND',
      `pip ${args.join(' ')} failed:\n${tail.slice(-8).join('\n')}`,
      { exitCode: code },
    );
  }
}

/** What `martlet libtorch status` prints. */
export function libtorchStatus(): { found?: LibtorchLocation; trace: string[]; cache: string } {
  const trace: string[] = [];
  const found = findLibtorch(trace);
  return { ...(found && { found }), trace, cache: cacheDir() };
}
