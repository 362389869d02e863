/** Everything a training run writes about itself: `logging.jsonl` (ms-swift's keys), `logs/train.log`, `runs/` (TensorBoard), `images/` (plots). */
import { type FileHandle, open, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { TrainEvent } from '../api/types.js';
import { ioError, makeDir } from '../files.js';
import { duration, gib, rounded } from './format.js';
import { Plots } from './plots.js';
import { describe } from './progress.js';
import { TensorBoardWriter } from './tensorboard.js';

/** One line of `logging.jsonl`. */
export type LogRecord = Record<string, unknown>;

export interface RunLogOptions {
  outputDir: string;
  totalSteps: number;
  /** Steps done before this process took over a resumed run: they do not count for the speed. */
  resumedStep: number;
  tensorboard: boolean;
}

const ANSWER_KEYS = { exactMatch: 'exact_match', rougeL: 'rouge_l', bleu: 'bleu' } as const;

type StepEvent = Extract<TrainEvent, { type: 'step' }>;
type EvalEvent = Extract<TrainEvent, { type: 'eval' }>;

export class RunLog {
  /** What was logged so far, numbers only: `log_history` of `trainer_state.json`. */
  readonly history: LogRecord[] = [];
  readonly #totalSteps: number;
  readonly #resumedStep: number;
  readonly #jsonl: LineFile;
  readonly #text: LineFile;
  readonly #board: TensorBoardWriter | undefined;
  readonly #plots: Plots;

  private constructor(options: RunLogOptions, jsonl: LineFile, text: LineFile, board: TensorBoardWriter | undefined) {
    this.#plots = new Plots(join(options.outputDir, 'images'));
    this.#totalSteps = options.totalSteps;
    this.#resumedStep = options.resumedStep;
    this.#jsonl = jsonl;
    this.#text = text;
    this.#board = board;
  }

  /** Opens the files for appending, so that a resumed run continues them. */
  static async open(options: RunLogOptions): Promise<RunLog> {
    const opened: LineFile[] = [];
    try {
      opened.push(await LineFile.open(join(options.outputDir, 'logging.jsonl')));
      opened.push(await LineFile.open(join(options.outputDir, 'logs', 'train.log')));
      const board = options.tensorboard ? await TensorBoardWriter.create(join(options.outputDir, 'runs')) : undefined;
      const log = new RunLog(options, opened[0] as LineFile, opened[1] as LineFile, board);
      if (options.resumedStep > 0) await log.#recall(join(options.outputDir, 'logging.jsonl'), options.resumedStep);
      return log;
    } catch (error) {
      for (const file of opened) await file.close();
      throw error;
    }
  }

  /** Curves of a resumed run go on: their points up to the checkpoint come from logging.jsonl. */
  async #recall(path: string, resumedStep: number): Promise<void> {
    for (const line of (await readFile(path, 'utf8')).split('\n')) {
      let record: LogRecord;
      try {
        record = JSON.parse(line) as LogRecord;
      } catch {
        continue; // a line that a killed process left half-written
      }
      const step = Number.parseInt(String(record['global_step/max_steps']), 10);
      if (!(step <= resumedStep) || record.train_runtime !== undefined) continue;
      const values = Object.entries(record).flatMap(([key, value]): [string, number][] => {
        if (typeof value !== 'number') return [];
        return [[key.startsWith('eval_') ? `eval/${key.slice(5)}` : `train/${key}`, value]];
      });
      this.#plots.add(step, Object.fromEntries(values));
    }
  }

  /** Records one event in every file that has a place for it. */
  async event(event: TrainEvent): Promise<void> {
    for (const line of describe(event, this.#totalSteps)) await this.note(line);
    if (event.type === 'step') await this.#step(event);
    if (event.type === 'eval') await this.#eval(event);
  }

  /** A line of `train.log`, with the time in front. */
  async note(line: string): Promise<void> {
    await this.#text.append(`${new Date().toISOString()}  ${line}`);
  }

  /** A line of `logging.jsonl`. */
  async record(record: LogRecord): Promise<void> {
    await this.#jsonl.append(JSON.stringify(record));
  }

  async #step(event: StepEvent): Promise<void> {
    const { step, loss, gradNorm, learningRate, tokenAccuracy } = event;
    const epoch = rounded(event.epoch, 6);
    const secondsPerStep = event.elapsed / Math.max(1, step - this.#resumedStep);
    this.history.push({
      step,
      epoch,
      loss,
      grad_norm: gradNorm,
      learning_rate: learningRate,
      token_acc: tokenAccuracy,
    });
    await this.record({
      loss: rounded(loss, 8),
      grad_norm: rounded(gradNorm, 8),
      learning_rate: rounded(learningRate, 8),
      token_acc: rounded(tokenAccuracy, 8),
      epoch,
      'global_step/max_steps': `${step}/${this.#totalSteps}`,
      elapsed_time: duration(event.elapsed),
      remaining_time: duration(event.remaining),
      'memory(GiB)': gib(event.memory),
      'train_speed(s/it)': rounded(secondsPerStep, 6),
      'memory_allocated(GiB)': gib(event.memoryAllocated),
      tokens_per_second: rounded(event.tokensPerSecond, 6),
      labelled_tokens_per_second: rounded(event.labelledTokensPerSecond, 6),
      samples_per_second: rounded(event.samplesPerSecond, 6),
      data_wait: rounded(event.dataWait, 4),
      ...(event.lossScale !== 1 && { loss_scale: event.lossScale }),
      ...(event.skippedSteps > 0 && { skipped_steps: event.skippedSteps }),
      ...(event.modelFlopUtilisation !== undefined && { MFU: rounded(event.modelFlopUtilisation, 4) }),
    });
    await this.#scalars(step, {
      'train/loss': loss,
      'train/grad_norm': gradNorm,
      'train/learning_rate': learningRate,
      'train/token_acc': tokenAccuracy,
      'train/epoch': event.epoch,
      'train/memory(GiB)': event.memory / 2 ** 30,
      'train/train_speed(s/it)': secondsPerStep,
      'train/memory_allocated(GiB)': event.memoryAllocated / 2 ** 30,
      'train/tokens_per_second': event.tokensPerSecond,
      'train/labelled_tokens_per_second': event.labelledTokensPerSecond,
      'train/samples_per_second': event.samplesPerSecond,
      'train/data_wait': event.dataWait,
      ...(event.lossScale !== 1 && { 'train/loss_scale': event.lossScale }),
      ...(event.skippedSteps > 0 && { 'train/skipped_steps': event.skippedSteps }),
      ...(event.modelFlopUtilisation !== undefined && { 'train/MFU': event.modelFlopUtilisation }),
    });
  }

  async #eval(event: EvalEvent): Promise<void> {
    const { step, loss, tokenAccuracy } = event;
    const epoch = rounded(event.epoch, 6);
    const answers = Object.fromEntries(
      (['exactMatch', 'rougeL', 'bleu'] as const).flatMap((key) =>
        event[key] === undefined ? [] : [[ANSWER_KEYS[key], event[key]]],
      ),
    );
    this.history.push({
      step,
      epoch,
      eval_loss: loss,
      eval_token_acc: tokenAccuracy,
      ...Object.fromEntries(Object.entries(answers).map(([key, value]) => [`eval_${key}`, value])),
    });
    await this.record({
      eval_loss: rounded(loss, 8),
      eval_token_acc: rounded(tokenAccuracy, 8),
      ...Object.fromEntries(Object.entries(answers).map(([key, value]) => [`eval_${key}`, rounded(value, 8)])),
      eval_runtime: rounded(event.seconds, 6),
      epoch,
      'global_step/max_steps': `${step}/${this.#totalSteps}`,
    });
    await this.#scalars(step, {
      'eval/loss': loss,
      'eval/token_acc': tokenAccuracy,
      'eval/runtime': event.seconds,
      ...Object.fromEntries(Object.entries(answers).map(([key, value]) => [`eval/${key}`, value])),
    });
  }

  async #scalars(step: number, values: Record<string, number>): Promise<void> {
    this.#plots.add(step, values);
    await this.#board?.scalars(step, values);
  }

  /** Also draws the curves: what there is of them, whatever ended the run. */
  async close(): Promise<void> {
    await this.#plots.write();
    await Promise.all([this.#jsonl.close(), this.#text.close(), this.#board?.close()]);
  }
}

/** A file that grows by whole lines. */
class LineFile {
  readonly #path: string;
  readonly #handle: FileHandle;

  private constructor(path: string, handle: FileHandle) {
    this.#path = path;
    this.#handle = handle;
  }

  static async open(path: string): Promise<LineFile> {
    try {
      await makeDir(join(path, '..'));
      return new LineFile(path, await open(path, 'a'));
    } catch (error) {
      throw ioError(error, 'write', path);
    }
  }

  async append(line: string): Promise<void> {
    try {
      await this.#handle.appendFile(`${line}\n`);
    } catch (error) {
      throw ioError(error, 'write', this.#path);
    }
  }

  async close(): Promise<void> {
    await this.#handle.close();
  }
}
