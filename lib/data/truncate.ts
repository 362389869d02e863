/** Rows longer than max_length: what is kept of them. A picture's tokens are kept or dropped together, and its pixels with them. */
import { MartletError } from '../errors.js';
import type { EncodedSample } from '../processing/types.js';

export type CutStrategy = 'left' | 'right' | 'split';

/** Tokens that a row brings into a batch: an encoder-decoder's on both sides. */
export function tokenCount({ inputIds, labels, decoderLabels }: EncodedSample): number {
  return inputIds.length + (decoderLabels ? (labels?.length ?? 0) : 0);
}

/**
 * The pieces of a row, each of at most `maxLength` tokens; one for `left` and `right`. An encoder-decoder's answer stays whole, its input is cut.
 *
 * @throws ERR_MARTLET_DATASET when such a row is to be split
 */
export function cutSample(sample: EncodedSample, maxLength: number, strategy: CutStrategy): EncodedSample[] {
  const { length } = sample.inputIds;
  if (tokenCount(sample) <= maxLength) return [sample];
  if (sample.decoderLabels) return cutInput(sample, maxLength - (tokenCount(sample) - length), strategy);
  const inside = (place: number) => (sample.mediaSpans ?? []).find(([begin, end]) => begin < place && place < end);
  const pieces: [number, number][] = [];
  if (strategy === 'left') {
    const begin = length - maxLength;
    pieces.push([inside(begin)?.[1] ?? begin, length]);
  } else if (strategy === 'right') {
    pieces.push([0, inside(maxLength)?.[0] ?? maxLength]);
  } else {
    for (let begin = 0; begin < length; ) {
      const end = Math.min(length, begin + maxLength);
      const span = inside(end);
      if (span === undefined || span[0] > begin) {
        pieces.push([begin, span?.[0] ?? end]);
        begin = span?.[0] ?? end;
      } else {
        begin = span[1]; // a picture of more than maxLength tokens fits into no piece
      }
    }
  }
  return pieces.map(([begin, end]) => slice(sample, begin, end));
}

/** The end token is kept, as transformers' tokenizers do; without room for input the row is no use. */
function cutInput(sample: EncodedSample, room: number, strategy: CutStrategy): EncodedSample[] {
  if (strategy === 'split') {
    throw new MartletError(
      'ERR_MARTLET_DATASET',
      'truncation_strategy: split cannot part a question from its answer, which an encoder-decoder reads apart: use left, right or delete.',
      { field: 'truncation_strategy' },
    );
  }
  if (room < 2) return [];
  const { inputIds } = sample;
  const body = { ...sample, inputIds: inputIds.subarray(0, -1) };
  const { labels, decoderLabels, ...input } = body;
  const [cut] = cutSample(input, room - 1, strategy) as [EncodedSample];
  return [{ ...sample, ...cut, inputIds: Int32Array.of(...cut.inputIds, inputIds.at(-1) as number) }];
}

function slice(sample: EncodedSample, begin: number, end: number): EncodedSample {
  const labels = sample.labels?.slice(begin, end);
  // nothing stands before the first token to predict it from
  if (labels && labels.length > 0) labels[0] = -100;
  const kept = (sample.mediaSpans ?? []).map(([from, to]) => from >= begin && to <= end);
  return {
    ...sample,
    inputIds: sample.inputIds.slice(begin, end),
    ...(labels && { labels }),
    images: sample.images.filter((_, i) => kept[i]),
    ...(sample.mediaSpans && {
      mediaSpans: sample.mediaSpans
        .filter((_, i) => kept[i])
        .map(([from, to]): [number, number] => [from - begin, to - begin]),
    }),
  };
}

/** Whether a sample has anything to learn. */
export function isTrained(sample: EncodedSample): boolean {
  return sample.labels?.some((label) => label !== -100) ?? false;
}
