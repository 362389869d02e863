/** JSON arrays and JSONL, row by row, so that a large file neither blocks the event loop nor hides which row is broken. */
import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { MartletError } from '../errors.js';

export interface RawRow {
  value: unknown;
  row: number;
  line?: number;
  /** Set when the text of this row is not JSON. */
  error?: string;
}

/** Work between two turns of the event loop. */
const SLICE_MS = 15;

/** Lets the event loop run when this much time has passed since the last turn. */
export class Yielder {
  #last = performance.now();
  async turn(signal?: AbortSignal): Promise<void> {
    if (performance.now() - this.#last < SLICE_MS) return;
    await nextTurn();
    if (signal?.aborted)
      throw new MartletError('ERR_MARTLET_ABORTED', 'The operation was aborted.', {}, { cause: signal.reason });
    this.#last = performance.now();
  }
}

/** @throws ERR_MARTLET_DATASET for a file that is missing, cut short or not JSON at all */
export async function* readRows(file: string, signal?: AbortSignal): AsyncGenerator<RawRow> {
  try {
    const info = await stat(file);
    if (!info.isFile()) throw new Error('it is not a file');
    if (info.size === 0) throw new Error('it is empty');
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
    throw new MartletError(
      'ERR_MARTLET_DATASET',
      missing
        ? `The data file ${file} does not exist. Check dataset (paths start from the working directory) and dataset_root.`
        : `The data file ${file} cannot be read: ${(cause as Error).message}.`,
      { file },
      { cause },
    );
  }
  const chunks = createReadStream(file, { encoding: 'utf8', ...(signal && { signal }) }) as AsyncIterable<string>;
  const source = chunks[Symbol.asyncIterator]();
  let head = '';
  for (;;) {
    const next = await source.next();
    if (next.done) break;
    head += next.value;
    if (head.trimStart() !== '') break;
  }
  const text = restart(head.replace(/^\uFEFF/, ''), source);
  yield* head
    .replace(/^\uFEFF/, '')
    .trimStart()
    .startsWith('[')
    ? arrayRows(file, text, signal)
    : lineRows(text, signal);
}

async function* restart(head: string, rest: AsyncIterator<string>): AsyncGenerator<string> {
  yield head;
  for (;;) {
    const next = await rest.next();
    if (next.done) return;
    yield next.value;
  }
}

function parsed(text: string, row: number, line?: number): RawRow {
  const place = { row, ...(line !== undefined && { line }) };
  try {
    return { value: JSON.parse(text), ...place };
  } catch (error) {
    return { value: undefined, error: (error as Error).message, ...place };
  }
}

async function* lineRows(text: AsyncIterable<string>, signal?: AbortSignal): AsyncGenerator<RawRow> {
  const yielder = new Yielder();
  let rest = '';
  let line = 0;
  let row = 0;
  for await (const chunk of text) {
    const lines = (rest + chunk).split('\n');
    rest = lines.pop() as string;
    for (const content of lines) {
      line++;
      if (content.trim() !== '') yield parsed(content, row++, line);
      await yielder.turn(signal);
    }
  }
  if (rest.trim() !== '') yield parsed(rest, row, line + 1);
}

/** Cuts the top-level array into the texts of its items: a scan for brackets outside strings. */
async function* arrayRows(file: string, text: AsyncIterable<string>, signal?: AbortSignal): AsyncGenerator<RawRow> {
  const yielder = new Yielder();
  let depth = 0;
  let inString = false;
  let escaped = false;
  let item = '';
  let row = 0;
  let closed = false;
  for await (const chunk of text) {
    let start = 0;
    for (let i = 0; i < chunk.length; i++) {
      const c = chunk.charCodeAt(i);
      if (inString) {
        if (escaped) escaped = false;
        else if (c === 0x5c) escaped = true;
        else if (c === 0x22) inString = false;
        continue;
      }
      if (c === 0x22) inString = true;
      else if (c === 0x5b || c === 0x7b) {
        if (++depth === 1) start = i + 1;
      } else if (c === 0x5d || c === 0x7d) {
        depth--;
        if (depth === 0) {
          item += chunk.slice(start, i);
          if (item.trim() !== '' || row > 0) yield parsed(item, row++);
          item = '';
          closed = true;
          const after = chunk.slice(i + 1).trim();
          if (after !== '')
            throw new MartletError('ERR_MARTLET_DATASET', `${file} holds more text after its JSON array.`, { file });
          start = chunk.length;
          break;
        }
      } else if (c === 0x2c && depth === 1) {
        item += chunk.slice(start, i);
        yield parsed(item, row++);
        item = '';
        start = i + 1;
      }
      if ((i & 0xffff) === 0) await yielder.turn(signal);
    }
    if (!closed) item += chunk.slice(start);
    await yielder.turn(signal);
  }
  if (!closed) {
    throw new MartletError(
      'ERR_MARTLET_DATASET',
      `${file} is cut short: its JSON array does not end (inside row ${row}). Download or export the file again.`,
      { file, row },
    );
  }
}
