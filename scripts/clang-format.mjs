/** clang-format, with the options given, on every C++ and CUDA file of ours. */
import { readdirSync } from 'node:fs';
import { join, sep } from 'node:path';
import { fileURLToPath } from 'node:url';
import { asScript, run } from './bootstrap.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));

asScript(import.meta.url, (options) => {
  const files = readdirSync(join(root, 'native'), { recursive: true })
    .filter((path) => /\.(cpp|h|cu|cuh)$/.test(path) && !path.startsWith(`third_party${sep}`))
    .map((path) => join('native', path));
  run(process.execPath, ['node_modules/clang-format-node/build/cli.js', ...options, ...files]);
});
