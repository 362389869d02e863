/**
 * npm's install script. Downloads nothing. A prebuilt addon is there, or libtorch is not: nothing to do (the loader says what is missing at first use).
 * Otherwise the addon is built from source for the libtorch that was found.
 */
const { spawnSync } = require('node:child_process');
const { existsSync, readdirSync } = require('node:fs');
const { join } = require('node:path');

const root = join(__dirname, '..');

async function main() {
  if (process.env.MARTLET_SKIP_BUILD === '1') return 0;
  const locator = join(root, 'dist/lib/native/libtorch.js');
  if (!existsSync(locator)) {
    console.log('martlet: this is a clone without its build. Run: npm run bootstrap');
    return 0;
  }
  const { findLibtorch } = await import(locator);
  const libtorch = findLibtorch();
  if (!libtorch) {
    console.log(
      'martlet: libtorch is not here yet, so the addon was not built. Next: npx martlet libtorch install (or set LIBTORCH, or LIBTORCH_USE_PYTORCH=1, and npm rebuild martlet).',
    );
    return 0;
  }
  const minor = libtorch.version?.split('.').slice(0, 2).join('.');
  const prebuilt = join(root, 'prebuilds', `torch${minor}`, 'prebuilds', `${process.platform}-${process.arch}`);
  if (existsSync(prebuilt) && readdirSync(prebuilt).some((name) => name.endsWith('.node'))) return 0;
  return (
    spawnSync(process.execPath, [require.resolve('node-gyp-build/bin.js')], { cwd: root, stdio: 'inherit' }).status ?? 1
  );
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
