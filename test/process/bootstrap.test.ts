/** scripts/bootstrap.mjs: nothing to do is fast and silent, a missing tool is named with the command that installs it. */
import assert from 'node:assert/strict';
import { cpSync, mkdirSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { projectRoot } from '../support/fixtures.js';
import { runNode } from '../support/process.js';

let clone: string;
before(async () => {
  clone = await mkdtemp(join(tmpdir(), 'martlet-clone-'));
  for (const path of ['scripts', 'package.json', 'package-lock.json'])
    cpSync(join(projectRoot, path), join(clone, path), { recursive: true });
});
after(() => rm(clone, { recursive: true }));

/** A folder of programs that answer `--version` and the like with `output`. */
function programs(name: string, outputs: Record<string, string>): string {
  const dir = join(clone, name);
  mkdirSync(dir);
  for (const [program, output] of Object.entries(outputs))
    writeFileSync(join(dir, program), `#!/bin/sh\necho '${output}'\n`, { mode: 0o755 });
  return dir;
}

const setUp = (path: string) =>
  runNode(['scripts/bootstrap.mjs'], {
    cwd: clone,
    env: { PATH: path, CXX: undefined, LIBTORCH: undefined, LIBTORCH_USE_PYTORCH: undefined },
  });

test('on a machine without any tool, each is named with the command that installs it', async () => {
  const { code, stderr } = await setUp(programs('none', {}));
  assert.equal(code, 1);
  for (const [tool, remedy] of [
    ['npm', 'apt-get install npm'],
    ['g++', 'apt-get install g++'],
    ['cmake', 'apt-get install cmake'],
    ['make', 'apt-get install make'],
    ['python3 -m pip', 'apt-get install python3 python3-pip'],
  ] as const) {
    const line = stderr.split('\n').find((one) => one.startsWith(`${tool} is missing. Install it: ${remedy}`));
    assert.ok(line, `${tool} is not in:\n${stderr}`);
  }
  assert.doesNotMatch(stderr, /^ +at /m, 'a message, no stack');
});

test('tools that are too old are named with the version that is needed', async () => {
  const old = { npm: '10.8.2', python3: 'pip 23.0.1', ninja: '1.11.1' };
  const { code, stderr } = await setUp(programs('old', { ...old, 'g++': '9', cmake: 'cmake version 3.16.3' }));
  assert.equal(code, 1);
  assert.deepEqual(stderr.trim().split('\n'), [
    'g++ 9 is too old: 11 or later is needed (C++20). Install it: apt-get install g++-12',
    'cmake 3.16 is too old: 3.22 or later is needed. Install it: python3 -m pip install cmake',
  ]);
});

test('with nothing to do it prints nothing and takes less than 2 s', async () => {
  const runs: { output: string; seconds: number }[] = [];
  for (let i = 0; i < 3; i++) {
    const began = performance.now();
    const { code, stdout, stderr } = await runNode(['scripts/bootstrap.mjs'], { cwd: projectRoot });
    assert.equal(code, 0);
    runs.push({ output: stdout + stderr, seconds: (performance.now() - began) / 1000 });
  }
  // one of three: another may have waited for a core, or found a file that was edited while the tests ran
  assert.ok(
    runs.some(({ output, seconds }) => output === '' && seconds < 2),
    JSON.stringify(runs),
  );
});
