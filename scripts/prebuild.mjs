/** `npm run prebuild`: the addon for publishing, in prebuilds/torch<minor>/prebuilds/<platform>-<arch>/. Carries no libtorch. */
import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { findLibtorch } from '../dist/lib/native/libtorch.js';

const libtorch = findLibtorch();
if (libtorch?.version === undefined) throw new Error('no libtorch: npx martlet libtorch install');
const minor = libtorch.version.split('.').slice(0, 2).join('.');
const root = fileURLToPath(new URL('..', import.meta.url));
const { status } = spawnSync(
  process.execPath,
  // Without -t prebuildify takes the newest Node and downloads its headers.
  [
    'node_modules/prebuildify/bin.js',
    '--napi',
    '--strip',
    '--tag-libc',
    '-t',
    process.versions.node,
    '--out',
    `prebuilds/torch${minor}`,
  ],
  { cwd: root, stdio: 'inherit', env: { ...process.env, MARTLET_PREBUILD: '1' } },
);
process.exitCode = status ?? 1;
