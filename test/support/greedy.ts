import assert from 'node:assert/strict';
import type { SampleArg } from '../../lib/native/binding.js';
import type { Engine } from '../../lib/native/engine.js';

/** Settings of a native `generate` that takes the highest logit, as long as it may. */
export const GREEDY = { temperature: 0, topP: 1, topK: 0, repetitionPenalty: 1, seed: 0, stopTokenIds: [] };

/**
 * Holds each token of a greedy answer to the whole pass, which has no cache: none has a logit above it, but for the roundings of bfloat16 (two
 * logits may lie closer together than those). `sample` is the prompt, with its buffers; they are added to.
 */
export async function assertGreedy(
  engine: Engine,
  sample: SampleArg,
  buffers: ArrayBufferView[],
  promptIds: number[],
  answer: number[],
): Promise<void> {
  assert.ok(answer.length > 0);
  const inputIds = [...promptIds, ...answer];
  const labels = inputIds.map((id, i) => (i < promptIds.length ? -100 : id));
  const row = {
    ...sample,
    inputIds: buffers.push(Int32Array.from(inputIds)) - 1,
    labels: buffers.push(Int32Array.from(labels)) - 1,
  };
  const { result, buffers: out } = await engine.call('score', { sample: row, logits: true }, { buffers });
  assert.ok(result.logits);
  const all = new Float32Array(out[result.logits.buffer] as ArrayBuffer);
  const vocab = result.logits.shape[1] as number;
  for (const [i, id] of answer.entries()) {
    const logits = all.subarray(i * vocab, (i + 1) * vocab);
    const highest = logits.reduce((a, b) => Math.max(a, b));
    assert.ok(highest - (logits[id] as number) <= 2 ** -6 * Math.abs(highest), `${sample.id}, token ${i}`);
  }
}
