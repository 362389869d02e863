/**
 * npm's install script. Downloads nothing. Where there is no libtorch, nothing to do: the loader says what is missing at first use. Where there is one
 * and no addon loads with it (a prebuilt one, or an earlier build), the addon is compiled.
 */
const { existsSync } = require('node:fs');
const { join } = require('node:path');
const { pathToFileURL } = require('node:url');
const { buildAddon } = require('./build-addon.cjs');

const native = join(__dirname, '../dist/lib/native');
const load = (name) => import(pathToFileURL(join(native, name)).href);

async function main() {
  if (process.env.MARTLET_SKIP_BUILD === '1') return 0;
  if (!existsSync(join(native, 'load.js'))) {
    console.log('martlet: this is a clone without its build. Run: npm run bootstrap');
    return 0;
  }
  const { findLibtorch } = await load('libtorch.js');
  if (!findLibtorch()) {
    console.log(
      'martlet: libtorch is not here yet, so the addon was not built. Next: npx martlet libtorch install (or set LIBTORCH, or LIBTORCH_USE_PYTORCH=1), then npm rebuild martlet.',
    );
    return 0;
  }
  try {
    const { loadAddon } = await load('load.js');
    loadAddon();
    return 0;
  } catch (error) {
    if (error?.code !== 'ERR_MARTLET_LIBTORCH_MISMATCH') throw error;
  }
  return buildAddon();
}

main().then(
  (code) => {
    process.exitCode = code;
  },
  (error) => {
    console.error(error);
    process.exitCode = 1;
  },
);
