/**
 * `npm test [-- filter …]`: sets up if needed, runs the C++ tests, then every compiled test whose path contains one of the filters. Ends with the
 * summary of Node's test runner. `--sanitized`: the C++ tests alone, built with AddressSanitizer and UndefinedBehaviorSanitizer.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { asScript, bootstrap, buildSanitized, run } from './bootstrap.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
/** test/gpu needs a device, test/interop Python packages: they are commands of their own. */
const SUITES = ['unit', 'addon', 'parity', 'process', 'types'];

function testFiles(suites, filters) {
  return (
    suites
      .flatMap((suite) => readdirSync(join(root, 'dist/test', suite)).map((name) => join('dist/test', suite, name)))
      .filter((path) => path.endsWith('.test.js'))
      // tsc leaves the output of a test that is gone.
      .filter((path) => existsSync(join(root, path.replace(/^dist\//, '').replace(/\.js$/, '.ts'))))
      .filter((path) => filters.length === 0 || filters.some((filter) => path.includes(filter)))
  );
}

/** Runs the compiled tests of `suites` by Node's test runner; gives its exit code. */
export function runTests(suites, filters, concurrency) {
  const files = testFiles(suites, filters);
  if (files.length === 0) {
    console.error(`no test matches ${filters.join(' ')}`);
    return 1;
  }
  // Threads that spin while they wait would take the other core from the test that runs beside.
  const env = { OMP_WAIT_POLICY: 'passive', ...process.env };
  const { status } = spawnSync(process.execPath, ['--test', `--test-concurrency=${concurrency}`, ...files], {
    cwd: root,
    stdio: 'inherit',
    env,
  });
  return status ?? 1;
}

function runCppTests(dir) {
  console.log('\n▸ C++ tests');
  run('ctest', ['--test-dir', dir, '--output-on-failure', '--no-tests=error']);
}

asScript(import.meta.url, (args) => {
  bootstrap({ tests: true });
  if (args.includes('--sanitized')) {
    runCppTests(buildSanitized());
    return;
  }
  if (args.length === 0) runCppTests('build/cmake');
  process.exitCode = runTests(SUITES, args, 2);
});
