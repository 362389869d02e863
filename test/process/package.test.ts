/** The package as npm packs it, in a project that depends on it: what is in it, and that it works there with nothing but its dependencies. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { mkdtemp, realpath, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { findLibtorch } from '../../lib/native/libtorch.js';
import { llava, projectRoot } from '../support/fixtures.js';
import { lastJson, runNode } from '../support/process.js';
import { MODEL } from '../support/train.js';

const exec = promisify(execFile);
const manifest = JSON.parse(readFileSync(join(projectRoot, 'package.json'), 'utf8'));
const libtorch = findLibtorch();
assert(libtorch?.version !== undefined, 'bootstrap installs libtorch');
const minor = (version: string) => version.split('.').slice(0, 2).join('.');

/** The project that depends on martlet. */
let consumer: string;
let packageDir: string;
/** Paths in the package, sorted. */
let files: string[];

before(async () => {
  consumer = await realpath(await mkdtemp(join(tmpdir(), 'martlet-consumer-')));
  // --ignore-scripts: prepack would rebuild dist under the tests that run beside this one
  const pack = ['pack', '--ignore-scripts', '--json', '--pack-destination', consumer];
  const { stdout } = await exec('npm', pack, { cwd: projectRoot, maxBuffer: 2 ** 26 });
  const [packed] = JSON.parse(stdout) as [{ filename: string; files: { path: string }[] }];
  files = packed.files.map(({ path }) => path).sort();
  const modules = join(consumer, 'node_modules');
  packageDir = join(modules, 'martlet');
  mkdirSync(packageDir, { recursive: true });
  await exec('tar', ['-xzf', join(consumer, packed.filename), '-C', packageDir, '--strip-components=1']);
  // What npm would install: the dependencies, no devDependency; and the types of Node, which the project has of itself.
  for (const name of [...Object.keys(manifest.dependencies), '@types/node']) {
    mkdirSync(dirname(join(modules, name)), { recursive: true });
    symlinkSync(join(projectRoot, 'node_modules', name), join(modules, name));
  }
  // As npm links a bin.
  mkdirSync(join(modules, '.bin'));
  symlinkSync(join('..', 'martlet', manifest.bin.martlet), join(modules, '.bin', 'martlet'));
  chmodSync(join(packageDir, manifest.bin.martlet), 0o755);
  writeFileSync(join(consumer, 'package.json'), '{ "name": "consumer", "private": true }');
});
after(() => rm(consumer, { recursive: true }));

const evaluate = (code: string, type: 'module' | 'commonjs', env: Record<string, string | undefined> = {}) =>
  runNode([`--input-type=${type}`, '-e', code], { cwd: consumer, env });
const install = (env: Record<string, string | undefined> = {}) =>
  runNode(['scripts/install.cjs'], { cwd: packageDir, env });

describe('what is packed', () => {
  test('the library, its types, the sources of the addon, and nothing else', () => {
    for (const path of [
      'README.md',
      'LICENSE',
      'CHANGELOG.md',
      'CMakeLists.txt',
      'binding.gyp',
      'cmake/FindLibtorch.cmake',
      'dist/lib/index.js',
      'dist/lib/index.d.ts',
      'dist/lib/cli/main.js',
      'native/addon/addon.cpp',
      'native/addon/preload/preload.cpp',
      'native/core/session.cpp',
      'scripts/install.cjs',
    ]) {
      assert.ok(files.includes(path), path);
    }
    const allowed = [
      /^(README\.md|LICENSE|CHANGELOG\.md|package\.json|CMakeLists\.txt|binding\.gyp)$/,
      /^dist\/lib\/.+\.(js|d\.ts)$/,
      /^native\/(addon|core|cuda|third_party)\//,
      /^cmake\/[^/]+\.cmake$/,
      /^scripts\/(install|build-addon)\.cjs$/,
      /^prebuilds\/torch[\d.]+\/prebuilds\/[^/]+\/[^/]+\.(node|so)$/,
      /^schema\/[^/]+\.json$/,
      /^docs\/.+\.(md|png|svg)$/,
    ];
    assert.deepEqual(
      files.filter((path) => !allowed.some((pattern) => pattern.test(path))),
      [],
    );
    assert.deepEqual(
      files.filter((path) => /test|fixture|\.tmp|~$/.test(path)),
      [],
    );
  });

  test('every header that a packed source includes is packed', () => {
    const sources = files.filter((path) => /^native\/(addon|core|cuda)\/.*\.(cpp|h|cu|cuh)$/.test(path));
    assert.ok(sources.length > 20);
    for (const path of sources) {
      for (const [, name] of readFileSync(join(packageDir, path), 'utf8').matchAll(/^#include "(.+)"/gm)) {
        const places = [join('native', name as string), join(dirname(path), name as string)];
        assert.ok(
          places.some((place) => files.includes(place)),
          `${path} includes ${name}`,
        );
      }
    }
    assert.ok(files.includes('native/third_party/nlohmann/json.hpp'));
  });

  test('every module loads with the declared dependencies alone, before there is any libtorch', async () => {
    const modules = files.filter((path) => path.endsWith('.js') && path !== manifest.bin.martlet.replace('./', ''));
    assert.ok(modules.length > 30);
    const code = modules.map((path) => `await import('./node_modules/martlet/${path}');`).join('\n');
    const { code: exit, stderr } = await evaluate(code, 'module', { LIBTORCH: join(consumer, 'none') });
    assert.deepEqual([exit, stderr], [0, '']);
  });

  test('its types compile in an ES module and in a CommonJS module, libraries checked too', async () => {
    const code = (open: string) => `${open}
const run: martlet.TrainRun = martlet.trainLoRA({ model: 'dir', dataset: 'train.json' });
export const codes: readonly martlet.ErrorCode[] = martlet.ERROR_CODES;
export const answer: Promise<martlet.GenerateResult> = martlet.infer({ model: 'dir', text: 'Hello', image: Buffer.of() });
// @ts-expect-error the types are there
run.nothing();
`;
    writeFileSync(join(consumer, 'esm.mts'), code("import * as martlet from 'martlet';"));
    writeFileSync(join(consumer, 'cjs.cts'), code("import martlet = require('martlet');"));
    const options = ['--strict', '--noEmit', '--target', 'es2022', '--module', 'nodenext', '--types', 'node'];
    const tsc = join(projectRoot, 'node_modules/typescript/bin/tsc');
    const { code: exit, stdout } = await runNode([tsc, ...options, 'esm.mts', 'cjs.cts'], { cwd: consumer });
    assert.deepEqual([exit, stdout], [0, '']);
  });
});

describe('without libtorch', () => {
  const none = () => ({ LIBTORCH: join(consumer, 'none') });

  test('the install script says what to do, builds nothing and succeeds', async () => {
    const { code, stdout, stderr } = await install(none());
    assert.deepEqual([code, stderr], [0, '']);
    assert.match(stdout, /npx martlet libtorch install .*npm rebuild martlet/);
    assert.ok(!existsSync(join(packageDir, 'build')));
  });

  test('import, require() and --version work; the first use is a coded error with remedies', async () => {
    const uses = `
      m.loadModel(${JSON.stringify(MODEL)})
        .catch((error) => console.log(JSON.stringify([Object.keys(m), error.code, error.message])));`;
    for (const [open, type] of [
      ["import * as m from 'martlet';", 'module'],
      ["const m = require('martlet');", 'commonjs'],
    ] as const) {
      const { code, stdout, stderr } = await evaluate(open + uses, type, none());
      assert.deepEqual([code, stderr], [0, ''], type);
      const [names, errorCode, message] = lastJson<[string[], string, string]>(stdout);
      assert.ok(names.includes('trainLoRA'), type);
      assert.equal(errorCode, 'ERR_MARTLET_LIBTORCH_NOT_FOUND', type);
      assert.match(message, /1\. [\s\S]*2\. [\s\S]*3\. /, type);
    }
    const martlet = join(consumer, 'node_modules/.bin/martlet');
    const { stdout } = await exec(martlet, ['--version'], { cwd: consumer });
    assert.equal(stdout, `${manifest.version}\n`);
    const doctor = await runNode([martlet, 'doctor', '--json'], { cwd: consumer, env: none() });
    assert.equal(doctor.code, 1);
    const report = JSON.parse(doctor.stdout);
    assert.deepEqual([report.ok, report.error.code], [false, 'ERR_MARTLET_LIBTORCH_NOT_FOUND']);
  });
});

describe('with libtorch', () => {
  const doctor = async (env: Record<string, string | undefined> = {}) => {
    const martlet = join(consumer, 'node_modules/.bin/martlet');
    const { code, stdout } = await runNode([martlet, 'doctor', '--json'], { cwd: consumer, env });
    return { code, report: JSON.parse(stdout) };
  };

  test('no addon is there yet: a coded error says how to build one', async () => {
    const { code, report } = await doctor();
    assert.deepEqual([code, report.error.code], [1, 'ERR_MARTLET_LIBTORCH_MISMATCH']);
    assert.match(report.error.message, /npm rebuild martlet/);
  });

  test('a prebuilt addon for this libtorch loads, and no script has run', async () => {
    // The layout of `npm run prebuild`; the addon of the checkout holds no path to libtorch either.
    const release = join(projectRoot, 'build/Release');
    const prebuilt = join(
      packageDir,
      `prebuilds/torch${minor(libtorch.version as string)}/prebuilds/linux-${process.arch}`,
    );
    rmSync(join(packageDir, 'prebuilds'), { recursive: true, force: true });
    mkdirSync(prebuilt, { recursive: true });
    cpSync(join(release, 'martlet.node'), join(prebuilt, 'martlet.glibc.node'));
    cpSync(join(release, 'martlet_preload.so'), join(prebuilt, 'martlet_preload.so'));

    const { code, report } = await doctor();
    assert.equal(code, 0, JSON.stringify(report.error));
    assert.equal(report.system.addonPath, join(prebuilt, 'martlet.glibc.node'));
    const uses = `
      const [model, image] = ${JSON.stringify([MODEL, join(llava, 'images/landscape.png')])};
      m.infer({ model, image, text: 'What is this?', device: 'cpu', temperature: 0, maxNewTokens: 4 })
        .then(({ tokenIds }) => console.log(JSON.stringify([...tokenIds])));`;
    const fromEsm = await evaluate(`import * as m from 'martlet';${uses}`, 'module');
    const fromCjs = await evaluate(`const m = require('martlet');${uses}`, 'commonjs');
    assert.equal(fromEsm.stderr + fromCjs.stderr, '');
    assert.equal(lastJson<number[]>(fromEsm.stdout).length, 4);
    assert.equal(fromCjs.stdout, fromEsm.stdout);
  });

  test('the install script leaves a prebuilt addon that loads alone', async () => {
    const { code, stdout, stderr } = await install();
    assert.deepEqual([code, stdout, stderr], [0, '', '']);
    assert.ok(!existsSync(join(packageDir, 'build')));
  });

  test('a libtorch of another minor version is refused, with both versions', async () => {
    const other = join(consumer, 'libtorch');
    mkdirSync(other);
    symlinkSync(libtorch.lib, join(other, 'lib'));
    writeFileSync(join(other, 'version.py'), "__version__ = '2.99.0'\n");
    const absent = await doctor({ LIBTORCH: other });
    assert.deepEqual([absent.code, absent.report.error.code], [1, 'ERR_MARTLET_LIBTORCH_MISMATCH']);

    const prebuilds = join(packageDir, 'prebuilds');
    cpSync(join(prebuilds, readdirSync(prebuilds)[0] as string), join(prebuilds, 'torch2.99'), { recursive: true });
    const wrong = await doctor({ LIBTORCH: other });
    assert.deepEqual([wrong.code, wrong.report.error.code], [1, 'ERR_MARTLET_LIBTORCH_MISMATCH']);
    const { compiled, found } = wrong.report.error.details;
    assert.deepEqual([minor(compiled), found], [minor(libtorch.version as string), '2.99.0']);
  });
});
