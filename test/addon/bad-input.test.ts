/** What users hand over that is broken: each gets its code, its place and its remedy, and nothing that was there is lost. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { getSystemInfo, infer, loadModel, type MartletError, mergeAdapter, trainLoRA } from '../../lib/index.js';
import type { Attempt, Outcome } from '../process/children/attempts.js';
import { brokenCopy, editHeader, editJson, hugePng } from '../support/broken.js';
import { expectedJson, getCase, llava } from '../support/fixtures.js';
import { CALM, runChild, slowConfig } from '../support/process.js';
import { check, refusal, type Wanted } from '../support/refusal.js';
import { digest, MODEL, smallConfig, train } from '../support/train.js';

const SINGLE = join(llava, 'model-5x');
const ADAPTER = join(llava, 'adapter-peft');
const IMAGE = join(llava, 'images', 'landscape.png');

Object.assign(process.env, CALM);

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtempSync(join(root, 'run-'));

/** Trains; the run must be refused, and leave neither weights nor checkpoints. */
async function refusedRun(dir: string, changes: Record<string, unknown>): Promise<MartletError> {
  const config = smallConfig(dir, changes);
  const error = await refusal(() => trainLoRA(config).result);
  const out = config.output_dir as string;
  const saved = existsSync(out) ? readdirSync(out).filter((name) => /^adapter|^checkpoint|^model|^\./.test(name)) : [];
  assert.deepEqual(saved, [], 'a refused run leaves no weights, no temporary file, no lock');
  return error;
}

// ---- models

const weights = (dir: string) => join(dir, 'model.safetensors');
const Q_PROJ = 'model.language_model.layers.0.self_attn.q_proj.weight';

const brokenModels: [string, string, (dir: string) => void, (dir: string) => Wanted][] = [
  [
    'positions of a kind that the family does not have',
    SINGLE,
    (dir) =>
      editJson(join(dir, 'config.json'), (config) => {
        config.text_config.rope_parameters = { rope_theta: 10000, rope_type: 'linear', factor: 2 };
      }),
    (dir) => ({
      code: 'ERR_MARTLET_UNSUPPORTED_MODEL',
      says: [new RegExp(`^${join(dir, 'config.json')}: rope_type "linear"`), /supported: default/],
      details: { path: join(dir, 'config.json'), field: 'rope_type', found: 'linear' },
    }),
  ],
  [
    'no file that says how pictures are prepared',
    MODEL,
    (dir) => rmSync(join(dir, 'preprocessor_config.json')),
    (dir) => ({
      code: 'ERR_MARTLET_MODEL_NOT_FOUND',
      says: [new RegExp(join(dir, 'preprocessor_config.json')), /is missing/, /copy it from the base model/],
      details: { path: join(dir, 'preprocessor_config.json') },
    }),
  ],
  [
    'a weight file cut short',
    MODEL,
    (dir) => truncateSync(join(dir, 'model-00002-of-00002.safetensors'), 300_000),
    (dir) => ({
      code: 'ERR_MARTLET_WEIGHTS',
      says: [/model-00002-of-00002\.safetensors/, /cut short/, /Download it again/],
      details: { path: join(dir, 'model-00002-of-00002.safetensors') },
    }),
  ],
  [
    'an empty weight file',
    SINGLE,
    (dir) => writeFileSync(weights(dir), ''),
    () => ({ code: 'ERR_MARTLET_WEIGHTS', says: [/0 bytes/, /Download it again/] }),
  ],
  [
    'a header that claims more bytes than there are',
    SINGLE,
    (dir) => {
      const bytes = readFileSync(weights(dir));
      bytes.writeBigUInt64LE(2n ** 63n);
      writeFileSync(weights(dir), bytes);
    },
    () => ({ code: 'ERR_MARTLET_WEIGHTS', says: [/header claims 9223372036854775808 bytes/, /Download it again/] }),
  ],
  [
    'a tensor that claims bytes of another one',
    SINGLE,
    (dir) =>
      editHeader(weights(dir), (header) => {
        const [first, second] = Object.keys(header).filter((key) => key !== '__metadata__') as [string, string];
        (header[second] as { data_offsets: unknown }).data_offsets = header[first]?.data_offsets;
        (header[second] as { shape: unknown }).shape = header[first]?.shape;
      }),
    () => ({ code: 'ERR_MARTLET_WEIGHTS', says: [/tensor model\./, /Download it again/] }),
  ],
  [
    'a shape larger than the bytes',
    SINGLE,
    (dir) =>
      editHeader(weights(dir), (header) => {
        (header[Q_PROJ] as { shape: number[] }).shape = [2 ** 40, 2 ** 40];
      }),
    () => ({ code: 'ERR_MARTLET_WEIGHTS', says: [/q_proj/, /Download it again/], details: { tensor: Q_PROJ } }),
  ],
  [
    'a shard that is missing',
    MODEL,
    (dir) => rmSync(join(dir, 'model-00001-of-00002.safetensors')),
    () => ({ code: 'ERR_MARTLET_WEIGHTS', says: [/model-00001-of-00002\.safetensors/, /[Dd]ownload/] }),
  ],
  [
    'an index that leads out of the folder',
    MODEL,
    (dir) =>
      editJson(join(dir, 'model.safetensors.index.json'), ({ weight_map }) => {
        weight_map[Object.keys(weight_map)[0] as string] = '../../etc/passwd';
      }),
    () => ({ code: 'ERR_MARTLET_WEIGHTS', says: [/index\.json/, /not a file of this folder/] }),
  ],
  [
    'weights without one of the tensors',
    SINGLE,
    (dir) =>
      editHeader(weights(dir), (header) => {
        const entry = header[Q_PROJ] as (typeof header)[string];
        delete header[Q_PROJ];
        header['an.extra.tensor'] = entry; // keeps the bytes described
      }),
    () => ({ code: 'ERR_MARTLET_WEIGHTS', says: [/q_proj|an\.extra\.tensor/, /[Dd]ownload|config\.json/] }),
  ],
  [
    'weights with a tensor that no module takes',
    SINGLE,
    (dir) =>
      editHeader(weights(dir), (header) => {
        const end = Math.max(...Object.values(header).map(({ data_offsets }) => data_offsets?.[1] ?? 0));
        header['model.language_model.layers.7.self_attn.q_proj.weight'] = {
          dtype: 'F32',
          shape: [0],
          data_offsets: [end, end],
        };
      }),
    () => ({ code: 'ERR_MARTLET_WEIGHTS', says: [/layers\.7\.self_attn\.q_proj/, /[Dd]ownload|config\.json/] }),
  ],
  [
    'a tensor of another shape',
    SINGLE,
    (dir) =>
      editHeader(weights(dir), (header) => {
        const entry = header['model.language_model.layers.0.mlp.down_proj.weight'] as (typeof header)[string];
        entry.shape.reverse();
      }),
    () => ({
      code: 'ERR_MARTLET_WEIGHTS',
      says: [/down_proj\.weight has shape \[\d+,\d+\].*config\.json asks for \[\d+,\d+\]/, /download the checkpoint/i],
    }),
  ],
  [
    'a model_type that is not known',
    SINGLE,
    (dir) =>
      editJson(join(dir, 'config.json'), (config) => {
        config.model_type = 'mamba_vl';
      }),
    () => ({ code: 'ERR_MARTLET_UNSUPPORTED_MODEL', says: [/mamba_vl/, /llava/] }),
  ],
  [
    'a config.json without model_type',
    SINGLE,
    (dir) =>
      editJson(join(dir, 'config.json'), (config) => {
        delete config.model_type;
      }),
    () => ({ code: 'ERR_MARTLET_UNSUPPORTED_MODEL', says: [/model_type/, /config\.json/] }),
  ],
  [
    'a config.json cut short',
    SINGLE,
    (dir) => truncateSync(join(dir, 'config.json'), 100),
    (dir) => ({
      code: 'ERR_MARTLET_MODEL_NOT_FOUND',
      says: [/config\.json/],
      details: { path: join(dir, 'config.json') },
    }),
  ],
  [
    'a config.json with a number that cannot be',
    SINGLE,
    (dir) =>
      editJson(join(dir, 'config.json'), (config) => {
        config.text_config.num_attention_heads = -3;
      }),
    () => ({ code: 'ERR_MARTLET_UNSUPPORTED_MODEL', says: [/num_attention_heads/, /config\.json/] }),
  ],
  [
    'a config.json with a word for a number',
    SINGLE,
    (dir) =>
      editJson(join(dir, 'config.json'), (config) => {
        config.text_config.hidden_size = 'large';
      }),
    () => ({ code: 'ERR_MARTLET_UNSUPPORTED_MODEL', says: [/hidden_size/, /config\.json/] }),
  ],
  [
    'a config.json with layers without end',
    SINGLE,
    (dir) =>
      editJson(join(dir, 'config.json'), (config) => {
        config.text_config.num_hidden_layers = 2_000_000_000;
      }),
    () => ({ code: 'ERR_MARTLET_UNSUPPORTED_MODEL', says: [/num_hidden_layers/, /config\.json/] }),
  ],
  [
    'no tokenizer',
    SINGLE,
    (dir) => rmSync(join(dir, 'tokenizer.json')),
    () => ({ code: 'ERR_MARTLET_TOKENIZER', says: [/tokenizer\.json/] }),
  ],
  [
    'a tokenizer cut short',
    SINGLE,
    (dir) => truncateSync(join(dir, 'tokenizer.json'), 5000),
    () => ({ code: 'ERR_MARTLET_TOKENIZER', says: [/tokenizer\.json/, /[Dd]ownload/] }),
  ],
  [
    'a chat template that is no template',
    SINGLE,
    (dir) => writeFileSync(join(dir, 'chat_template.json'), JSON.stringify({ chat_template: '{% for m in %}{{' })),
    () => ({ code: 'ERR_MARTLET_TEMPLATE', says: [/template/, /Download.*ms-swift/] }),
  ],
];

for (const [title, source, edit, wanted] of brokenModels) {
  test(`model: ${title}`, async () => {
    const dir = brokenCopy(source, root, edit);
    const ask = async () => {
      const model = await loadModel(dir, { device: 'cpu' });
      await model
        .generate({ messages: [{ role: 'user', content: 'hello' }], maxNewTokens: 1 })
        .finally(() => model.dispose());
    };
    check(await refusal(ask), wanted(dir));
    const error = await refusedRun(folder(), { model: dir });
    assert.equal(error.code, wanted(dir).code, 'training says the same');
  });
}

// ---- adapters

const brokenAdapters: [string, (dir: string) => void, RegExp[]][] = [
  [
    'weights cut short',
    (dir) => truncateSync(join(dir, 'adapter_model.safetensors'), 20_000),
    [/adapter_model\.safetensors/, /cut short/],
  ],
  [
    'a layer that the model lacks',
    (dir) =>
      editHeader(join(dir, 'adapter_model.safetensors'), (header) => {
        for (const key of Object.keys(header).filter((name) => name.includes('layers.2.'))) {
          header[key.replace('layers.2.', 'layers.30.')] = header[key] as (typeof header)[string];
          delete header[key];
        }
      }),
    [/layers\.30\./],
  ],
  [
    'half a pair',
    (dir) =>
      editHeader(join(dir, 'adapter_model.safetensors'), (header) => {
        const key = Object.keys(header).find((name) => name.includes('lora_B')) as string;
        header[key.replace('lora_B', 'lora_C')] = header[key] as (typeof header)[string];
        delete header[key];
      }),
    [/lora_/],
  ],
  ['a config cut short', (dir) => truncateSync(join(dir, 'adapter_config.json'), 40), [/adapter_config\.json/]],
  [
    'a method that is not LoRA',
    (dir) =>
      editJson(join(dir, 'adapter_config.json'), (config) => {
        config.peft_type = 'PREFIX_TUNING';
      }),
    [/adapter_config\.json/, /PREFIX_TUNING/, /LORA/],
  ],
  [
    'another rank than its weights',
    (dir) =>
      editJson(join(dir, 'adapter_config.json'), (config) => {
        config.r = 64;
      }),
    [/adapter_model\.safetensors/, /has rank 4 where adapter_config\.json says 64/],
  ],
];

for (const [title, edit, says] of brokenAdapters) {
  test(`adapter: ${title}; the model goes on, a merge leaves nothing`, async () => {
    const dir = brokenCopy(ADAPTER, root, edit);
    const model = await loadModel(MODEL, { device: 'cpu' });
    const { messages, images } = getCase('single');
    const ask = async () =>
      model.generate({
        messages: messages.slice(0, -1),
        images: images.map((image) => join(llava, 'images', image)),
        temperature: 0,
        maxNewTokens: 24,
      });
    check(await refusal(() => model.loadAdapter('broken', dir)), { code: 'ERR_MARTLET_ADAPTER', says });
    assert.deepEqual(model.adapters, []);
    assert.deepEqual([...(await ask()).tokenIds], expectedJson.greedy.single, 'as without the adapter');
    await model.dispose();

    const outputDir = join(root, 'merged');
    check(await refusal(() => mergeAdapter({ model: MODEL, adapter: dir, outputDir })), {
      code: 'ERR_MARTLET_ADAPTER',
      says,
    });
    assert.deepEqual(
      readdirSync(root).filter((name) => name.includes('merged')),
      [],
      'neither the folder nor a temporary one',
    );
  });
}

test('adapter: of another model, in loading, merging and as the start of a run', async () => {
  const other = join(llava, 'model-gqa');
  const wanted = { code: 'ERR_MARTLET_ADAPTER', says: [/[kv]_proj/, /\d+/] };
  check(await refusal(() => loadModel(other, { adapters: { a: ADAPTER } })), wanted);
  const outputDir = join(root, 'merged');
  check(await refusal(() => mergeAdapter({ model: other, adapter: ADAPTER, outputDir })), wanted);
  assert.ok(!existsSync(outputDir));
  check(await refusedRun(folder(), { model: other, adapters: [ADAPTER] }), wanted);
});

// ---- configs

const YAML = (dir: string) => `model: ${MODEL}
dataset: ${join(dir, 'data.json')}
output_dir: ${join(dir, 'out')}
lora_rank: 8
learning_rate: 1e-4
`;
const brokenConfigs: [string, (yaml: string) => string, RegExp[], Record<string, unknown>][] = [
  [
    'a misspelt key',
    (yaml) => yaml.replace('lora_rank', 'lora_rnak'),
    [/lora_rnak/, /did you mean lora_rank/],
    { line: 4 },
  ],
  [
    'a misspelt key inside a section',
    (yaml) =>
      `model_id: ${MODEL}\nlora_args:\n  r: 8\n  lora_dropuot: 0.1\n${yaml.replace(/model:.*\n|lora_rank.*\n/g, '')}`,
    [/lora_args\.lora_dropuot/, /did you mean .*lora_dropout/],
    { line: 4 },
  ],
  ['a word for a number', (yaml) => yaml.replace('rank: 8', 'rank: eight'), [/lora_rank/, /number/], { line: 4 }],
  ['a number out of range', (yaml) => yaml.replace('rank: 8', 'rank: 0'), [/lora_rank/, /1/], { line: 4 }],
  ['a list for a word', (yaml) => yaml.replace(/output_dir: .*/, 'output_dir: [a, b]'), [/output_dir/], { line: 3 }],
  ['a value that is none of the choices', (yaml) => `${yaml}lr_scheduler_type: cosien\n`, [/cosine/], { line: 6 }],
  ['a missing key', (yaml) => yaml.replace(/dataset: .*\n/, ''), [/dataset/], {}],
  ['a quote that does not end', (yaml) => yaml.replace('model: ', 'model: "'), [/config\.yaml/], {}],
  ['a tab for an indent', (yaml) => `${yaml}lora_args:\n\tr: 8\n`, [/tab/], { line: 7 }],
  ['a key that is there twice', (yaml) => `${yaml}lora_rank: 16\n`, [/lora_rank|duplicate/], { line: 6 }],
  ['a list for a config', () => '- model\n- dataset\n', [/config\.yaml/], {}],
  ['an empty file', () => '', [/config\.yaml/], {}],
];

for (const [title, edit, says, details] of brokenConfigs) {
  test(`config: ${title}`, async () => {
    const dir = folder();
    smallConfig(dir); // writes the data
    const file = join(dir, 'config.yaml');
    writeFileSync(file, edit(YAML(dir)));
    const error = await refusal(() => trainLoRA(file).result);
    check(error, { code: 'ERR_MARTLET_CONFIG', says: [/config\.yaml/, ...says], details: { file, ...details } });
    if ('line' in details) assert.match(error.message, new RegExp(`config\\.yaml:${details.line}\\b`));
    assert.deepEqual(readdirSync(dir).sort(), ['config.yaml', 'data.json']);
  });
}

// ---- data

const turns = (question: string) => [
  { from: 'human', value: question },
  { from: 'gpt', value: 'A circle.' },
];
const PICTURE_ROW = { conversations: turns('<image>\nWhat is it?'), image: IMAGE };
const GOOD = { id: 'good', ...PICTURE_ROW };
/** Each after a good row: so it is row 1. */
const brokenRows: [string, (dir: string) => Record<string, unknown>, string, RegExp[]][] = [
  [
    'no answer of the assistant',
    () => ({ conversations: turns('Hi').slice(0, 1) }),
    'ERR_MARTLET_DATASET',
    [/assistant|answer/],
  ],
  [
    'two marks, one image',
    () => ({ conversations: turns('<image><image>Which?'), image: IMAGE }),
    'ERR_MARTLET_DATASET',
    [/2/, /1/, /<image>/],
  ],
  [
    'one mark, two images',
    () => ({ conversations: turns('<image>Which?'), images: [IMAGE, IMAGE] }),
    'ERR_MARTLET_DATASET',
    [/1/, /2/, /<image>/],
  ],
  [
    'a path out of every folder',
    () => ({ ...PICTURE_ROW, image: '../../../../../../etc/passwd' }),
    'ERR_MARTLET_DATASET',
    [/etc\/passwd/, /outside/, /absolute path/],
  ],
  [
    'a picture that is not there',
    () => ({ ...PICTURE_ROW, image: 'none.png' }),
    'ERR_MARTLET_DATASET',
    [/none\.png/, /exist/],
  ],
  [
    'an absolute picture that is not there',
    () => ({ ...PICTURE_ROW, image: '/no/such.png' }),
    'ERR_MARTLET_IMAGE',
    [/\/no\/such\.png/, /exist/],
  ],
  [
    'a picture of zero bytes',
    (dir) => picture(dir, 'empty.png', Buffer.alloc(0)),
    'ERR_MARTLET_IMAGE',
    [/empty\.png/, /zero bytes/],
  ],
  [
    'a text named .jpg',
    (dir) => picture(dir, 'text.jpg', Buffer.from('This is no picture. '.repeat(100))),
    'ERR_MARTLET_IMAGE',
    [/text\.jpg/, /PNG or JPEG/],
  ],
  [
    'a picture cut short in its header',
    (dir) => picture(dir, 'head.png', readFileSync(IMAGE).subarray(0, 20)),
    'ERR_MARTLET_IMAGE',
    [/head\.png/],
  ],
  [
    'a picture of 3.6 gigapixels',
    (dir) => picture(dir, 'huge.png', hugePng(60_000, 60_000)),
    'ERR_MARTLET_IMAGE',
    [/huge\.png/, /max_image_pixels/],
  ],
  ['a folder for a picture', (dir) => ({ ...PICTURE_ROW, image: dir }), 'ERR_MARTLET_IMAGE', [/not a file/]],
  ['a word for a conversation', () => ({ conversations: 'hello' }), 'ERR_MARTLET_DATASET', [/conversations/]],
  ['nothing of a known form', () => ({ foo: 1 }), 'ERR_MARTLET_DATASET', [/messages|conversations/]],
];

function picture(dir: string, name: string, bytes: Buffer): Record<string, unknown> {
  writeFileSync(join(dir, name), bytes);
  return { ...PICTURE_ROW, image: name };
}

for (const [title, make, code, says] of brokenRows) {
  test(`data: ${title}`, async () => {
    const dir = folder();
    const rows = [GOOD, { id: 'bad', ...make(dir) }, GOOD];
    const [json, jsonl] = [join(dir, 'rows.json'), join(dir, 'rows.jsonl')];
    writeFileSync(json, JSON.stringify(rows));
    writeFileSync(jsonl, rows.map((row) => JSON.stringify(row)).join('\n'));
    for (const [dataset, place] of [
      [json, { row: 1 }],
      [jsonl, { row: 1, line: 2 }],
    ] as const) {
      const error = await refusedRun(dir, { dataset });
      check(error, {
        code: 'ERR_MARTLET_DATASET',
        says: [/row 1/, /on_bad_row: skip/, ...says],
        details: { file: dataset, id: 'bad', ...place },
      });
      const problems = error.details.problems as { code: string; row: number }[];
      assert.deepEqual(
        problems.map((problem) => [problem.code, problem.row]),
        [[code, 1]],
      );
    }
  });
}

test('data: a JSON file cut short, a JSONL line that is none, no file, an empty one', async () => {
  const dir = folder();
  const text = JSON.stringify([GOOD, GOOD, GOOD], null, 1);
  const file = (name: string, content: string) => {
    writeFileSync(join(dir, name), content);
    return join(dir, name);
  };
  const cut = file('cut.json', text.slice(0, -60));
  check(await refusedRun(dir, { dataset: cut }), {
    code: 'ERR_MARTLET_DATASET',
    says: [/cut\.json is cut short/, /row 2/, /again/],
    details: { file: cut, row: 2 },
  });
  const lines = file('lines.jsonl', `${JSON.stringify(GOOD)}\n\n{"id": "x", "conver\n${JSON.stringify(GOOD)}\n`);
  check(await refusedRun(dir, { dataset: lines }), {
    code: 'ERR_MARTLET_DATASET',
    says: [/row 1 \(line 3\)/, /not valid JSON/],
    details: { file: lines, row: 1, line: 3 },
  });
  check(await refusedRun(dir, { dataset: file('empty.json', '') }), { code: 'ERR_MARTLET_DATASET', says: [/empty/] });
  check(await refusedRun(dir, { dataset: file('none.json', '[]') }), {
    code: 'ERR_MARTLET_DATASET',
    says: [/no rows/],
  });
  check(await refusedRun(dir, { dataset: join(dir, 'missing.json') }), {
    code: 'ERR_MARTLET_DATASET',
    says: [/missing\.json does not exist/, /dataset_root/],
  });
});

test('data: a picture cut short after its header ends the run by row, before any weights are saved', async () => {
  for (const [name, source] of [
    ['cut.png', IMAGE],
    ['cut.jpg', join(llava, 'images', 'large.jpg')],
  ] as const) {
    const dir = folder();
    const bytes = readFileSync(source);
    const bad = { id: 'bad', ...picture(dir, name, bytes.subarray(0, bytes.length / 2)) };
    const dataset = join(dir, 'rows.json');
    writeFileSync(dataset, JSON.stringify([GOOD, bad]));
    check(await refusedRun(dir, { dataset }), {
      code: 'ERR_MARTLET_IMAGE',
      says: [/rows\.json row 1 \(id bad\)/, new RegExp(name.replace('.', '\\.')), /leave the row out/],
      details: { file: dataset, row: 1 },
    });
  }
});

test('picture: every kind of bad one is refused by infer too, with its path', async () => {
  const dir = folder();
  for (const [title, make, , says] of brokenRows.filter(([, , code]) => code === 'ERR_MARTLET_IMAGE')) {
    const { image } = make(dir) as { image: string };
    const path = image.startsWith('/') ? image : join(dir, image);
    const error = await refusal(() => infer({ model: MODEL, image: path, text: 'What?', device: 'cpu' }));
    check(error, {
      code: 'ERR_MARTLET_IMAGE',
      says: title.includes('pixel') ? [/huge\.png/] : says,
      details: { path },
    });
  }
});

// ---- places to write to

test('output: a folder below a file, and one that the system refuses', async () => {
  const dir = folder();
  writeFileSync(join(dir, 'file'), '');
  for (const output of [join(dir, 'file', 'out'), join(dir, 'file'), '/proc/martlet']) {
    const error = await refusal(() => trainLoRA(smallConfig(dir, { output_dir: output })).result);
    check(error, { code: 'ERR_MARTLET_IO', says: [new RegExp(output)], details: { path: output } });
    check(await refusal(() => mergeAdapter({ model: MODEL, adapter: ADAPTER, outputDir: output })), {
      code: 'ERR_MARTLET_IO',
      says: [new RegExp(output)],
    });
  }
  assert.equal(readFileSync(join(dir, 'file'), 'utf8'), '');
});

/** What a run left in its folder, with the content of its files. */
function snapshot(dir: string): Record<string, string> {
  return Object.fromEntries(
    (readdirSync(dir, { recursive: true, withFileTypes: true }) as import('node:fs').Dirent[])
      .filter((entry) => entry.isFile() && !/logging\.jsonl|train\.log|args\.yaml|\.svg$/.test(entry.name))
      .map((entry) => join(entry.parentPath, entry.name))
      .map((path) => [path, digest(path)]),
  );
}

async function attempts(list: Attempt[], shell?: string): Promise<Outcome[]> {
  const { code, signal, stdout, stderr } = await runChild('attempts', list, {
    ...(shell && { shell }),
  });
  assert.deepEqual({ code, signal }, { code: 0, signal: null }, stdout + stderr);
  return stdout
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line));
}

function failed(outcome: Outcome | undefined): Pick<MartletError, 'code' | 'message' | 'details'> {
  assert.ok(outcome && 'error' in outcome, JSON.stringify(outcome));
  if (process.env.SHOW) console.log(JSON.stringify(outcome.error));
  return outcome.error;
}

test('a limit on file sizes in the middle of saving: code, path, and the run before it stays as it was', async () => {
  const dir = folder();
  const config = smallConfig(dir, { max_steps: 3 });
  await train(config);
  const earlier = snapshot(join(dir, 'out'));
  assert.ok(Object.keys(earlier).length > 5);
  const outputDir = join(dir, 'merged');
  // 24 KB: enough for every text file, too little for the weights
  const [trained, merged] = await attempts(
    [
      { call: 'train', config: { ...config, max_steps: 6, resume_from_checkpoint: true } },
      { call: 'merge', options: { model: MODEL, adapter: ADAPTER, outputDir } },
    ],
    `trap '' XFSZ; ulimit -f 24; exec "$@"`,
  );
  check(failed(trained), { code: 'ERR_MARTLET_IO', says: [/checkpoint-6|adapter_model/, /[Ff]ile too large|EFBIG/] });
  check(failed(merged), { code: 'ERR_MARTLET_IO', says: [/safetensors/, /[Ff]ile too large|EFBIG/] });
  assert.deepEqual(snapshot(join(dir, 'out')), earlier);
  assert.deepEqual(readdirSync(dir).sort(), ['data.json', 'out']);
  const again = await train({ ...config, max_steps: 4, resume_from_checkpoint: true });
  assert.equal(again.result.steps, 4);
});

const canMount = (() => {
  try {
    execFileSync('unshare', ['-rm', 'mount', '-t', 'tmpfs', 'none', '/mnt'], { stdio: 'ignore' });
    return true;
  } catch {
    return false;
  }
})();

test('a full disk in the middle of saving: the message says so, finished checkpoints stay, nothing half-written', {
  skip: canMount ? false : 'this machine lets nobody mount a small disk (unshare -rm mount)',
}, async () => {
  const dir = folder();
  const small = join(dir, 'disk');
  mkdirSync(small);
  const config = smallConfig(dir, { output_dir: join(small, 'out'), save_steps: 1, max_steps: 50 });
  // The disk is seen by these processes only, so what it holds is listed here.
  const shell = `unshare -rm bash -c 'mount -t tmpfs -o size=600k none ${small} && "$@"; find ${small}' bash "$@"`;
  const { code, stdout, stderr } = await runChild(
    'attempts',
    [
      { call: 'train', config },
      { call: 'merge', options: { model: MODEL, adapter: ADAPTER, outputDir: join(small, 'merged') } },
    ] satisfies Attempt[],
    { shell },
  );
  assert.equal(code, 0, stderr);
  const [trained, merged, ...files] = stdout.trimEnd().split('\n') as [string, string, ...string[]];
  for (const outcome of [trained, merged]) {
    check(failed(JSON.parse(outcome)), { code: 'ERR_MARTLET_IO', says: [/[Nn]o space left|ENOSPC/, /disk is full/] });
  }
  const steps = files.flatMap((path) => /\/checkpoint-(\d+)$/.exec(path)?.[1] ?? []);
  assert.ok(steps.length > 0, 'some were saved before the disk was full');
  for (const step of steps) {
    const names = ['adapter_config.json', 'adapter_model.safetensors', 'args.yaml', 'optimizer.safetensors'];
    for (const name of [...names, 'trainer_state.json']) {
      assert.ok(files.includes(join(small, 'out', `checkpoint-${step}`, name)), `checkpoint-${step}/${name}`);
    }
  }
  assert.deepEqual(
    files.filter((path) => /merged|tmp|\/out\/adapter/.test(path.slice(small.length))),
    [],
  );
});

// ---- devices and memory

test('CUDA asked for where it is not: by name, with the reason and the way out', async () => {
  // No machine has a hundredth device; where there is no CUDA at all, cuda alone is refused too.
  const { cudaAvailable } = getSystemInfo();
  for (const device of cudaAvailable ? (['cuda:99'] as const) : (['cuda', 'cuda:99'] as const)) {
    const wanted = { code: 'ERR_MARTLET_CUDA_UNAVAILABLE', says: [new RegExp(device)], details: { device } };
    const error = await refusal(() => loadModel(MODEL, { device }));
    check(error, wanted);
    if (!cudaAvailable) assert.match(error.message, /device: cpu.*libtorch install --cuda/);
    check(await refusedRun(folder(), { device }), wanted);
  }
});

test('out of memory in a training step: it is done in smaller parts, and the process goes on', async () => {
  const dir = folder();
  const question = {
    model: MODEL,
    image: IMAGE,
    text: 'What is in the picture?',
    device: 'cpu' as const,
    temperature: 0,
  };
  const [, , step, after] = await attempts([
    { call: 'infer', options: { ...question, maxNewTokens: 24 } },
    { call: 'limit-memory', megabytes: 200 },
    { call: 'train', config: { ...slowConfig(dir, 144), max_steps: 1 } },
    { call: 'infer', options: { ...question, maxNewTokens: 24 } },
  ]);
  assert.ok(step && 'result' in step, JSON.stringify(step));
  assert.match(readFileSync(join(dir, 'out', 'logs', 'train.log'), 'utf8'), /out of memory with 144 rows at a time/);
  assert.ok(after && 'result' in after, JSON.stringify(after));
});
