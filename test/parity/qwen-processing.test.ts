/** Ids, labels, grids and pixels of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers (test/reference/make_qwen_vl.py). */
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { loadModel } from '../../lib/index.js';
import type { RgbImage } from '../../lib/processing/index.js';
import { loadProcessor } from '../../lib/processing/index.js';
import { maxDifference } from '../support/fixtures.js';
import { caseInput, QWEN_FAMILIES, qwenCase, qwenCases, qwenDir, qwenImage } from '../support/qwen-vl.js';
import { type FixtureTensor, readSafetensors } from '../support/safetensors.js';

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

for (const family of QWEN_FAMILIES) {
  for (const folder of ['model-4x', 'model-5x']) {
    test(`${family} ${folder}: pixels are transformers', bit for bit`, async () => {
      const model = await loadModel(qwenDir(family, folder), { device: 'cpu' });
      const expected = readSafetensors(qwenDir(family, 'pixels.safetensors'));
      const check = (found: FixtureTensor | undefined, name: string) => {
        const wanted = expected.get(name);
        assert.ok(found && wanted, name);
        assert.deepEqual(found.shape, wanted.shape, name);
        assert.equal(maxDifference(found.data, wanted.data), 0, name);
      };
      const pictures = [...expected.keys()].filter((name) => name.endsWith('.png') && !name.startsWith('grid.'));
      assert.ok(pictures.length >= 2);
      for (const name of pictures) {
        const { pixels } = await model.prepare({
          messages: [{ role: 'user', content: '<image>' }],
          images: [qwenImage(name)],
        });
        assert.deepEqual(Object.keys(pixels).sort(), ['image_grid_thw', 'pixel_values']);
        check(pixels.pixel_values, name);
        check(pixels.image_grid_thw, `grid.${name}`);
      }
      for (const name of ['video', 'video-slow']) {
        const row = qwenCase(family, name);
        const { pixels } = await model.prepare({ messages: row.messages, ...caseInput(row), for: 'train' });
        check(pixels.pixel_values_videos, name);
        check(pixels.video_grid_thw, `grid.${name}`);
        const { secondPerGrid } = row;
        assert.deepEqual(
          pixels.second_per_grid_ts,
          secondPerGrid && { data: Float32Array.from(secondPerGrid), shape: [secondPerGrid.length] },
        );
      }
      // several pictures and a video in one call: one after the other along the first dimension
      const [first, second] = pictures as [string, string];
      const row = qwenCase(family, 'video');
      const { pixels } = await model.prepare({
        messages: [{ role: 'user', content: '<image><video><image>' }],
        images: [first, second].map(qwenImage),
        ...(({ videos }) => videos && { videos })(caseInput(row)),
      });
      const both = (prefix: string) => [first, second].map((name) => expected.get(prefix + name) as FixtureTensor);
      const joined = (parts: FixtureTensor[]) => ({
        data: Float32Array.from(parts.flatMap(({ data }) => [...data])),
        shape: [parts.reduce((sum, { shape }) => sum + (shape[0] as number), 0), ...(parts[0]?.shape.slice(1) ?? [])],
      });
      const wanted = joined(both(''));
      assert.deepEqual(pixels.pixel_values?.shape, wanted.shape);
      assert.equal(maxDifference(pixels.pixel_values?.data ?? [], wanted.data), 0);
      assert.deepEqual(pixels.image_grid_thw, joined(both('grid.')));
      check(pixels.pixel_values_videos, 'video');
      await model.dispose();
    });
  }
}
