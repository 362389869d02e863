/** Builds the addon with CMake through cmake-js, which knows Node's headers and downloads none. Used by a clone (bootstrap.mjs) and by npm's install script. */
const { spawnSync } = require('node:child_process');
const { availableParallelism } = require('node:os');
const { join } = require('node:path');

const root = join(__dirname, '..');

/**
 * Into build/Release. CMake's files and objects are in build/cmake, so that a second build compiles only what changed.
 *
 * @param {{ tests?: boolean }} options tests: also the C++ tests of the core
 * @returns {number} exit code
 */
function buildAddon({ tests = false } = {}) {
  const options = [
    ...['--directory', root, '--out', join(root, 'build/cmake'), '--config', 'Release'],
    `--CDCMAKE_LIBRARY_OUTPUT_DIRECTORY=${join(root, 'build/Release')}`,
    `--CDMARTLET_TESTS=${tests ? 'ON' : 'OFF'}`,
  ];
  // Ninja takes every core by itself, make only when told.
  const env = { CMAKE_BUILD_PARALLEL_LEVEL: String(availableParallelism()), ...process.env };
  for (const command of ['configure', 'build']) {
    const cmakeJs = [require.resolve('cmake-js/bin/cmake-js'), command, ...options];
    const { status, error } = spawnSync(process.execPath, cmakeJs, { cwd: root, stdio: 'inherit', env });
    if (error) throw error;
    if (status !== 0) return status ?? 1;
  }
  return 0;
}

module.exports = { buildAddon };
