/**
 * What martlet writes is read by transformers and PEFT, what PEFT writes by martlet, and both compute the same from it, in float32.
 * `npm run test:interop` makes the virtual environment; test/reference/interop.py is the other side.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { after, before, test } from 'node:test';
import { promisify } from 'node:util';
import sharp from 'sharp';
import { loadModel, mergeAdapter, quantizeModel } from '../../lib/index.js';
import { getCase, llava, maxDifference, projectRoot } from '../support/fixtures.js';
import { QUICKSTART_MODEL } from '../support/process.js';
import { type FixtureTensor, readSafetensors } from '../support/safetensors.js';
import { MODEL, smallConfig, train } from '../support/train.js';

/** Largest distance between martlet's logits and transformers' that counts as the same arithmetic. */
const TOLERANCE = 1e-4;
const MAX_NEW_TOKENS = 24;

interface Row {
  messages: { role: 'user' | 'assistant' | 'system'; content: string }[];
  /** Absolute paths. */
  images: string[];
}

/** A model folder, with an adapter or without, that both sides read. */
interface Run {
  name: string;
  model: string;
  adapter?: string;
  /** Base and adapter that PEFT merges, to compare with `model`, which martlet merged. */
  mergedBy?: { model: string; adapter: string };
  rows: Row[];
  maxNewTokens: number;
}

interface Answer {
  missing_keys: string[];
  unexpected_keys: string[];
  mismatched_keys: string[];
  processor: string;
  adapterKeys?: number;
  unknownToPeft?: string[];
  missingForPeft?: string[];
  /** Python's, on loading the adapter. */
  warnings?: string[];
  mergeDifference?: number;
  rows: { promptIds: number[]; greedy: number[] }[];
}

const runs: Run[] = [];
let root: string;
let answers: Record<string, Answer>;
let arrays: Map<string, FixtureTensor>;

/**
 * The pictures as PNG of the size that the model takes: how each side resizes is the matter of test/parity, and decoders of JPEG differ in the last
 * bit.
 */
async function fitted(images: string[], size: number): Promise<string[]> {
  const dir = await mkdtemp(join(root, 'images-'));
  const fit = async (image: string) => {
    const copy = join(dir, `${basename(image)}.png`);
    await sharp(image).resize(size, size, { fit: 'fill' }).toColourspace('srgb').removeAlpha().toFile(copy);
    return copy;
  };
  return Promise.all(images.map(fit));
}

/** Rows of the fixture. */
async function tinyRows(): Promise<Row[]> {
  const rows: Row[] = [];
  for (const name of ['single', 'two-images', 'text-only', 'chinese']) {
    const { messages, images } = getCase(name);
    const paths = images.map((image) => join(llava, 'images', image));
    rows.push({ messages, images: await fitted(paths, 56) });
  }
  return rows;
}

const quickstart = join(projectRoot, 'examples/quickstart/data');
/** Held-out rows of the quickstart. */
async function codeRows(): Promise<Row[]> {
  const heldOut = JSON.parse(readFileSync(join(quickstart, 'heldout.json'), 'utf8')) as {
    image: string;
    conversations: { value: string }[];
  }[];
  const rows: Row[] = [];
  for (const { image, conversations } of heldOut.slice(0, 3)) {
    const [question, answer] = conversations.map(({ value }) => value) as [string, string];
    rows.push({
      messages: [
        { role: 'user', content: question },
        { role: 'assistant', content: answer },
      ],
      images: await fitted([join(quickstart, 'images', image)], 96),
    });
  }
  return rows;
}

/** The same few steps on every model; gives the folder of the adapter, or of the model after `full`. */
async function tune(name: string, changes: Record<string, unknown>): Promise<string> {
  const dir = join(root, name);
  await mkdir(dir);
  const { result } = await train(smallConfig(dir, { save_strategy: 'no', ...changes }));
  return result.adapterDir;
}

async function merge(name: string, model: string, adapter: string, dtype: 'float32' | 'bfloat16'): Promise<string> {
  const outputDir = join(root, name);
  await mergeAdapter({ model, adapter, outputDir, dtype, maxShardSize: '400KB' });
  return outputDir;
}

/** The folders of all runs: trained and merged by martlet, or to be made by PEFT. */
async function prepare(): Promise<{ makeAdapters: object[] }> {
  const defaults = { maxNewTokens: MAX_NEW_TOKENS };
  const add = (name: string, rows: Row[], folders: Partial<Run> & { model: string }) =>
    runs.push({ ...defaults, name, rows, ...folders });
  const fixture = (name: string) => join(llava, name);
  const tiny = await tinyRows();
  const codes = await codeRows();

  add('base', tiny, { model: MODEL });
  add('base-5x', tiny, { model: fixture('model-5x') });
  add('base-gqa', tiny, { model: fixture('model-gqa') });
  add('base-quickstart', codes, { model: QUICKSTART_MODEL });

  const lora = await tune('lora', {});
  add('lora', tiny, { model: MODEL, adapter: lora });
  const merged = await merge('lora-merged', MODEL, lora, 'float32');
  add('lora-merged', tiny, { model: merged, mergedBy: { model: MODEL, adapter: lora } });

  // every part trained, in the spelling of transformers 5, weights stored in bfloat16
  const gqa = { model: fixture('model-gqa'), use_rslora: true, freeze_vit: false, freeze_aligner: false };
  const everywhere = await tune('lora-everywhere', gqa);
  add('lora-everywhere', tiny, { model: gqa.model, adapter: everywhere });
  add('lora-everywhere-merged', tiny, {
    model: await merge('everywhere-merged', gqa.model, everywhere, 'bfloat16'),
  });

  const coded = await tune('quickstart', {
    model: QUICKSTART_MODEL,
    dataset: [{ path: join(quickstart, 'train.json'), dataset_root: quickstart, image_folder: 'images', sample: 16 }],
  });
  add('quickstart', codes, { model: QUICKSTART_MODEL, adapter: coded });
  add('quickstart-merged', codes, { model: await merge('codes-merged', QUICKSTART_MODEL, coded, 'bfloat16') });

  add('full', tiny, { model: await tune('full', { sft_type: 'full', learning_rate: 1e-3 }) });
  const full = { model: fixture('model-5x'), sft_type: 'full', learning_rate: 1e-3, freeze_vit: false };
  add('full-5x', tiny, { model: await tune('full-5x', { ...full, freeze_aligner: false }) });

  // every kind of adapter that PEFT has a name for
  for (const [name, changes] of Object.entries({
    dora: { use_dora: true, freeze_aligner: false },
    pissa: { init_weights: 'pissa', target_modules: ['q_proj', 'v_proj'] },
    saved: {
      target_modules: ['q_proj', 'v_proj'],
      modules_to_save: ['lm_head', 'multi_modal_projector'],
      trainable_parameters: ['model.language_model.norm'],
    },
    'bias-lora': { lora_bias: 'lora_only', freeze_vit: false, target_modules: ['q_proj', 'fc1'] },
    'bias-all': { lora_bias: 'all', freeze_vit: false, target_modules: ['q_proj', 'fc1'] },
    'lora-llm': { sft_type: 'lora_llm' },
  })) {
    add(name, tiny, { model: MODEL, adapter: await tune(name, changes) });
  }

  // quantised: the folder by itself, and the adapter that was trained on weights quantised as they were read
  const nf4 = join(root, 'nf4');
  await quantizeModel({ model: MODEL, outputDir: nf4, quantization: 'nf4', dtype: 'float32', device: 'cpu' });
  add('nf4', tiny, { model: nf4 });
  add('qlora-nf4', tiny, { model: nf4, adapter: await tune('qlora-nf4', { sft_type: 'qlora' }) });

  const makeAdapters = Object.entries({
    'peft-list': { r: 3, lora_alpha: 7, target_modules: ['q_proj', 'down_proj', 'out_proj'] },
    'peft-regex': {
      r: 4,
      lora_alpha: 6,
      use_rslora: true,
      target_modules: '.*(language_model.*(v_proj|gate_proj)|multi_modal_projector\\.linear_1|vision_tower.*fc1)',
    },
    'peft-patterns': {
      r: 4,
      lora_alpha: 8,
      target_modules: ['k_proj', 'up_proj'],
      rank_pattern: { up_proj: 2 },
      alpha_pattern: { 'layers.1.self_attn.k_proj': 3 },
    },
  }).map(([name, config], seed) => {
    add(name, tiny, { model: MODEL, adapter: join(root, name) });
    return { model: MODEL, dir: join(root, name), seed, config };
  });
  return { makeAdapters };
}

before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-interop-'));
  const request = join(root, 'request.json');
  const answer = join(root, 'answer.json');
  const { makeAdapters } = await prepare();
  const encoded = [];
  for (const run of runs) {
    // what is fed does not depend on adapters, which PEFT has yet to make
    const model = await loadModel(run.model, { device: 'cpu' });
    const rows = [];
    for (const row of run.rows) {
      const { inputIds, labels } = await model.prepare({ ...row, for: 'train' });
      assert(labels);
      rows.push({ ...row, inputIds: [...inputIds], labels: [...labels] });
    }
    await model.dispose();
    encoded.push({ ...run, rows });
  }
  writeFileSync(request, JSON.stringify({ makeAdapters, runs: encoded }));
  const python = join(projectRoot, '.venv-interop/bin/python');
  const script = join(projectRoot, 'test/reference/interop.py');
  // nothing is to be fetched
  const env = { ...process.env, HF_HUB_OFFLINE: '1' };
  await promisify(execFile)(python, [script, request, answer], { env, maxBuffer: 2 ** 26 });
  answers = JSON.parse(readFileSync(answer, 'utf8'));
  arrays = readSafetensors(join(root, 'answer.safetensors'));
});
after(() => rm(root, { recursive: true }));

const answerOf = (name: string): Answer => answers[name] ?? assert.fail(`no answer for ${name}`);
const arrayOf = (name: string): FixtureTensor => arrays.get(name) ?? assert.fail(`no array ${name}`);

async function compare(name: string): Promise<void> {
  const run = runs.find((one) => one.name === name) ?? assert.fail(`no run ${name}`);
  const answer = answerOf(name);
  assert.deepEqual(
    [answer.missing_keys, answer.unexpected_keys, answer.mismatched_keys],
    [[], [], []],
    'transformers finds every weight and no other',
  );
  assert.equal(answer.processor, 'LlavaProcessor');
  if (run.adapter !== undefined) {
    assert.ok((answer.adapterKeys as number) > 0);
    // Single parameters are no modules_to_save: PEFT loads them by their key, as the logits show, and would not save them.
    const alone = /vision_tower\.embeddings\.(class_embedding|position_embedding\.weight)$/;
    assert.deepEqual(
      answer.unknownToPeft?.filter((key) => !alone.test(key)),
      [],
      'PEFT knows every key of the adapter',
    );
    // `lora_bias: all`: of layers that LLaVA never reads the base's own biases stay
    const unread = /vision_tower\.(encoder\.layers\.2\.(?!.*lora_).*|post_layernorm)\.bias$/;
    assert.deepEqual(
      answer.missingForPeft?.filter((key) => !unread.test(key)),
      [],
      'the adapter has every key that PEFT looks for',
    );
    assert.deepEqual(answer.warnings, [], 'PEFT loads it without a warning');
  }
  const model = await loadModel(run.model, {
    device: 'cpu',
    dtype: 'float32',
    ...(run.adapter !== undefined && { adapters: { tuned: run.adapter } }),
  });
  try {
    for (const [i, row] of run.rows.entries()) {
      const theirs = answer.rows[i] ?? assert.fail(`no row ${i}`);
      const question = { ...row, messages: row.messages.slice(0, -1) };
      const { inputIds, pixels } = await model.prepare({ ...question, for: 'generate' });
      assert.deepEqual([...inputIds], theirs.promptIds, `row ${i}: the prompt of AutoProcessor`);
      if (row.images.length > 0) {
        const { data, shape } = pixels.pixel_values ?? assert.fail('no pixel_values');
        const expected = arrayOf(`${name}.${i}.pixel_values`);
        assert.deepEqual(shape, expected.shape);
        assert.ok(maxDifference(data, expected.data) < 1e-6, `row ${i}: the pixels of AutoProcessor`);
      }
      const { logits } = await model.score({ ...row, logits: true });
      const expected = arrayOf(`${name}.${i}.logits`);
      assert.deepEqual(logits?.shape, expected.shape);
      const difference = maxDifference(logits?.data as Float32Array, expected.data);
      assert.ok(difference < TOLERANCE, `row ${i}: logits differ by ${difference}`);
      const { tokenIds } = await model.generate({ ...question, temperature: 0, maxNewTokens: MAX_NEW_TOKENS });
      assert.deepEqual([...tokenIds], theirs.greedy, `row ${i}: greedy tokens`);
    }
  } finally {
    await model.dispose();
  }
}

/** How far what was trained is from where it began, in transformers' own logits. */
function effect(name: string, base: string): number {
  const rows = answerOf(name).rows.map((_, i) => i);
  return Math.min(
    ...rows.map((i) => maxDifference(arrayOf(`${name}.${i}.logits`).data, arrayOf(`${base}.${i}.logits`).data)),
  );
}

test('base models, in every spelling of their weights', async () => {
  for (const name of ['base', 'base-5x', 'base-gqa', 'base-quickstart']) await compare(name);
});

for (const [what, name, base] of [
  ['a LoRA adapter loads in PEFT', 'lora', 'base'],
  [
    'a LoRA adapter of vision tower, projector and language model, rank-stabilised, loads in PEFT',
    'lora-everywhere',
    'base-gqa',
  ],
  ['a LoRA adapter of the quickstart model loads in PEFT', 'quickstart', 'base-quickstart'],
  ['a merged model loads in transformers', 'lora-merged', 'base'],
  ['a merged model in bfloat16 loads in transformers', 'lora-everywhere-merged', 'base-gqa'],
  ['the merged quickstart model loads in transformers', 'quickstart-merged', 'base-quickstart'],
  ['a fully trained model loads in transformers', 'full', 'base'],
  ['a fully trained model, vision tower and projector too, loads in transformers', 'full-5x', 'base-5x'],
  ['a DoRA adapter of language model and projector loads in PEFT', 'dora', 'base'],
  ['a PiSSA run, saved as plain LoRA, loads in PEFT', 'pissa', 'base'],
  ['whole modules beside an adapter (head, projector, a norm) load in PEFT', 'saved', 'base'],
  ['biases of the adapted modules load in PEFT', 'bias-lora', 'base'],
  ['all biases load in PEFT', 'bias-all', 'base'],
  ['adapters beside a whole vision tower and projector load in PEFT', 'lora-llm', 'base'],
  ['a model quantised to NF4 loads in transformers with bitsandbytes', 'nf4', 'base'],
  ['a QLoRA adapter on NF4 loads in PEFT on the quantised model', 'qlora-nf4', 'nf4'],
  ["PEFT's adapter for a list of modules loads in martlet", 'peft-list', 'base'],
  ["PEFT's adapter for a regular expression, rank-stabilised, loads in martlet", 'peft-regex', 'base'],
  ["PEFT's adapter with rank and alpha patterns loads in martlet", 'peft-patterns', 'base'],
] as const) {
  test(`${what}: the same logits and greedy tokens`, async () => {
    assert.ok(effect(name, base) > 0.05, 'training changed the answers');
    await compare(name);
  });
}

test("martlet's merged weights are those of PEFT's merge_and_unload", () => {
  const { mergeDifference } = answerOf('lora-merged');
  assert.ok((mergeDifference as number) < 1e-6, `${mergeDifference}`);
});
