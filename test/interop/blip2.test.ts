/**
 * BLIP-2: what martlet trains and merges is read by transformers and PEFT, and both compute the same from it, in float32. PEFT's own adapters are in the
 * fixtures (test/parity). `npm run test:interop` makes the virtual environment; test/reference/interop_blip2.py is the other side.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { loadModel, mergeAdapter } from '../../lib/index.js';
import { BLIP2_FORMS, type Blip2Form, blip2Case, blip2Cases, blip2Dir, blip2Image } from '../support/blip2.js';
import { maxDifference, projectRoot } from '../support/fixtures.js';
import { type FixtureTensor, readSafetensors } from '../support/safetensors.js';
import { FEW_STEPS, train } from '../support/train.js';

/** Largest distance between martlet's logits and transformers' that counts as the same arithmetic. */
const TOLERANCE = 1e-4;
const MAX_NEW_TOKENS = 16;
const CASES = ['caption', 'single', 'multi-turn', 'text-only', 'chinese'];
const TARGETS = { opt: ['q_proj', 'v_proj'], t5: ['q', 'v'] };

/** A model folder, with an adapter or without, that both sides read. */
interface Run {
  name: string;
  form: Blip2Form;
  model: string;
  adapter?: string;
  /** Base and adapter that PEFT merges, to compare with `model`, which martlet merged. */
  mergedBy?: { model: string; adapter: string };
  old: boolean;
}

interface Answer {
  missing_keys: string[];
  unexpected_keys: string[];
  mismatched_keys: string[];
  unknownToPeft?: string[];
  missingForPeft?: string[];
  mergeDifference?: number;
  greedy: number[][];
}

const runs: Run[] = [];
let root: string;
let answers: Record<string, Answer>;
let arrays: Map<string, FixtureTensor>;

function row(form: Blip2Form, name: string) {
  const { messages, images } = blip2Case(form, name);
  return { messages, images: images.map(blip2Image) };
}

/** The same few steps; gives the folder of the adapter, or of the model after `full`. */
async function tune(form: Blip2Form, name: string, changes: Record<string, unknown>): Promise<string> {
  const dir = join(root, form, name);
  await mkdir(dir, { recursive: true });
  const dataset = join(dir, 'data.json');
  writeFileSync(dataset, JSON.stringify(CASES.map((one) => row(form, one))));
  const { result } = await train({
    model: blip2Dir(form, 'model-new'),
    dataset,
    output_dir: join(dir, 'out'),
    ...FEW_STEPS,
    save_strategy: 'no',
    target_modules: TARGETS[form],
    ...changes,
  });
  return result.adapterDir;
}

async function prepare(form: Blip2Form): Promise<void> {
  const add = (name: string, folders: Omit<Run, 'name' | 'form' | 'old'>, old = false) =>
    runs.push({ name: `${form}.${name}`, form, old, ...folders });
  const model = blip2Dir(form, 'model-new');
  add('base', { model });
  const merge = async (name: string, adapter: string) => {
    const outputDir = join(root, form, name);
    await mergeAdapter({ model, adapter, outputDir, dtype: 'float32', maxShardSize: '100KB' });
    return outputDir;
  };

  const lora = await tune(form, 'lora', {});
  add('lora', { model, adapter: lora });
  add('lora-merged', { model: await merge('merged', lora), mergedBy: { model, adapter: lora } });

  const everywhere = await tune(form, 'everywhere', {
    target_modules: [...TARGETS[form], 'query', 'value', 'language_projection', 'qkv'],
    freeze_aligner: false,
    freeze_vit: false,
  });
  add('everywhere', { model, adapter: everywhere });

  const aligner = await tune(form, 'aligner', { freeze_aligner: false, learning_rate: 2e-3 });
  add('aligner', { model, adapter: aligner });
  add('aligner-merged', { model: await merge('aligner-merged', aligner) });

  const full = { sft_type: 'full', freeze_aligner: false, learning_rate: 1e-3 };
  add('stage', { model: await tune(form, 'stage', { ...full, freeze_llm: true }) });
  add('full', { model: await tune(form, 'full', { ...full, freeze_vit: false }) });

  const old = blip2Dir(form, 'model-old');
  add('old-base', { model: old }, true);
  add('old', { model: old, adapter: await tune(form, 'old', { model: old }) }, true);
}

before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-interop-'));
  for (const form of BLIP2_FORMS) await prepare(form);
  const request = [];
  for (const run of runs) {
    const { imageTokens, endToken } = blip2Cases(run.form);
    const model = await loadModel(run.model, { device: 'cpu' });
    const rows = [];
    for (const name of CASES) {
      const { messages, images } = row(run.form, name);
      const { inputIds, labels, pixels } = await model.prepare({ messages, images, for: 'train' });
      const prompt = await model.prepare({ messages: messages.slice(0, -1), images });
      assert(labels);
      const { data, shape } = pixels.pixel_values ?? { data: new Float32Array(), shape: [0, 3, 28, 28] };
      rows.push({
        inputIds: [...inputIds],
        labels: [...labels],
        promptIds: [...prompt.inputIds],
        places: imageTokens * images.length,
        pixels: nested([...data], shape),
      });
    }
    await model.dispose();
    request.push({ ...run, rows, maxNewTokens: MAX_NEW_TOKENS, endToken });
  }
  writeFileSync(join(root, 'request.json'), JSON.stringify(request));
  const python = join(projectRoot, '.venv-interop/bin/python');
  const script = join(projectRoot, 'test/reference/interop_blip2.py');
  const files = [join(root, 'request.json'), join(root, 'answer.json')];
  // nothing is to be fetched
  const env = { ...process.env, HF_HUB_OFFLINE: '1' };
  await promisify(execFile)(python, [script, ...files], { env, maxBuffer: 2 ** 26 });
  answers = JSON.parse(readFileSync(join(root, 'answer.json'), 'utf8'));
  arrays = readSafetensors(join(root, 'answer.safetensors'));
});
after(() => rm(root, { recursive: true }));

/** As lists in lists. */
function nested(data: unknown[], shape: number[]): unknown[] {
  let out = data;
  for (const size of shape.slice(1).reverse()) {
    out = Array.from({ length: out.length / size }, (_, i) => out.slice(i * size, (i + 1) * size));
  }
  return out;
}

const logitsOf = (name: string, i: number) => arrays.get(`${name}.${i}.logits`) ?? assert.fail(`no logits of ${name}`);

async function compare(name: string): Promise<void> {
  const run = runs.find((one) => one.name === name) ?? assert.fail(`no run ${name}`);
  const answer = answers[name] ?? assert.fail(`no answer for ${name}`);
  assert.deepEqual(
    [answer.missing_keys, answer.unexpected_keys, answer.mismatched_keys],
    [[], [], []],
    'transformers finds every weight and no other',
  );
  if (run.adapter !== undefined) {
    // a bare parameter, which PEFT reads and has no name for
    assert.deepEqual(
      answer.unknownToPeft?.filter((key) => key !== 'base_model.model.query_tokens'),
      [],
    );
    assert.deepEqual(answer.missingForPeft, []);
  }
  const model = await loadModel(run.model, {
    device: 'cpu',
    dtype: 'float32',
    ...(run.adapter !== undefined && { adapters: { tuned: run.adapter } }),
  });
  try {
    for (const [i, one] of CASES.entries()) {
      const { messages, images } = row(run.form, one);
      const { logits } = await model.score({ messages, images, logits: true });
      const expected = logitsOf(name, i);
      assert.deepEqual(logits?.shape, expected.shape);
      const difference = maxDifference(logits?.data as Float32Array, expected.data);
      assert.ok(difference < TOLERANCE, `${one}: logits differ by ${difference}`);
      const { tokenIds } = await model.generate({
        messages: messages.slice(0, -1),
        images,
        temperature: 0,
        maxNewTokens: MAX_NEW_TOKENS,
      });
      assert.deepEqual([...tokenIds], answer.greedy[i], `${one}: greedy tokens`);
    }
  } finally {
    await model.dispose();
  }
}

/** How far what was trained is from where it began, in transformers' own logits. Rows without pictures see nothing of the aligner. */
const effect = (name: string, base: string) =>
  Math.min(
    ...CASES.flatMap((one, i) =>
      one === 'text-only' ? [] : [maxDifference(logitsOf(name, i).data, logitsOf(base, i).data)],
    ),
  );

for (const form of BLIP2_FORMS) {
  describe(form, () => {
    test('base models of both layouts', async () => {
      for (const name of ['base', 'old-base']) await compare(`${form}.${name}`);
    });

    for (const [what, name, base] of [
      ['a LoRA adapter loads in PEFT', 'lora', 'base'],
      ['a merged model loads in transformers', 'lora-merged', 'base'],
      ['a LoRA adapter of all parts loads in PEFT', 'everywhere', 'base'],
      ['an adapter with Q-Former, projection and query tokens whole loads in PEFT', 'aligner', 'base'],
      ['such an adapter merged loads in transformers', 'aligner-merged', 'base'],
      ['Q-Former, projection and query tokens trained alone load in transformers', 'stage', 'base'],
      ['a fully trained model loads in transformers', 'full', 'base'],
      ['an adapter of the old layout loads in PEFT', 'old', 'old-base'],
    ] as const) {
      test(`${what}: the same logits and greedy tokens`, async () => {
        assert.ok(effect(`${form}.${name}`, `${form}.${base}`) > 0.01, 'training changed the answers');
        await compare(`${form}.${name}`);
      });
    }

    test("martlet's merged weights are those of PEFT's merge_and_unload", () => {
      const { mergeDifference } = answers[`${form}.lora-merged`] as Answer;
      assert.ok((mergeDifference as number) < 1e-6, `${mergeDifference}`);
    });
  });
}
