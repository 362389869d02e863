/** The training loop: steps, logging, evaluation, checkpoints, the final save. */
import { join } from 'node:path';
import { configToYaml, type TrainConfig } from '../config/index.js';
import type { Row } from '../data/index.js';
import { tokenCount } from '../data/truncate.js';
import { MartletError } from '../errors.js';
import { exists, writeDirAtomic, writeFileAtomic } from '../files.js';
import type {
  EvalResult,
  GenerateRequest,
  LoadResult,
  TrainBeginResult,
  TrainStepArgs,
  TrainStepResult,
} from '../native/binding.js';
import { Engine } from '../native/engine.js';
import type { EncodedSample } from '../processing/index.js';
import { rounded, significant } from '../report/format.js';
import { RunLog } from '../report/run-log.js';
import { ARGS_FILE } from './adapter-args.js';
import {
  copyCheckpointWeights,
  type LogInterval,
  laterCheckpoints,
  removeOldCheckpoints,
  type TrainerState,
  writeTrainerState,
} from './checkpoint.js';
import { LossAdvice } from './loss-advice.js';
import { chooseRecompute, savingsText } from './memory-advice.js';
import { copyModelFiles } from './model-folder.js';
import { PREDICTIONS_FILE, removeRun } from './output-dir.js';
import { type LoadedRow, type LoadedStep, Prefetcher } from './prefetch.js';
import { JobBuffers } from './samples.js';
import { parseSize } from './size.js';
import { scoreAnswers, type TextScores } from './text-metrics.js';
import { beginArgs, loadArgs } from './train-args.js';
import type { RunControl } from './train-run.js';
import type { StepRows } from './train-schedule.js';
import {
  encodeRow,
  findResumePoint,
  fingerprintRows,
  hasPicture,
  limitLength,
  markedSample,
  planSteps,
  type ResumePoint,
  rowName,
  type TrainData,
  type TrainPlan,
  type TrainWarning,
  trainingWarnings,
} from './train-setup.js';
import type { TrainEvent, TrainResult } from './types.js';

/** Rows encoded ahead of the step that runs, unless one step has more. */
const PREFETCH_ROWS = 16;
/** Decoded pictures that wait ahead of the step that runs, in bytes. */
const PREFETCH_BYTES = 512 * 2 ** 20;
/** Rows that a warning names; its details hold all. */
const SHOWN_ROWS = 5;
const EMPTY_INTERVAL: LogInterval = { steps: 0, loss: 0, labelledTokens: 0, correctTokens: 0, rows: 0 };
/** Steps in a row that may change nothing before the run ends. */
const MAX_SKIPPED_IN_A_ROW = 10;
/** Of the exponential mean of the loss, as ms-swift's plots. */
const SMOOTHING = 0.9;

export interface TrainerInput {
  config: TrainConfig;
  modelDir: string;
  outputDir: string;
  data: TrainData;
  /** From reading the config. */
  warnings: string[];
}

/** Of all evaluation rows. */
interface Evaluated {
  /** Mean over the labelled tokens; NaN if a row has no finite loss. */
  loss: number;
  labelledTokens: number;
  correctTokens: number;
}

/** All that is fixed when the first step begins. */
interface TrainSetup extends Omit<TrainerInput, 'warnings'>, TrainPlan {
  /** Of the training rows. */
  fingerprint: string;
  resume: ResumePoint | undefined;
  loaded: LoadResult;
  begun: TrainBeginResult;
  warnings: TrainWarning[];
}

/** Trains, and saves into the output folder. */
export async function runTrainer(input: TrainerInput, control: RunControl): Promise<TrainResult> {
  const { config, modelDir, outputDir } = input;
  const { signal } = control;
  const engine = new Engine();
  try {
    const { result: loaded } = await engine.call(
      'load',
      { ...loadArgs(config, modelDir), imageTokenId: input.data.processor.imageTokenId },
      { signal },
    );
    checkModelType(config, loaded);
    const data = limitLength(input.data, config, loaded.maxPositions);
    const plan = planSteps(config, data);
    const fingerprint = await fingerprintRows(data.train.rows);
    const resume = await findResumePoint(config, outputDir, plan.schedule.plan, fingerprint);
    const { result: begun } = await engine.call(
      'train.begin',
      beginArgs(config, plan, await chooseRecompute(config, modelDir, data)),
      { signal },
    );
    if (resume) await engine.call('train.loadState', { dir: resume.dir }, { signal });
    // an earlier run's files go only now that the new one is sure to start
    if (config.overwrite_output_dir && !resume) await removeRun(outputDir);
    const log = await RunLog.open({
      outputDir,
      totalSteps: plan.schedule.totalSteps,
      resumedStep: resume?.state.global_step ?? 0,
      tensorboard: config.report_to.includes('tensorboard'),
    });
    try {
      const warnings: TrainWarning[] = [
        ...input.warnings.map((message) => ({ message })),
        ...trainingWarnings(config, data, plan),
      ];
      const later = resume ? await laterCheckpoints(outputDir, resume.dir) : [];
      if (later.length > 0) {
        warnings.push({
          message: `${later.join(', ')} are of the run before: until this one has passed them, resume_from_checkpoint: true would go on from the last of them.`,
          details: { checkpoints: later },
        });
      }
      const setup: TrainSetup = { ...input, ...plan, data, fingerprint, resume, loaded, begun, warnings };
      return await new Trainer(setup, control, engine, log).run();
    } catch (error) {
      await log.note(`ended: ${(error as Error).message}`);
      throw error;
    } finally {
      await log.close();
    }
  } finally {
    await engine.close();
  }
}

/** A config that names another family than the checkpoint's was written for another model. ms-swift's names carry a version: `llava1_5_hf`. */
function checkModelType({ model, model_type }: TrainConfig, { family, modelType }: LoadResult): void {
  if (model_type === null) return;
  const plain = (name: string) => name.toLowerCase().replaceAll(/[^a-z0-9]/g, '');
  // "qwen" alone would be the beginning of every Qwen's name.
  if (plain(model_type).startsWith(plain(family)) || plain(model_type) === plain(modelType)) return;
  throw new MartletError(
    'ERR_MARTLET_CONFIG',
    `model_type is ${model_type}, but ${model} is a ${modelType}. Correct model or model_type, or leave model_type out.`,
    { path: 'model_type', value: model_type, found: modelType },
  );
}

class Trainer {
  readonly #setup: TrainSetup;
  readonly #control: RunControl;
  readonly #engine: Engine;
  readonly #log: RunLog;
  readonly #started = performance.now();
  readonly #skipped: TrainResult['skipped'];
  /** Steps done, in this process or before it. */
  #step: number;
  #epoch: number;
  #tokens: number;
  #interval: LogInterval;
  /** Tokens and time at the last step event, for tokens per second. */
  #mark: { tokens: number; time: number; dataWait: number };
  #lastLoss: number;
  #lastStep: TrainStepResult | undefined;
  #memory = 0;
  #memoryAllocated = 0;
  #best: { metric: number; dir: string } | undefined;
  #lastEval: { step: number; metric: number } | undefined;
  /** Of all evaluations, whether a checkpoint was saved then or not. */
  #bestMetric: number | undefined;
  #evaluationsWithoutGain: number;
  #smoothed: { value: number; steps: number };
  #skippedSteps: number;
  #skippedInARow = 0;
  #rowLimit: number;
  #evalRowLimit = Number.POSITIVE_INFINITY;
  readonly #advice: LossAdvice = new LossAdvice();
  #lastCheckpoint: { step: number; dir: string } | undefined;
  /** Over the steps of this process. */
  #sum = { loss: 0, rows: 0, steps: 0 };
  /** Milliseconds that the engine waited for rows. */
  #dataWait = 0;

  constructor(setup: TrainSetup, control: RunControl, engine: Engine, log: RunLog) {
    this.#setup = setup;
    this.#control = control;
    this.#engine = engine;
    this.#log = log;
    this.#skipped = [...setup.data.skipped];
    const state = setup.resume?.state;
    this.#step = state?.global_step ?? 0;
    this.#epoch = state?.epoch ?? 0;
    this.#tokens = state?.num_input_tokens_seen ?? 0;
    this.#interval = { ...(state?.martlet.pending ?? EMPTY_INTERVAL) };
    this.#lastLoss = state?.martlet.last_loss ?? Number.NaN;
    this.#smoothed = { ...(state?.martlet.smoothed ?? { value: 0, steps: 0 }) };
    this.#skippedSteps = state?.martlet.skipped_steps ?? 0;
    this.#evaluationsWithoutGain = state?.martlet.evaluations_without_gain ?? 0;
    this.#rowLimit = state?.martlet.row_limit ?? Number.POSITIVE_INFINITY;
    this.#bestMetric = state?.martlet.best_evaluation ?? undefined;
    this.#mark = { tokens: this.#tokens, time: this.#started, dataWait: 0 };
    if (state) log.history.push(...state.log_history);
    if (setup.resume && state) this.#lastCheckpoint = { step: state.global_step, dir: setup.resume.dir };
    if (state?.best_model_checkpoint != null && state.best_metric !== null) {
      this.#best = { metric: state.best_metric, dir: state.best_model_checkpoint };
    }
  }

  async run(): Promise<TrainResult> {
    const { config, schedule } = this.#setup;
    await writeFileAtomic(join(this.#setup.outputDir, ARGS_FILE), configToYaml(config));
    await this.#announce();
    const prefetcher = this.#prefetch(this.#setup.data.train.rows, schedule.from(this.#step + 1));
    let stopped = false;
    let stoppedEarly = false;
    while (this.#step < schedule.totalSteps && !stopped && !stoppedEarly) {
      const waited = performance.now();
      const loaded = (await prefetcher.next()) as LoadedStep<StepRows>;
      this.#dataWait += performance.now() - waited;
      await this.#trainStep(loaded);
      if (this.#isDue('steps', config.logging_steps) || (this.#step === 1 && config.logging_first_step)) {
        await this.#logStep();
      }
      if (this.#isDue(config.eval_strategy, config.eval_steps)) await this.#evaluate();
      if (this.#isDue(config.save_strategy, config.save_steps)) await this.#saveCheckpoint();
      stopped = this.#stopped && this.#step < schedule.totalSteps;
      stoppedEarly = config.early_stop_interval !== null && this.#evaluationsWithoutGain >= config.early_stop_interval;
    }
    if (stoppedEarly) {
      await this.#warn(
        `stopped early: ${config.metric_for_best_model} has not improved in ${this.#evaluationsWithoutGain} evaluations.`,
      );
    }
    await this.#advise(this.#advice.atEnd());
    // a stopped run can be continued, whatever save_steps says
    if (stopped && this.#lastCheckpoint?.step !== this.#step) await this.#saveCheckpoint();
    return this.#finish(stopped, stoppedEarly);
  }

  async #advise(advice: string | undefined): Promise<void> {
    if (advice !== undefined) await this.#warn(advice);
  }

  async #announce(): Promise<void> {
    const { config, schedule, outputDir, data, loaded, begun, warnings } = this.#setup;
    const { trainableParams, totalParams, parts, targets, unmatched } = begun;
    const first = await encodeRow(data.processor, data.train.rows[0] as Row, config, this.#control.signal);
    await this.#emit({
      type: 'start',
      config,
      outputDir,
      steps: schedule.totalSteps,
      epochs: schedule.epochs,
      rows: data.train.rows.length,
      trainableParams,
      totalParams,
      parts,
      targets: targets.length,
      sample: markedSample(data.processor, first),
    });
    for (const { name, nearest } of unmatched) {
      const near = nearest.length === 0 ? '' : ` Near: ${nearest.join(', ')}.`;
      await this.#warn(`${name} matches nothing in this model.${near}`, { name, nearest });
    }
    for (const message of [...loaded.warnings, ...begun.warnings]) await this.#warn(message);
    for (const [key, part] of [
      ['vit_lr', 'vision'],
      ['aligner_lr', 'projector'],
    ] as const) {
      if (config[key] !== null && parts[part] === 0)
        await this.#warn(
          `${key} has no effect: nothing of the ${part === 'vision' ? 'vision tower' : part} is trained.`,
        );
    }
    for (const { message, details } of warnings) await this.#warn(message, details);
    if (!this.#setup.resume) await this.#checkPictures();
  }

  /** A model whose loss does not depend on the picture does not see it: a wrong template, a mask. */
  async #checkPictures(): Promise<void> {
    const { config, data } = this.#setup;
    const { signal } = this.#control;
    const row = data.train.rows.find(hasPicture);
    if (!row) return;
    // a picture that has gone is the business of the step that needs it
    const sample = await encodeRow(data.processor, row, config, signal).catch((error: unknown) => {
      if (error instanceof MartletError && error.code === 'ERR_MARTLET_IMAGE') return undefined;
      throw error;
    });
    if (sample === undefined || sample.images.length === 0) return;
    const grey = sample.images.map(({ key: _, ...image }) => ({
      ...image,
      data: new Uint8Array(image.data.length).fill(128),
    }));
    const losses: number[] = [];
    for (const images of [sample.images, grey]) {
      const job = new JobBuffers();
      const args = { microBatches: [[job.sample({ ...sample, images }, rowName(row))]] };
      const { result } = await this.#engine.call('train.evaluate', args, { buffers: job.buffers, signal });
      losses.push(result.loss);
    }
    // of a loss that is not finite the step over the row speaks
    if (Number.isFinite(losses[0]) && losses[0] === losses[1]) {
      await this.#warn(
        `the answer of ${rowName(row)} does not depend on its picture (the loss with a grey one is the same): check the template and that the row marks the picture with <image>.`,
        { row: rowName(row), loss: losses[0] },
      );
    }
  }

  #prefetch(rows: Row[], steps: Iterator<StepRows>): Prefetcher<StepRows> {
    return new Prefetcher({
      steps,
      rows: (step) => step.microBatches,
      encode: (row) => this.#encode(rows[row] as Row),
      maxRows: PREFETCH_ROWS,
      maxBytes: PREFETCH_BYTES,
    });
  }

  /** A row that went bad since it was checked (a picture was removed) ends the run, or is left out, as on_bad_row says. */
  async #encode(row: Row): Promise<EncodedSample | undefined> {
    const { config, data } = this.#setup;
    try {
      return await encodeRow(data.processor, row, config, this.#control.signal);
    } catch (error) {
      const bad = error instanceof MartletError && ['ERR_MARTLET_IMAGE', 'ERR_MARTLET_DATASET'].includes(error.code);
      if (!bad || config.on_bad_row !== 'skip') throw error;
      const { file, row: number } = row.source;
      if (!this.#skipped.some((skipped) => skipped.file === file && skipped.row === number)) {
        this.#skipped.push({ file, row: number, code: error.code, message: error.message });
        await this.#warn(`left out: ${error.message}`, error.details);
      }
      return undefined;
    }
  }

  async #trainStep({ step, microBatches }: LoadedStep<StepRows>): Promise<void> {
    const { rows } = this.#setup.data.train;
    if (microBatches.length === 0) {
      throw new MartletError('ERR_MARTLET_DATASET', `step ${step.step}: none of its rows can be used any more.`, {
        step: step.step,
        rows: step.microBatches.flat().map((row) => rowName(rows[row] as Row)),
      });
    }
    const result = await this.#nativeStep(step.step, microBatches);
    this.#step = step.step;
    this.#epoch = step.epochProgress;
    if (result === undefined) return; // skipped
    this.#tokens += result.tokens;
    this.#lastLoss = result.loss;
    this.#lastStep = result;
    this.#memory = Math.max(this.#memory, result.memory.peakReserved, result.memory.peakAllocated);
    this.#memoryAllocated = Math.max(this.#memoryAllocated, result.memory.peakAllocated);
    this.#sum.loss += result.loss;
    this.#sum.rows += microBatches.flat().length;
    this.#sum.steps += 1;
    this.#interval.steps += 1;
    this.#interval.loss += result.loss;
    this.#interval.labelledTokens += result.labelledTokens;
    this.#interval.correctTokens += result.correctTokens;
    this.#interval.rows += microBatches.flat().length;
    this.#smoothed = {
      value: SMOOTHING * this.#smoothed.value + (1 - SMOOTHING) * result.loss,
      steps: this.#smoothed.steps + 1,
    };
    if (result.overflow) {
      // the scale looks for its level, as torch's GradScaler does; at 1 native code calls the gradient not finite
      this.#skippedSteps += 1;
      await this.#warn(
        `step ${step.step}: the gradients overflowed float16 at loss scale ${result.lossScale}; the step is skipped, the scale halved.`,
        { step: step.step, lossScale: result.lossScale },
      );
    } else {
      this.#skippedInARow = 0;
    }
    await this.#advise(this.#advice.add(result.loss));
  }

  /** A step left out for its loss or gradients; too many of them end the run. */
  #countSkipped(error: MartletError): void {
    this.#skippedSteps += 1;
    this.#skippedInARow += 1;
    if (this.#skippedInARow >= MAX_SKIPPED_IN_A_ROW) throw error;
  }

  /** One optimiser step; undefined when it was left out because its loss or gradients were not finite. */
  async #nativeStep(step: number, microBatches: LoadedRow[][]): Promise<TrainStepResult | undefined> {
    const { rows } = this.#setup.data.train;
    const { signal } = this.#control;
    for (;;) {
      const batches = microBatches.flatMap((batch) => parts(batch, this.#rowLimit));
      const { args, buffers } = this.#job(batches, rows);
      try {
        return (await this.#engine.call('train.step', { ...args, step }, { buffers, signal })).result;
      } catch (error) {
        if (!(error instanceof MartletError)) throw error;
        if (error.code === 'ERR_MARTLET_OUT_OF_MEMORY') await this.#shrinkBatches(error, step, batches);
        else if (error.code === 'ERR_MARTLET_NON_FINITE') return this.#leaveOut(error, step, microBatches);
        else throw error;
      }
    }
  }

  /** The memory ran out: the same step in smaller micro-batches, its loss the same. One row that does not fit ends the run. */
  async #shrinkBatches(error: MartletError, step: number, batches: LoadedRow[][]): Promise<void> {
    const { config, data, modelDir } = this.#setup;
    const largest = batches.flat().reduce((a, b) => (tokenCount(b.sample) > tokenCount(a.sample) ? b : a));
    const sample = rowName(data.train.rows[largest.row] as Row);
    const length = tokenCount(largest.sample);
    const most = Math.max(...batches.map((batch) => batch.length));
    if (most <= 1) {
      const savings = await savingsText(config, modelDir, length);
      throw new MartletError(
        error.code,
        `${error.message} Step ${step} does not fit one row at a time; the largest is ${sample} with ${length} tokens. ${savings}`,
        { ...error.details, step, sample, tokens: length },
        { cause: error },
      );
    }
    this.#rowLimit = Math.ceil(most / 2);
    await this.#engine.call('emptyCache', {}, { signal: this.#control.signal });
    await this.#warn(
      `step ${step}: out of memory with ${most} rows at a time (the largest: ${sample}, ${length} tokens). Going on with ${this.#rowLimit} rows at a time and as many more accumulated: the loss is the same.`,
      { step, sample, tokens: length, rows: this.#rowLimit },
    );
  }

  /** A loss or gradient that is not finite, as non_finite says. */
  async #leaveOut(error: MartletError, step: number, microBatches: LoadedRow[][]): Promise<undefined> {
    const { config } = this.#setup;
    const named = this.#withSamples(error, step, microBatches);
    if (config.non_finite === 'stop') throw named;
    this.#countSkipped(named);
    const checkpoint = config.non_finite === 'rollback' ? this.#lastCheckpoint : undefined;
    if (checkpoint) {
      await this.#engine.call('train.loadState', { dir: checkpoint.dir }, { signal: this.#control.signal });
    }
    await this.#warn(
      `${named.message} ${checkpoint ? `Back to the weights of ${checkpoint.dir}, on with the next rows.` : 'The step is left out.'}`,
      named.details,
    );
    return undefined;
  }

  #job(microBatches: LoadedRow[][], rows: Row[]): { args: TrainStepArgs; buffers: ArrayBufferView[] } {
    const job = new JobBuffers();
    const args = {
      microBatches: microBatches.map((batch) =>
        batch.map(({ row, sample }) => job.sample(sample, rowName(rows[row] as Row))),
      ),
    };
    return { args, buffers: job.buffers };
  }

  /** Puts the rows of the step into the message of a loss that is not finite. */
  #withSamples(error: MartletError, step: number, microBatches: LoadedRow[][]): MartletError {
    const rows = microBatches.flat().map(({ row }) => rowName(this.#setup.data.train.rows[row] as Row));
    // native code names those whose own loss is not finite, where it can tell
    const samples = (error.details.samples as string[] | undefined) ?? rows;
    return new MartletError(
      error.code,
      `${error.message} The rows: ${samples.join(', ')}.`,
      { ...error.details, step, samples, rows },
      { cause: error },
    );
  }

  /** Whether something with this strategy happens after the current step. */
  #isDue(strategy: 'no' | 'steps' | 'epoch', every: number): boolean {
    if (strategy === 'steps') return this.#step % every === 0;
    const { stepsPerEpoch, totalSteps } = this.#setup.schedule;
    return strategy === 'epoch' && (this.#step % stepsPerEpoch === 0 || this.#step === totalSteps);
  }

  async #logStep(): Promise<void> {
    const result = this.#lastStep as TrainStepResult;
    if (this.#interval.steps === 0) return; // every step since the last line was left out
    const { steps, loss, labelledTokens, correctTokens, rows } = this.#interval;
    const now = performance.now();
    const elapsed = (now - this.#started) / 1000;
    const seconds = Math.max(1e-9, (now - this.#mark.time) / 1000);
    const doneHere = this.#step - (this.#setup.resume?.state.global_step ?? 0);
    await this.#emit({
      type: 'step',
      step: this.#step,
      epoch: this.#epoch,
      loss: loss / steps,
      gradNorm: result.gradNorm,
      learningRate: result.learningRate,
      tokenAccuracy: labelledTokens > 0 ? correctTokens / labelledTokens : 0,
      tokens: this.#tokens,
      tokensPerSecond: (this.#tokens - this.#mark.tokens) / seconds,
      smoothedLoss: this.#smoothed.value / (1 - SMOOTHING ** this.#smoothed.steps),
      samplesPerSecond: rows / seconds,
      labelledTokensPerSecond: labelledTokens / seconds,
      dataWait: Math.min(1, (this.#dataWait - this.#mark.dataWait) / 1000 / seconds),
      memory: this.#memory,
      memoryAllocated: this.#memoryAllocated,
      lossScale: result.lossScale,
      skippedSteps: this.#skippedSteps,
      ...(result.visionCache && { visionCache: result.visionCache }),
      ...(result.modelFlopUtilisation !== undefined && { modelFlopUtilisation: result.modelFlopUtilisation }),
      elapsed,
      remaining: (elapsed / doneHere) * (this.#setup.schedule.totalSteps - this.#step),
    });
    this.#interval = { ...EMPTY_INTERVAL };
    this.#mark = { tokens: this.#tokens, time: now, dataWait: this.#dataWait };
  }

  /** Whether stop() was called. */
  get #stopped(): boolean {
    return this.#control.stopSignal.aborted;
  }

  /** A stop leaves it after the batch that is computed: the step before it is what gets saved. */
  async #evaluate(): Promise<void> {
    const { data, evalSchedule } = this.#setup;
    if (!evalSchedule) return;
    const { rows } = data.evaluation;
    const started = performance.now();
    const prefetcher = this.#prefetch(rows, evalSchedule.from(1));
    const sum = { loss: 0, labelled: 0, correct: 0 };
    const notFinite: string[] = [];
    for (let loaded = await prefetcher.next(); loaded && !this.#stopped; loaded = await prefetcher.next()) {
      if (loaded.microBatches.length === 0) continue;
      for (const { result, batch } of await this.#evaluateBatch(loaded.microBatches.flat(), rows)) {
        if (!Number.isFinite(result.loss)) notFinite.push(...batch.map(({ row }) => rowName(rows[row] as Row)));
        sum.loss += result.loss * result.labelledTokens;
        sum.labelled += result.labelledTokens;
        sum.correct += result.correctTokens;
      }
    }
    const result = { loss: sum.loss / sum.labelled, labelledTokens: sum.labelled, correctTokens: sum.correct };
    if (notFinite.length > 0 && !this.#stopped) {
      await this.#warn(
        `evaluation at step ${this.#step}: the loss is not finite in ${notFinite.slice(0, SHOWN_ROWS).join(', ')}${notFinite.length > SHOWN_ROWS ? ` and ${notFinite.length - SHOWN_ROWS} more rows` : ''}. Use torch_dtype: bfloat16 or float32, or correct the rows.`,
        { step: this.#step, rows: notFinite },
      );
    }
    const answers =
      this.#setup.config.predict_with_generate && !this.#stopped ? await this.#answerRows(rows) : undefined;
    if (this.#stopped) {
      await this.#warn(`evaluation at step ${this.#step}: left, since the run is being stopped.`, { step: this.#step });
      return;
    }
    await this.#judge(result, answers);
    const now = performance.now();
    await this.#emit({
      type: 'eval',
      step: this.#step,
      epoch: this.#epoch,
      loss: result.loss,
      tokenAccuracy: sum.correct / sum.labelled,
      seconds: (now - started) / 1000,
      ...answers,
    });
    this.#mark.time += now - started; // evaluation does not count as training speed
  }

  /** The rows of one batch; in halves where the memory runs out, and so from then on. */
  async #evaluateBatch(whole: LoadedRow[], rows: Row[]): Promise<{ result: EvalResult; batch: LoadedRow[] }[]> {
    const { signal } = this.#control;
    const done: { result: EvalResult; batch: LoadedRow[] }[] = [];
    let waiting = parts(whole, this.#evalRowLimit);
    for (let batch = waiting.shift(); batch; batch = waiting.shift()) {
      const { args, buffers } = this.#job([batch], rows);
      try {
        done.push({ result: (await this.#engine.call('train.evaluate', args, { buffers, signal })).result, batch });
      } catch (error) {
        const short = error instanceof MartletError && error.code === 'ERR_MARTLET_OUT_OF_MEMORY';
        if (!short || batch.length <= 1) throw error;
        this.#evalRowLimit = Math.ceil(batch.length / 2);
        await this.#engine.call('emptyCache', {}, { signal });
        await this.#warn(
          `evaluation at step ${this.#step}: out of memory with ${batch.length} rows at a time. Going on with ${this.#evalRowLimit}.`,
          { step: this.#step, rows: this.#evalRowLimit },
        );
        waiting = parts([batch, ...waiting].flat(), this.#evalRowLimit);
      }
    }
    return done;
  }

  /** Keeps the best value of metric_for_best_model. */
  async #judge(result: Evaluated, answers: TextScores | undefined): Promise<void> {
    const { metric_for_best_model: name } = this.#setup.config;
    const metric = {
      loss: result.loss,
      token_acc: result.correctTokens / result.labelledTokens,
      exact_match: answers?.exactMatch,
      rouge_l: answers?.rougeL,
      bleu: answers?.bleu,
    }[name] as number;
    const gained = this.#isBetter(metric, this.#bestMetric);
    if (gained) this.#bestMetric = metric;
    this.#evaluationsWithoutGain = gained ? 0 : this.#evaluationsWithoutGain + 1;
    this.#lastEval = { step: this.#step, metric };
  }

  /** By metric_for_best_model; any number is better than nothing. */
  #isBetter(metric: number, than: number | undefined): boolean {
    if (Number.isNaN(metric)) return false;
    return than === undefined || (this.#setup.config.metric_for_best_model === 'loss' ? metric < than : metric > than);
  }

  /**
   * Answers every evaluation row greedily with the weights as they are, per_device_eval_batch_size at once; `predict.jsonl` holds the answers of the
   * last evaluation. Undefined when stop() ends it.
   */
  async #answerRows(rows: Row[]): Promise<TextScores | undefined> {
    const { config, data, outputDir } = this.#setup;
    const { signal, stopSignal } = this.#control;
    const lines: { id?: string; row: string; answer: string; reference: string }[] = [];
    // a row that was split is asked once, whole
    const whole = rows.filter(({ source, piece }, i) => piece === undefined || rows[i - 1]?.source !== source);
    const atOnce = config.per_device_eval_batch_size;
    for (let begin = 0; begin < whole.length; begin += atOnce) {
      const group = whole.slice(begin, begin + atOnce);
      const job = new JobBuffers();
      const requests: GenerateRequest[] = [];
      for (const row of group) {
        const { source: _, id: __, piece: ___, ...input } = row;
        const sample = await data.processor.encode(
          { ...input, messages: row.messages.slice(0, -1), id: rowName(row) },
          { for: 'generate', signal },
        );
        requests.push({
          sample: job.sample(sample, rowName(row)),
          maxNewTokens: config.max_new_tokens,
          temperature: 0,
          topP: 1,
          topK: 0,
          repetitionPenalty: 1,
          seed: config.seed,
          stopTokenIds: data.processor.stopTokenIds,
        });
      }
      const left = new Uint8Array(requests.length);
      const leave = () => left.fill(1);
      stopSignal.addEventListener('abort', leave, { once: true });
      const { result, buffers } = await this.#engine
        .call('generate.batch', { requests, trained: true, left: job.add(left) }, { buffers: job.buffers, signal })
        .finally(() => stopSignal.removeEventListener('abort', leave));
      if (this.#stopped) return undefined;
      for (const [i, row] of group.entries()) {
        const { tokenIds } = result.answers[i] as (typeof result.answers)[0];
        const last = row.messages.at(-1) as Row['messages'][0];
        const reference =
          typeof last.content === 'string'
            ? last.content
            : last.content.map((part) => (part.type === 'text' ? part.text : '')).join('');
        lines.push({
          ...(row.id !== undefined && { id: row.id }),
          row: rowName(row),
          answer: data.processor.decode(new Int32Array(buffers[tokenIds] as ArrayBuffer)),
          reference,
        });
      }
    }
    await writeFileAtomic(
      join(outputDir, PREDICTIONS_FILE),
      `${lines.map((line) => JSON.stringify(line)).join('\n')}\n`,
    );
    return scoreAnswers(lines);
  }

  async #saveCheckpoint(): Promise<void> {
    const started = performance.now();
    const { config, outputDir } = this.#setup;
    const { signal } = this.#control;
    const dir = join(outputDir, `checkpoint-${this.#step}`);
    const evaluated = this.#lastEval?.step === this.#step ? this.#lastEval : undefined;
    if (evaluated && this.#isBetter(evaluated.metric, this.#best?.metric)) {
      this.#best = { metric: evaluated.metric, dir };
    }
    await writeDirAtomic(dir, 'replace', async (unfinished) => {
      await this.#saveWeights(unfinished);
      await writeFileAtomic(join(unfinished, ARGS_FILE), configToYaml(config));
      if (!config.save_only_model) {
        await this.#engine.call('train.saveState', { dir: unfinished }, { signal });
        await writeTrainerState(unfinished, this.#state());
      }
    });
    this.#lastCheckpoint = { step: this.#step, dir };
    if (config.save_total_limit !== null) {
      await removeOldCheckpoints(outputDir, config.save_total_limit, { newest: dir, best: this.#best?.dir ?? null });
    }
    await this.#emit({ type: 'checkpoint', step: this.#step, dir });
    this.#mark.time += performance.now() - started;
  }

  async #saveWeights(dir: string): Promise<void> {
    const { config, modelDir } = this.#setup;
    const { signal } = this.#control;
    if (config.sft_type === 'full') await copyModelFiles(modelDir, dir, signal);
    await this.#engine.call(
      'train.save',
      { dir, baseModel: config.model, maxShardSize: parseSize(config.max_shard_size, 'max_shard_size') },
      { signal },
    );
  }

  #state(): TrainerState {
    const { schedule, fingerprint } = this.#setup;
    return {
      global_step: this.#step,
      max_steps: schedule.totalSteps,
      epoch: this.#epoch,
      num_train_epochs: schedule.epochs,
      best_metric: this.#best?.metric ?? null,
      best_model_checkpoint: this.#best?.dir ?? null,
      log_history: this.#log.history,
      num_input_tokens_seen: this.#tokens,
      martlet: {
        version: 1,
        schedule: schedule.plan,
        dataset: fingerprint,
        pending: this.#interval,
        last_loss: this.#lastLoss,
        smoothed: this.#smoothed,
        skipped_steps: this.#skippedSteps,
        best_evaluation: this.#bestMetric ?? null,
        evaluations_without_gain: this.#evaluationsWithoutGain,
        row_limit: Number.isFinite(this.#rowLimit) ? this.#rowLimit : null,
      },
    };
  }

  async #finish(stopped: boolean, stoppedEarly: boolean): Promise<TrainResult> {
    const { config, outputDir, schedule } = this.#setup;
    const { trainableParams, totalParams } = this.#setup.begun;
    await this.#saveWeights(outputDir);
    if (config.load_best_model_at_end) await this.#takeBest();
    const seconds = (performance.now() - this.#started) / 1000;
    const steps = this.#step - (this.#setup.resume?.state.global_step ?? 0);
    await this.#log.record({
      train_runtime: rounded(seconds, 6),
      train_samples_per_second: rounded(this.#sum.rows / seconds, 6),
      train_steps_per_second: rounded(steps / seconds, 6),
      train_loss: rounded(this.#sum.loss / Math.max(1, this.#sum.steps), 8),
      skipped_steps: this.#skippedSteps,
      'global_step/max_steps': `${this.#step}/${schedule.totalSteps}`,
      last_model_checkpoint: this.#lastCheckpoint?.dir ?? null,
      best_model_checkpoint: this.#best?.dir ?? null,
      best_metric: this.#best?.metric ?? null,
      model_parameter_info: { total: totalParams, trainable: trainableParams },
    });
    await this.#log.note(
      `${steps} steps in ${seconds.toFixed(1)} s; waited ${(this.#dataWait / 1000).toFixed(1)} s of it for rows (${(this.#dataWait / 10 / seconds).toFixed(1)} %)`,
    );
    const result: TrainResult = {
      outputDir,
      adapterDir: outputDir,
      steps: this.#step,
      finalLoss: this.#lastLoss,
      ...(this.#best && { bestCheckpoint: this.#best.dir }),
      trainableParams,
      totalParams,
      skipped: this.#skipped,
      skippedSteps: this.#skippedSteps,
      ...(this.#lastStep?.visionCache && { visionCache: this.#lastStep.visionCache }),
      stopped,
      stoppedEarly,
    };
    await this.#log.event({ type: 'done', ...result });
    return result;
  }

  /** The best checkpoint's weights stand in the output folder, as transformers' load_best_model_at_end leaves them. */
  async #takeBest(): Promise<void> {
    const { config, outputDir } = this.#setup;
    if (!this.#best || !(await exists(this.#best.dir))) {
      const why = this.#best ? `${this.#best.dir} is gone` : 'no checkpoint was evaluated';
      await this.#warn(`load_best_model_at_end: ${why}, so ${outputDir} holds the weights of the last step.`);
      return;
    }
    await copyCheckpointWeights(this.#best.dir, outputDir);
    const metric = `${config.metric_for_best_model} ${significant(this.#best.metric)}`;
    await this.#log.note(`${outputDir} holds the weights of ${this.#best.dir}, the best checkpoint (${metric})`);
  }

  async #emit(event: TrainEvent): Promise<void> {
    this.#control.emit(event);
    await this.#log.event(event);
  }

  #warn(message: string, details?: Record<string, unknown>): Promise<void> {
    return this.#emit({ type: 'warning', message, ...(details && { details }) });
  }
}

/** A micro-batch as several of at most `limit` rows, as even as can be. */
function parts(batch: LoadedRow[], limit: number): LoadedRow[][] {
  if (batch.length <= limit) return [batch];
  const count = Math.ceil(batch.length / limit);
  return Array.from({ length: count }, (_, i) =>
    batch.slice(Math.floor((i * batch.length) / count), Math.floor(((i + 1) * batch.length) / count)),
  );
}
