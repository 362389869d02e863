/** The programs of examples/ run as they are, on the quickstart's model and data. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { loadTrainConfig } from '../../lib/config/index.js';
import { brokenCopy, editJson } from '../support/broken.js';
import { projectRoot } from '../support/fixtures.js';
import { CALM, QUICKSTART_MODEL } from '../support/process.js';
import { runIn, workspace } from '../support/snippets.js';

let root: string;
let dir: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
  dir = workspace(root);
});
after(() => rm(root, { recursive: true }));

const program = (name: string) => join(projectRoot, 'dist/examples', `${name}.js`);
const run = (name: string, ...args: string[]) => runIn(dir, process.execPath, [program(name), ...args]);

test('merge.ts before anything was trained says what to do', async () => {
  const { code, stderr } = await run('merge');
  assert.equal(code, 1);
  assert.match(stderr, /^ERR_MARTLET_ADAPTER: .*\nTrain one first/);
});

test('train.ts, merge.ts and infer.ts work one after the other', async () => {
  const trained = await run('train', 'examples/quickstart/quickstart.yaml', 'max_steps=3', 'logging_steps=1');
  assert.equal(trained.code, 0, trained.stderr);
  assert.match(trained.stdout, /^\d+ rows, 3 steps, /);
  assert.match(trained.stdout, /\[\[.+<\/s>\]\]/);
  assert.match(trained.stdout, /step 3: loss \d/);
  assert.ok(existsSync(join(dir, 'output/example/adapter_model.safetensors')));

  const merged = await run('merge');
  assert.equal(merged.code, 0, merged.stderr);
  assert.match(merged.stdout, /merged 28 tensors into output\/example-merged/);

  for (const model of ['examples/quickstart/model', 'output/example-merged']) {
    const { code, stdout, stderr } = await run('infer', model);
    assert.equal(code, 0, stderr);
    const [, answer] = /^answer: (.*) \(\d+ tokens, stop\)$/m.exec(stdout) ?? [];
    assert.ok(answer, stdout);
    assert.ok(stdout.includes(`stream: ${answer}\n`), 'the stream is the answer');
    assert.match(stdout, /score: loss \d/);
  }
});

/** Starts the server and waits for its port. */
async function serve(model: string) {
  const child = spawn(process.execPath, [program('serve-embedded'), model], {
    cwd: dir,
    env: { ...process.env, ...CALM, PORT: '0' },
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let log = '';
  const waiting = new Set<() => void>();
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    log += text;
    for (const look of waiting) look();
  });
  const line = (pattern: RegExp) =>
    new Promise<string>((resolve) => {
      const look = () => {
        const found = pattern.exec(log);
        if (found) resolve(found[1] ?? found[0]);
      };
      waiting.add(look);
      look();
    });
  const closed = new Promise<number | null>((resolve) => child.on('close', resolve));
  const url = `http://localhost:${await line(/listening on port (\d+)/)}/answer`;
  const ask = (body: string, signal?: AbortSignal) => fetch(url, { method: 'POST', body, ...(signal && { signal }) });
  return { child, line, closed, ask };
}
const question = JSON.stringify({ image: 'examples/quickstart/data/images/000.png', text: 'What shape is it?' });

test('serve-embedded.ts answers, names what is wrong, and ends by Ctrl-C', async () => {
  const { child, closed, ask } = await serve(QUICKSTART_MODEL);
  try {
    const answers = await Promise.all([ask(question), ask(question)].map(async (response) => (await response).text()));
    assert.match(answers[0] as string, /^\S.*\n$/);
    assert.equal(answers[0], answers[1]);
    const missing = await ask(JSON.stringify({ image: 'none.png', text: 'x' }));
    assert.equal(missing.status, 422);
    assert.equal(((await missing.json()) as { code: string }).code, 'ERR_MARTLET_IMAGE');
    assert.equal((await ask('{"image": 1}')).status, 400);
    assert.equal((await ask('not JSON')).status, 400);
  } finally {
    child.kill('SIGINT');
  }
  assert.equal(await closed, 0);
});

test('serve-embedded.ts stops the answer of a client that leaves, and answers the next', async () => {
  // A model that never says its end token: each answer has the 256 tokens that the example allows.
  const model = brokenCopy(QUICKSTART_MODEL, root, (copy) => {
    editJson(join(copy, 'generation_config.json'), (config) => {
      config.eos_token_id = config.pad_token_id;
    });
    editJson(join(copy, 'tokenizer_config.json'), (config) => {
      config.eos_token = config.pad_token;
    });
  });
  const { child, line, closed, ask } = await serve(model);
  try {
    const client = new AbortController();
    const response = await ask(question, client.signal);
    const reader = response.body?.getReader();
    await reader?.read();
    client.abort();
    await line(/the client left; its answer was stopped/);
    const { length } = await (await ask(question)).text();
    assert.ok(length > 100, `the next answer has ${length} characters`);
  } finally {
    child.kill('SIGINT');
  }
  assert.equal(await closed, 0);
});

test('the configs are valid, without warnings; the nested one trains as it is', async () => {
  for (const name of ['llava_lora', 'llava_full', 'tutorial_style']) {
    const { config, warnings } = await loadTrainConfig(join(projectRoot, 'examples/configs', `${name}.yaml`));
    assert.deepEqual(warnings, [], name);
    assert.equal(config.sft_type, name === 'llava_full' ? 'full' : 'lora');
  }
  const { code, stderr } = await runIn(dir, 'martlet', [
    'train',
    'examples/configs/tutorial_style.yaml',
    ...['--max_steps', '2', '--gradient_accumulation_steps', '1'],
  ]);
  assert.equal(code, 0, stderr);
  assert.ok(existsSync(join(dir, 'output/tutorial_style/adapter_model.safetensors')));
});
