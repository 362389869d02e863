/** The handle that `trainLoRA` gives back: a promise of the result and a stream of events in one. */
import type { TrainEvent, TrainResult, TrainRun } from './types.js';

/** What the training loop sees of its handle. */
export interface RunControl {
  emit(event: TrainEvent): void;
  /** Aborted by the caller's signal or by leaving the event loop. */
  readonly signal: AbortSignal;
  /** Aborted by stop(): finish the step and save. */
  readonly stopSignal: AbortSignal;
}

/** Events kept for a loop that starts late; older ones are let go. */
const HISTORY_LIMIT = 10_000;

class EventStream implements AsyncIterator<TrainEvent> {
  readonly #queue: TrainEvent[];
  readonly #leave: () => Promise<void>;
  #waiting: { resolve: (result: IteratorResult<TrainEvent>) => void; reject: (error: unknown) => void }[] = [];
  #end: { error?: unknown } | undefined;

  constructor(history: TrainEvent[], leave: () => Promise<void>) {
    this.#queue = [...history];
    this.#leave = leave;
  }

  push(event: TrainEvent): void {
    const waiting = this.#waiting.shift();
    if (waiting) waiting.resolve({ value: event, done: false });
    else this.#queue.push(event);
  }

  finish(end: { error?: unknown }): void {
    this.#end = end;
    for (const waiting of this.#waiting) {
      if ('error' in end) waiting.reject(end.error);
      else waiting.resolve({ value: undefined, done: true });
    }
    this.#waiting = [];
  }

  async next(): Promise<IteratorResult<TrainEvent>> {
    const event = this.#queue.shift();
    if (event) return { value: event, done: false };
    if (this.#end && 'error' in this.#end) throw this.#end.error;
    if (this.#end) return { value: undefined, done: true };
    return new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }));
  }

  async return(): Promise<IteratorResult<TrainEvent>> {
    await this.#leave();
    return { value: undefined, done: true };
  }
}

class Run implements TrainRun {
  readonly result: Promise<TrainResult>;
  readonly #abort = new AbortController();
  readonly #streams = new Set<EventStream>();
  readonly #history: TrainEvent[] = [];
  readonly #stop = new AbortController();
  #settled: { error?: unknown } | undefined;

  constructor(body: (control: RunControl) => Promise<TrainResult>, signal: AbortSignal | undefined) {
    const control: RunControl = {
      emit: (event) => this.#emit(event),
      signal: signal ? AbortSignal.any([signal, this.#abort.signal]) : this.#abort.signal,
      stopSignal: this.#stop.signal,
    };
    this.result = body(control).then(
      (result) => {
        this.#emit({ type: 'done', ...result });
        this.#settle({});
        return result;
      },
      (error) => {
        this.#settle({ error });
        throw error;
      },
    );
  }

  // biome-ignore lint/suspicious/noThenProperty: the run is awaitable by contract
  then<A = TrainResult, B = never>(
    onFulfilled?: ((result: TrainResult) => A | PromiseLike<A>) | null,
    onRejected?: ((error: unknown) => B | PromiseLike<B>) | null,
  ): Promise<A | B> {
    return this.result.then(onFulfilled, onRejected);
  }

  stop(): void {
    this.#stop.abort();
  }

  [Symbol.asyncIterator](): AsyncIterator<TrainEvent> {
    // the loop itself throws the failure, so the promise may stay unwatched
    this.result.catch(() => {});
    const stream = new EventStream(this.#history, async () => {
      this.#streams.delete(stream);
      this.#abort.abort(new DOMException('the loop over the training events was left', 'AbortError'));
      await this.result.catch(() => {});
    });
    if (this.#settled) stream.finish(this.#settled);
    else this.#streams.add(stream);
    return stream;
  }

  #emit(event: TrainEvent): void {
    this.#history.push(event);
    if (this.#history.length > HISTORY_LIMIT) this.#history.shift();
    for (const stream of this.#streams) stream.push(event);
  }

  #settle(end: { error?: unknown }): void {
    this.#settled = end;
    for (const stream of this.#streams) stream.finish(end);
    this.#streams.clear();
  }
}

/** Starts `body` and wraps it into a run. */
export function startRun(body: (control: RunControl) => Promise<TrainResult>, signal?: AbortSignal): TrainRun {
  return new Run(body, signal);
}
