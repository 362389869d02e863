/** The package where there is no libtorch: importing works, the first use says what to do. */
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { projectRoot } from '../support/fixtures.js';
import { lastJson, runNode } from '../support/process.js';
import { MODEL, smallConfig } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

/** Without `LIBTORCH` the system's folders are searched last; a libtorch there is hidden by a LIBTORCH that leads nowhere. */
const systemHasOne = ['/usr', '/usr/local'].some((dir) => existsSync(join(dir, 'lib/libtorch_cpu.so')));
const env = () => ({
  MARTLET_CACHE: root,
  LIBTORCH: systemHasOne ? join(root, 'none') : undefined,
  LIBTORCH_USE_PYTORCH: undefined,
});

const NAMES = ['infer', 'loadModel', 'mergeAdapter', 'trainLoRA', 'train', 'getSystemInfo', 'MartletError'];
const uses = `
  const attempts = {
    loadModel: () => m.loadModel(model),
    trainLoRA: () => m.trainLoRA(config).result,
    getSystemInfo: async () => m.getSystemInfo(),
  };
  (async () => {
    const errors = {};
    for (const [name, attempt] of Object.entries(attempts)) {
      errors[name] = await attempt().then(() => null, (e) => ({ isMartlet: e instanceof m.MartletError, ...e.toJSON() }));
    }
    console.log(JSON.stringify({ names: Object.keys(m), errors }));
  })();`;

for (const [way, open, type] of [
  ['import', "import * as m from 'martlet';", 'module'],
  ['require()', "const m = require('martlet');", 'commonjs'],
] as const) {
  test(`${way} works without libtorch; the first use names the remedies`, async () => {
    const config = smallConfig(root);
    const variables = `const model = ${JSON.stringify(MODEL)}; const config = ${JSON.stringify(config)};`;
    // the package by its own name, as its exports say: from a folder inside it
    const result = await runNode([`--input-type=${type}`, '-e', open + variables + uses], {
      env: env(),
      cwd: projectRoot,
    });
    assert.equal(result.code, 0, result.stderr);
    const { names, errors } = lastJson<{
      names: string[];
      errors: Record<
        string,
        { isMartlet: boolean; code: string; message: string; details: { trace: string[] } } | null
      >;
    }>(result.stdout);
    for (const name of NAMES) assert.ok(names.includes(name), name);
    for (const [use, error] of Object.entries(errors)) {
      assert.deepEqual([error?.isMartlet, error?.code], [true, 'ERR_MARTLET_LIBTORCH_NOT_FOUND'], use);
      assert.match(error?.message as string, /1\. .*libtorch install[\s\S]*2\. .*--cuda[\s\S]*3\. .*LIBTORCH=/, use);
      assert.ok((error?.details.trace.length as number) > 0, use);
    }
    assert.deepEqual(Object.keys(errors).length, 3);
    assert.ok(!existsSync(join(root, 'out', 'args.yaml')), 'no run was begun');
  });
}
