import assert from 'node:assert/strict';
import { cp, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { cli, jsonLines } from '../support/cli.js';
import { expectedJson, getCase, llava } from '../support/fixtures.js';

const MODEL = join(llava, 'model-4x');
const ADAPTER = join(llava, 'adapter-peft');
const IMAGE = join(llava, 'images', 'landscape.png');
const TEXT = 'What is in the picture?';
const GREEDY = ['--temperature', '0', '--max-new-tokens', '24'];

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

test('--version and help need neither libtorch nor the addon', async () => {
  const env = { LIBTORCH: '/no/such' };
  const version = await cli(['--version'], { env });
  assert.match(version.stdout, /^\d+\.\d+\.\d+\n$/);
  for (const verb of ['train', 'sft', 'infer', 'export', 'merge-lora', 'doctor', 'libtorch']) {
    const { code, stdout } = await cli([verb, '--help'], { env });
    assert.equal(code, 0, verb);
    assert.match(stdout, /^Usage: martlet /);
  }
  const help = await cli(['--help'], { env });
  assert.equal(help.code, 0);
  for (const verb of ['train', 'infer', 'export', 'doctor', 'libtorch']) assert.ok(help.stdout.includes(`  ${verb}`));
});

test('a wrong command line exits with 2 and says what was meant', async () => {
  const cases: [string[], RegExp][] = [
    [[], /Usage/],
    [['trian'], /Did you mean train\?/],
    [['infer', '--modle', 'x'], /Did you mean --model\?/],
    [['infer'], /--model or --adapters/],
    [['infer', '--model', MODEL, '--image', IMAGE], /--text/],
    [['infer', '--model', MODEL, '--text', 'x', '--temperature', 'hot'], /must be a number/],
    [['infer', '--model', MODEL, '--input', 'x', '--max_batch_size', '0'], /max_batch_size must be/],
    [['infer', '--model', MODEL, '--text', 'x', '--temperature', '-1'], /temperature must be/],
    [['infer', '--model', MODEL, '--multi_modal_inputs', '{"image"'], /not JSON/],
    [['infer', '--model', MODEL, '--multi_modal_inputs', '{"image":"a.png"}'], /"text" is missing/],
    [['infer', '--model', MODEL, '--text', 'x', '--vllm', 'True'], /vLLM/],
    [['export'], /--adapters/],
    [['libtorch', 'remove'], /install or status/],
    [['train'], /needs a config/],
    [['doctor', 'now'], /unexpected argument/],
  ];
  for (const [args, message] of cases) {
    const { code, stderr, stdout } = await cli(args);
    assert.equal(code, 2, args.join(' '));
    assert.match(stderr, message, args.join(' '));
    assert.equal(stdout, '');
  }
});

test('with --json an error is one line of JSON with code, message and details', async () => {
  const usage = await cli(['infer', '--modle', 'x', '--json']);
  assert.equal(usage.code, 2);
  const { error } = JSON.parse(usage.stderr);
  assert.equal(error.code, 'ERR_MARTLET_USAGE');
  assert.deepEqual(error.details, { option: '--modle', didYouMean: '--model' });
  const missing = await cli(['infer', '--model', '/no/such', '--text', 'x', '--json']);
  assert.equal(missing.code, 1);
  assert.equal(JSON.parse(missing.stderr).error.code, 'ERR_MARTLET_MODEL_NOT_FOUND');
});

test('doctor says what is loaded, and exits with 1 when libtorch is missing', async () => {
  const well = await cli(['doctor', '--json']);
  assert.equal(well.code, 0);
  const report = JSON.parse(well.stdout);
  assert.equal(report.ok, true);
  assert.match(report.system.addonPath, /\.node$/);
  assert.equal(report.system.devices[0].name, 'cpu');
  const ill = await cli(['doctor', '--json'], { env: { LIBTORCH: '/no/such' } });
  assert.equal(ill.code, 1);
  assert.equal(JSON.parse(ill.stdout).error.code, 'ERR_MARTLET_LIBTORCH_NOT_FOUND');
  const status = await cli(['libtorch', 'status', '--json']);
  assert.equal(status.code, 0);
  assert.match(JSON.parse(status.stdout).found.version, /^\d+\.\d+/);
});

test('infer: --image and --text, --multi_modal_inputs, --json, --stream', async () => {
  const args = ['infer', '--model', MODEL, ...GREEDY];
  const plain = await cli([...args, '--image', IMAGE, '--text', TEXT]);
  assert.equal(plain.code, 0, plain.stderr);
  const json = await cli([...args, '--json', '--multi_modal_inputs', JSON.stringify({ image: IMAGE, text: TEXT })]);
  const out = JSON.parse(json.stdout);
  assert.deepEqual(out.tokenIds, expectedJson.greedy.single);
  assert.deepEqual(Object.keys(out), ['text', 'tokenIds', 'finishReason', 'usage']);
  assert.equal(plain.stdout, `${out.text}\n`);
  const streamed = await cli([...args, '--image', IMAGE, '--text', TEXT, '--stream']);
  assert.equal(streamed.stdout, plain.stdout);
  const adapted = await cli([...args, '--json', '--image', IMAGE, '--text', TEXT, '--adapter_name_or_path', ADAPTER]);
  assert.deepEqual(JSON.parse(adapted.stdout).tokenIds, expectedJson.adapterGreedy.single);
});

test('infer --input: pictures that no message marks go before the first question, as in a row of training data', async () => {
  const file = join(root, 'unmarked.jsonl');
  const user = (content: unknown) => [{ role: 'user', content }];
  const lines = [
    { image: IMAGE, text: TEXT },
    { image: IMAGE, messages: user(`<image>\n${TEXT}`) },
    { image: IMAGE, messages: user(TEXT) },
    { images: [IMAGE], system: 'Be brief.', messages: user(TEXT) },
    { images: [IMAGE, IMAGE], messages: user(`<image>\n${TEXT}`) },
  ];
  await writeFile(file, lines.map((line) => JSON.stringify(line)).join('\n'));
  const { code, stdout } = await cli(['infer', '--model', MODEL, ...GREEDY, '--input', file]);
  assert.equal(code, 1);
  const items = jsonLines(stdout) as unknown as { tokenIds?: number[]; error?: { code: string; message: string } }[];
  assert.deepEqual(items[0]?.tokenIds, expectedJson.greedy.single);
  assert.deepEqual(items[1]?.tokenIds, items[0]?.tokenIds);
  assert.deepEqual(items[2]?.tokenIds, items[0]?.tokenIds);
  assert.ok(items[3]?.tokenIds, JSON.stringify(items[3]));
  assert.equal(items[4]?.error?.code, 'ERR_MARTLET_IMAGE');
  assert.match(items[4]?.error?.message ?? '', /2 picture\(s\) were given, but the messages mark 1/);
});

test('infer --input: one line an item, a failing item does not stop the others, exit code 1; the same with several at once', async () => {
  const file = join(root, 'questions.jsonl');
  await cp(IMAGE, join(root, 'beside.png'));
  const { messages } = getCase('text-only');
  const lines = [
    JSON.stringify({ image: 'beside.png', text: TEXT }),
    JSON.stringify({ image: 'missing.png', text: TEXT }),
    '{"image": cut',
    '',
    JSON.stringify({ messages: messages.slice(0, 1) }),
    JSON.stringify({ image: 'beside.png' }),
    JSON.stringify({ messages: messages.slice(0, 2) }),
  ];
  await writeFile(file, lines.join('\n'));
  const { code, stdout } = await cli(['infer', '--model', MODEL, ...GREEDY, '--input', file]);
  assert.equal(code, 1);
  for (const size of ['2', '4', '16']) {
    const batched = await cli(['infer', '--model', MODEL, ...GREEDY, '--input', file, '--max_batch_size', size]);
    assert.deepEqual([batched.code, batched.stdout], [code, stdout], size);
  }
  const items = jsonLines(stdout) as unknown as {
    tokenIds?: number[];
    reference?: string;
    error?: { code: string; details: { line: number } };
  }[];
  assert.equal(items.length, 6);
  assert.deepEqual(items[5]?.tokenIds, items[3]?.tokenIds, 'the answer of a row is not shown to the model');
  assert.deepEqual([items[5]?.reference, items[3]?.reference], [messages[1]?.content, undefined]);
  assert.deepEqual(items[0]?.tokenIds, expectedJson.greedy.single);
  assert.deepEqual([items[1]?.error?.code, items[1]?.error?.details.line], ['ERR_MARTLET_IMAGE', 2]);
  assert.deepEqual([items[2]?.error?.code, items[2]?.error?.details.line], ['ERR_MARTLET_DATASET', 3]);
  assert.deepEqual(items[3]?.tokenIds, expectedJson.greedy['text-only']);
  assert.equal(items[4]?.error?.details.line, 6);
  const absent = await cli(['infer', '--model', MODEL, '--input', join(root, 'none.jsonl'), '--json']);
  assert.equal(absent.code, 1);
  assert.equal(JSON.parse(absent.stderr).error.code, 'ERR_MARTLET_IO');
});

test('infer without a question is a conversation; a bad picture ends the turn, not the talk', async () => {
  const args = ['infer', '--model', MODEL, ...GREEDY];
  const single = await cli([...args, '--image', IMAGE, '--text', TEXT]);
  const talk = await cli(args, {
    stdin: `<image>\n/no/such.png\n<image> ${TEXT}\n${IMAGE}\nclear\n\nhello\nexit\nnever`,
  });
  assert.equal(talk.code, 0, talk.stderr);
  assert.match(talk.stderr, /no\/such\.png/);
  assert.equal(talk.stdout.trimEnd().split('\n').length >= 2, true);
  assert.ok(single.stdout.length > 1);
});

test('export merges and reports; the default folder stands beside the adapter', async () => {
  const adapter = join(root, 'adapter');
  await cp(ADAPTER, adapter, { recursive: true });
  const first = await cli(['export', '--adapters', adapter, '--model', MODEL, '--json', '--merge_lora', 'true']);
  assert.equal(first.code, 0, first.stderr);
  const report = JSON.parse(first.stdout);
  assert.deepEqual(Object.keys(report), ['outputDir', 'shards', 'mergedTensors', 'maxAbsError', 'seconds']);
  assert.equal(report.outputDir, `${adapter}-merged`);
  assert.ok((await readdir(report.outputDir)).includes('config.json'));
  const again = await cli(['merge-lora', '--adapter-name-or-path', `${adapter}/`, '--model', MODEL, '--json']);
  assert.equal(again.code, 1);
  assert.equal(JSON.parse(again.stderr).error.code, 'ERR_MARTLET_IO');
  const merged = await cli([
    'infer',
    '--model',
    report.outputDir,
    ...GREEDY,
    '--image',
    IMAGE,
    '--text',
    TEXT,
    '--json',
  ]);
  assert.deepEqual(JSON.parse(merged.stdout).tokenIds, expectedJson.adapterGreedy.single);
});
