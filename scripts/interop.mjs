/**
 * `npm run test:interop [-- filter …]`: what martlet writes is loaded by transformers and PEFT, and the other way round. Sets up if needed, which
 * includes a virtual environment of its own in .venv-interop.
 */
import { createHash } from 'node:crypto';
import { existsSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { asScript, bootstrap, run, step } from './bootstrap.mjs';
import { runTests } from './test.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
const environment = join(root, '.venv-interop');
const requirements = join(root, 'test/reference/requirements.txt');

asScript(import.meta.url, (filters) => {
  bootstrap();
  step(
    'Python packages in .venv-interop',
    createHash('sha256').update(readFileSync(requirements)).digest('hex'),
    () => existsSync(join(environment, 'bin/python')),
    () => {
      rmSync(environment, { recursive: true, force: true });
      // pip comes from outside: Debian has ensurepip in another package than venv.
      run('python3', ['-m', 'venv', '--without-pip', environment]);
      const python = join(environment, 'bin/python');
      run('python3', ['-m', 'pip', '--python', python, 'install', '--quiet', '--requirement', requirements], {
        PIP_ROOT_USER_ACTION: 'ignore',
        PIP_DISABLE_PIP_VERSION_CHECK: '1',
      });
    },
  );
  process.exitCode = runTests(['interop'], filters, 1);
});
