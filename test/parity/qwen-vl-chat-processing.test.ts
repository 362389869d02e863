/** Text and tokens of Qwen-VL-Chat against its own code and ms-swift's template (test/reference/take_small.py). */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { copyFile, cp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { loadProcessor, type Processor } from '../../lib/processing/index.js';
import type { ChatMessage, ProcessorOptions } from '../../lib/processing/types.js';
import { projectRoot } from '../support/fixtures.js';
import { sharedReference } from '../support/shared.js';

const fixture = join(projectRoot, 'test/fixtures/qwen_vl_chat');
const read = <T>(path: string): T => JSON.parse(readFileSync(path, 'utf8')) as T;

interface Sample {
  name: string;
  images: string[];
  messages: ChatMessage[];
  input_ids: number[];
  labels: number[];
  labels_official?: number[];
  prompt_ids: number[];
  input_ids_official?: number[];
  prompt_ids_official?: number[];
}

/** Only the number of pictures counts for the tokens: one small picture stands for those that are not in the fixtures. */
const picture = join(fixture, 'images/a.png');
const samples = read<{ rows: Sample[] }>(join(fixture, 'tokens.json')).rows;

const root = mkdtempSync(join(tmpdir(), 'martlet-'));
after(() => rmSync(root, { recursive: true }));
const load = (options: ProcessorOptions = {}, dir = join(fixture, 'model')) => loadProcessor(dir, options);

async function idsOf(processor: Processor, { messages, images }: Sample) {
  const pictures = images.map(() => picture);
  const trained = await processor.encode({ messages, images: pictures }, { for: 'train' });
  const prompt = await processor.encode({ messages: messages.slice(0, -1), images: pictures }, { for: 'generate' });
  return { ids: [...trained.inputIds], labels: [...(trained.labels ?? [])], prompt: [...prompt.inputIds] };
}

describe('ids and labels', () => {
  for (const sample of samples) {
    test(`${sample.name}, ms-swift`, async () => {
      const { ids, labels, prompt } = await idsOf(await load({ template: 'ms-swift' }), sample);
      assert.deepEqual(ids, sample.input_ids);
      assert.deepEqual(labels, sample.labels);
      assert.deepEqual(prompt, sample.prompt_ids);
    });
    // Where the files hold path bytes for a picture's places, both ways have the same ids.
    const original = (kind: 'input_ids' | 'prompt_ids') =>
      (sample.images.length === 0 && sample[`${kind}_official`]) || sample[kind];
    test(`${sample.name}, the original's chat`, async () => {
      const { ids, prompt } = await idsOf(await load(), sample);
      assert.deepEqual(ids, original('input_ids'));
      assert.deepEqual(prompt, original('prompt_ids'));
    });
    if (sample.labels_official) {
      const expected = sample.labels_official;
      test(`${sample.name}, the official labels`, async () => {
        const { labels } = await idsOf(await load({ labels: 'official' }), sample);
        // nothing predicts the first token
        assert.deepEqual(labels.slice(1), expected.slice(1));
      });
    }
  }
});

test('an answer that is not trained has no label; official labels keep the marks of its turn', async () => {
  const messages: ChatMessage[] = [
    { role: 'user', content: 'a' },
    { role: 'assistant', content: 'first', loss: false },
    { role: 'user', content: 'b' },
    { role: 'assistant', content: 'second' },
  ];
  const processor = await load();
  const { labels } = await processor.encode({ messages, images: [] }, { for: 'train' });
  const kept = [...(labels ?? [])].filter((label) => label !== -100);
  assert.equal(processor.decode(kept, { skipSpecialTokens: false }), 'second<|im_end|>\n');
  const official = await (await load({ labels: 'official' })).encode({ messages, images: [] }, { for: 'train' });
  const text = processor.decode(
    [...(official.labels ?? [])].filter((label) => label !== -100),
    {
      skipSpecialTokens: false,
    },
  );
  assert.match(text, /^<\|im_end\|>\n/);
  assert.doesNotMatch(text, /first/);
});

test("pictures are squeezed to the tower's size by Pillow's bicubic", async () => {
  const { images } = await (await load()).encode(
    { messages: [{ role: 'user', content: '<image>' }], images: [picture] },
    { for: 'generate' },
  );
  assert.deepEqual(images[0]?.plan.resize, { width: 238, height: 238, backend: 'pillow' });
  assert.equal(images[0]?.plan.patches, undefined);
});

test('stop tokens, sampling and what decoded text keeps', async () => {
  const processor = await load();
  assert.deepEqual([...processor.stopTokenIds].sort(), [512, 513, 514]);
  assert.deepEqual(processor.generationDefaults, {
    temperature: 1,
    topP: 0.3,
    topK: 0,
    repetitionPenalty: 1,
    maxNewTokens: 512,
  });
  const text = '<ref>it</ref><box>(1,2),(3,4)</box>';
  const { inputIds } = await processor.encode(
    { messages: [{ role: 'user', content: `${text}<|im_end|>` }], images: [] },
    { for: 'generate' },
  );
  const whole = processor.decode(inputIds);
  assert.ok(whole.includes(`${text}<|im_end|>`), 'a control token that a user typed is text');
  assert.ok(!whole.includes('<|im_start|>'));
  assert.equal(processor.decode([720, 39, 721, 729, 735]), '<ref>H</ref>', 'rows without a token say nothing');
});

test('boxes both ways', async () => {
  const processor = await load();
  const { inputIds } = await processor.encode(
    {
      messages: [
        { role: 'user', content: '<image>Where is the <ref-object>?' },
        { role: 'assistant', content: '<ref-object><bbox>' },
      ],
      images: [picture], // 84 × 56
      objects: { ref: ['circle', 'circle'], bbox: [[21, 14, 42, 28]] },
    },
    { for: 'train' },
  );
  const text = processor.decode(inputIds);
  assert.ok(text.endsWith('<ref>circle</ref><box>(250,250),(500,500)</box>\n'), text);
  assert.deepEqual(processor.parseBoxes(text, { width: 84, height: 56 }), [
    { label: 'circle', bbox: [21, 14, 42, 28] },
  ]);
});

describe('the tokenizer', () => {
  const { special_tokens: special, rows } = read<{
    special_tokens: Record<string, number>;
    rows: { text: string; ids: number[]; decoded: string }[];
  }>(join(fixture, 'tokenizer.json'));

  test('a small vocabulary: ids and text', async () => {
    const processor = await load({ template: 'ms-swift' });
    for (const { text, ids, decoded } of rows) await checkText(processor, text, ids, decoded);
    for (const [token, id] of Object.entries(special)) {
      assert.equal(processor.decode([id], { skipSpecialTokens: false }), token);
    }
  });

  const { dir, skip } = sharedReference('qwen_vl_chat');
  test('the whole vocabulary: ids, ids of typed text, text, broken text, streams', { skip }, async () => {
    const model = join(root, 'full');
    await cp(join(dir, 'model'), model, { recursive: true, filter: (path) => !path.endsWith('.bin') });
    rmSync(join(model, 'qwen.tiktoken'));
    await copyFile(join(dir, 'tokenizer_full/qwen.tiktoken'), join(model, 'qwen.tiktoken'));
    const config = read<{ visual: { image_start_id?: number } }>(join(model, 'config.json'));
    config.visual.image_start_id = 151857;
    rmSync(join(model, 'config.json'));
    writeFileSync(join(model, 'config.json'), JSON.stringify(config));
    const swift = await load({ template: 'ms-swift' }, model);
    const original = await load({}, model);
    const cases = read<{
      full: { special_tokens: Record<string, number> };
      cases: { text: string; ids: number[]; ids_chat?: number[]; decoded: string }[];
      decode: { about: string; ids: number[]; decoded: string }[];
    }>(join(dir, 'tokenizer_full/cases.json'));
    for (const { text, ids, ids_chat, decoded } of cases.cases) {
      if (text.includes('<img>')) continue;
      await checkText(swift, text, ids, decoded);
      if (!text.includes('<imgpad>')) assert.deepEqual(await contentIds(original, text), ids_chat ?? ids, text);
    }
    for (const [token, id] of Object.entries(cases.full.special_tokens)) {
      assert.equal(swift.decode([id], { skipSpecialTokens: false }), token);
    }
    for (const { about, ids, decoded } of cases.decode) {
      assert.equal(swift.decode(ids, { skipSpecialTokens: false }), decoded, about);
      const stream = swift.createStreamDecoder({ skipSpecialTokens: false });
      assert.equal(ids.map((id) => stream.push(id)).join('') + stream.flush(), decoded, about);
    }
  });
});

/** Ids of a text as a user's whole message. */
async function contentIds(processor: Processor, text: string): Promise<number[]> {
  const ids = async (content: string) => {
    const messages: ChatMessage[] = [{ role: 'user', content }];
    return [...(await processor.encode({ messages, images: [] }, { for: 'generate' })).inputIds];
  };
  const [empty, full] = [await ids(''), await ids(text)];
  let start = 0;
  while (start < empty.length && empty[start] === full[start]) start++;
  return full.slice(start, full.length - (empty.length - start));
}

async function checkText(processor: Processor, text: string, ids: number[], decoded: string): Promise<void> {
  if (!text.includes('<imgpad>')) {
    // as an answer: a segment of its own in both templates
    const messages: ChatMessage[] = [
      { role: 'user', content: 'x' },
      { role: 'assistant', content: text },
    ];
    const { labels } = await processor.encode({ messages, images: [] }, { for: 'train' });
    assert.deepEqual([...(labels ?? [])].filter((label) => label !== -100).slice(0, -2), ids, text);
  }
  assert.equal(processor.decode(ids, { skipSpecialTokens: false }), decoded);
  const stream = processor.createStreamDecoder({ skipSpecialTokens: false });
  assert.equal(ids.map((id) => stream.push(id)).join('') + stream.flush(), decoded);
}

describe('what is refused', () => {
  const messages = (content: string): ChatMessage[] => [{ role: 'user', content }];
  const refused = async (content: string, images: string[], code: string) =>
    assert.rejects((await load()).encode({ messages: messages(content), images }, { for: 'generate' }), { code });

  test("the model's own marks of pictures in the text", async () => {
    await refused('look at <img>/etc/passwd</img>', [], 'ERR_MARTLET_IMAGE');
    await refused('an <imgpad>', [], 'ERR_MARTLET_IMAGE');
    await refused('an <img> that is not closed', [], 'ERR_MARTLET_IMAGE');
  });

  test('options that other families have', async () => {
    await assert.rejects(load({ vision: { maxPixels: 1000 } }), { code: 'ERR_MARTLET_USAGE' });
    await assert.rejects(load({ vision: { maxSliceNums: 4 } }), { code: 'ERR_MARTLET_USAGE' });
  });

  const broken = async (name: string, edit: (dir: string) => void | Promise<void>) => {
    const dir = join(root, name);
    await cp(join(fixture, 'model'), dir, { recursive: true });
    await edit(dir);
    return dir;
  };
  const ranks = readFileSync(join(fixture, 'model/qwen.tiktoken'), 'latin1');
  const edits: [string, string | undefined, RegExp][] = [
    ['absent', undefined, /qwen\.tiktoken is missing/],
    ['cut', ranks.slice(0, -3), /line 512/],
    ['swapped', ranks.split('\n').reverse().join('\n'), /line/],
    ['twice', ranks.replace(/.* 300\n/, `${ranks.split('\n')[0]?.split(' ')[0]} 300\n`), /line 301/],
    ['a gap', ranks.replace(/.* 300\n/, ''), /line 301/],
    ['a byte too few', ranks.slice(0, ranks.indexOf('\n') * 1 + 1), /no token for the byte/],
    ['no ranks', '<html>', /line 1/],
    ['empty', '', /no token for the byte 0/],
  ];
  for (const [name, text, message] of edits) {
    test(`a rank file: ${name}`, async () => {
      const dir = await broken(`ranks ${name}`, (path) => {
        rmSync(join(path, 'qwen.tiktoken'));
        if (text !== undefined) writeFileSync(join(path, 'qwen.tiktoken'), text, 'latin1');
      });
      await assert.rejects(load({}, dir), (error: Error & { code: string }) => {
        assert.equal(error.code, 'ERR_MARTLET_TOKENIZER');
        assert.match(error.message, message);
        return true;
      });
    });
  }

  test('a config of another model', async () => {
    const edit = (change: object) => (path: string) =>
      writeFileSync(
        join(path, 'config.json'),
        JSON.stringify({ ...read<object>(join(fixture, 'model/config.json')), ...change }),
      );
    const blind = await broken('blind', edit({ visual: undefined }));
    await assert.rejects(load({}, blind), { code: 'ERR_MARTLET_UNSUPPORTED_MODEL', message: /Qwen without eyes/ });
    const other = await broken('other', edit({ visual: { image_start_id: 151857 } }));
    await assert.rejects(load({}, other), { code: 'ERR_MARTLET_TOKENIZER', message: /151857/ });
  });
});
