/** Ids, labels and pixels against transformers (test/reference/make_llava.py). */
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { loadProcessor } from '../../lib/processing/index.js';
import { cases, llava } from '../support/fixtures.js';

for (const template of ['default', 'ms-swift'] as const) {
  describe(`template ${template}`, () => {
    for (const row of cases.values()) {
      test(row.name, async () => {
        const processor = await loadProcessor(join(llava, 'model-4x'), { template });
        const images = row.images.map((name) => join(llava, 'images', name));
        const trained = await processor.encode({ messages: row.messages, images }, { for: 'train' });
        assert.deepEqual(Array.from(trained.inputIds), row[template].inputIds);
        assert.deepEqual(Array.from(trained.labels ?? []), row[template].labels);
        const prompt = await processor.encode({ messages: row.messages.slice(0, -1), images }, { for: 'generate' });
        assert.deepEqual(Array.from(prompt.inputIds), row[template].promptIds);
        assert.equal(prompt.labels, undefined);
      });
    }
  });
}
