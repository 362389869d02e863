/** Long work on the command line: Ctrl-C, and models that have to be downloaded first. */
import { resolveModel } from '../hub/index.js';
import { bytes } from '../report/format.js';
import { type CliIo, INTERRUPTED } from './command.js';

/**
 * Runs `work` with a signal that Ctrl-C or SIGTERM aborts, so that it can clean up; a second one ends the process.
 * Rejects with `ERR_MARTLET_ABORTED` then.
 */
export async function interruptible<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const abort = new AbortController();
  const interrupt = () => {
    if (abort.signal.aborted) process.exit(INTERRUPTED);
    abort.abort(new DOMException('interrupted', 'AbortError'));
  };
  process.on('SIGINT', interrupt);
  process.on('SIGTERM', interrupt);
  try {
    return await work(abort.signal);
  } finally {
    process.off('SIGINT', interrupt);
    process.off('SIGTERM', interrupt);
  }
}

/** The folder of a model, downloaded first if it must be: a line on standard error says so. */
export async function resolveWithNotice(model: string, io: CliIo, signal: AbortSignal): Promise<string> {
  let noted = -1;
  return resolveModel(model, {
    signal,
    onProgress: ({ bytes: done, totalBytes }) => {
      const percent = totalBytes > 0 ? Math.floor((10 * done) / totalBytes) * 10 : 0;
      if (percent > noted) io.stderr.write(`downloading ${model}: ${bytes(done)} of ${bytes(totalBytes)}\n`);
      noted = Math.max(noted, percent);
    },
  });
}
