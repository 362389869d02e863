/** What is said of a curve, and when. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { LossAdvice } from '../../lib/api/loss-advice.js';

function said(losses: number[]): { at: number[]; text: string[]; end: string | undefined } {
  const advice = new LossAdvice();
  const found = losses.map((loss) => advice.add(loss));
  return {
    at: found.flatMap((text, i) => (text === undefined ? [] : [i + 1])),
    text: found.filter((text) => text !== undefined),
    end: advice.atEnd(),
  };
}
const curve = (steps: number, loss: (step: number) => number) => Array.from({ length: steps }, (_, i) => loss(i));

test('a loss that rises again is said once, with what helps', () => {
  const { at, text, end } = said(curve(80, (i) => (i < 30 ? 2 - i / 20 : 0.5 + (i - 30) / 10)));
  assert.equal(at.length, 1);
  assert.ok((at[0] as number) > 30 && (at[0] as number) < 45, `${at}`);
  assert.match(text[0] as string, /the loss rises: .* Lower learning_rate/);
  assert.equal(end, undefined);
});

test('a flat loss is said at the end; one that falls, and a run of few steps, are not', () => {
  assert.match(said(curve(40, (i) => 2 + (i % 2) / 100)).end ?? '', /the loss is flat: 2\.005 .* Raise learning_rate/);
  assert.deepEqual(said(curve(40, (i) => 2 - i / 40)), { at: [], text: [], end: undefined });
  assert.equal(said(curve(29, () => 2)).end, undefined);
});
