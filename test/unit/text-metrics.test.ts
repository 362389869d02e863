import assert from 'node:assert/strict';
import { test } from 'node:test';
import { bleu, rougeL, scoreAnswers, words } from '../../lib/api/text-metrics.js';

const close = (actual: number, expected: number) =>
  assert.ok(Math.abs(actual - expected) < 1e-9, `${actual} ${expected}`);

// Reference values: nltk 3.10 sentence_bleu with SmoothingFunction().method3, rouge_score 0.1.2 rougeL without stemming.
test('ROUGE-L and BLEU equal the usual packages', () => {
  const cases: [string, string, number, number][] = [
    ['the cat sat on the mat', 'the cat is on the mat', 0.8333333333333334, 0.37991784282579627],
    ['a red circle and two blue squares', 'a red circle and two blue squares', 1.0, 1.0],
    ['two squares', 'a red circle and two blue squares on the left side', 0.3076923076923077, 0.003927623392184509],
    [
      'there are three green triangles at the top of it',
      'there are three triangles',
      0.5714285714285715,
      0.16784459625186196,
    ],
    ['nothing here', 'a cat', 0.0, 0],
    ['cat cat cat', 'the cat', 0.4, 0.2259005009024612],
  ];
  for (const [answer, reference, rouge, score] of cases) {
    close(rougeL(words(answer), words(reference)), rouge);
    close(bleu(words(answer), words(reference)), score);
  }
});

test('words: Chinese by characters, the rest by words, punctuation apart', () => {
  assert.deepEqual(words('A red circle, 两个蓝色!'), ['a', 'red', 'circle', ',', '两', '个', '蓝', '色', '!']);
});

test('means over rows; exact match ignores white space at the ends', () => {
  const scores = scoreAnswers([
    { answer: ' The cat. ', reference: 'The cat.' },
    { answer: 'dog', reference: 'The cat.' },
  ]);
  close(scores.exactMatch, 0.5);
  close(scores.rougeL, 0.5);
});
