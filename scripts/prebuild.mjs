/**
 * `npm run prebuild`: the addon for publishing, in prebuilds/torch<minor>/prebuilds/<platform>-<arch>/. Carries no libtorch. It is compiled from what
 * `npm pack` packs, in a folder of its own: node-gyp, which prebuildify calls, empties build/.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { asScript, bootstrap, run } from './bootstrap.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));

asScript(import.meta.url, async () => {
  bootstrap();
  const { findLibtorch } = await import('../dist/lib/native/libtorch.js');
  const minor = findLibtorch().version.split('.').slice(0, 2).join('.');
  // In the project, whose node_modules are found from there.
  const temporary = mkdtempSync(join(root, 'build', 'prebuild-'));
  try {
    const pack = ['pack', '--ignore-scripts', '--silent', '--pack-destination', temporary];
    const { stdout } = spawnSync('npm', pack, { cwd: root, encoding: 'utf8' });
    run('tar', ['-xzf', join(temporary, stdout.trim()), '-C', temporary]);
    const source = join(temporary, 'package');
    const out = join(root, 'prebuilds', `torch${minor}`);
    const prebuildify = [join(root, 'node_modules/prebuildify/bin.js'), '--cwd', source, '--out', out];
    // Without -t prebuildify takes the newest Node and downloads its headers.
    const options = ['--napi', '--strip', '--tag-libc', '-t', process.versions.node];
    // node-gyp would download the headers of this Node too, which stand beside it.
    const beside = dirname(dirname(process.execPath));
    const env = existsSync(join(beside, 'include/node/node.h')) ? { npm_config_nodedir: beside } : {};
    run(process.execPath, [...prebuildify, ...options], env);
  } finally {
    rmSync(temporary, { recursive: true, force: true });
  }
});
