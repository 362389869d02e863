/** A training run's folder: who may write there, what belongs to a run, which checkpoints it holds. */
import { open, readFile, realpath, rm } from 'node:fs/promises';
import { hostname } from 'node:os';
import { dirname, join, relative, sep } from 'node:path';
import { MartletError } from '../errors.js';
import { ensureWritableDir, exists, ioError, isDirectory, listDir } from '../files.js';

/** Answers of the last evaluation with predict_with_generate. */
export const PREDICTIONS_FILE = 'predict.jsonl';

const CHECKPOINT = /^checkpoint-(\d+)$/;
/** What a training run leaves at the top of its folder. */
const RUN_FILES =
  /^(checkpoint-\d+|adapter_config\.json|adapter_model\.(safetensors|bin)|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|args\.yaml|logging\.jsonl|predict\.jsonl|trainer_state\.json)$/;
/** Swept away with them when a run is overwritten. */
const RUN_DIRS = /^(logs|runs|images)$/;

export interface Checkpoint {
  step: number;
  dir: string;
}

/** Finished checkpoints in `outputDir`, oldest first. */
export async function listCheckpoints(outputDir: string): Promise<Checkpoint[]> {
  const found: Checkpoint[] = [];
  for (const name of await listDir(outputDir)) {
    const step = CHECKPOINT.exec(name)?.[1];
    if (step !== undefined) found.push({ step: Number(step), dir: join(outputDir, name) });
  }
  return found.sort((a, b) => a.step - b.step);
}

/** True when the folder holds the files of a training run. */
export async function holdsRun(outputDir: string): Promise<boolean> {
  return (await listDir(outputDir)).some((name) => RUN_FILES.test(name));
}

/** Creates the output folder if asked to. Refuses one that holds another run, or where the run would overwrite one of `inputs`. */
export async function checkOutputDir(
  outputDir: string,
  options: { resume: boolean; overwrite: boolean; inputs: string[]; create: boolean },
): Promise<void> {
  if (options.create) await ensureWritableDir(outputDir);
  else if (!(await exists(outputDir))) return;
  const output = await realpath(outputDir);
  for (const input of options.inputs) {
    if (!(await isDirectory(input))) continue;
    const path = relative(output, await realpath(input));
    const lost = path === '' || (options.overwrite && RUN_FILES.test(path.split(sep)[0] as string));
    if (lost) {
      throw new MartletError(
        'ERR_MARTLET_IO',
        `training would overwrite ${input}, which it reads, in output_dir ${outputDir}. Choose another output_dir.`,
        { path: outputDir, input },
      );
    }
  }
  if (!options.resume && !options.overwrite && (await holdsRun(outputDir))) {
    throw new MartletError(
      'ERR_MARTLET_IO',
      `output_dir ${outputDir} already holds a training run. Choose another output_dir, continue that run with ` +
        'resume_from_checkpoint: true, or replace it with overwrite_output_dir: true.',
      { path: outputDir, remedies: ['output_dir', 'resume_from_checkpoint', 'overwrite_output_dir'] },
    );
  }
}

/** Removes an earlier run's files, and nothing else, from `outputDir`. */
export async function removeRun(outputDir: string): Promise<void> {
  for (const name of await listDir(outputDir)) {
    if (!RUN_FILES.test(name) && !RUN_DIRS.test(name)) continue;
    const path = join(outputDir, name);
    try {
      await rm(path, { recursive: true });
    } catch (error) {
      throw ioError(error, 'remove', path);
    }
  }
}

const LOCK_NAME = '.martlet.lock';

interface LockOwner {
  pid: number;
  host: string;
  /** Tells a process from a later one with the same id (containers restart with the same ids). */
  started: string;
}

/** Start time of a process in clock ticks since boot; empty when it does not run or cannot be seen. */
async function startTime(pid: number): Promise<string> {
  try {
    const stat = await readFile(`/proc/${pid}/stat`, 'latin1');
    // the command name is in parentheses and may hold spaces; `starttime` is field 22
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19] ?? '';
  } catch {
    return '';
  }
}

/** Keeps a second run out of `outputDir`. The lock of a process that is gone is taken over. Returns the function that releases it. */
export async function lockOutputDir(outputDir: string): Promise<() => Promise<void>> {
  const path = join(outputDir, LOCK_NAME);
  const owner: LockOwner = { pid: process.pid, host: hostname(), started: await startTime(process.pid) };
  for (let attempt = 0; attempt < 3; attempt++) {
    try {
      const handle = await open(path, 'wx');
      try {
        await handle.writeFile(JSON.stringify(owner));
      } finally {
        await handle.close();
      }
      return () => rm(path, { force: true });
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw ioError(error, 'write', path);
    }
    const held = await readLock(path);
    if (held && (await isAlive(held, owner.host))) {
      throw new MartletError(
        'ERR_MARTLET_IO',
        `another training run (process ${held.pid} on ${held.host}) is writing to ${dirname(path)}. Wait for it, or choose another ` +
          `output_dir. If no such run exists, delete ${path}.`,
        { path: outputDir, lock: path, pid: held.pid, host: held.host },
      );
    }
    await rm(path, { force: true });
  }
  throw new MartletError('ERR_MARTLET_IO', `cannot take the lock ${path}: other runs keep taking it.`, { path });
}

async function readLock(path: string): Promise<LockOwner | undefined> {
  try {
    const owner = JSON.parse(await readFile(path, 'utf8')) as Partial<LockOwner>;
    if (typeof owner.pid === 'number' && typeof owner.host === 'string' && typeof owner.started === 'string') {
      return owner as LockOwner;
    }
  } catch {
    // gone in the meantime, or cut off by a crash: nobody holds it
  }
  return undefined;
}

async function isAlive(owner: LockOwner, host: string): Promise<boolean> {
  if (owner.host !== host) return true; // a shared disk: cannot be told from here
  try {
    process.kill(owner.pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
  const started = await startTime(owner.pid);
  return started === '' || started === owner.started;
}
