/** The CUDA kernels: that they are used, and that each does what it stands for (native/test/cuda). */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { loadAddon } from '../../lib/native/load.js';

test('the kernels are there', () => {
  const { cudaKernels, cudaKernelsError } = JSON.parse(loadAddon().addon.systemInfo());
  assert.equal(cudaKernels, true, cudaKernelsError);
});

test('each kernel beside its reference, gradients too', () => {
  const { path, libtorch } = loadAddon();
  const { status, stdout, error } = spawnSync(join(dirname(path), 'martlet_cuda_tests'), {
    encoding: 'utf8',
    env: { ...process.env, LD_LIBRARY_PATH: libtorch.lib },
  });
  assert.ifError(error);
  assert.equal(status, 0, stdout);
  assert.match(stdout, /^[1-9]\d* tests, 0 failed$/m);
});
