/** The training loop: steps, logging, evaluation, checkpoints, the final save. */
import { join } from 'node:path';
import { configToYaml } from '../config/index.js';
import { MartletError } from '../errors.js';
import { writeDirAtomic, writeFileAtomic } from '../files.js';
import type { LoadResult, TrainBeginArgs, TrainBeginResult, TrainStepArgs, TrainStepResult } from '../native/binding.js';
import { Engine } from '../native/engine.js';
import { duration, rounded } from '../report/format.js';
import { RunLog } from '../report/run-log.js';
import { type LogInterval, removeOldCheckpoints, type TrainerState, writeTrainerState } from './checkpoint.js';
import { copyModelFiles } from './merge.js';
import { removeRun } from './output-dir.js';
import { type LoadedRow, type LoadedStep, Prefetcher } from './prefetch.js';
import { JobBuffers } from './samples.js';
import { parseSize } from './size.js';
import type { RunControl } from './train-run.js';
import type { StepRows } from './train-schedule.js';
import { markedSample, type TrainSetup } from './train-setup.js';
import type { TrainEvent, TrainResult } from './types.js';

/** Rows encoded ahead of the step that runs, unless one step has more. */
const PREFETCH_ROWS = 16;
/** Decoded pictures that wait ahead of the step that runs, in bytes. */
const PREFETCH_BYTES = 512 * 2 ** 20;
const SHARD_SIZE = parseSize('5GB', 'max_shard_size');
const EMPTY_INTERVAL: LogInterval = { steps: 0, loss: 0, labelledTokens: 0, correctTokens: 0 };

/** Trains as `setup` says and saves into its output folder. */
export async function runTrainer(setup: TrainSetup, control: RunControl): Promise<TrainResult> {
  const { config, outputDir } = setup;
  const { signal } = control;
  const engine = new Engine();
  try {
    const { result: loaded } = await engine.call(
      'load',
      { modelDir: setup.modelDir, device: config.device, dtype: setup.dtype },
      { signal },
    );
    const { result: begun } = await engine.call('train.begin', beginArgs(setup), { signal });
    if (setup.resume) await engine.call('train.loadState', { dir: setup.resume.dir }, { signal });
    // an earlier run's files go only now that the new one is sure to start
    if (config.overwrite_output_dir && !setup.resume) await removeRun(outputDir);
    const log = await RunLog.open({
      outputDir,
      totalSteps: setup.schedule.totalSteps,
      resumedStep: setup.resume?.state.global_step ?? 0,
      tensorboard: config.report_to.includes('tensorboard'),
    });
    try {
      const trainer = new Trainer(setup, control, engine, log, loaded, begun);
      return await trainer.run();
    } catch (error) {
      await log.note(`failed: ${(error as Error).message}`);
      throw error;
    } finally {
      await log.close();
    }
  } finally {
    await engine.close();
  }
}

function beginArgs(setup: TrainSetup): TrainBeginArgs {
  const { config, schedule } = setup;
  const full = config.tuner_type === 'full';
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
      warmupSteps: setup.warmupSteps,
      totalSteps: schedule.totalSteps,
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
  readonly #loaded: LoadResult;
  readonly #begun: TrainBeginResult;
  readonly #started = performance.now();
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
  /** Milliseconds that the engine waited for rows. */
  #dataWait = 0;

  constructor(
    setup: TrainSetup,
    control: RunControl,
    engine: Engine,
    log: RunLog,
    loaded: LoadResult,
    begun: TrainBeginResult,
  ) {
    this.#setup = setup;
    this.#control = control;
    this.#engine = engine;
    this.#log = log;
    this.#loaded = loaded;
    this.#begun = begun;
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
    await writeFileAtomic(join(this.#setup.outputDir, 'args.yaml'), configToYaml(config));
    await this.#announce();
    const prefetcher = this.#prefetch();
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
    const { config, schedule, outputDir, rows } = this.#setup;
    const { trainableParams, totalParams, parts, targets, unmatched, warnings } = this.#begun;
    await this.#emit({
      type: 'start',
      config,
      outputDir,
      steps: schedule.totalSteps,
      epochs: schedule.epochs,
      rows: rows.length,
      trainableParams,
      totalParams,
      parts,
      targets: targets.length,
      sample: markedSample(this.#setup, this.#loaded.imageTokenId),
    });
    for (const { name, nearest } of unmatched) {
      await this.#warn(`target_modules: ${name} matches no module of this model. Near: ${nearest.join(', ')}.`, {
        name,
        nearest,
      });
    }
    for (const message of warnings) await this.#warn(message);
    for (const { message, details } of this.#setup.warnings) await this.#warn(message, details);
  }

  #prefetch(): Prefetcher<StepRows> {
    const { schedule } = this.#setup;
    const first = this.#step + 1;
    function* steps(): Generator<StepRows> {
      for (let step = first; step <= schedule.totalSteps; step++) yield schedule.step(step);
    }
    return new Prefetcher({
      steps: steps(),
      rows: (step) => step.microBatches,
      encode: (row) => this.#setup.encode(this.#setup.rows, row, this.#control.signal),
      maxRows: PREFETCH_ROWS,
      maxBytes: PREFETCH_BYTES,
    });
  }

  async #trainStep({ step, microBatches }: LoadedStep<StepRows>): Promise<void> {
    const { args, buffers } = this.#job(microBatches, this.#setup.rows);
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
    this.#interval.steps += 1;
    this.#interval.loss += result.loss;
    this.#interval.labelledTokens += result.labelledTokens;
    this.#interval.correctTokens += result.correctTokens;
  }

  #job(microBatches: LoadedRow[][], rows: TrainSetup['rows']): { args: TrainStepArgs; buffers: ArrayBufferView[] } {
    const job = new JobBuffers();
    const args = {
      microBatches: microBatches.map((batch) =>
        batch.map(({ row, sample }) => job.sample(sample, this.#setup.rowName(rows, row))),
      ),
    };
    return { args, buffers: job.buffers };
  }

  /** Native code says that the loss or a gradient is not finite; which rows were in the step is known here. */
  #withSamples(error: unknown, step: number, microBatches: LoadedRow[][]): unknown {
    if (!(error instanceof MartletError) || error.code !== 'ERR_MARTLET_NON_FINITE') return error;
    const samples = microBatches.flat().map(({ row }) => this.#setup.rowName(this.#setup.rows, row));
    return new MartletError(
      error.code,
      `${error.message} (step ${step}; rows of the step: ${samples.join(', ')}). Look at these rows; else lower learning_rate, or use ` +
        'bfloat16 or float32 in place of float16.',
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
    const { config, evalRows, evalSchedule } = this.#setup;
    if (!evalSchedule) return;
    const started = performance.now();
    const prefetcher = new Prefetcher({
      steps: Array.from({ length: evalSchedule.batchesPerEpoch }, (_, i) => evalSchedule.step(i + 1)).values(),
      rows: (step) => step.microBatches,
      encode: (row) => this.#setup.encode(evalRows, row, this.#control.signal),
      maxRows: PREFETCH_ROWS,
      maxBytes: PREFETCH_BYTES,
    });
    const sum = { loss: 0, labelled: 0, correct: 0 };
    for (let loaded = await prefetcher.next(); loaded; loaded = await prefetcher.next()) {
      if (loaded.microBatches.length === 0) continue;
      const { args, buffers } = this.#job(loaded.microBatches, evalRows);
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
      await writeFileAtomic(join(unfinished, 'args.yaml'), configToYaml(config));
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
    if (config.tuner_type === 'full') await copyModelFiles(modelDir, dir, signal);
    await this.#engine.call('train.save', { dir, baseModel: config.model, maxShardSize: SHARD_SIZE }, { signal });
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
    const { outputDir, schedule, skipped } = this.#setup;
    const { trainableParams, totalParams } = this.#begun;
    await this.#saveWeights(outputDir);
    const seconds = (performance.now() - this.#started) / 1000;
    const steps = this.#step - (this.#setup.resume?.state.global_step ?? 0);
    await this.#log.record({
      train_runtime: rounded(seconds, 6),
      train_steps_per_second: rounded(steps / seconds, 6),
      'global_step/max_steps': `${this.#step}/${schedule.totalSteps}`,
      last_model_checkpoint: this.#lastCheckpoint?.dir ?? null,
      best_model_checkpoint: this.#best?.dir ?? null,
      best_metric: this.#best?.metric ?? null,
      model_parameter_info: { total: totalParams, trainable: trainableParams },
    });
    await this.#log.note(
      `${steps} steps in ${duration(seconds)}; waited ${duration(this.#dataWait / 1000)} of it for rows (${((100 * this.#dataWait) / 1000 / seconds).toFixed(1)} %)`,
    );
    const result: TrainResult = {
      outputDir,
      adapterDir: outputDir,
      steps: this.#step,
      finalLoss: this.#lastLoss,
      ...(this.#best && { bestCheckpoint: this.#best.dir }),
      trainableParams,
      totalParams,
      skipped,
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
