import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { test } from 'node:test';
import { projectRoot } from '../support/fixtures.js';

test('docs/benchmarks.md is what the results in bench/results give', () => {
  const script = join(projectRoot, 'scripts/generate-benchmarks.mjs');
  const { status, stderr } = spawnSync(process.execPath, [script, '--check'], { encoding: 'utf8' });
  assert.equal(status, 0, stderr);
});
