/**
 * `npm run test:gpu [-- filter …]`: the suite of test/gpu on a CUDA device. Without one it says so and fails: nothing is skipped.
 * `--built` leaves bootstrap out, for a machine where scripts/gpu/setup.sh has built everything.
 */
import { bootstrap } from '../bootstrap.mjs';
import { runTests } from '../test.mjs';

const args = process.argv.slice(2);
if (!args.includes('--built')) bootstrap();
const { loadAddon } = await import('../../dist/lib/native/load.js');
const { cudaAvailable, cudaError, torchVersion } = JSON.parse(loadAddon().addon.systemInfo());
if (cudaAvailable) {
  process.exitCode = runTests(
    ['gpu'],
    args.filter((arg) => arg !== '--built'),
    1,
  );
} else {
  console.error(
    `npm run test:gpu needs a CUDA device; none can be used here: ${cudaError ?? `libtorch ${torchVersion} sees none`}.\n` +
      'With the CPU build of libtorch: npx martlet libtorch install --cuda, then node scripts/bootstrap.mjs. No test was run.',
  );
  process.exitCode = 1;
}
