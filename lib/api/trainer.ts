/** The training loop: steps, logging, evaluation, checkpoints, the final save. */
import { join } from 'node:path';
import { configToYaml, type TrainConfig } from '../config/index.js';
import type { Row } from '../data/index.js';
import { MartletError } from '../errors.js';
import { writeDirAtomic, writeFileAtomic } from '../files.js';
import type {
  LoadResult,
  TrainBeginArgs,
  TrainBeginResult,
  TrainStepArgs,
  TrainStepResult,
} from '../native/binding.js';
import { Engine } from '../native/engine.js';
import type { EncodedSample } from '../processing/index.js';
import { rounded } from '../report/format.js';
import { RunLog } from '../report/run-log.js';
import { ARGS_FILE } from './adapter-args.js';
import { type LogInterval, removeOldCheckpoints, type TrainerState, writeTrainerState } from './checkpoint.js';
import { copyModelFiles } from './model-folder.js';
import { removeRun } from './output-dir.js';
import { type LoadedRow, type LoadedStep, Prefetcher } from './prefetch.js';
import { JobBuffers } from './samples.js';
import { parseSize } from './size.js';
import type { RunControl } from './train-run.js';
import type { StepRows } from './train-schedule.js';
import {
  encodeRow,
  findResumePoint,
  fingerprintRows,
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
const EMPTY_INTERVAL: LogInterval = { steps: 0, loss: 0, labelledTokens: 0, correctTokens: 0 };

export interface TrainerInput {
  config: TrainConfig;
  modelDir: string;
  outputDir: string;
  data: TrainData;
  /** From reading the config. */
  warnings: string[];
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
      {
        modelDir,
        device: config.device,
        dtype: config.torch_dtype,
        imageTokenId: input.data.processor.imageTokenId,
      },
      { signal },
    );
    checkModelType(config, loaded);
    const data = limitLength(input.data, config, loaded.maxPositions);
    const plan = planSteps(config, data);
    const fingerprint = await fingerprintRows(data.train.rows);
    const resume = await findResumePoint(config, outputDir, plan.schedule.plan, fingerprint);
    const { result: begun } = await engine.call('train.begin', beginArgs(config, plan), { signal });
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
      const warnings = [...input.warnings.map((message) => ({ message })), ...trainingWarnings(config, data, plan)];
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

function beginArgs(config: TrainConfig, plan: TrainPlan): TrainBeginArgs {
  const full = config.sft_type === 'full';
  return {
    method: full ? 'full' : 'lora',
    ...(!full && {
      lora: {
        r: config.lora_rank,
        alpha: config.lora_alpha,
        dropout: config.lora_dropout,
        useRslora: config.use_rslora,
        targetModules: config.target_modules,
      },
    }),
    ...(config.adapters[0] !== undefined && { adapterDir: config.adapters[0] }),
    freeze: { vision: config.freeze_vit, projector: config.freeze_aligner, language: config.freeze_llm },
    optimizer: {
      name: 'adamw',
      beta1: config.adam_beta1,
      beta2: config.adam_beta2,
      epsilon: config.adam_epsilon,
      weightDecay: config.weight_decay,
    },
    schedule: {
      type: config.lr_scheduler_type,
      warmupSteps: plan.warmupSteps,
      totalSteps: plan.schedule.totalSteps,
    },
    learningRate: config.learning_rate,
    maxGradNorm: config.max_grad_norm,
    gradientCheckpointing: config.gradient_checkpointing,
    seed: config.seed,
    deterministic: config.deterministic,
  };
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
  #mark: { tokens: number; time: number };
  #lastLoss: number;
  #lastStep: TrainStepResult | undefined;
  #memory = 0;
  #best: { metric: number; dir: string } | undefined;
  #lastEval: { step: number; loss: number } | undefined;
  #lastCheckpoint: { step: number; dir: string } | undefined;
  /** Over the steps of this process. */
  #sum = { loss: 0, rows: 0 };
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
    this.#mark = { tokens: this.#tokens, time: this.#started };
    if (state) log.history.push(...state.log_history);
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
    while (this.#step < schedule.totalSteps && !stopped) {
      const waited = performance.now();
      const loaded = (await prefetcher.next()) as LoadedStep<StepRows>;
      this.#dataWait += performance.now() - waited;
      await this.#trainStep(loaded);
      if (this.#isDue('steps', config.logging_steps) || (this.#step === 1 && config.logging_first_step)) {
        await this.#logStep();
      }
      if (this.#isDue(config.eval_strategy, config.eval_steps)) await this.#evaluate();
      if (this.#isDue(config.save_strategy, config.save_steps)) await this.#saveCheckpoint();
      stopped = this.#control.stopRequested && this.#step < schedule.totalSteps;
    }
    // a stopped run can be continued, whatever save_steps says
    if (stopped && this.#lastCheckpoint?.step !== this.#step) await this.#saveCheckpoint();
    return this.#finish(stopped);
  }

  async #announce(): Promise<void> {
    const { config, schedule, outputDir, data, begun, warnings } = this.#setup;
    const { trainableParams, totalParams, parts, targets, unmatched } = begun;
    const first = await encodeRow(data.processor, data.train.rows[0] as Row, this.#control.signal);
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
      await this.#warn(`target_modules: ${name} matches no module of this model.${near}`, { name, nearest });
    }
    for (const message of begun.warnings) await this.#warn(message);
    for (const { message, details } of warnings) await this.#warn(message, details);
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
      return await encodeRow(data.processor, row, this.#control.signal);
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
    const { args, buffers } = this.#job(microBatches, rows);
    const { result } = await this.#engine
      .call('train.step', args, { buffers, signal: this.#control.signal })
      .catch((error: unknown) => {
        throw this.#withSamples(error, step.step, microBatches);
      });
    this.#step = step.step;
    this.#epoch = step.epochProgress;
    this.#tokens += result.tokens;
    this.#lastLoss = result.loss;
    this.#lastStep = result;
    this.#memory = Math.max(this.#memory, result.memory.peakReserved, result.memory.peakAllocated);
    this.#sum.loss += result.loss;
    this.#sum.rows += microBatches.flat().length;
    this.#interval.steps += 1;
    this.#interval.loss += result.loss;
    this.#interval.labelledTokens += result.labelledTokens;
    this.#interval.correctTokens += result.correctTokens;
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

  /** Native code says that the loss or a gradient is not finite; which rows were in the step is known here. */
  #withSamples(error: unknown, step: number, microBatches: LoadedRow[][]): unknown {
    if (!(error instanceof MartletError) || error.code !== 'ERR_MARTLET_NON_FINITE') return error;
    const samples = microBatches.flat().map(({ row }) => rowName(this.#setup.data.train.rows[row] as Row));
    return new MartletError(
      error.code,
      `${error.message} The rows of the step: ${samples.join(', ')}.`,
      { ...error.details, step, samples },
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
    const { steps, loss, labelledTokens, correctTokens } = this.#interval;
    const now = performance.now();
    const elapsed = (now - this.#started) / 1000;
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
      tokensPerSecond: (this.#tokens - this.#mark.tokens) / Math.max(1e-9, (now - this.#mark.time) / 1000),
      memory: this.#memory,
      elapsed,
      remaining: (elapsed / doneHere) * (this.#setup.schedule.totalSteps - this.#step),
    });
    this.#interval = { ...EMPTY_INTERVAL };
    this.#mark = { tokens: this.#tokens, time: now };
  }

  async #evaluate(): Promise<void> {
    const { data, evalSchedule } = this.#setup;
    if (!evalSchedule) return;
    const { rows } = data.evaluation;
    const started = performance.now();
    const prefetcher = this.#prefetch(rows, evalSchedule.from(1));
    const sum = { loss: 0, labelled: 0, correct: 0 };
    for (let loaded = await prefetcher.next(); loaded; loaded = await prefetcher.next()) {
      if (loaded.microBatches.length === 0) continue;
      const { args, buffers } = this.#job(loaded.microBatches, rows);
      const { result } = await this.#engine.call('train.evaluate', args, { buffers, signal: this.#control.signal });
      sum.loss += result.loss * result.labelledTokens;
      sum.labelled += result.labelledTokens;
      sum.correct += result.correctTokens;
    }
    const loss = sum.loss / sum.labelled;
    this.#lastEval = { step: this.#step, loss };
    const now = performance.now();
    await this.#emit({
      type: 'eval',
      step: this.#step,
      epoch: this.#epoch,
      loss,
      tokenAccuracy: sum.correct / sum.labelled,
      seconds: (now - started) / 1000,
    });
    this.#mark.time += now - started; // evaluation does not count as training speed
  }

  async #saveCheckpoint(): Promise<void> {
    const started = performance.now();
    const { config, outputDir } = this.#setup;
    const { signal } = this.#control;
    const dir = join(outputDir, `checkpoint-${this.#step}`);
    if (this.#lastEval?.step === this.#step && this.#lastEval.loss < (this.#best?.metric ?? Number.POSITIVE_INFINITY)) {
      this.#best = { metric: this.#lastEval.loss, dir };
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
      await removeOldCheckpoints(outputDir, config.save_total_limit, this.#best?.dir ?? null);
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
      },
    };
  }

  async #finish(stopped: boolean): Promise<TrainResult> {
    const { outputDir, schedule } = this.#setup;
    const { trainableParams, totalParams } = this.#setup.begun;
    await this.#saveWeights(outputDir);
    const seconds = (performance.now() - this.#started) / 1000;
    const steps = this.#step - (this.#setup.resume?.state.global_step ?? 0);
    await this.#log.record({
      train_runtime: rounded(seconds, 6),
      train_samples_per_second: rounded(this.#sum.rows / seconds, 6),
      train_steps_per_second: rounded(steps / seconds, 6),
      train_loss: rounded(this.#sum.loss / steps, 8),
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
      stopped,
    };
    await this.#log.event({ type: 'done', ...result });
    return result;
  }

  async #emit(event: TrainEvent): Promise<void> {
    this.#control.emit(event);
    await this.#log.event(event);
  }

  #warn(message: string, details?: Record<string, unknown>): Promise<void> {
    return this.#emit({ type: 'warning', message, ...(details && { details }) });
  }
}
