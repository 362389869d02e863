/**
 * bfloat16 on the GPU. The fixtures' numbers are transformers' and PEFT's in float32; their random weights are large, so that bfloat16 alone moves
 * logits by some percent. At the public shapes the benchmark's gate holds loss and gradients to transformers + PEFT (bench/run.mjs).
 */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import type { Engine } from '../../lib/native/engine.js';
import { device } from '../support/device.js';
import { cosine, relativeError } from '../support/fixtures.js';
import { assertGreedy } from '../support/greedy.js';
import { QwenFixture, using } from '../support/qwen-parity.js';
import { QWEN_FAMILIES } from '../support/qwen-vl.js';

for (const family of QWEN_FAMILIES) {
  describe(family, () => {
    const fixture = new QwenFixture(family, device, 'bfloat16');
    const { expectedJson } = fixture;

    describe('forward', () => {
      let engine: Engine;
      before(async () => {
        engine = await fixture.open('model-4x');
      });
      after(() => engine.close());

      for (const name of ['single', 'text-only', 'two-images', 'video', 'image-video']) {
        test(`loss and logits: ${name}`, async (t) => {
          const { loss, logits } = await fixture.logits(engine, name);
          const distance = Math.abs(loss / (expectedJson.losses[name]?.loss as number) - 1);
          const error = relativeError(logits, fixture.tensor(`labelled.${name}`).data);
          t.diagnostic(`loss ${distance.toExponential(1)}, logits ${error.toExponential(1)}`);
          assert.ok(distance < 2e-2, `loss: ${distance}`);
          assert.ok(error < 8e-2, `logits: ${error}`); // at most 4.9 % on the CPU
        });
      }

      const held = async (name: string, answer: number[]) => {
        const buffers: ArrayBufferView[] = [];
        const sample = await fixture.sample(name, buffers, 'promptIds');
        await assertGreedy(engine, sample, buffers, fixture.case(name).default.promptIds, answer);
      };

      test('the cached decode path chooses what the whole pass would', async () => {
        for (const name of Object.keys(expectedJson.greedy)) await held(name, await fixture.greedy(engine, name));
      });

      test('several rows at once choose what the whole pass of each would', async () => {
        const all = Object.keys(expectedJson.greedy);
        for (const rows of [2, 5, 16, 19]) {
          const names = Array.from({ length: rows }, (_, i) => all[i % all.length] as string);
          const answers = await fixture.greedyBatch(engine, names);
          for (const [i, name] of names.entries()) await held(name, answers[i] as number[]);
        }
      });
    });

    for (const recompute of ['none', 'cheap', 'mlp', 'layer'] as const) {
      test(`the LoRA gradient points where PEFT's in float32 does, recompute: ${recompute}`, async (t) => {
        await using(fixture.open('model-4x'), async (engine) => {
          await engine.call('train.begin', { ...fixture.lora('adapter-peft'), recompute });
          const { gradients } = await fixture.gradients(engine, expectedJson.loraGradients.rows);
          const own = [...gradients.values()].flatMap((gradient) => [...gradient]);
          const reference = [...gradients.keys()].flatMap((name) => [...fixture.tensor(`grad.${name}`).data]);
          const found = cosine(own, reference);
          t.diagnostic(`cosine ${found}`);
          assert.ok(found > 0.995, `cosine ${found}`);
        });
      });
    }

    test('the losses of a 20-step curve stay with the float32 reference', async (t) => {
      await using(fixture.open('model-4x'), async (engine) => {
        await engine.call('train.begin', fixture.lora('adapter-peft'));
        let worst = 0;
        for (const { step, result } of await fixture.trainingCurve(engine))
          worst = Math.max(worst, Math.abs(result.loss / step.loss - 1));
        t.diagnostic(`largest relative distance: ${worst}`);
        assert.ok(worst < 1e-2, String(worst));
      });
    });
  });
}
