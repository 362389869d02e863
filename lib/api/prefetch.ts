/** Encodes the rows of coming steps while the current one is computed: a bounded distance ahead. */
import type { EncodedSample } from '../processing/types.js';

/** One encoded row of a step. */
export interface LoadedRow {
  row: number;
  sample: EncodedSample;
}

export interface LoadedStep<S> {
  step: S;
  microBatches: LoadedRow[][];
}

export interface PrefetchOptions<S> {
  steps: Iterator<S>;
  /** The rows of a step, by micro-batch. */
  rows: (step: S) => number[][];
  /** undefined = the row is left out (the caller has recorded why). */
  encode: (row: number) => Promise<EncodedSample | undefined>;
  /** Rows encoded or waiting at once, unless a single step has more. */
  maxRows: number;
  /** Decoded pictures waiting at once, in bytes, unless a single step has more. */
  maxBytes: number;
}

export class Prefetcher<S> {
  readonly #options: PrefetchOptions<S>;
  readonly #queue: { rows: number; bytes: number; loaded: Promise<LoadedStep<S>> }[] = [];
  #ended = false;

  constructor(options: PrefetchOptions<S>) {
    this.#options = options;
    this.#fill();
  }

  /** The next step with its rows; undefined after the last. */
  async next(): Promise<LoadedStep<S> | undefined> {
    this.#fill();
    const entry = this.#queue[0];
    if (!entry) return undefined;
    const loaded = await entry.loaded;
    this.#queue.shift();
    this.#fill();
    return loaded;
  }

  #fill(): void {
    const { steps, rows, maxRows, maxBytes } = this.#options;
    while (!this.#ended) {
      const queued = this.#queue.reduce((sum, entry) => sum + entry.rows, 0);
      const bytes = this.#queue.reduce((sum, entry) => sum + entry.bytes, 0);
      if (this.#queue.length > 0 && (queued >= maxRows || bytes >= maxBytes)) return;
      const next = steps.next();
      if (next.done) {
        this.#ended = true;
        return;
      }
      const batches = rows(next.value);
      const entry = { rows: batches.flat().length, bytes: 0, loaded: this.#load(next.value, batches) };
      entry.loaded.then(
        (loaded) => {
          entry.bytes = pixelBytes(loaded);
        },
        () => {}, // next() throws it
      );
      this.#queue.push(entry);
    }
  }

  async #load(step: S, batches: number[][]): Promise<LoadedStep<S>> {
    const microBatches: LoadedRow[][] = [];
    for (const batch of batches) {
      const loaded = await Promise.all(batch.map(async (row) => ({ row, sample: await this.#options.encode(row) })));
      const kept = loaded.filter((entry): entry is LoadedRow => entry.sample !== undefined);
      if (kept.length > 0) microBatches.push(kept);
    }
    return { step, microBatches };
  }
}

function pixelBytes(loaded: LoadedStep<unknown>): number {
  const pictures = new Set(loaded.microBatches.flat().flatMap(({ sample }) => sample.images.map(({ data }) => data)));
  return [...pictures].reduce((sum, data) => sum + data.byteLength, 0);
}
