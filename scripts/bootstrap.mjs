/**
 * Makes a clone ready: checks the tools, then npm packages, TypeScript, libtorch, native addon; each only if something changed since. Plain Node,
 * no dependency. `node scripts/bootstrap.mjs [--tests]`; --tests also builds the C++ tests.
 */
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const require = createRequire(import.meta.url);
const root = fileURLToPath(new URL('..', import.meta.url));
const at = (...parts) => join(root, ...parts);

/** A step that cannot go on; the message says what to do. */
class SetupError extends Error {}

/** Each missing tool with the command that installs it (Debian and Ubuntu). */
function checkTools() {
  const problems = [];
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major < 20 || (major === 20 && minor < 19)) {
    problems.push(
      `Node ${process.versions.node} is too old: 20.19 or later is needed. Install it: https://nodejs.org, or nvm install 20`,
    );
  }
  const need = (tool, args, install) => {
    const [command, ...first] = tool.split(' ');
    const { status, stdout } = spawnSync(command, [...first, ...args], { encoding: 'utf8' });
    if (status !== 0) problems.push(`${tool} is missing. Install it: ${install}`);
    return status === 0 ? stdout : '';
  };
  need('npm', ['--version'], 'apt-get install npm, or https://nodejs.org, which brings it');
  const compiler = process.env.CXX ?? 'g++';
  const version = Number.parseInt(need(compiler, ['-dumpversion'], 'apt-get install g++'), 10);
  if (compiler === 'g++' && version < 11)
    problems.push(`g++ ${version} is too old: 11 or later is needed (C++20). Install it: apt-get install g++-12`);
  const [, cmakeMajor, cmakeMinor] =
    /(\d+)\.(\d+)/.exec(need('cmake', ['--version'], 'apt-get install cmake'))?.map(Number) ?? [];
  if (cmakeMajor < 3 || (cmakeMajor === 3 && cmakeMinor < 22))
    problems.push(
      `cmake ${cmakeMajor}.${cmakeMinor} is too old: 3.22 or later is needed. Install it: python3 -m pip install cmake`,
    );
  if (!hasNinja()) need('make', ['--version'], 'apt-get install make (or ninja-build)');
  // Only to fetch libtorch.
  if (!process.env.LIBTORCH && process.env.LIBTORCH_USE_PYTORCH !== '1')
    need('python3 -m pip', ['--version'], 'apt-get install python3 python3-pip');
  if (problems.length > 0) throw new SetupError(problems.join('\n'));
}

export function run(command, args, env = {}) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: 'inherit', env: { ...process.env, ...env } });
  if (error) throw new SetupError(`${command} could not be started: ${error.message}`);
  if (status !== 0) throw new SetupError(`failed: ${[command, ...args].join(' ')}`);
}

/** Changes when a file of that kind under `paths` is written, added or removed. */
function stateOf(kind, ...paths) {
  let count = 0;
  let latest = 0;
  const visit = (path) => {
    const stat = statSync(path, { throwIfNoEntry: false });
    if (stat?.isDirectory()) for (const name of readdirSync(path)) visit(join(path, name));
    // a folder that is not there is no file
    else if (stat && kind.test(path)) {
      count++;
      latest = Math.max(latest, stat.mtimeMs);
    }
  };
  paths.forEach(visit);
  return `${count} files, ${latest}`;
}

/** Runs `make` unless the stamp in build/stamps holds `key`. */
export function step(name, key, isThere, make) {
  const stamp = at('build', 'stamps', name);
  if (isThere() && existsSync(stamp) && readFileSync(stamp, 'utf8') === key) return;
  console.log(`\n▸ ${name}`);
  const began = performance.now();
  make();
  mkdirSync(at('build', 'stamps'), { recursive: true });
  writeFileSync(stamp, key);
  console.log(`  done in ${((performance.now() - began) / 1000).toFixed(0)} s`);
}

/** The libtorch that the addon is built against, as `martlet libtorch status --json` says. */
function libtorchRoot() {
  const { stdout } = spawnSync(process.execPath, [at('dist/lib/cli/main.js'), 'libtorch', 'status', '--json'], {
    encoding: 'utf8',
    cwd: root,
  });
  return JSON.parse(stdout).found?.root;
}

export function bootstrap({ tests = false } = {}) {
  process.chdir(root);
  const lock = createHash('sha256')
    .update(readFileSync(at('package-lock.json')))
    .digest('hex');
  step(
    'npm packages',
    lock,
    () => existsSync(at('node_modules/.package-lock.json')),
    () => {
      checkTools();
      // The package's own install script builds the addon, which comes later here.
      run('npm', ['ci', '--no-audit', '--no-fund'], { MARTLET_SKIP_BUILD: '1' });
    },
  );
  step(
    'TypeScript',
    stateOf(/\.(c|m)?ts$|tsconfig\.json$/, at('lib'), at('test'), at('examples'), at('bench'), at('tsconfig.json')),
    () => existsSync(at('dist/lib/index.js')),
    () => run(process.execPath, [at('node_modules/typescript/bin/tsc'), '-p', '.']),
  );
  // The libtorch of an earlier run is looked for without starting a process; where that is gone or the environment differs, the slow way.
  const environment = JSON.stringify(
    ['LIBTORCH', 'LIBTORCH_USE_PYTORCH', 'MARTLET_CACHE', 'XDG_CACHE_HOME', 'HOME'].map(
      (name) => process.env[name] ?? null,
    ),
  );
  const where = at('build', 'stamps', 'libtorch-root');
  step(
    'libtorch',
    environment,
    () => existsSync(where) && existsSync(join(readFileSync(where, 'utf8'), 'lib/libtorch_cpu.so')),
    () => {
      if (libtorchRoot() === undefined)
        run(process.execPath, [at('dist/lib/cli/main.js'), 'libtorch', 'install', '--cpu']);
      const found = libtorchRoot();
      if (found === undefined)
        throw new SetupError('libtorch is not where it was just installed; run: npx martlet libtorch status');
      mkdirSync(at('build', 'stamps'), { recursive: true });
      writeFileSync(where, found);
      console.log(`  ${found}`);
    },
  );
  const withTests = tests || existsSync(at('build', 'stamps', 'with-tests'));
  step(
    'native addon (about two minutes when built for the first time)',
    [stateOf(/./, at('native'), at('cmake'), at('CMakeLists.txt')), readFileSync(where, 'utf8'), withTests].join(' '),
    () => existsSync(at('build/Release/martlet.node')),
    () => {
      checkTools();
      buildNative({ tests: withTests });
      if (withTests) writeFileSync(at('build', 'stamps', 'with-tests'), '');
    },
  );
}

/** The addon, in build/Release. */
function buildNative({ tests = false } = {}) {
  const { buildAddon } = require('./build-addon.cjs');
  if (buildAddon({ tests }) !== 0) throw new SetupError('the native addon could not be built; the reason stands above');
}

const hasNinja = () => spawnSync('ninja', ['--version']).status === 0;

/** Core and C++ tests with AddressSanitizer and UndefinedBehaviorSanitizer, in build/asan. */
export function buildSanitized() {
  const dir = at('build/asan');
  run('cmake', [
    ...['-S', root, '-B', dir, ...(hasNinja() ? ['-G', 'Ninja'] : [])],
    ...['-DMARTLET_ADDON=OFF', '-DMARTLET_TESTS=ON', '-DMARTLET_SANITIZE=ON'],
  ]);
  run('cmake', ['--build', dir, '--parallel', String(availableParallelism())]);
  return dir;
}

/** Runs `main` as a script's body: a SetupError is its message and exit code 1. */
export async function asScript(url, main) {
  if (process.argv[1] === undefined || resolve(process.argv[1]) !== fileURLToPath(url)) return;
  try {
    await main(process.argv.slice(2));
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    console.error(`\n${error.message}`);
    process.exitCode = 1;
  }
}

asScript(import.meta.url, (args) => {
  if (args.includes('--native')) buildNative({ tests: args.includes('--tests') });
  else bootstrap({ tests: args.includes('--tests') });
});
