/** examples/grounding/run.mjs does what it says: a network of random weights learns to put boxes around squares that it has not seen. */
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { test } from 'node:test';
import { projectRoot } from '../support/fixtures.js';
import { runNode } from '../support/process.js';

test('examples/grounding/run.mjs: boxes in pixels of the picture, most of them over the square', async () => {
  const { code, stdout, stderr } = await runNode([join(projectRoot, 'examples/grounding/run.mjs')], { limit: 300_000 });
  assert.equal(code, 0, stderr);
  assert.match(
    stdout,
    /\[\[<\|object_ref_start\|>\w+ square<\|object_ref_end\|><\|box_start\|>\(\d+,\d+\),\(\d+,\d+\)<\|box_end\|><\|im_end\|>\]\]/,
  );
  assert.ok((stdout.match(/answered: \w+ square at \d+, \d+, \d+, \d+/g) ?? []).length >= 13, stdout);
  const overlap = Number(/mean overlap .*: (\d\.\d+);/.exec(stdout)?.[1]);
  assert.ok(overlap > 0.4, `boxes at random overlap by 0.15, these by ${overlap}`);
});
