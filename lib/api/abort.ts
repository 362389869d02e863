/** One way for every job to say that its caller's AbortSignal ended it. */
import { MartletError } from '../errors.js';

function aborted(signal: AbortSignal): MartletError {
  const reason = signal.reason as unknown;
  return new MartletError('ERR_MARTLET_ABORTED', 'aborted by its signal', {}, { cause: reason });
}

/** Throws `ERR_MARTLET_ABORTED` (cause: the signal's reason) when `signal` was aborted. */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw aborted(signal);
}

/** What to throw when a job failed: `ERR_MARTLET_ABORTED` if its signal was aborted, else the failure itself. */
export function abortedError(error: unknown, signal: AbortSignal | undefined): unknown {
  if (!signal?.aborted) return error;
  if (error instanceof MartletError && error.code === 'ERR_MARTLET_ABORTED' && error.cause !== undefined) return error;
  return aborted(signal);
}
