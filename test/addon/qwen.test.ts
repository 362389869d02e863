/** Qwen2-VL, Qwen2.5-VL and Qwen3-VL from end to end on the tiny models of the fixtures. */
import assert from 'node:assert/strict';
import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { dump, load } from 'js-yaml';
import { loadModel, type Model, mergeAdapter, type PrepareResult, trainLoRA } from '../../lib/index.js';
import { cli, jsonLines } from '../support/cli.js';
import { CALM } from '../support/process.js';
import { caseInput, QWEN_FAMILIES, type QwenFamily, qwenCase, qwenDir, qwenImage } from '../support/qwen-vl.js';
import { qwenConfig } from '../support/qwen-vl-train.js';
import { readSafetensors } from '../support/safetensors.js';
import { collect, losses } from '../support/train.js';

Object.assign(process.env, CALM);

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtempSync(join(root, 'run-'));

const question = (content: string) => [{ role: 'user' as const, content }];
const LANDSCAPE = qwenImage('landscape.png');
const grid = ({ pixels }: PrepareResult) => [...(pixels.image_grid_thw?.data ?? [])];
const prompt = { messages: question('<image>What is it?'), images: [LANDSCAPE] };

/** Every tensor of a folder's weight files. */
const readWeights = (dir: string) =>
  new Map(
    readdirSync(dir)
      .filter((name) => /^model.*\.safetensors$/.test(name))
      .flatMap((name) => [...readSafetensors(join(dir, name))]),
  );

/** Runs `work` with these variables set. */
async function withEnv<T>(env: Record<string, string>, work: () => Promise<T>): Promise<T> {
  const earlier = Object.keys(env).map((name) => [name, process.env[name]] as const);
  Object.assign(process.env, env);
  try {
    return await work();
  } finally {
    for (const [name, value] of earlier) {
      if (value === undefined) delete process.env[name];
      else process.env[name] = value;
    }
  }
}

for (const family of QWEN_FAMILIES) {
  describe(family, () => {
    test('training from a YAML file, inference with the saved limits, the merged model', async () => {
      const dir = folder();
      const file = join(dir, 'config.yaml');
      writeFileSync(file, dump(qwenConfig(dir, family, { max_pixels: 1024, model_type: family, max_steps: 12 })));
      const { events, result } = await collect(trainLoRA(file));
      assert.equal(result.steps, 12);
      assert.deepEqual(result.skipped, []);
      const loss = losses(events);
      assert.ok(loss.every(Number.isFinite));
      const mean = (values: number[]) => values.reduce((a, b) => a + b) / values.length;
      assert.ok(mean(loss.slice(-3)) < mean(loss.slice(0, 3)), `the loss falls: ${loss}`);
      const start = events.find(({ type }) => type === 'start');
      assert.ok(start?.type === 'start' && start.rows === 18);

      const args = load(readFileSync(join(result.adapterDir, 'args.yaml'), 'utf8')) as Record<string, unknown>;
      assert.equal(args.max_pixels, 1024);
      assert.equal(args.min_pixels, null);

      const base = await loadModel(qwenDir(family, 'model-4x'), { device: 'cpu', dtype: 'float32' });
      const tuned = await loadModel(qwenDir(family, 'model-4x'), {
        device: 'cpu',
        dtype: 'float32',
        adapters: { tuned: result.adapterDir },
      });
      const free = grid(await base.prepare(prompt));
      const limited = grid(await tuned.prepare(prompt));
      assert.deepEqual(free, [1, 8, 14]);
      assert.deepEqual(limited, [1, 6, 10]);
      assert.deepEqual(grid(await tuned.prepare({ ...prompt, maxPixels: 2048 })), free, 'a call may say otherwise');

      const merged = join(dir, 'merged');
      await mergeAdapter({ model: qwenDir(family, 'model-4x'), adapter: result.adapterDir, outputDir: merged });
      const mergedArgs = load(readFileSync(join(merged, 'args.yaml'), 'utf8')) as Record<string, unknown>;
      assert.equal(mergedArgs.max_pixels, 1024);
      const whole = await loadModel(merged, { device: 'cpu', dtype: 'float32' });
      assert.deepEqual(grid(await whole.prepare(prompt)), limited);
      const { messages, ...media } = {
        ...qwenCase(family, 'image-video'),
        ...caseInput(qwenCase(family, 'image-video')),
      };
      const row = { messages, images: media.images, ...(media.videos && { videos: media.videos }) };
      const [before, adapted, after] = await Promise.all([base, tuned, whole].map((model) => model.score(row)));
      assert.ok(before && adapted && after && adapted.loss < before.loss, 'trained');
      assert.ok(Math.abs(adapted.loss - after.loss) < 0.05, `merged in bfloat16: ${adapted.loss} and ${after.loss}`);
      for (const model of [base, tuned, whole]) await model.dispose();
    });

    test('generate, stream and score: pictures, a video, text alone', async () => {
      const model = await loadModel(qwenDir(family, 'model-4x'), { device: 'cpu', dtype: 'float32' });
      for (const name of ['single', 'two-images', 'video', 'image-video', 'text-only', 'parts']) {
        const row = qwenCase(family, name);
        const { images, videos } = caseInput(row);
        const media = { images, ...(videos && { videos }) };
        const options = { messages: row.messages.slice(0, -1), ...media, temperature: 0, maxNewTokens: 12 };
        const answer = await model.generate(options);
        assert.equal(answer.promptTokens, row.default.promptIds.length, name);
        const chunks = [];
        for await (const chunk of model.stream(options)) chunks.push(chunk);
        assert.deepEqual(
          chunks.map(({ tokenId }) => tokenId),
          [...answer.tokenIds],
          name,
        );
        assert.equal(chunks.map(({ text }) => text).join(''), answer.text, name);
        const score = await model.score({ messages: row.messages, ...media });
        assert.deepEqual([...score.labels], row.default.labels, name);
        assert.equal(score.logprobs.length, row.default.labels.filter((label) => label !== -100).length);
        const mean = score.logprobs.reduce((a, b) => a + b, 0) / score.logprobs.length;
        assert.ok(Math.abs(score.loss + mean) < 1e-4, name);
      }
      await model.dispose();
    });
  });
}

test('limits by the environment are saved with the adapter; an option wins over them, they win over what is saved', async () => {
  const dir = folder();
  const { result } = await withEnv({ IMAGE_MAX_TOKEN_NUM: '8', VIDEO_MAX_PIXELS: '512', FPS: '4' }, () =>
    collect(trainLoRA(qwenConfig(dir, 'qwen2_5_vl', { max_steps: 1 }))),
  );
  const args = load(readFileSync(join(result.adapterDir, 'args.yaml'), 'utf8')) as Record<string, unknown>;
  assert.deepEqual([args.image_max_token_num, args.video_max_pixels, args.fps, args.max_pixels], [8, 512, 4, null]);
  const clip = ['frame0.png', 'frame1.png'].map(qwenImage);
  const ask = { messages: question('<image><video>'), images: [LANDSCAPE], videos: [clip] };
  const look = async (options: object, env: Record<string, string> = {}) => {
    const model = await withEnv(env, () =>
      loadModel(qwenDir('qwen2_5_vl', 'model-4x'), { device: 'cpu', adapters: { a: result.adapterDir }, ...options }),
    );
    const prepared = await model.prepare(ask);
    await model.dispose();
    const tokens = grid(prepared).reduce((a, b) => a * b) / 4;
    return [tokens, ...(prepared.pixels.second_per_grid_ts?.data ?? [])];
  };
  assert.deepEqual(await look({}), [6, 0.5]);
  assert.deepEqual(await look({}, { MAX_PIXELS: '1024' }), [15, 0.5]);
  assert.deepEqual(await look({ maxPixels: 2048, fps: 1 }, { MAX_PIXELS: '1024' }), [28, 2]);
});

test('each adapter is asked as it was trained, whether it came first or later', async () => {
  const trained = async (changes: object) => {
    const { result } = await collect(trainLoRA(qwenConfig(folder(), 'qwen2_5_vl', { max_steps: 1, ...changes })));
    return result.adapterDir;
  };
  const one = await trained({ max_pixels: 1024, template: 'ms-swift' });
  const [two, three] = [await trained({ max_pixels: 512 }), await trained({})];
  const model = await loadModel(qwenDir('qwen2_5_vl', 'model-4x'), { device: 'cpu', adapters: { one, two } });
  await model.loadAdapter('three', three);
  for (const [adapter, size, tokens] of [
    ['one', [1, 6, 10], 15],
    ['two', [1, 4, 6], 6],
    ['three', [1, 8, 14], 28],
    [null, [1, 6, 10], 15],
  ] as const) {
    const asked = { ...prompt, adapter };
    const prepared = await model.prepare(asked);
    assert.deepEqual(grid(prepared), size, `${adapter}`);
    assert.equal(prepared.inputIds.filter((id) => id === 364).length, tokens);
    assert.equal((await model.generate({ ...asked, maxNewTokens: 1 })).promptTokens, prepared.inputIds.length);
    const [, rows, columns] = size;
    const [box] = model.parseBoxes(`[0, 0, ${4 * columns}, ${4 * rows}]`, { width: 61, height: 37, adapter });
    assert.deepEqual(box?.bbox, [0, 0, 61, 37], 'the whole picture');
  }
  assert.throws(() => model.parseBoxes('', { width: 1, height: 1, adapter: 'four' }), { code: 'ERR_MARTLET_ADAPTER' });
  await model.dispose();
});

for (const family of QWEN_FAMILIES) {
  test(`${family}: vit_lr and aligner_lr are those of the tower and the merger alone`, async () => {
    const parts = async (changes: object) => {
      const whole = { sft_type: 'full', freeze_vit: false, freeze_aligner: false, max_steps: 1, save_strategy: 'no' };
      const { result } = await collect(trainLoRA(qwenConfig(folder(), family, { ...whole, ...changes })));
      const before = readWeights(qwenDir(family, 'model-4x'));
      const moved = { language: 0, vision: 0, merger: 0 };
      for (const [name, { data }] of readWeights(result.outputDir)) {
        const part = !name.includes('visual') ? 'language' : /merger/.test(name) ? 'merger' : 'vision';
        if (!data.every((value, i) => value === before.get(name)?.data[i])) moved[part]++;
      }
      return moved;
    };
    const still = await parts({ learning_rate: 1e-3, vit_lr: 0, aligner_lr: 0 });
    assert.ok(still.language > 20 && still.vision === 0 && still.merger === 0, JSON.stringify(still));
    const tower = await parts({ learning_rate: 0, vit_lr: 1e-2 });
    assert.ok(tower.language === 0 && tower.vision > 40 && tower.merger === 0, JSON.stringify(tower));
    const merger = await parts({ learning_rate: 0, aligner_lr: 1e-2 });
    assert.ok(merger.language === 0 && merger.vision === 0 && merger.merger > 4, JSON.stringify(merger));
  });
}

test('rows may have limits and a frame rate of their own (chat_template_kwargs)', async () => {
  const dir = folder();
  const rows = [
    { messages: [...prompt.messages, { role: 'assistant', content: 'A.' }], images: [LANDSCAPE] },
    {
      messages: [...prompt.messages, { role: 'assistant', content: 'A.' }],
      images: [LANDSCAPE],
      chat_template_kwargs: { max_pixels: 512 },
    },
  ];
  const dataset = join(dir, 'rows.json');
  writeFileSync(dataset, JSON.stringify(rows));
  const changes = { dataset, max_steps: 1, per_device_train_batch_size: 1, gradient_accumulation_steps: 1 };
  const tokensOf = async (sample: number) => {
    const { events } = await collect(
      trainLoRA(qwenConfig(folder(), 'qwen2_vl', { ...changes, dataset: `${dataset}.${sample}.json` })),
    );
    const step = events.find(({ type }) => type === 'step');
    return step?.type === 'step' ? step.tokens : 0;
  };
  for (const [i, row] of rows.entries()) writeFileSync(`${dataset}.${i}.json`, JSON.stringify([row]));
  const [whole, small] = [await tokensOf(0), await tokensOf(1)];
  assert.equal(whole - small, 28 - 6, '4 × 7 tokens become 2 × 3');
});

describe('boxes', () => {
  const answers: Record<QwenFamily, string> = {
    qwen2_vl: '<|box_start|>(500,0),(1000,500)<|box_end|>',
    qwen2_5_vl: '<|box_start|>(28,0),(56,16)<|box_end|>',
    qwen3_vl: '[{"bbox_2d": [500, 0, 1000, 500], "label": "cat"}]',
  };
  for (const family of QWEN_FAMILIES) {
    test(`${family}: an answer's boxes in pixels of the picture, from text and from ids`, async () => {
      const model = await loadModel(qwenDir(family, 'model-4x'), { device: 'cpu' });
      // 61 × 37 pixels become 56 × 32
      const [box] = model.parseBoxes(answers[family], { width: 61, height: 37 });
      assert.deepEqual(box?.bbox, [30.5, 0, 61, 18.5]);
      const { inputIds } = await model.prepare({ messages: question(`at ${answers[family]}`) });
      assert.deepEqual(model.parseBoxes(inputIds, { width: 61, height: 37 })[0]?.bbox, [30.5, 0, 61, 18.5]);
      if (family === 'qwen2_5_vl') {
        const [small] = model.parseBoxes(answers[family], { width: 61, height: 37, maxPixels: 1024 });
        assert.deepEqual(small?.bbox, [(28 * 61) / 40, 0, 61, (16 * 37) / 24], 'of the size that the limit gives');
      }
      await model.dispose();
    });
  }

  test('special tokens stay in the text when they are wanted', async () => {
    const model = await loadModel(qwenDir('qwen2_vl', 'model-4x'), { device: 'cpu', dtype: 'float32' });
    // what is sampled at a high temperature holds special tokens sooner or later
    const options = { ...prompt, temperature: 5, maxNewTokens: 64, seed: 3 };
    const [plain, kept] = [
      await model.generate(options),
      await model.generate({ ...options, skipSpecialTokens: false }),
    ];
    assert.deepEqual(plain.tokenIds, kept.tokenIds);
    assert.doesNotMatch(plain.text, /<\|\w+\|>/);
    assert.match(kept.text, /<\|\w+\|>/);
    let streamed = '';
    for await (const { text } of model.stream({ ...options, skipSpecialTokens: false })) streamed += text;
    assert.equal(streamed, kept.text);
    await model.dispose();
  });

  test('norm_bbox and bbox_format of a config change what is trained, and are saved', async () => {
    const dir = folder();
    const dataset = join(dir, 'boxes.json');
    const row = {
      messages: [...question('<image>Find the <ref-object>.'), { role: 'assistant', content: '<bbox>' }],
      images: [LANDSCAPE],
      objects: { ref: ['cat'], bbox: [[0, 0, 30.5, 18.5]] },
    };
    writeFileSync(dataset, JSON.stringify([row, row]));
    const sampleOf = async (changes: object) => {
      const run = await collect(trainLoRA(qwenConfig(folder(), 'qwen2_5_vl', { dataset, max_steps: 1, ...changes })));
      const start = run.events.find(({ type }) => type === 'start');
      const args = load(readFileSync(join(run.result.adapterDir, 'args.yaml'), 'utf8')) as Record<string, unknown>;
      return { sample: start?.type === 'start' ? start.sample : '', args };
    };
    const legacy = await sampleOf({});
    assert.match(
      legacy.sample,
      /<\|object_ref_start\|>cat<\|object_ref_end\|>.*\[\[<\|box_start\|>\(0,0\),\(28,16\)<\|box_end\|>/s,
    );
    const changed = await sampleOf({ norm_bbox: 'norm1000', bbox_format: 'new' });
    assert.match(changed.sample, /Find the cat\..*\[\[\[0, 0, 500, 500\]<\|im_end\|>\]\]/s);
    assert.deepEqual([changed.args.norm_bbox, changed.args.bbox_format], ['norm1000', 'new']);
  });
});

describe('command line', () => {
  let model: Model;
  before(async () => {
    model = await loadModel(qwenDir('qwen3_vl', 'model-4x'), { device: 'cpu', dtype: 'float32' });
  });
  after(() => model.dispose());
  const MODEL = ['--model', qwenDir('qwen3_vl', 'model-4x'), '--device', 'cpu', '--torch_dtype', 'float32'];
  const GREEDY = ['--temperature', '0', '--max_new_tokens', '8'];
  const frames = ['frame0.png', 'frame1.png', 'frame2.png'].map(qwenImage);

  test('infer: limits, a video as a folder and as a list', async () => {
    const dir = join(folder(), 'clip');
    mkdirSync(dir);
    // in order of their numbers, not of their letters
    for (const [i, frame] of frames.entries()) cpSync(frame, join(dir, `${[2, 10, 100][i]}.png`));
    writeFileSync(join(dir, 'notes.txt'), 'no picture');
    const wanted = await model.generate({
      messages: question('<image>\n<video>\nWhat?'),
      images: [LANDSCAPE],
      videos: [{ frames, fps: 1 }],
      maxPixels: 1024,
      temperature: 0,
      maxNewTokens: 8,
    });
    for (const video of [dir, frames.join(',')]) {
      const media = ['--image', LANDSCAPE, '--video', video, '--fps', '1', '--max-pixels', '1024'];
      const { code, stdout, stderr } = await cli(['infer', ...MODEL, ...media, '--text', 'What?', ...GREEDY, '--json']);
      assert.equal(code, 0, stderr);
      const [line] = jsonLines(stdout);
      assert.deepEqual(line?.tokenIds, [...wanted.tokenIds]);
      assert.deepEqual(line?.usage, wanted.usage);
    }
  });

  test('infer: a file of items with videos', async () => {
    const dir = folder();
    const file = join(dir, 'items.jsonl');
    cpSync(frames[0] as string, join(dir, 'beside.png'));
    const items = [
      { text: 'What?', video: ['beside.png', frames[1]] },
      { messages: question('<video>What?'), videos: [frames] },
      { text: 'What?', video: 'clip.mp4' },
      // rows of data: a last answer is left out, boxes and limits count, a misspelt key is no picture less
      {
        messages: [...question('<video>Is it <ref-object>?'), { role: 'assistant', content: 'Yes.' }],
        videos: [{ frames, fps: 1 }],
        objects: { ref: ['a cat'] },
        chat_template_kwargs: { max_pixels: 512 },
        system: 'Be brief.',
        id: 4,
      },
      { text: 'What?', imgae: frames[0] },
    ];
    writeFileSync(file, items.map((item) => JSON.stringify(item)).join('\n'));
    const { code, stdout } = await cli(['infer', ...MODEL, '--input', file, ...GREEDY]);
    assert.equal(code, 1);
    const lines = jsonLines(stdout) as unknown as { tokenIds?: number[]; error?: { message: string } }[];
    assert.deepEqual(
      lines.map(({ error }) => error === undefined),
      [true, true, false, true, false],
    );
    assert.match(lines[2]?.error?.message ?? '', /items\.jsonl line 3: clip\.mp4 is a video file/);
    assert.match(lines[4]?.error?.message ?? '', /items\.jsonl line 5: "imgae" is not known: did you mean "image"\?/);
    const wanted = await model.generate({
      messages: [
        { role: 'system', content: 'Be brief.' },
        ...question('<video>Is it <|object_ref_start|>a cat<|object_ref_end|>?'),
      ],
      videos: [{ frames, fps: 1 }],
      videoMaxPixels: 512,
      temperature: 0,
      maxNewTokens: 8,
    });
    assert.deepEqual(lines[3]?.tokenIds, [...wanted.tokenIds]);
    assert.deepEqual((lines[3] as unknown as { usage: unknown }).usage, wanted.usage);
  });

  for (const [args, says] of [
    [['--max_pixels', 'many'], /max_pixels must be a number/],
    [['--max_pixels', '1.5'], /max_pixels must be a whole number above 0/],
    [['--max_pixels', '99', '--image_max_token_num', '5'], /max_pixels and image_max_token_num set the same limit/],
    [['--norm_bbox', 'norm1'], /norm1000, none/],
    [['--max_pixel', '5'], /Did you mean --max_pixels/],
  ] as const) {
    test(`infer ${args.join(' ')} is refused`, async () => {
      const { code, stderr } = await cli(['infer', ...MODEL, '--text', 'hi', ...args]);
      assert.equal(code, 2);
      assert.match(stderr, says);
    });
  }

  test('train --dry-run counts videos and shows the limits in force', async () => {
    const dir = folder();
    const file = join(dir, 'config.json');
    writeFileSync(file, JSON.stringify(qwenConfig(dir, 'qwen3_vl')));
    const { code, stdout, stderr } = await cli(['train', file, '--dry-run', '--json', '--max_pixels', '1024'], {
      env: { VIDEO_MAX_TOKEN_NUM: '4' },
    });
    assert.equal(code, 0, stderr);
    const { config, plan } = JSON.parse(stdout) as { config: Record<string, unknown>; plan: { rows: number } };
    assert.deepEqual([config.max_pixels, config.video_max_token_num, plan.rows], [1024, 4, 18]);
  });
});
