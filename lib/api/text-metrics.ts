/** Answers against references: exact match, ROUGE-L, BLEU. Scores are 0 to 1, means over the rows. */

export interface TextScores {
  exactMatch: number;
  rougeL: number;
  bleu: number;
}

/** Words, and each Chinese, Japanese or Korean character by itself, as ms-swift's evaluation splits them in effect. */
export function words(text: string): string[] {
  return (
    text
      .toLowerCase()
      .match(
        /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}]|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu,
      ) ?? []
  );
}

export function scoreAnswers(pairs: { answer: string; reference: string }[]): TextScores {
  const sum = { exactMatch: 0, rougeL: 0, bleu: 0 };
  for (const { answer, reference } of pairs) {
    const [hypothesis, expected] = [words(answer), words(reference)];
    sum.exactMatch += answer.trim() === reference.trim() ? 1 : 0;
    sum.rougeL += rougeL(hypothesis, expected);
    sum.bleu += bleu(hypothesis, expected);
  }
  const n = Math.max(1, pairs.length);
  return { exactMatch: sum.exactMatch / n, rougeL: sum.rougeL / n, bleu: sum.bleu / n };
}

/** F1 of the longest common subsequence (Lin 2004, as the rouge_score package). */
export function rougeL(hypothesis: string[], reference: string[]): number {
  if (hypothesis.length === 0 || reference.length === 0) return 0;
  let before = new Array<number>(reference.length + 1).fill(0);
  for (const word of hypothesis) {
    const row = [0];
    reference.forEach((expected, j) => {
      row.push(word === expected ? (before[j] as number) + 1 : Math.max(before[j + 1] as number, row[j] as number));
    });
    before = row;
  }
  const common = before[reference.length] as number;
  if (common === 0) return 0;
  const precision = common / hypothesis.length;
  const recall = common / reference.length;
  return (2 * precision * recall) / (precision + recall);
}

/** Sentence BLEU-4 with NLTK's smoothing method 3 (a match of 0 counts 1 / 2^k of one), which is ms-swift's. */
export function bleu(hypothesis: string[], reference: string[]): number {
  if (hypothesis.length === 0) return 0;
  const logs: number[] = [];
  let halvings = 1;
  for (let n = 1; n <= 4; n++) {
    const expected = counts(reference, n);
    let matches = 0;
    for (const [gram, count] of counts(hypothesis, n)) matches += Math.min(count, expected.get(gram) ?? 0);
    if (n === 1 && matches === 0) return 0;
    const total = Math.max(1, hypothesis.length - n + 1);
    logs.push(Math.log(matches > 0 ? matches / total : 1 / (2 ** halvings++ * total)));
  }
  const brevity = hypothesis.length > reference.length ? 1 : Math.exp(1 - reference.length / hypothesis.length);
  return brevity * Math.exp(logs.reduce((a, b) => a + b, 0) / 4);
}

function counts(tokens: string[], n: number): Map<string, number> {
  const out = new Map<string, number>();
  for (let i = 0; i + n <= tokens.length; i++) {
    const gram = tokens.slice(i, i + n).join('\u0001');
    out.set(gram, (out.get(gram) ?? 0) + 1);
  }
  return out;
}
