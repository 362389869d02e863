/** MiniCPM-V 4.5: 2.6's tower and resampler with Qwen3 (test/reference/make_minicpm_v_4_5.py), and its template with empty thoughts. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { loadProcessor } from '../../lib/processing/index.js';
import type { ChatMessage } from '../../lib/processing/types.js';
import { maxDifference, projectRoot } from '../support/fixtures.js';
import { gradients, Reference, type ReferenceRow, score, trainArgs, using } from '../support/reference.js';
import { readSafetensors } from '../support/safetensors.js';

const fixture = join(projectRoot, 'test/fixtures/minicpm_v_4_5');
const pictures = join(projectRoot, 'test/fixtures/minicpm_v');
const { rows } = JSON.parse(readFileSync(join(pictures, 'tokens.json'), 'utf8')) as { rows: ReferenceRow[] };
const expected = JSON.parse(readFileSync(join(fixture, 'expected.json'), 'utf8')) as Record<
  string,
  { ids: number[]; labels: number[]; loss: number }
>;

describe('the network', () => {
  const logits = readSafetensors(join(fixture, 'logits.safetensors'));
  const reference = new Reference(pictures, rows);
  const sample = async (name: string) => {
    const { ids = [], labels = [] } = expected[name] ?? {};
    return { ...(await reference.encode(name)), inputIds: Int32Array.from(ids), labels: Int32Array.from(labels) };
  };

  test('logits and losses of rows with and without pictures, alone and packed', async () => {
    await using(reference.open(join(fixture, 'model')), async (engine) => {
      let sum = 0;
      let count = 0;
      for (const [name, { loss }] of Object.entries(expected)) {
        const found = await score(engine, await sample(name));
        const distance = maxDifference(found.logits, logits.get(name)?.data ?? []);
        assert(distance < 2e-5, `${name} ${distance}`);
        assert(Math.abs(found.loss - loss) < 1e-5, `${name} ${found.loss} ${loss}`);
        const { labels } = await sample(name);
        const labelled = labels.filter((label) => label !== -100).length;
        sum += loss * labelled;
        count += labelled;
      }
      await engine.call('train.begin', trainArgs({}));
      const all = await Promise.all(Object.keys(expected).map(sample));
      const { loss } = await gradients(engine, all);
      assert(Math.abs(loss - sum / count) < 1e-5, `${loss} ${sum / count}`);
    });
  });
});

describe('the template', () => {
  const model = join(fixture, 'model');
  const EMPTY = '<think>\n\n</think>\n\n';
  const turns = (...texts: string[]): ChatMessage[] =>
    texts.map((content, i) => ({ role: i % 2 === 0 ? 'user' : 'assistant', content }));
  const rendered = async (template: 'default' | 'ms-swift', messages: ChatMessage[], purpose: 'train' | 'generate') => {
    const processor = await loadProcessor(model, { template });
    const { inputIds, labels } = await processor.encode({ messages, images: [] }, { for: purpose });
    const text = (ids: ArrayLike<number>) => processor.decode(ids, { skipSpecialTokens: false });
    return { text: text(inputIds), trained: text([...(labels ?? [])].filter((label) => label !== -100)) };
  };
  const user = (text: string) => `<|im_start|>user\n${text}<|im_end|>\n<|im_start|>assistant\n`;

  test('default: the empty thought belongs to the prompt', async () => {
    const row = await rendered('default', turns('What?', 'A cat.'), 'train');
    assert.equal(row.text, `${user('What?')}${EMPTY}A cat.<|im_end|>`);
    assert.equal(row.trained, 'A cat.<|im_end|>');
    const prompt = await rendered('default', turns('What?'), 'generate');
    assert.equal(prompt.text, user('What?') + EMPTY);
    const history = await rendered('default', turns('a', 'b', 'c'), 'generate');
    assert.equal(history.text, `${user('a')}b<|im_end|>\n${user('c')}${EMPTY}`);
  });

  test('default: an answer with a thought of its own has no empty one before it', async () => {
    const answer = '<think>\nHm.\n</think>\n\nA cat.';
    const row = await rendered('default', turns('What?', answer), 'train');
    assert.equal(row.text, `${user('What?')}${answer}<|im_end|>`);
    assert.equal(row.trained, `${answer}<|im_end|>`);
  });

  test('ms-swift: an empty thought is trained before every answer, and none is in the history', async () => {
    const row = await rendered('ms-swift', turns('a', 'b', 'c', '<think>\nHm.\n</think>\n\nd'), 'train');
    assert.equal(row.text, `${user('a')}${EMPTY}b<|im_end|>\n${user('c')}<think>\nHm.\n</think>\n\nd<|im_end|>\n`);
    assert.equal(row.trained, `${EMPTY}b<|im_end|>\n<think>\nHm.\n</think>\n\nd<|im_end|>\n`);
    const prompt = await rendered('ms-swift', turns('a', `${EMPTY}b`, 'c'), 'generate');
    assert.equal(prompt.text, `${user('a')}b<|im_end|>\n${user('c')}${EMPTY}`);
    const system: ChatMessage[] = [{ role: 'system', content: 'Be brief.' }, ...turns('a')];
    const briefly = await rendered('ms-swift', system, 'generate');
    assert.equal(briefly.text, `<|im_start|>system\nBe brief.<|im_end|>\n${user('a')}${EMPTY}`);
  });
});
