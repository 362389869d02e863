/** Data files: forms of rows, broken and strange files, where pictures are looked for, what is wrong with a row. */
import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { ImageResolver } from '../../lib/data/images.js';
import { type DatasetSpec, type LoadedDataset, loadDataset, type RowProblem } from '../../lib/data/index.js';
import { type RawRow, readRows } from '../../lib/data/read.js';
import { parseRow as parse, RowError } from '../../lib/data/rows.js';
import type { MartletError } from '../../lib/index.js';
import { loadProcessor, type Processor } from '../../lib/processing/index.js';
import { llava, projectRoot } from '../support/fixtures.js';

let root: string;
let processor: Processor;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
  processor = await loadProcessor(join(llava, 'model-4x'));
});
after(() => rm(root, { recursive: true }));

const IMAGE = join(llava, 'images', 'landscape.png');
const text = (role: 'user' | 'assistant' | 'system', content: string) => ({ role, content });

function file(name: string, content: string): string {
  const path = join(mkdtempSync(join(root, 'data-')), name);
  writeFileSync(path, content);
  return path;
}

async function rows(path: string): Promise<RawRow[]> {
  const out: RawRow[] = [];
  for await (const row of readRows(path)) out.push(row);
  return out;
}

const load = (specs: DatasetSpec[], changes: Partial<Parameters<typeof loadDataset>[1]> = {}): Promise<LoadedDataset> =>
  loadDataset(specs, {
    onBadRow: 'error',
    processor,
    maxLength: Number.POSITIVE_INFINITY,
    truncationStrategy: 'delete',
    ...changes,
  });

// ---- rows

/** As for a family without videos. */
function parseRow(value: unknown) {
  const { videos, ...row } = parse(value, { takesVideos: false });
  assert.deepEqual(videos, []);
  return row;
}

test("the tutorial's row, in which the roles are user and assistant", () => {
  const [row] = JSON.parse(readFileSync(join(projectRoot, 'test/fixtures/tutorial/data.json'), 'utf8'));
  assert.deepEqual(parseRow(row), {
    messages: [text('user', '<image>\n这只猫是什么颜色?'), text('assistant', '这只猫是蓝色的,属于英短蓝猫。')],
    images: ['images/cat.jpg'],
  });
});

test('every form of a row gives the same messages', () => {
  const messages = [text('user', '<image>Q'), text('assistant', 'A')];
  for (const row of [
    {
      image: 'i.png',
      conversations: [
        { from: 'human', value: '<image>Q' },
        { from: 'gpt', value: 'A' },
      ],
    },
    {
      image: ['i.png'],
      conversation: [
        { from: 'user', value: '<image>Q' },
        { from: 'bot', value: 'A' },
      ],
    },
    { images: 'i.png', messages },
    { images: [{ path: 'i.png' }], messages, system: '' },
    { images: [{ url: 'i.png' }], query: '<image>Q', response: 'A' },
    { images: ['i.png'], question: '<image>Q', answer: 'A', history: null },
    { image: 'i.png', instruction: '<image>Q', input: '', output: 'A' },
    { image: 'i.png', conversation: [{ human: '<image>Q', assistant: 'A' }] },
    { image: 'i.png', messages, videos: [], tools: null },
  ]) {
    const parsed = parseRow(row);
    assert.deepEqual(parsed, { messages, images: ['i.png'] }, JSON.stringify(row));
  }
});

test('system, history, input, loss and content parts', () => {
  assert.deepEqual(parseRow({ system: 'S', query: 'Q2', response: 'A2', history: [['Q1', 'A1']] }).messages, [
    text('system', 'S'),
    text('user', 'Q1'),
    text('assistant', 'A1'),
    text('user', 'Q2'),
    text('assistant', 'A2'),
  ]);
  assert.equal(parseRow({ instruction: 'I', input: 'x', output: 'O' }).messages[0]?.content, 'I\nx');
  const [, first, , last] = parseRow({
    messages: [
      text('user', 'a'),
      { ...text('assistant', 'b'), loss: false },
      text('user', 'c'),
      { ...text('assistant', 'd'), loss_scale: 1 },
    ],
  }).messages;
  assert.deepEqual([first?.loss, last?.loss], [false, undefined]);
  const source = { type: 'base64', media_type: 'image/png', data: 'AAAA' };
  const { messages } = parseRow({
    messages: [
      {
        role: 'user',
        content: [
          { type: 'image', image: 'a.png' },
          { type: 'image_url', image_url: { url: 'b.png' } },
          { type: 'image', source },
          { type: 'image' },
          { type: 'text', text: 'Q' },
        ],
      },
      text('assistant', 'A'),
    ],
    images: ['c.png'],
  });
  assert.deepEqual(messages[0]?.content, [
    { type: 'image', image: 'a.png' },
    { type: 'image', image: 'b.png' },
    { type: 'image', image: 'data:image/png;base64,AAAA' },
    { type: 'image' },
    { type: 'text', text: 'Q' },
  ]);
});

test('pictures without a mark go in front of the first question; every other difference is an error', () => {
  const row = (question: string, images: string[]) => ({ query: question, response: 'A', images, system: 'S' });
  assert.equal(parseRow(row('Q', ['a', 'b'])).messages[1]?.content, '<image>\n<image>\nQ');
  assert.equal(parseRow(row('x<image>Q', ['a'])).messages[1]?.content, 'x<image>Q');
  for (const [question, images, message] of [
    ['<image>Q', [], '1 <image> mark(s) but 0 image(s)'],
    ['<image>Q', ['a', 'b'], '1 <image> mark(s) but 2 image(s)'],
    ['<image><image>', ['a'], '2 <image> mark(s) but 1 image(s)'],
  ] as const)
    assert.throws(
      () => parseRow(row(question, [...images])),
      (error: RowError) => error.message.startsWith(message) && error.field === 'images',
    );
});

test('what is wrong with a row is said, with its field', () => {
  const turn = [text('user', 'Q'), text('assistant', 'A')];
  const cases: [unknown, RegExp, string | undefined][] = [
    [null, /the row is null, not an object/, undefined],
    [[1], /the row is a list/, undefined],
    [{}, /found nothing/, undefined],
    [{ foo: 1, bar: 2 }, /found foo, bar/, undefined],
    [{ messages: [] }, /list with messages/, 'messages'],
    [{ messages: ['Q'] }, /must be an object/, 'messages.0'],
    [{ messages: [{ role: 'tool', content: 'x' }] }, /unknown role "tool"/, 'messages.0.role'],
    [{ conversations: [{ from: 'constructor', value: 'x' }] }, /unknown role/, 'conversations.0.from'],
    [{ messages: [{ role: 'user', content: 5 }] }, /must be text, not number/, 'messages.0.content'],
    [
      { messages: [{ role: 'user', content: [{ type: 'audio' }] }] },
      /content part "audio"/,
      'messages.0.content.0.type',
    ],
    [{ messages: [...turn, ...turn.slice(1)] }, /must alternate: expected user at place 2/, 'messages.2'],
    [{ messages: [...turn, text('system', 'S')] }, /system message must come first/, 'messages.2'],
    [{ messages: [...turn, text('user', 'Q')] }, /last message must be the assistant/, undefined],
    [{ messages: [text('user', 'Q')] }, /no assistant turn/, undefined],
    [{ messages: [text('user', 'Q'), text('assistant', '')] }, /every answer is empty/, undefined],
    [
      { messages: [text('user', 'Q'), { ...text('assistant', 'A'), loss_scale: 0.5 }] },
      /loss_scale/,
      'messages.1.loss_scale',
    ],
    [{ query: 'Q' }, /no answer/, 'response'],
    [{ query: 'Q', response: 'A', history: [['x']] }, /pairs/, 'history.0'],
    [{ query: 'Q', response: 'A', images: [7] }, /must be text/, 'images.0'],
    [{ query: 'Q', response: 'A', videos: ['v.mp4'] }, /v\.mp4 is a video file.*ffmpeg/, 'videos.0'],
    [
      { query: 'Q', response: 'A', objects: { bboxs: [] } },
      /objects\.bboxs is not known: did you mean bbox/,
      'objects.bboxs',
    ],
    [{ query: 'Q', response: 'A', audios: ['a.wav'] }, /audios is not supported yet/, 'audios'],
    [{ query: 'Q', response: 'A', tools: [{}] }, /tools is not supported yet/, 'tools'],
  ];
  for (const [row, message, field] of cases) {
    assert.throws(
      () => parseRow(row),
      (error: unknown) => {
        assert.ok(error instanceof RowError, String(error));
        assert.match(error.message, message);
        assert.equal(error.field, field, error.message);
        return true;
      },
    );
  }
});

// ---- files

test('JSON arrays and JSONL, however they are written', async () => {
  const items = [{ a: 1, s: 'x],[{"\\' }, { b: [[2], { c: '"' }] }, { d: '\u2028é😀' }];
  const array = JSON.stringify(items);
  for (const content of [array, `\uFEFF \n${array}\n`, JSON.stringify(items, null, 2).replaceAll('\n', '\r\n')])
    assert.deepEqual(
      await rows(file('x.json', content)),
      items.map((value, row) => ({ value, row })),
    );
  const lines = items.map((item) => JSON.stringify(item));
  for (const content of [lines.join('\n'), `\uFEFF${lines.join('\r\n')}\r\n`])
    assert.deepEqual(
      await rows(file('x.jsonl', content)),
      items.map((value, row) => ({ value, row, line: row + 1 })),
    );
  // empty lines count as lines, not as rows
  assert.deepEqual(await rows(file('x.jsonl', `\n${lines[0]}\n\n${lines[1]}`)), [
    { value: items[0], row: 0, line: 2 },
    { value: items[1], row: 1, line: 4 },
  ]);
});

test('characters and brackets at the border of two chunks of a large file', async () => {
  // 64 KiB is what a stream reads at once; each size moves the border into another part of a row
  for (let shift = 0; shift < 8; shift++) {
    const items = Array.from({ length: 400 }, (_, i) => ({ i, s: `é😀"\\],[${'x'.repeat(400 + shift)}` }));
    const read = await rows(file('x.json', JSON.stringify(items)));
    assert.deepEqual(
      read.map(({ value }) => value),
      items,
    );
  }
});

test('a row that is not JSON is one bad row; a file cut short, empty or missing is an error', async () => {
  const [good, bad, after] = await rows(file('x.jsonl', '{"a":1}\n{"a":\n{"a":2}\n'));
  assert.deepEqual([good?.value, bad?.line, after?.value], [{ a: 1 }, 2, { a: 2 }]);
  assert.match(bad?.error ?? '', /JSON/);
  const [, inArray] = await rows(file('x.json', '[{"a":1},{"a":tru},{"a":2}]'));
  assert.match(inArray?.error ?? '', /JSON/);
  for (const [path, message] of [
    [file('x.json', '[{"a":1},{"a"'), /cut short.*inside row 1/],
    [file('x.json', '[{"a":1}] [2]'), /more text after its JSON array/],
    [file('x.json', ''), /it is empty/],
    [join(root, 'none.json'), /does not exist.*start from the working directory/],
    [root, /it is not a file/],
  ] as const)
    await assert.rejects(rows(path), { code: 'ERR_MARTLET_DATASET', message });
});

test('path#N takes the first rows, and no more are read', async () => {
  const row = JSON.stringify({ query: 'Q', response: 'A' });
  const { rows } = await load([{ path: file('x.jsonl', `${row}\n${row}\nnot JSON\n`), sample: 2 }]);
  assert.equal(rows.length, 2);
  await assert.rejects(load([{ path: file('x.json', '[]') }]), {
    code: 'ERR_MARTLET_DATASET',
    message: /holds no rows/,
  });
});

// ---- pictures

test('a picture is looked for in root/folder, root, beside the file, in the working directory, in this order', async () => {
  const dir = mkdtempSync(join(root, 'images-'));
  const at = (...parts: string[]) => join(dir, ...parts);
  mkdirSync(at('data'));
  mkdirSync(at('root', 'folder'), { recursive: true });
  const cwd = process.cwd();
  process.chdir(dir);
  try {
    const spec = { path: at('data', 'd.json'), dataset_root: at('root'), image_folder: 'folder' };
    const resolver = new ImageResolver(spec);
    await assert.rejects(resolver.resolve('p.png'), {
      message: `the picture p.png does not exist; looked for ${[at('root/folder/p.png'), at('root/p.png'), at('data/p.png'), at('p.png')].join(', ')}`,
    });
    // the last place first: each new file goes before the ones that are there
    for (const place of ['p.png', 'data/p.png', 'root/p.png', 'root/folder/p.png']) {
      writeFileSync(at(place), '');
      assert.equal(await resolver.resolve('p.png'), at(place));
    }
    // without dataset_root the file's folder is the root
    mkdirSync(at('data', 'folder'));
    writeFileSync(at('data', 'folder', 'q.png'), '');
    assert.equal(
      await new ImageResolver({ path: 'data/d.json', image_folder: 'folder' }).resolve('q.png'),
      at('data/folder/q.png'),
    );
    // the tutorial's two spellings of one place
    writeFileSync(at('root', 'folder', 'cat.jpg'), '');
    for (const source of ['folder/cat.jpg', 'cat.jpg', 'root/folder/cat.jpg'])
      assert.equal(await resolver.resolve(source), at('root/folder/cat.jpg'));
    await assert.rejects(resolver.resolve('../../etc/passwd'), { message: /lies outside every folder/ });
    assert.equal(await resolver.resolve('../data/p.png'), at('data/p.png'), 'inside another root');
  } finally {
    process.chdir(cwd);
  }
});

test('absolute paths, URIs, URLs and bare base64 are taken as they are', async () => {
  const resolver = new ImageResolver({ path: join(root, 'd.json') });
  const base64 = readFileSync(IMAGE).toString('base64');
  assert.ok(base64.length > 256);
  for (const [source, resolved] of [
    [IMAGE, IMAGE],
    [pathToFileURL(IMAGE).href, IMAGE],
    ['https://example.org/a.png', 'https://example.org/a.png'],
    ['data:image/png;base64,AAAA', 'data:image/png;base64,AAAA'],
    [base64, `data:image/unknown;base64,${base64}`],
  ] as const)
    assert.equal(await resolver.resolve(source), resolved);
  const row = JSON.stringify({ query: '<image>Q', response: 'A', images: [base64] });
  assert.equal((await load([{ path: file('x.jsonl', row) }])).rows.length, 1);
});

// ---- bad and long rows

test('all bad rows of all files come in one error, the first ten in its message', async () => {
  const good = { query: '<image>Q', response: 'A', image: IMAGE };
  const one = file('one.jsonl', [good, { id: 7, query: 'Q' }, good].map((row) => JSON.stringify(row)).join('\n'));
  const two = file('two.json', JSON.stringify(Array.from({ length: 12 }, () => ({ ...good, image: 'none.png' }))));
  await assert.rejects(load([{ path: one }, { path: two }]), ({ code, message, details }: MartletError) => {
    const problems = details.problems as RowProblem[];
    assert.deepEqual([code, problems.length], ['ERR_MARTLET_DATASET', 13]);
    assert.deepEqual(
      [details.file, details.row, details.line, details.id, details.field],
      [one, 1, 2, '7', 'response'],
    );
    assert.match(message, /^13 row\(s\) cannot be used\. .*on_bad_row: skip/);
    assert.ok(message.includes(`${one} row 1 (line 2), id 7: no answer`));
    assert.match(message, /… and 3 more/);
    return true;
  });
  const { rows, skipped, lengths } = await load([{ path: one }, { path: two }], { onBadRow: 'skip' });
  assert.deepEqual([rows.length, skipped.length, lengths.length], [2, 13, 2]);
  await assert.rejects(load([{ path: two }], { onBadRow: 'skip' }), {
    code: 'ERR_MARTLET_DATASET',
    message: /^No row of .* can be used\. First reason: the picture none\.png does not exist/,
  });
});

test('a long row is left out and listed, or an error; image tokens count', async () => {
  const short = { query: 'Q', response: 'A' };
  const path = file('x.json', JSON.stringify([short, { ...short, query: '<image>Q', image: IMAGE }]));
  const { lengths } = await load([{ path }]);
  const [plain, picture] = lengths as [number, number];
  assert.ok(picture >= plain + 16, `${picture} tokens with a picture, ${plain} without`);
  const { rows, skipped } = await load([{ path }], { maxLength: picture - 1 });
  assert.equal(rows.length, 1);
  assert.deepEqual([skipped[0]?.row, skipped[0]?.code], [1, 'ERR_MARTLET_DATASET']);
  assert.equal(skipped[0]?.message, `the row has ${picture} tokens, more than max_length ${picture - 1}`);
  assert.equal((await load([{ path }], { maxLength: picture })).rows.length, 2);
  await assert.rejects(load([{ path }], { maxLength: 1 }), {
    code: 'ERR_MARTLET_DATASET',
    message: /^No row of .*more than max_length 1\. Raise max_length, or cut the rows/,
  });
  await assert.rejects(load([{ path }], { maxLength: picture - 1, truncationStrategy: 'raise' }), {
    code: 'ERR_MARTLET_DATASET',
    message: /^1 row\(s\) cannot be used/,
  });
});
