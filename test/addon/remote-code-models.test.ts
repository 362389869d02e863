/** Qwen-VL-Chat and MiniCPM-V from end to end, on models of the fixtures' shapes with random weights. */
import assert from 'node:assert/strict';
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  writeFileSync,
} from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { dump, load } from 'js-yaml';
import sharp from 'sharp';
import { loadModel, mergeAdapter, quantizeModel, trainLoRA } from '../../lib/index.js';
import type { ChatMessage } from '../../lib/processing/types.js';
import { cli, jsonLines } from '../support/cli.js';
import { projectRoot } from '../support/fixtures.js';
import { CALM } from '../support/process.js';
import { type RandomFamily, writeRandomModel } from '../support/random-model.js';
import { readSafetensors, safetensorsHeader } from '../support/safetensors.js';
import { collect, losses } from '../support/train.js';

Object.assign(process.env, CALM);
const fixtures = join(projectRoot, 'test/fixtures');
const FAMILIES: RandomFamily[] = ['qwen_vl_chat', 'minicpm_v'];

let root: string;
const models = {} as Record<RandomFamily, string>;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
  for (const family of FAMILIES) {
    models[family] = join(root, family);
    writeRandomModel(family, models[family]);
    writeFileSync(join(models[family], 'modeling_remote.py'), '# remote code\r\n');
  }
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtempSync(join(root, 'run-'));

const PICTURES = ['small.png', 'wide.png', 'tall.png'].map((name) => join(fixtures, 'minicpm_v/images', name));
const [SMALL = '', WIDE = '', TALL = ''] = PICTURES;

/** Rows with no picture, one and two, of several turns. */
const ROWS: { messages: ChatMessage[]; images: string[] }[] = [
  { messages: turns('<image>What is it?', 'A shape.'), images: [SMALL] },
  { messages: turns('<image><image>Which one?', 'The second.'), images: [WIDE, SMALL] },
  { messages: turns('Hello.', 'Good day.', 'And now?', 'Nothing.'), images: [] },
  { messages: turns('<image>First?', 'Yes.', 'And this: <image>?', 'No.'), images: [SMALL, TALL] },
];

function turns(...texts: string[]): ChatMessage[] {
  return texts.map((content, i) => ({ role: i % 2 === 0 ? 'user' : 'assistant', content }));
}

function config(family: RandomFamily, dir: string, changes: Record<string, unknown> = {}): Record<string, unknown> {
  const data = join(dir, 'data.json');
  writeFileSync(data, JSON.stringify(ROWS));
  return {
    model: models[family],
    dataset: data,
    output_dir: join(dir, 'out'),
    device: 'cpu',
    torch_dtype: 'float32',
    lora_rank: 4,
    learning_rate: 1e-2,
    per_device_train_batch_size: 2,
    gradient_accumulation_steps: 1,
    num_train_epochs: 4,
    logging_steps: 1,
    save_strategy: 'no',
    report_to: 'none',
    ...changes,
  };
}

/** What the published folders hold beside weights, config and tokenizer, and what a folder of somebody's own may hold. */
const REMOTE_FILES = [
  'modeling_qwen.py',
  'configuration_qwen.py',
  'tokenization_qwen.py',
  'qwen_generation_utils.py',
  'visual.py',
  'modeling_minicpmv.py',
  'resampler.py',
  'image_processing_minicpmv.py',
  'processing/__init__.py',
  'processing/slices/grid.py',
  'SimSun.ttf',
  'LICENSE',
];

const question = { messages: turns('<image>What is it?'), images: [WIDE], temperature: 0, maxNewTokens: 6 };

for (const family of FAMILIES) {
  describe(family, () => {
    test('LoRA, the adapter in use, the merged model; the remote code is kept', async () => {
      const dir = folder();
      const { events, result } = await collect(trainLoRA(config(family, dir)));
      const loss = losses(events);
      assert.equal(loss.length, 8);
      assert.ok(loss[7] && loss[0] && loss[7] < loss[0], `the loss falls: ${loss}`);
      const outputDir = join(dir, 'merged');
      await mergeAdapter({ adapter: result.adapterDir, outputDir });
      assert.deepEqual(
        readFileSync(join(outputDir, 'modeling_remote.py')),
        readFileSync(join(models[family], 'modeling_remote.py')),
      );
      const adapted = await loadModel(models[family], { device: 'cpu', adapters: { a: result.adapterDir } });
      const merged = await loadModel(outputDir, { device: 'cpu' });
      try {
        for (const row of ROWS) {
          const [one, two] = [await adapted.score(row), await merged.score(row)];
          assert.ok(Math.abs(one.loss - two.loss) < 1e-4, `${one.loss} ${two.loss}`);
          const bare = await adapted.score({ ...row, adapter: null });
          assert.ok(Math.abs(one.loss - bare.loss) > 1e-3, 'the adapter does something');
        }
        const answer = await adapted.generate(question);
        assert.deepEqual((await merged.generate(question)).tokenIds, answer.tokenIds);
        let text = '';
        for await (const chunk of adapted.stream(question)) text += chunk.text;
        assert.equal(text, answer.text);
      } finally {
        await adapted.dispose();
        await merged.dispose();
      }
    });

    test('a merged folder of many shards: other files byte for byte, weights under their names, shapes and dtypes', async () => {
      const dir = folder();
      const model = join(dir, 'model');
      cpSync(models[family], model, { recursive: true });
      mkdirSync(join(model, 'processing/slices'), { recursive: true });
      for (const [i, name] of REMOTE_FILES.entries())
        writeFileSync(join(model, name), Buffer.from([...Buffer.from(`# ${name}\r\n\u00e9`), 0, 255, i]));
      const { result } = await collect(
        trainLoRA(config(family, dir, { model, max_steps: 1, target_modules: 'all-linear' })),
      );
      const outputDir = join(dir, 'merged');
      await mergeAdapter({ adapter: result.adapterDir, outputDir, maxShardSize: 2 ** 21 });

      const isWeights = (name: string) => /\.safetensors(\.index\.json)?$/.test(name);
      const others = (folder: string) =>
        readdirSync(folder, { recursive: true, withFileTypes: true })
          .filter((entry) => entry.isFile() && !isWeights(entry.name))
          .map((entry) => relative(folder, join(entry.parentPath, entry.name)))
          .sort();
      // and how to prompt the merged model
      assert.deepEqual(others(outputDir), [...others(model), 'args.yaml'].sort());
      assert.ok(REMOTE_FILES.every((name) => others(outputDir).includes(name)));
      for (const name of others(model))
        assert.deepEqual(readFileSync(join(outputDir, name)), readFileSync(join(model, name)), name);

      const shards = readdirSync(outputDir).filter((name) => name.endsWith('.safetensors'));
      assert.ok(shards.length > 2, 'several shards');
      const index = JSON.parse(readFileSync(join(outputDir, 'model.safetensors.index.json'), 'utf8'));
      const base = safetensorsHeader(join(model, 'model.safetensors'));
      const seen = new Map<string, string>();
      let size = 0;
      for (const shard of shards) {
        for (const [name, { dtype, shape, data_offsets }] of safetensorsHeader(join(outputDir, shard))) {
          assert.ok(!seen.has(name), `${name} is there once`);
          seen.set(name, shard);
          size += data_offsets[1] - data_offsets[0];
          assert.deepEqual({ dtype, shape }, { dtype: base.get(name)?.dtype, shape: base.get(name)?.shape }, name);
        }
      }
      assert.deepEqual([...seen.keys()].sort(), [...base.keys()].sort());
      assert.deepEqual(index.weight_map, Object.fromEntries([...seen].sort()));
      assert.equal(index.metadata.total_size, size);
    });

    test('the projector alone: everything else stays as it was, the whole model is saved', async () => {
      const dir = folder();
      const { result } = await collect(
        trainLoRA(
          config(family, dir, {
            sft_type: 'full',
            freeze_llm: true,
            freeze_vit: true,
            freeze_aligner: false,
            num_train_epochs: 1,
            learning_rate: 1e-3,
          }),
        ),
      );
      const before = readSafetensors(join(models[family], 'model.safetensors'));
      const now = readSafetensors(join(result.outputDir, 'model.safetensors'));
      assert.deepEqual([...now.keys()].sort(), [...before.keys()].sort());
      const projector = family === 'minicpm_v' ? /^resampler\./ : /^transformer\.visual\.(attn_pool\.|ln_post\.|proj$)/;
      for (const [name, { data }] of before) {
        const same = now.get(name)?.data.every((value, i) => value === data[i]);
        assert.equal(same, !projector.test(name) || name.endsWith('.pos_embed'), name);
      }
      const model = await loadModel(result.outputDir, { device: 'cpu' });
      await model.dispose();
    });

    test('resuming from a checkpoint gives the run that was not interrupted', async () => {
      const changes = { save_strategy: 'steps', save_steps: 3, max_steps: 6, lora_dropout: 0.1 };
      const whole = await collect(trainLoRA(config(family, folder(), changes)));
      const dir = folder();
      await collect(trainLoRA(config(family, dir, { ...changes, max_steps: 6 }), { overrides: { max_steps: 6 } }));
      const again = await collect(
        trainLoRA(config(family, dir, { ...changes, resume_from_checkpoint: join(dir, 'out/checkpoint-3') })),
      );
      assert.deepEqual(losses(again.events), losses(whole.events).slice(3));
    });
  });
}

const MINICPM_4_5 = join(fixtures, 'minicpm_v_4_5/model');
for (const family of [...FAMILIES, 'minicpm_v_4_5'] as const) {
  test(`${family}: qlora on nf4 and int8 trains, answers, merges onto either base; saved quantised it loads again`, async () => {
    const model = family === 'minicpm_v_4_5' ? MINICPM_4_5 : models[family];
    for (const [bits, quantization] of [
      [4, 'nf4'],
      [8, 'int8'],
    ] as const) {
      const dir = folder();
      const changes = { ...config('minicpm_v', dir), model, sft_type: 'qlora', quant_bits: bits };
      const yaml = join(dir, 'qlora.yaml');
      writeFileSync(yaml, dump(changes));
      const { events, result } = await collect(trainLoRA(yaml));
      const curve = losses(events);
      assert.ok((curve.at(-1) as number) < (curve[0] as number) - 1, String(curve));

      const stored = join(dir, 'stored');
      const report = await quantizeModel({ model, outputDir: stored, quantization, dtype: 'float32', device: 'cpu' });
      assert.equal(report.quantizedTensors, family === 'qwen_vl_chat' ? 10 : 14, 'all linears but the head');
      const { quantization_config: written } = JSON.parse(readFileSync(join(stored, 'config.json'), 'utf8'));
      assert.deepEqual(
        written.llm_int8_skip_modules,
        family === 'qwen_vl_chat'
          ? ['lm_head', 'transformer.visual', 'visual']
          : ['llm.lm_head', 'lm_head', 'resampler', 'vpm'],
      );
      const outputDir = join(dir, 'merged');
      const adapter = result.adapterDir;
      await mergeAdapter({ adapter, outputDir: `${outputDir}-original` });
      await mergeAdapter({ adapter, outputDir: `${outputDir}-quantized`, base: 'quantized' });
      const adapters = { a: adapter };
      const scores: number[] = [];
      const answers: number[][] = [];
      for (const [path, options] of [
        [model, { quantization, adapters }],
        [stored, { adapters }],
        [`${outputDir}-quantized`, {}],
        [`${outputDir}-original`, {}],
      ] as const) {
        const loaded = await loadModel(path, { device: 'cpu', dtype: 'float32', ...options });
        scores.push((await loaded.score(ROWS[1] as (typeof ROWS)[0])).loss);
        answers.push([...(await loaded.generate(question)).tokenIds]);
        await loaded.dispose();
      }
      const [onLoad, fromDisk, quantized, original] = scores as [number, number, number, number];
      assert.equal(fromDisk, onLoad);
      assert.ok(Math.abs(quantized - onLoad) < 1e-4, String(scores));
      assert.ok(original !== onLoad && Math.abs(original - onLoad) < 0.5, String(scores));
      assert.deepEqual(answers[1], answers[0]);
      assert.deepEqual(answers[2], answers[0]);
    }
  });
}

test('MiniCPM-V: slices and image ids as the config says, saved with the adapter and with the merged model', async () => {
  const dir = folder();
  const changes = { max_slice_nums: 2, use_image_id: false, num_train_epochs: 1 };
  const { result } = await collect(trainLoRA(config('minicpm_v', dir, changes)));
  const args = load(readFileSync(join(result.adapterDir, 'args.yaml'), 'utf8')) as Record<string, unknown>;
  assert.deepEqual([args.max_slice_nums, args.use_image_id], [2, false]);
  const outputDir = join(dir, 'merged');
  await mergeAdapter({ adapter: result.adapterDir, outputDir });
  const views = async (path: string, options: object) => {
    const model = await loadModel(path, { device: 'cpu', ...options });
    try {
      return (await model.prepare(question)).pixels.tgt_sizes?.shape[0];
    } finally {
      await model.dispose();
    }
  };
  const adapters = { a: result.adapterDir };
  assert.equal(await views(models.minicpm_v, {}), 5);
  assert.equal(await views(models.minicpm_v, { adapters }), 3);
  assert.equal(await views(outputDir, {}), 3);
  assert.equal(await views(models.minicpm_v, { adapters, maxSliceNums: 1 }), 1);
  const { code, stdout, stderr } = await cli([
    'infer',
    ...['--adapters', result.adapterDir, '--image', WIDE, '--text', 'What is it?', '--max_new_tokens', '4'],
    ...['--max_slice_nums', '1', '--use_image_id', 'true', '--temperature', '0', '--json'],
  ]);
  assert.equal(code, 0, stderr);
  const [{ usage } = { usage: { promptTokens: 0 } }] = jsonLines(stdout) as unknown as {
    usage: { promptTokens: number };
  }[];
  assert.ok(usage.promptTokens > 0 && usage.promptTokens < 60, 'one view');
  const wrong = await cli(['infer', '--model', models.minicpm_v, '--text', 'x', '--max_pixels', '1000']);
  assert.equal(wrong.code, 2);
  assert.match(wrong.stderr, /max_pixels/);
});

test('Qwen-VL-Chat: official labels train the marks of every turn', async () => {
  const plain = await loadModel(models.qwen_vl_chat, { device: 'cpu' });
  const official = await loadModel(models.qwen_vl_chat, { device: 'cpu', labels: 'official' });
  try {
    const [row] = ROWS as [(typeof ROWS)[0]];
    const count = async (model: typeof plain) => (await model.score(row)).logprobs.length;
    // three turns, four marks of which two are the answer's already
    assert.equal((await count(official)) - (await count(plain)), 7 - 1);
  } finally {
    await plain.dispose();
    await official.dispose();
  }
  const { events } = await collect(
    trainLoRA(config('qwen_vl_chat', folder(), { labels: 'official', num_train_epochs: 1 })),
  );
  const start = events.find(({ type }) => type === 'start');
  assert.ok(
    start?.type === 'start' && /\[\[<\|im_end\|>\n<\|im_start\|>\]\]user/.test(start.sample),
    start?.type === 'start' ? start.sample : '',
  );
});

test("the tutorial's whole way: its YAML and its data unmodified, its commands", async () => {
  const dir = folder();
  const snapshot = join(dir, 'hf/hub/models--Qwen--Qwen-VL-Chat/snapshots/1');
  mkdirSync(join(snapshot, '../../refs'), { recursive: true });
  writeFileSync(join(snapshot, '../../refs/main'), '1');
  cpSync(models.qwen_vl_chat, snapshot, { recursive: true });
  mkdirSync(join(dir, 'custom_data/images'), { recursive: true });
  copyFileSync(join(fixtures, 'tutorial/qwen_vl_lora.yaml'), join(dir, 'qwen_vl_lora.yaml'));
  copyFileSync(join(fixtures, 'tutorial/data.json'), join(dir, 'custom_data/data.json'));
  await sharp(SMALL).jpeg().toFile(join(dir, 'custom_data/images/cat.jpg'));
  const run = (args: string[]) => cli(args, { cwd: dir, env: { HF_HOME: join(dir, 'hf'), HF_HUB_OFFLINE: '1' } });

  const trained = await run(['train', '--config', 'qwen_vl_lora.yaml', '--json']);
  assert.equal(trained.code, 0, trained.stderr);
  const events = jsonLines(trained.stdout) as unknown as {
    type: string;
    targets: number;
    steps: number;
    message: string;
  }[];
  assert.equal(events.find(({ type }) => type === 'start')?.targets, 2, 'c_attn of both layers');
  assert.ok(events.some(({ type, message }) => type === 'warning' && /qkv_proj matches nothing/.test(message)));
  assert.equal(events.at(-1)?.steps, 3, 'three epochs over one row');
  const out = 'output/qwen_vl_lora';
  for (const name of ['adapter_model.safetensors', 'adapter_config.json', 'args.yaml', 'logs/train.log', 'runs'])
    assert.ok(existsSync(join(dir, out, name)), name);
  const { base_model_name_or_path: base } = JSON.parse(readFileSync(join(dir, out, 'adapter_config.json'), 'utf8'));
  assert.equal(base, 'Qwen/Qwen-VL-Chat', 'the id that is published');

  const inputs = JSON.stringify({ image: 'custom_data/images/cat.jpg', text: '这只猫是什么颜色?' });
  const common = ['--model_id', 'qwen/Qwen-VL-Chat-7B', '--adapter_name_or_path', out, '--max_new_tokens', '4'];
  const answer = await run(['infer', ...common, '--multi_modal_inputs', inputs, '--json']);
  assert.equal(answer.code, 0, answer.stderr);
  const { usage } = jsonLines(answer.stdout)[0] as unknown as { usage: { promptTokens: number } };
  assert.ok(usage.promptTokens > 256, 'the picture has 256 places');
  const merged = await run(['export', '--adapter_name_or_path', out, '--output_dir', 'merged', '--json']);
  assert.equal(merged.code, 0, merged.stderr);
  assert.equal(JSON.parse(merged.stdout).mergedTensors, 2);
  assert.ok(existsSync(join(dir, 'merged/modeling_remote.py')));

  // a folder of the name that the config gives comes before any cache
  cpSync(models.qwen_vl_chat, join(dir, 'qwen/Qwen-VL-Chat-7B'), { recursive: true });
  const local = await run(['train', '--config', 'qwen_vl_lora.yaml', '--dry_run', '--output_dir', 'other', '--json']);
  assert.equal(local.code, 0, local.stderr);
  assert.equal(JSON.parse(local.stdout).config.model, join(dir, 'qwen/Qwen-VL-Chat-7B'));
});
