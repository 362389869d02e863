/** Text and tokens of MiniCPM-V 2.6 against its own processor and ms-swift's manner (test/reference/take_small.py). */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { cp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { loadProcessor, type Processor } from '../../lib/processing/index.js';
import type { ChatMessage, ProcessorOptions } from '../../lib/processing/types.js';
import { projectRoot } from '../support/fixtures.js';

const fixture = join(projectRoot, 'test/fixtures/minicpm_v');
const read = <T>(name: string): T => JSON.parse(readFileSync(join(fixture, name), 'utf8')) as T;

interface Sample {
  name: string;
  images: string[];
  messages: ChatMessage[];
  input_ids: number[];
  labels: number[];
  prompt_ids?: number[];
  processor_ids?: number[];
  tgt_sizes?: number[][];
}

const samples = [...read<{ rows: Sample[] }>('tokens.json').rows, ...read<{ rows: Sample[] }>('tokens_only.json').rows];

const root = mkdtempSync(join(tmpdir(), 'martlet-'));
after(() => rmSync(root, { recursive: true }));
const load = (options: ProcessorOptions = {}, dir = join(fixture, 'model')) => loadProcessor(dir, options);
const pictures = (images: string[]) => images.map((image) => join(fixture, image));

async function idsOf(processor: Processor, messages: ChatMessage[], images: string[]) {
  const trained = await processor.encode({ messages, images: pictures(images) }, { for: 'train' });
  const prompt = await processor.encode(
    { messages: messages.slice(0, -1), images: pictures(images) },
    { for: 'generate' },
  );
  return { ids: [...trained.inputIds], labels: [...(trained.labels ?? [])], prompt: [...prompt.inputIds], trained };
}

for (const { name, images, messages, input_ids, labels, prompt_ids, processor_ids, tgt_sizes } of samples) {
  describe(name, () => {
    test('ms-swift', async () => {
      const found = await idsOf(await load({ template: 'ms-swift' }), messages, images);
      assert.deepEqual(found.ids, input_ids);
      assert.deepEqual(found.labels, labels);
      if (prompt_ids) assert.deepEqual(found.prompt, prompt_ids);
      assert.equal(
        await (await load({ template: 'ms-swift' })).countTokens({ messages, images: pictures(images) }),
        input_ids.length,
      );
      if (tgt_sizes) {
        const sizes = found.trained.images.map(({ plan: { crop, resize } }) => crop ?? resize);
        assert.deepEqual(
          sizes.map((size) => [(size?.height ?? 0) / 14, (size?.width ?? 0) / 14]),
          tgt_sizes,
        );
      }
    });
    if (prompt_ids) {
      test('the own processor', async () => {
        const { ids, labels: own, prompt } = await idsOf(await load(), messages, images);
        assert.deepEqual(prompt, prompt_ids);
        // The line end after the last answer is left out, and none is trained.
        assert.deepEqual(ids, input_ids.slice(0, -1));
        const newline = input_ids.at(-1);
        const before = (i: number) => labels[i - 1] !== -100 && labels[i] === newline && input_ids[i - 1] === 513;
        assert.deepEqual(
          own,
          labels.slice(0, -1).map((label, i) => (before(i) ? -100 : label)),
        );
      });
    } else if (processor_ids && name !== 'newline_after_image' && name !== 'image_last') {
      test('the own processor', async () => {
        const { ids } = await idsOf(await load(), messages, images);
        assert.deepEqual(ids, processor_ids.slice(0, -1));
      });
    }
  });
}

test("the own template's line end after a picture takes the place of the row's", async () => {
  const processor = await load();
  const ids = async (content: string, images = ['images/small.png']) => [
    ...(
      await processor.encode({ messages: [{ role: 'user', content }], images: pictures(images) }, { for: 'generate' })
    ).inputIds,
  ];
  assert.deepEqual(await ids('<image>\nDescribe it.'), await ids('<image>Describe it.'));
  assert.notDeepEqual(await ids('<image>\n\nDescribe it.'), await ids('<image>Describe it.'));
  // as the processor: "What is this?\n" before the picture stays
  const last = samples.find(({ name }) => name === 'image_last');
  const question = await ids(last?.messages[0]?.content as string);
  assert.deepEqual(last?.processor_ids?.slice(0, question.length - 1), question.slice(0, -1));
});

describe('options', () => {
  const messages: ChatMessage[] = [{ role: 'user', content: '<image>x' }];
  const text = async (options: ProcessorOptions, vision = {}) => {
    const processor = await load(options);
    const images = pictures(['images/large.png']);
    const sample = await processor.encode({ messages, images, vision }, { for: 'generate' });
    return {
      text: processor.decode(sample.inputIds, { skipSpecialTokens: false }),
      views: sample.images.length,
      processor,
    };
  };

  test('max_slice_nums and use_image_id, of the processor and of one row', async () => {
    const plain = await text({});
    assert.equal(plain.views, 7);
    assert.match(plain.text, /<image_id>0<\/image_id><image>/);
    assert.equal(plain.text.split('<slice>').length, 7);
    const few = await text({ vision: { maxSliceNums: 1, useImageId: false } });
    assert.equal(few.views, 1);
    assert.doesNotMatch(few.text, /<slice>|<image_id>/);
    assert.deepEqual(few.processor.vision, { maxSliceNums: 1, useImageId: false });
    const row = await text({}, { maxSliceNums: 4, useImageId: false });
    assert.equal(row.views, 5);
    assert.doesNotMatch(row.text, /<image_id>/);
    const saved = await text({ savedVision: { maxSliceNums: 1, fps: 2 } });
    assert.equal(saved.views, 1);
    assert.deepEqual(saved.processor.vision, { maxSliceNums: 1 });
  });

  test('views share the decoded picture', async () => {
    const { images } = await (await load()).encode(
      { messages, images: pictures(['images/large.png']) },
      { for: 'generate' },
    );
    assert.equal(new Set(images.map(({ data }) => data)).size, 1);
  });

  test('what they may not be, and options of other families', async () => {
    const refused = { code: 'ERR_MARTLET_USAGE' };
    for (const vision of [{ maxSliceNums: 0 }, { maxSliceNums: 2.5 }, { maxPixels: 100 }, { fps: 1 }])
      await assert.rejects(text({ vision }), refused, JSON.stringify(vision));
    await assert.rejects(text({ vision: { useImageId: 'yes' as unknown as boolean } }), refused);
    await assert.rejects(text({}, { maxPixels: 100 }), refused);
  });
});

describe('what is refused', () => {
  test('tokens of places in the text', async () => {
    const encode = async (content: string) =>
      (await load()).encode({ messages: [{ role: 'user', content }], images: [] }, { for: 'generate' });
    await assert.rejects(encode('an <unk> word'), { code: 'ERR_MARTLET_IMAGE', message: /<unk>/ });
    await assert.rejects(encode('<image>'), { code: 'ERR_MARTLET_IMAGE' });
  });

  const changed = async (name: string, file: string, change: object) => {
    const dir = join(root, name);
    await cp(join(fixture, 'model'), dir, { recursive: true });
    rmSync(join(dir, file));
    writeFileSync(join(dir, file), JSON.stringify({ ...read<object>(`model/${file}`), ...change }));
    return dir;
  };

  test('other versions, by their number or by what their files hold', async () => {
    const cases: [object, string | undefined][] = [
      [{ version: 2.0 }, '2.0'],
      [{ version: 2.5 }, '2.5'],
      [{ version: '4.0' }, '4.0'],
      [{ version: 'two' }, '"two"'],
      [{ version: '' }, '""'],
      [{ version: [2, 6] }, '[2,6]'],
      [{ model_type: 'minicpmv4_6' }, '4.6'],
      [{ version: undefined, vision_encoder: 'vit_so400m' }, '2.0'],
      [{ version: null, query_num: 96 }, '2.5'],
      [{ version: undefined }, undefined],
    ];
    for (const [i, [change, version]] of cases.entries()) {
      const dir = await changed(`version ${i}`, 'config.json', change);
      if (version === undefined) {
        await load({}, dir);
        continue;
      }
      await assert.rejects(load({}, dir), (error: Error & { code: string; details: Record<string, unknown> }) => {
        assert.equal(error.code, 'ERR_MARTLET_UNSUPPORTED_MODEL');
        assert.equal(error.details.version, version);
        assert.ok(error.message.includes(`of MiniCPM-V ${version}, which`), error.message);
        assert.match(error.message, /Supported: 2\.6 and 4\.5/);
        return true;
      });
    }
  });

  test('files that are not of one model', async () => {
    const unsupported = { code: 'ERR_MARTLET_UNSUPPORTED_MODEL' };
    for (const [i, change] of [
      { slice_mode: false },
      { image_feature_size: 64 },
      { scale_resolution: 0 },
      { norm_mean: [0.5] },
    ].entries()) {
      await assert.rejects(load({}, await changed(`files ${i}`, 'preprocessor_config.json', change)), unsupported);
    }
    const marks = await changed('marks', 'preprocessor_config.json', { im_start: '<picture>' });
    await assert.rejects(load({}, marks), { code: 'ERR_MARTLET_TOKENIZER', message: /<picture>/ });
  });
});
