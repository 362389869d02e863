/** Makes calls of the public API one after another, each whatever became of the others; prints how each ended. */
import { execFileSync } from 'node:child_process';
import { readFileSync, writeSync } from 'node:fs';
import { infer, MartletError, mergeAdapter, trainLoRA } from '../../../lib/index.js';
import { childArgs } from '../../support/process.js';

export type Attempt =
  | { call: 'train'; config: Record<string, unknown> }
  | { call: 'merge'; options: Parameters<typeof mergeAdapter>[0] }
  | { call: 'infer'; options: Parameters<typeof infer>[0] }
  /** From now on, only so many MB of written memory more; mapped files and reserved addresses are free. */
  | { call: 'limit-memory'; megabytes: number };

export type Outcome = { error: ReturnType<MartletError['toJSON']> } | { other: string } | { result: unknown };

function limitMemory(megabytes: number): void {
  const kilobytes = Number(/^VmData:\s+(\d+) kB$/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1]);
  execFileSync('prlimit', ['--pid', String(process.pid), `--data=${(kilobytes + megabytes * 1024) * 1024}`]);
}

async function attempt(what: Attempt): Promise<unknown> {
  if (what.call === 'train') return await trainLoRA(what.config);
  if (what.call === 'merge') return await mergeAdapter(what.options);
  if (what.call === 'infer') return await infer(what.options);
  return limitMemory(what.megabytes);
}

async function main(): Promise<void> {
  for (const what of childArgs<Attempt[]>()) {
    const outcome: Outcome = await attempt(what).then(
      (result) => ({ result: result ?? null }),
      (error) => (error instanceof MartletError ? { error: error.toJSON() } : { other: String(error.stack) }),
    );
    writeSync(1, `${JSON.stringify(outcome)}\n`);
  }
}

void main();
