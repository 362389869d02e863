/** Training checkpoints: `checkpoint-N` folders and the state that continues a run from one. */
import { readFile, rename, rm } from 'node:fs/promises';
import { basename, join, resolve } from 'node:path';
import { MartletError } from '../errors.js';
import { copyFileAtomic, exists, ioError, listDir, writeFileAtomic } from '../files.js';
import type { LogRecord } from '../report/run-log.js';
import { listCheckpoints } from './output-dir.js';
import type { SchedulePlan } from './train-schedule.js';

const STATE_FILE = 'trainer_state.json';
const OPTIMIZER_FILE = 'optimizer.safetensors';
const WEIGHT_FILES =
  /^(adapter_config\.json|adapter_model\.safetensors|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)$/;

/** `trainer_state.json`: transformers' keys first, so that tools which read those work; then what a bit-exact continuation needs. */
export interface TrainerState {
  global_step: number;
  max_steps: number;
  epoch: number;
  num_train_epochs: number;
  best_metric: number | null;
  best_model_checkpoint: string | null;
  log_history: LogRecord[];
  num_input_tokens_seen: number;
  martlet: {
    version: 1;
    /** With global_step, the data cursor: the order of rows follows from these alone. */
    schedule: SchedulePlan;
    /** Of all rows, in file order. */
    dataset: string;
    /** Not yet logged when the checkpoint was written. */
    pending: LogInterval;
    /** Loss of the last step done. */
    last_loss: number;
    /** Exponential mean of the loss and the steps in it. */
    smoothed: { value: number; steps: number };
    skipped_steps: number;
    /** Metric of the best evaluation, which need not be that of a checkpoint. */
    best_evaluation: number | null;
    /** Evaluations since the best one. */
    evaluations_without_gain: number;
    /** Rows of a micro-batch after the memory ran out; null = as configured. */
    row_limit: number | null;
  };
}

/** Sums over the steps since the last log line. */
export interface LogInterval {
  steps: number;
  loss: number;
  labelledTokens: number;
  correctTokens: number;
  rows: number;
}

export async function readTrainerState(dir: string): Promise<TrainerState> {
  const path = join(dir, STATE_FILE);
  if (!(await exists(dir))) {
    throw new MartletError(
      'ERR_MARTLET_IO',
      `there is no checkpoint ${dir}. Give resume_from_checkpoint: true or the path of one.`,
      {
        path: dir,
      },
    );
  }
  for (const name of [STATE_FILE, OPTIMIZER_FILE]) {
    if (await exists(join(dir, name))) continue;
    throw new MartletError(
      'ERR_MARTLET_IO',
      `${dir} cannot be continued: it has no ${name}${name === OPTIMIZER_FILE ? ' (save_only_model leaves it out)' : ''}. To start a new run from its weights, use adapters: ${dir}.`,
      { path: dir, missing: name },
    );
  }
  let state: TrainerState;
  try {
    state = JSON.parse(await readFile(path, 'utf8')) as TrainerState;
  } catch (cause) {
    throw new MartletError(
      'ERR_MARTLET_IO',
      `cannot read ${path}: ${(cause as Error).message}. Continue from an earlier checkpoint: resume_from_checkpoint: PATH.`,
      { path },
      { cause },
    );
  }
  if (!Number.isInteger(state.global_step) || state.martlet?.version !== 1) {
    throw new MartletError(
      'ERR_MARTLET_IO',
      `${path} was not written by martlet: only its own checkpoints can be continued. To start from its weights, use adapters: ${dir}.`,
      { path },
    );
  }
  return state;
}

export async function writeTrainerState(dir: string, state: TrainerState): Promise<void> {
  await writeFileAtomic(join(dir, STATE_FILE), `${JSON.stringify(state, null, 2)}\n`);
}

/**
 * Keeps `limit` checkpoints: the one just written, the best, then the newest before it; removes the others whole. Those of later steps are of a run
 * that was continued from before them, and go first.
 */
export async function removeOldCheckpoints(
  outputDir: string,
  limit: number,
  { newest, best }: { newest: string; best: string | null },
): Promise<void> {
  const checkpoints = await listCheckpoints(outputDir);
  const written = checkpoints.find(({ dir }) => dir === newest)?.step ?? Number.POSITIVE_INFINITY;
  // a run must be able to continue, and to take its best weights at the end: these two stay whatever the limit
  const kept = new Set(checkpoints.filter(({ dir }) => dir === newest || dir === best));
  for (const checkpoint of [...checkpoints].reverse()) {
    if (checkpoint.step < written && kept.size < limit) kept.add(checkpoint);
  }
  for (const checkpoint of checkpoints) {
    if (kept.has(checkpoint)) continue;
    // renamed first, so that a half-removed folder is never taken for a checkpoint
    const doomed = join(outputDir, `.checkpoint-${checkpoint.step}.${process.pid}-00000000.tmp`);
    try {
      await rename(checkpoint.dir, doomed);
      await rm(doomed, { recursive: true });
    } catch (error) {
      throw ioError(error, 'remove', checkpoint.dir);
    }
  }
}

/** Names of checkpoints in `outputDir` that a run continued from `dir` leaves behind it: they are of the run before. */
export async function laterCheckpoints(outputDir: string, dir: string): Promise<string[]> {
  const checkpoints = await listCheckpoints(outputDir);
  const from = checkpoints.find((checkpoint) => checkpoint.dir === resolve(dir));
  return from === undefined ? [] : checkpoints.filter(({ step }) => step > from.step).map(({ dir }) => basename(dir));
}

/** Puts a checkpoint's weights into `outputDir` in place of those there. */
export async function copyCheckpointWeights(dir: string, outputDir: string): Promise<void> {
  const names = (await listDir(dir)).filter((name) => WEIGHT_FILES.test(name));
  // whole weights first, then what tells how to read them
  for (const name of names.sort((a, b) => Number(a.endsWith('.json')) - Number(b.endsWith('.json'))))
    await copyFileAtomic(join(dir, name), join(outputDir, name));
}

/** The folder that `resume_from_checkpoint` means. */
export async function findCheckpoint(outputDir: string, resume: true | string): Promise<string> {
  if (resume !== true) return resume;
  const newest = (await listCheckpoints(outputDir)).at(-1);
  if (newest) return newest.dir;
  throw new MartletError(
    'ERR_MARTLET_IO',
    `resume_from_checkpoint: true, but ${outputDir} holds no checkpoint-N folder. Leave resume_from_checkpoint out to start a new run.`,
    { path: outputDir },
  );
}
