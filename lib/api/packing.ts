/** Rows into bins of at most `capacity` tokens, and orders that put rows of similar length together. */
import type { Rng } from './rng.js';

/**
 * First fit, the longest row first: each row goes into the first bin that has room for it. Rows of equal length keep the order of `order`. The result
 * follows from the arguments alone; a row longer than `capacity` has a bin to itself.
 */
export function firstFit(order: ArrayLike<number>, lengths: number[], capacity: number): number[][] {
  const rows = Array.from(order).sort((a, b) => (lengths[b] as number) - (lengths[a] as number));
  // A tree of the largest room in each range of bins finds the first that fits in log n steps.
  let leaves = 1;
  while (leaves < rows.length) leaves *= 2;
  const room = new Float64Array(2 * leaves).fill(capacity);
  const bins: number[][] = [];
  for (const row of rows) {
    const length = Math.min(lengths[row] as number, capacity);
    let node = 1;
    while (node < leaves) node = (room[2 * node] as number) >= length ? 2 * node : 2 * node + 1;
    const bin = node - leaves;
    while (bins.length <= bin) bins.push([]);
    (bins[bin] as number[]).push(row);
    room[node] = (room[node] as number) - length;
    for (node >>= 1; node > 0; node >>= 1)
      room[node] = Math.max(room[2 * node] as number, room[2 * node + 1] as number);
  }
  return bins;
}

/** transformers' length grouping: random chunks of about 50 batches, each sorted by falling length; the longest of all rows comes first. */
export function groupByLength(rng: Rng, lengths: number[], batchRows: number): Uint32Array {
  const n = lengths.length;
  const batches = Math.min(Math.floor(n / (batchRows * 4)), 50) || 1;
  const chunkRows = batches * batchRows;
  const order = rng.permutation(n);
  const length = (row: number) => lengths[row] as number;
  let longest = 0;
  for (let begin = 0; begin < n; begin += chunkRows) {
    order.subarray(begin, begin + chunkRows).sort((a, b) => length(b) - length(a));
    if (length(order[begin] as number) > length(order[longest] as number)) longest = begin;
  }
  const first = order[0] as number;
  order[0] = order[longest] as number;
  order[longest] = first;
  return order;
}
