/** Data files → rows, all of them checked before training starts. */

import { MartletError } from '../errors.js';
import type { Processor } from '../processing/types.js';
import { ImageResolver } from './images.js';
import { readRows, Yielder } from './read.js';
import { parseRow, RowError, rowId } from './rows.js';
import { type CutStrategy, cutSample, isTrained, tokenCount } from './truncate.js';
import type { DatasetSpec, Row, RowProblem } from './types.js';

export type { DatasetSpec, Row, RowProblem, RowSource } from './types.js';

/** Rows whose pictures are looked at together. */
const CONCURRENCY = 16;
const SHOWN_PROBLEMS = 10;

export interface LoadDatasetOptions {
  onBadRow: 'error' | 'skip';
  processor: Processor;
  /** Longest row in tokens, image tokens counted. */
  maxLength: number;
  /** A longer row: `delete` lists it under `skipped`, `raise` makes it a bad row; `left`, `right` and `split` keep pieces of it. */
  truncationStrategy: 'delete' | 'raise' | CutStrategy;
  signal?: AbortSignal;
  onProgress?: (rows: number) => void;
}

export interface LoadedDataset {
  rows: Row[];
  /** Tokens of each row. */
  lengths: number[];
  /** Rows left out, each with its reason. */
  skipped: RowProblem[];
}

/**
 * Reads, resolves and checks every row: its form, its pictures' headers, its length. In `error` mode all bad rows of all files come as one error.
 *
 * @throws ERR_MARTLET_DATASET with `details.problems`; `code` of each says what is wrong with it
 */
export async function loadDataset(specs: DatasetSpec[], options: LoadDatasetOptions): Promise<LoadedDataset> {
  const out: LoadedDataset = { rows: [], lengths: [], skipped: [] };
  const bad: RowProblem[] = [];
  const yielder = new Yielder();
  for (const spec of specs) {
    const resolver = new ImageResolver(spec);
    let batch: Promise<Checked>[] = [];
    let taken = 0;
    const drain = async () => {
      for (const checked of await Promise.all(batch)) {
        if ('pieces' in checked) {
          out.rows.push(...checked.pieces);
          out.lengths.push(...checked.lengths);
        } else if ('problem' in checked) (checked.tooLong ? out.skipped : bad).push(checked.problem);
        else {
          out.rows.push(checked.row);
          out.lengths.push(checked.length);
        }
      }
      batch = [];
      options.onProgress?.(out.rows.length);
    };
    for await (const raw of readRows(spec.path, options.signal)) {
      if (spec.sample !== undefined && taken >= spec.sample) break;
      taken++;
      batch.push(checkRow(raw, spec, resolver, options));
      if (batch.length >= CONCURRENCY) await drain();
      await yielder.turn(options.signal);
    }
    await drain();
    if (taken === 0) throw new MartletError('ERR_MARTLET_DATASET', `${spec.path} holds no rows.`, { file: spec.path });
  }
  if (bad.length > 0 && options.onBadRow === 'error') throw badRows(bad);
  out.skipped.push(...bad);
  if (out.rows.length === 0 && specs.length > 0) {
    throw new MartletError(
      'ERR_MARTLET_DATASET',
      `No row of ${specs.map(({ path }) => path).join(', ')} can be used. First reason: ${out.skipped[0]?.message ?? 'unknown'}.${bad.length === 0 ? ' Raise max_length, or cut the rows with truncation_strategy: left or right.' : ''}`,
      {
        problems: out.skipped,
      },
    );
  }
  return out;
}

type Checked =
  | { row: Row; length: number }
  | { pieces: Row[]; lengths: number[] }
  | { problem: RowProblem; tooLong: boolean };

async function checkRow(
  raw: { value: unknown; row: number; line?: number; error?: string },
  spec: DatasetSpec,
  resolver: ImageResolver,
  options: LoadDatasetOptions,
): Promise<Checked> {
  const source = { file: spec.path, row: raw.row, ...(raw.line !== undefined && { line: raw.line }) };
  const id = rowId(raw.value);
  try {
    if (raw.error !== undefined) throw new RowError(`not valid JSON: ${raw.error}`);
    const { videoTokenId } = options.processor;
    const parsed = parseRow(raw.value, { takesVideos: videoTokenId !== undefined });
    const [messages, images, videos] = await Promise.all([
      Promise.all(parsed.messages.map((message) => resolver.message(message))),
      Promise.all(parsed.images.map((image) => resolver.resolve(image))),
      Promise.all(parsed.videos.map((video) => resolver.video(video))),
    ]);
    const { objects, vision } = parsed;
    const row: Row = {
      messages,
      images,
      ...(videos.length > 0 && { videos }),
      ...(objects && { objects }),
      ...(vision && { vision }),
      ...(id !== undefined && { id }),
      source,
    };
    // Reads the pictures' headers: a missing or broken one is found here, before training.
    const length = await options.processor.countTokens(
      { messages, images, videos, objects, vision },
      options.signal ? { signal: options.signal } : {},
    );
    if (length <= options.maxLength) return { row, length };
    if (options.truncationStrategy !== 'delete' && options.truncationStrategy !== 'raise') {
      return await cutRow(row, options.truncationStrategy, options);
    }
    const message = `the row has ${length} tokens, more than max_length ${options.maxLength}`;
    return {
      problem: { ...source, code: 'ERR_MARTLET_DATASET', message, ...(id !== undefined && { id }) },
      tooLong: options.truncationStrategy === 'delete',
    };
  } catch (error) {
    if (error instanceof MartletError && error.code === 'ERR_MARTLET_ABORTED') throw error;
    if (!(error instanceof RowError || error instanceof MartletError)) throw error;
    const field = error instanceof RowError ? error.field : (error.details.field as string | undefined);
    return {
      problem: {
        ...source,
        code: error instanceof MartletError ? error.code : 'ERR_MARTLET_DATASET',
        message: error.message,
        ...(id !== undefined && { id }),
        ...(field !== undefined && { field }),
      },
      tooLong: false,
    };
  }
}

/** The pieces of a row that have something to learn. */
async function cutRow(row: Row, strategy: CutStrategy, options: LoadDatasetOptions): Promise<Checked> {
  const { signal, maxLength } = options;
  const sample = await options.processor.encode(row, { for: 'train', ...(signal && { signal }) });
  const kept = cutSample(sample, maxLength, strategy).flatMap((piece, i) =>
    isTrained(piece) ? [{ row: { ...row, piece: i }, length: tokenCount(piece) }] : [],
  );
  if (kept.length === 0) {
    throw new RowError(
      `the row has ${tokenCount(sample)} tokens; cut to max_length ${maxLength} (${strategy}) no trained token is left`,
    );
  }
  return { pieces: kept.map((piece) => piece.row), lengths: kept.map((piece) => piece.length) };
}

function badRows(problems: RowProblem[]): MartletError {
  const lines = problems.slice(0, SHOWN_PROBLEMS).map(({ file, row, line, id, message }) => {
    return `  ${file} row ${row}${line === undefined ? '' : ` (line ${line})`}${id === undefined ? '' : `, id ${id}`}: ${message}`;
  });
  if (problems.length > SHOWN_PROBLEMS)
    lines.push(`  … and ${problems.length - SHOWN_PROBLEMS} more (details.problems)`);
  const [first] = problems as [RowProblem];
  return new MartletError(
    'ERR_MARTLET_DATASET',
    `${problems.length} row(s) cannot be used. Correct them, or set on_bad_row: skip.\n${lines.join('\n')}`,
    { file: first.file, row: first.row, line: first.line, id: first.id, field: first.field, problems },
  );
}
