/** Ids, labels, grids and pixels of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers (test/reference/make_qwen_vl.py). */
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import type { RgbImage } from '../../lib/processing/index.js';
import { loadProcessor } from '../../lib/processing/index.js';
import { caseInput, QWEN_FAMILIES, qwenCases, qwenDir } from '../support/qwen-vl.js';

function grid({ plan, frames }: RgbImage): number[] {
  const { size, temporal } = plan.patches as NonNullable<typeof plan.patches>;
  const { height, width } = plan.resize as NonNullable<typeof plan.resize>;
  return [Math.ceil((frames ?? 1) / temporal), height / size, width / size];
}

for (const family of QWEN_FAMILIES) {
  for (const folder of ['model-4x', 'model-5x']) {
    for (const template of ['default', 'ms-swift'] as const) {
      describe(`${family} ${folder}, template ${template}`, () => {
        const { cases, grids, imageToken, videoToken } = qwenCases(family);
        for (const row of cases) {
          test(row.name, async () => {
            const processor = await loadProcessor(qwenDir(family, folder), { template });
            assert.deepEqual([processor.imageTokenId, processor.videoTokenId], [imageToken, videoToken]);
            const input = caseInput(row);
            const { messages } = row;
            const trained = await processor.encode({ messages, ...input }, { for: 'train' });
            assert.deepEqual(Array.from(trained.inputIds), row[template].inputIds);
            assert.deepEqual(Array.from(trained.labels ?? []), row[template].labels);
            const stills = trained.images.filter(({ frames }) => frames === undefined);
            const videos = trained.images.filter(({ frames }) => frames !== undefined);
            assert.deepEqual(stills.map(grid), row.imageGrids);
            assert.deepEqual(videos.map(grid), row.videoGrids);
            assert.deepEqual(
              stills.map(grid),
              row.images.map((name) => grids[name]),
            );
            const seconds = videos.flatMap(({ secondsPerGrid }) => secondsPerGrid ?? []);
            assert.deepEqual(seconds, row.secondPerGrid ?? []);
            assert.equal(await processor.countTokens({ messages, ...input }), row[template].inputIds.length);

            if (!row.objects) {
              const prompt = await processor.encode({ messages: messages.slice(0, -1), ...input }, { for: 'generate' });
              assert.deepEqual(Array.from(prompt.inputIds), row[template].promptIds);
              assert.equal(prompt.labels, undefined);
            }
          });
        }
      });
    }
  }
}
