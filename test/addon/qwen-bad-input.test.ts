/** What users hand over to Qwen-VL models that is broken: each gets its code, its place and its remedy before training starts. */
import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readdirSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import sharp from 'sharp';
import { loadModel, type MartletError, type Model, trainLoRA } from '../../lib/index.js';
import { brokenCopy, editJson } from '../support/broken.js';
import { CALM } from '../support/process.js';
import { QWEN_FAMILIES, qwenDir, qwenImage } from '../support/qwen-vl.js';
import { qwenConfig } from '../support/qwen-vl-train.js';
import { check, refusal } from '../support/refusal.js';
import { MODEL as LLAVA, train } from '../support/train.js';

Object.assign(process.env, CALM);

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtempSync(join(root, 'run-'));

const IMAGE = qwenImage('landscape.png');
const CLIP = ['frame0.png', 'frame1.png'].map(qwenImage);
const turns = (question: string, answer = 'A circle.') => [
  { role: 'user', content: question },
  { role: 'assistant', content: answer },
];
const PICTURE_ROW = { messages: turns('<image>What is it?'), images: [IMAGE] };
const GOOD = { id: 'good', ...PICTURE_ROW };

async function refusedRun(changes: Record<string, unknown>, family: (typeof QWEN_FAMILIES)[number] = 'qwen2_vl') {
  const config = qwenConfig(folder(), family, changes);
  const error = await refusal(() => trainLoRA(config).result);
  const out = config.output_dir as string;
  const saved = existsSync(out) ? readdirSync(out).filter((name) => /^adapter|^checkpoint|^model|^\./.test(name)) : [];
  assert.deepEqual(saved, [], 'a refused run leaves no weights, no temporary file, no lock');
  return error;
}

async function picture(width: number, height: number): Promise<string> {
  const path = join(root, `${width}x${height}.png`);
  await sharp({ create: { width, height, channels: 3, background: 'red' } })
    .png()
    .toFile(path);
  return path;
}

// ---- rows

interface BadRow {
  row: Record<string, unknown>;
  code?: string;
  field?: string;
  says: RegExp[];
}

const brokenRows: [string, () => BadRow | Promise<BadRow>][] = [
  [
    'a picture more than 200 times as long as wide',
    async () => {
      const path = await picture(1, 201);
      return {
        row: { ...PICTURE_ROW, images: [path] },
        code: 'ERR_MARTLET_IMAGE',
        says: [/1x201\.png is 1×201/, /201 times/, /Crop it/],
      };
    },
  ],
  [
    'two marks, one image',
    () => ({
      row: { messages: turns('<image><image>Which?'), images: [IMAGE] },
      field: 'images',
      says: [/2 <image> mark\(s\) but 1 image/],
    }),
  ],
  [
    'two marks, one video',
    () => ({
      row: { messages: turns('<video><video>Which?'), videos: [CLIP] },
      field: 'videos',
      says: [/2 <video> mark\(s\) but 1 video/],
    }),
  ],
  [
    'a mark, no video',
    () => ({ row: { messages: turns('<video>Which?') }, field: 'videos', says: [/1 <video> mark\(s\) but 0 video/] }),
  ],
  [
    'one mark, two videos',
    () => ({
      row: { messages: turns('<video>Which?'), videos: [CLIP, CLIP] },
      field: 'videos',
      says: [/1 <video> mark\(s\) but 2 video/],
    }),
  ],
  [
    'a video file',
    () => ({
      row: { messages: turns('<video>Which?'), videos: ['clips/v.mp4'] },
      field: 'videos.0',
      says: [/clips\/v\.mp4 is a video file/, /ffmpeg/, /\[\["frames/],
    }),
  ],
  [
    'a video file in a content part',
    () => ({
      row: {
        messages: [
          { role: 'user', content: [{ type: 'video', video: 'v.mp4' }] },
          { role: 'assistant', content: 'A.' },
        ],
      },
      field: 'messages.0.content.0.video',
      says: [/v\.mp4 is a video file/],
    }),
  ],
  [
    'a video without frames',
    () => ({ row: { messages: turns('<video>'), videos: [[]] }, field: 'videos.0', says: [/at least one frame/] }),
  ],
  [
    'a frame that is not there',
    () => ({
      row: { messages: turns('<video>'), videos: [[...CLIP, 'none.png']] },
      says: [/none\.png does not exist/],
    }),
  ],
  [
    'frames of two sizes',
    () => ({
      row: { messages: turns('<video>'), videos: [[...CLIP, IMAGE]] },
      code: 'ERR_MARTLET_IMAGE',
      says: [/one size/, /frame0\.png is 26×17/, /landscape\.png is 61×37/],
    }),
  ],
  [
    'a frame rate of zero',
    () => ({
      row: { messages: turns('<video>'), videos: [{ frames: CLIP, fps: 0 }] },
      field: 'videos.0.fps',
      says: [/fps must be a number above 0, not 0/],
    }),
  ],
  [
    'a limit that is misspelt',
    () => ({
      row: { ...PICTURE_ROW, chat_template_kwargs: { max_pixel: 1000 } },
      field: 'chat_template_kwargs.max_pixel',
      says: [/did you mean max_pixels\?/],
    }),
  ],
  [
    'a limit that is no number',
    () => ({
      row: { ...PICTURE_ROW, chat_template_kwargs: { max_pixels: '1000' } },
      field: 'chat_template_kwargs.max_pixels',
      says: [/whole number above 0, not "1000"/],
    }),
  ],
  [
    'limits that contradict each other',
    () => ({
      row: { ...PICTURE_ROW, chat_template_kwargs: { max_pixels: 100 } },
      code: 'ERR_MARTLET_USAGE',
      says: [/max_pixels 100 is below min_pixels 256/],
    }),
  ],
  [
    'fewer boxes than marks',
    () => ({
      row: { messages: turns('<image>Where?', '<bbox><bbox>'), images: [IMAGE], objects: { bbox: [[1, 2, 3, 4]] } },
      field: 'objects.bbox',
      says: [/2 <bbox> in the messages but 1 given/],
    }),
  ],
  [
    'a box of three numbers',
    () => ({
      row: { messages: turns('<image>Where?', '<bbox>'), images: [IMAGE], objects: { bbox: [[1, 2, 3]] } },
      field: 'objects.bbox.0',
      says: [/\[1,2,3\]/, /\[x1, y1, x2, y2\]/],
    }),
  ],
  [
    'a box outside the picture',
    () => ({
      row: { messages: turns('<image>Where?', '<bbox>'), images: [IMAGE], objects: { bbox: [[1, 2, 300, 4]] } },
      field: 'objects.bbox.0',
      says: [/300 lies outside the picture \(width 61\)/],
    }),
  ],
  [
    'a box in a picture that is not there',
    () => ({
      row: {
        messages: turns('<image>Where?', '<bbox>'),
        images: [IMAGE],
        objects: { bbox: [[1, 2, 3, 4]], image_id: [1] },
      },
      field: 'objects.image_id',
      says: [/picture 1, but the row has 1/],
    }),
  ],
  [
    'boxes without a picture',
    () => ({
      row: { messages: turns('Where?', '<bbox>'), objects: { bbox: [[1, 2, 3, 4]] } },
      field: 'objects.image_id',
      says: [/the row has 0/],
    }),
  ],
  [
    'objects with a misspelt key',
    () => ({
      row: { ...PICTURE_ROW, objects: { bboxes: [] } },
      field: 'objects.bboxes',
      says: [/objects\.bboxes is not known: did you mean bbox\?/],
    }),
  ],
  [
    'objects as text that is not JSON',
    () => ({ row: { ...PICTURE_ROW, objects: '{bbox' }, field: 'objects', says: [/not JSON/] }),
  ],
  [
    "the model's own image token in the text",
    () => ({
      row: { messages: turns('<image>What is <|image_pad|>?'), images: [IMAGE] },
      code: 'ERR_MARTLET_IMAGE',
      says: [/<\|image_pad\|> 2 time\(s\) where 1 come/, /mark them with <image>/],
    }),
  ],
];

for (const [title, make] of brokenRows) {
  test(`row: ${title}`, async () => {
    const { row, code = 'ERR_MARTLET_DATASET', field, says } = await make();
    const dir = folder();
    const dataset = join(dir, 'rows.jsonl');
    writeFileSync(dataset, [GOOD, { id: 'bad', ...row }, GOOD].map((entry) => JSON.stringify(entry)).join('\n'));
    const error = await refusedRun({ dataset });
    check(error, {
      code: 'ERR_MARTLET_DATASET',
      says: [/row 1 \(line 2\), id bad/, ...says],
      details: { file: dataset, row: 1, line: 2, id: 'bad', ...(field !== undefined && { field }) },
    });
    const [problem, ...others] = error.details.problems as { code: string }[];
    assert.equal(problem?.code, code);
    assert.deepEqual(others, []);
  });
}

test('row: longer than max_length, text alone, pictures and videos counted', async () => {
  const dir = folder();
  const dataset = join(dir, 'rows.json');
  const rows = [
    GOOD,
    { id: 'text', messages: turns('word '.repeat(90)) },
    {
      id: 'video',
      messages: turns('<video>'),
      videos: [[...CLIP, ...CLIP, ...CLIP, ...CLIP, ...CLIP, ...CLIP, ...CLIP, ...CLIP]],
    },
  ];
  writeFileSync(dataset, JSON.stringify(rows));
  const error = await refusedRun({ dataset, max_length: 80, truncation_strategy: 'raise' });
  check(error, {
    code: 'ERR_MARTLET_DATASET',
    says: [/row 1, id text: the row has \d+ tokens, more than max_length 80/],
  });
  assert.deepEqual(
    (error.details.problems as { id: string }[]).map(({ id }) => id),
    ['text', 'video'],
  );
  const { result } = await train(qwenConfig(dir, 'qwen2_vl', { dataset, max_length: 80, max_steps: 1 }));
  assert.deepEqual(
    result.skipped.map(({ row }) => row),
    [1, 2],
  );
});

test('row: longer than the positions of the model, and no other: what helps is said, and nothing that is so already', async () => {
  const dataset = join(folder(), 'rows.json');
  writeFileSync(dataset, JSON.stringify([{ messages: turns('word '.repeat(600)) }]));
  const error = await refusedRun({ dataset });
  check(error, {
    code: 'ERR_MARTLET_DATASET',
    says: [/no other is left to train on/, /row 0: the row has \d+ tokens, the model has 512 positions/, /max_pixels/],
    details: { file: dataset, row: 0 },
  });
  assert.doesNotMatch(error.message, /truncation_strategy: delete/);
});

test('row: a picture smaller than a patch is taken, and so is a video of one frame', async () => {
  const dot = await picture(1, 1);
  for (const family of QWEN_FAMILIES) {
    const model = await loadModel(qwenDir(family, 'model-4x'), { device: 'cpu' });
    const { pixels } = await model.prepare({
      messages: [{ role: 'user', content: '<image><video>' }],
      images: [dot],
      videos: [[dot]],
    });
    assert.deepEqual([...(pixels.image_grid_thw?.data ?? [])], [1, 4, 4]);
    assert.equal(pixels.video_grid_thw?.data[0], 1);
    await model.dispose();
  }
});

// ---- calls

describe('calls', () => {
  let model: Model;
  before(async () => {
    model = await loadModel(qwenDir('qwen2_5_vl', 'model-4x'), { device: 'cpu', dtype: 'float32' });
  });
  after(() => model.dispose());
  const ask = (content: string, rest: object) =>
    refusal(() => model.generate({ messages: [{ role: 'user', content }], maxNewTokens: 1, ...rest }));

  test('too few and too many videos, a video file, no frames', async () => {
    check(await ask('<video><video>', { videos: [CLIP] }), {
      code: 'ERR_MARTLET_IMAGE',
      says: [/mark 2 video\(s\), but 1 were given/],
      details: { marks: 2, videos: 1 },
    });
    check(await ask('<video>', { videos: [CLIP, CLIP] }), {
      code: 'ERR_MARTLET_IMAGE',
      says: [/2 video\(s\) were given, but the messages mark 1/],
    });
    check(await ask('<image><image>', { images: [IMAGE] }), {
      code: 'ERR_MARTLET_IMAGE',
      says: [/mark 2 picture\(s\), but 1 were given/],
    });
    check(await ask('<video>', { videos: ['v.mp4'] }), {
      code: 'ERR_MARTLET_DATASET',
      says: [/list of at least one frame/, /v\.mp4/, /ffmpeg/],
    });
    check(await ask('<video>', { videos: [[]] }), { code: 'ERR_MARTLET_DATASET', says: [/at least one frame/] });
  });

  test('messages that are none', async () => {
    const user = (content: unknown) => [{ role: 'user', content }];
    for (const [options, field] of [
      [{ messages: [] }, 'messages'],
      [{ messages: 'hi' }, 'messages'],
      [{ messages: ['hi'] }, 'messages.0'],
      [{ messages: [{ role: 'usr', content: 'hi' }] }, 'messages.0.role'],
      [{ messages: user(5) }, 'messages.0.content'],
      [{ messages: user([{ type: 'imge', image: IMAGE }]) }, 'messages.0.content.0.type'],
      [{ messages: user([null]) }, 'messages.0.content.0.type'],
      [{ messages: user([{ type: 'text' }]) }, 'messages.0.content.0.text'],
      [{ messages: user([{ type: 'image_url' }]) }, 'messages.0.content.0.image_url'],
      [{ images: IMAGE }, 'images'],
      [{ videos: 'v.mp4' }, 'videos'],
    ] as const) {
      check(await ask('hi', options), { code: 'ERR_MARTLET_USAGE', says: [], details: { field } });
    }
  });

  test('options that are none', async () => {
    for (const [options, field] of [
      [{ maxPixels: -1 }, 'maxPixels'],
      [{ maxPixels: 1.5 }, 'maxPixels'],
      [{ maxPixels: 100 }, 'maxPixels'],
      [{ maxPixels: 1000, imageMaxTokenNum: 5 }, 'imageMaxTokenNum'],
      [{ imageMinTokenNum: 100 }, 'maxPixels'],
    ] as const) {
      check(await ask('<image>', { images: [IMAGE], ...options }), {
        code: 'ERR_MARTLET_USAGE',
        says: [],
        details: { field },
      });
    }
    check(await ask('<video>', { videos: [CLIP], fps: 0 }), { code: 'ERR_MARTLET_USAGE', says: [/fps/] });
    const load = () => loadModel(qwenDir('qwen2_5_vl', 'model-4x'), { device: 'cpu', minPixels: 4096 });
    check(await refusal(load), {
      code: 'ERR_MARTLET_USAGE',
      says: [/max_pixels 2048 is below min_pixels 4096/, /set both/],
    });
  });

  test('the model goes on', async () => {
    const { promptTokens } = await model.generate({
      messages: [{ role: 'user', content: '<image>' }],
      images: [IMAGE],
      maxNewTokens: 1,
    });
    assert.ok(promptTokens > 28);
  });
});

// ---- the environment, configs, model folders

test('a misspelt variable is refused by training and by loading, with the name that was meant', async () => {
  process.env.IMAGAE_MAX_PIXELS = '1003520';
  try {
    const wanted = {
      code: 'ERR_MARTLET_CONFIG',
      says: [/IMAGAE_MAX_PIXELS/, /did you mean MAX_PIXELS\?/],
      details: { variable: 'IMAGAE_MAX_PIXELS', didYouMean: 'MAX_PIXELS' },
    };
    check(await refusedRun({}), wanted);
    check(await refusal(() => loadModel(qwenDir('qwen3_vl', 'model-4x'), { device: 'cpu' })), wanted);
    // LLaVA has no such limits: the variable is not its own
    await (await loadModel(LLAVA, { device: 'cpu' })).dispose();
  } finally {
    delete process.env.IMAGAE_MAX_PIXELS;
  }
});

test('a config with limits that contradict each other', async () => {
  check(await refusedRun({ max_pixels: 100 }), {
    code: 'ERR_MARTLET_CONFIG',
    says: [/max_pixels 100 is below min_pixels 256/],
    details: { path: 'max_pixels' },
  });
  check(await refusedRun({ max_pixels: 1000, image_max_token_num: 5 }), {
    code: 'ERR_MARTLET_CONFIG',
    says: [/max_pixels and image_max_token_num set the same limit/],
    details: { path: 'image_max_token_num' },
  });
});

test('LLaVA refuses limits, videos and boxes', async () => {
  check(await refusedRun({ model: LLAVA, max_pixels: 1000 }), {
    code: 'ERR_MARTLET_CONFIG',
    says: [/max_pixels has no meaning for llava/, /leave it out/],
    details: { path: 'max_pixels' },
  });
  check(await refusal(() => loadModel(LLAVA, { device: 'cpu', fps: 1 })), {
    code: 'ERR_MARTLET_USAGE',
    says: [/fps has no meaning for llava/],
    details: { field: 'fps' },
  });
  for (const [row, says] of [
    [{ messages: turns('<video>'), videos: [CLIP] }, /llava takes no videos/],
    [
      { messages: turns('<image>Where?', '<bbox>'), images: [IMAGE], objects: { bbox: [[1, 2, 3, 4]] } },
      /llava has no form for boxes/,
    ],
    [{ ...PICTURE_ROW, chat_template_kwargs: { max_pixels: 1000 } }, /max_pixels has no meaning for llava/],
  ] as const) {
    const dataset = join(folder(), 'rows.json');
    writeFileSync(dataset, JSON.stringify([GOOD, row]));
    check(await refusedRun({ model: LLAVA, dataset }), {
      code: 'ERR_MARTLET_DATASET',
      says: [says],
      details: { file: dataset, row: 1 },
    });
  }
  const model = await loadModel(LLAVA, { device: 'cpu' });
  const boxes = () => Promise.resolve().then(() => model.parseBoxes('', { width: 1, height: 1 }));
  check(await refusal(boxes), { code: 'ERR_MARTLET_USAGE', says: [/llava has no form for boxes/] });
  await model.dispose();
});

const brokenModels: [string, (dir: string) => void, string, RegExp[]][] = [
  [
    'a rope type that is not known',
    (dir) =>
      editJson(join(dir, 'config.json'), (config) => {
        config.rope_scaling = { type: 'spiral', mrope_section: [2, 3, 3] };
      }),
    'ERR_MARTLET_UNSUPPORTED_MODEL',
    [/spiral/, /config\.json|rope/],
  ],
  [
    'another patch size than the network',
    (dir) =>
      editJson(join(dir, 'preprocessor_config.json'), (config) => {
        config.patch_size = 7;
      }),
    'ERR_MARTLET_UNSUPPORTED_MODEL',
    [/patch_size 7/, /config\.json says 4/],
  ],
  [
    'a limit that is a word',
    (dir) =>
      editJson(join(dir, 'preprocessor_config.json'), (config) => {
        config.max_pixels = 'many';
      }),
    'ERR_MARTLET_UNSUPPORTED_MODEL',
    [/max_pixels is "many"/],
  ],
  [
    'an image token of another model',
    (dir) =>
      editJson(join(dir, 'config.json'), (config) => {
        config.image_token_id = 3;
      }),
    'ERR_MARTLET_TOKENIZER',
    [/image_token_id is 3/, /not of one model/],
  ],
];

for (const [title, edit, code, says] of brokenModels) {
  test(`model: ${title}`, async () => {
    const dir = brokenCopy(qwenDir('qwen2_vl', 'model-4x'), root, edit);
    check(await refusal(() => loadModel(dir, { device: 'cpu' })), { code, says });
    const error: MartletError = await refusedRun({ model: dir });
    assert.equal(error.code, code, 'training says the same');
  });
}
