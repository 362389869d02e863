/** The typed side of the native engine: one thread with its queue of jobs, holding at most one model. */
import { type ErrorCode, type ErrorDetails, MartletError } from '../errors.js';
import type { Methods, RawEngine } from './binding.js';
import { loadAddon } from './load.js';

export interface CallOptions {
  /** What the arguments point into by index. Not to be changed until the call settles, but for flags (`left` of generate.batch). */
  buffers?: ArrayBufferView[];
  /** Aborting rejects with ERR_MARTLET_ABORTED, `cause` = the signal's reason. */
  signal?: AbortSignal;
  /** Progress events of the method. What it throws ends the job and is what the call rejects with. */
  // biome-ignore lint/suspicious/noExplicitAny: each method has its own event shape (see Methods)
  onEvent?: (event: any) => void;
}

export class Engine {
  readonly #raw: RawEngine;
  /** Queued or running; the first one runs. */
  readonly #jobs = new Set<object>();
  #closed: Promise<void> | undefined;

  constructor() {
    this.#raw = new (loadAddon().addon.Engine)();
  }

  get closed(): boolean {
    return this.#closed !== undefined;
  }

  /** Queues one job and gives its result. */
  async call<M extends keyof Methods>(
    method: M,
    args: Methods[M][0],
    options: CallOptions = {},
  ): Promise<{ result: Methods[M][1]; buffers: ArrayBuffer[] }> {
    const { buffers = [], signal, onEvent } = options;
    // The native error has no JavaScript frames: those of the caller are put on it below.
    const here = new Error();
    if (this.#closed) throw new MartletError('ERR_MARTLET_DISPOSED', 'The model has been disposed of.');
    if (signal?.aborted) throw aborted(signal);
    let thrown: { error: unknown } | undefined;
    // native code has nobody to hand a listener's error to: it ends the job
    const listener = (text: string) => {
      if (thrown) return;
      try {
        onEvent?.(JSON.parse(text));
      } catch (error) {
        thrown = { error };
        job.cancel();
      }
    };
    const job = this.#raw.submit(method, JSON.stringify(args), buffers, onEvent && listener);
    this.#jobs.add(job);
    const done = () => this.#jobs.delete(job);
    job.promise.then(done, done);
    let cancel = () => {};
    const leftQueue = new Promise<never>((_, reject) => {
      cancel = () => {
        job.cancel();
        // native code drops a waiting job only when its turn comes: the caller need not wait for the jobs before it
        const [running] = this.#jobs;
        if (running !== job && signal) reject(aborted(signal));
      };
    });
    signal?.addEventListener('abort', cancel, { once: true });
    try {
      const { result, buffers: out } = await Promise.race([job.promise, leftQueue]);
      if (thrown) throw thrown.error;
      return { result: JSON.parse(result, notFinite), buffers: out };
    } catch (error) {
      if (thrown) throw thrown.error;
      throw translate(error, here, signal, this.closed);
    } finally {
      signal?.removeEventListener('abort', cancel);
    }
  }

  /** Cancels what runs or waits, waits for the thread, frees the model. Idempotent. */
  close(): Promise<void> {
    this.#closed ??= this.#raw.close();
    return this.#closed;
  }
}

function aborted(signal: AbortSignal): MartletError {
  return new MartletError('ERR_MARTLET_ABORTED', 'The operation was aborted.', {}, { cause: signal.reason });
}

function translate(error: unknown, here: Error, signal: AbortSignal | undefined, closed: boolean): unknown {
  const native = error as { code?: ErrorCode; message: string; details?: string };
  if (typeof native?.code !== 'string') return error;
  if (native.code === 'ERR_MARTLET_ABORTED') {
    if (signal?.aborted) return aborted(signal);
    if (closed) return new MartletError('ERR_MARTLET_DISPOSED', 'The model was disposed of while this job ran.');
  }
  const details = native.details ? (JSON.parse(native.details) as ErrorDetails) : {};
  const out = new MartletError(native.code, native.message, details);
  out.stack = `${out.name}: ${out.message}\n${here.stack?.split('\n').slice(2).join('\n') ?? ''}`;
  return out;
}

/** JSON has no NaN and no infinity: native code's arrive as null. */
function notFinite(key: string, value: unknown): unknown {
  return value === null && (key === 'loss' || key === 'gradNorm') ? Number.NaN : value;
}
