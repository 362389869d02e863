/** `--dry-run`: everything that can be checked and counted without the engine. */
import { resolve } from 'node:path';
import type { TrainConfig, TrainConfigInput } from '../config/index.js';
import type { RowProblem } from '../data/index.js';
import { checkOutputDir } from './output-dir.js';
import { resolveTraining } from './train.js';
import { encodeRow, loadTrainingData, markedSample, planSteps, trainingWarnings } from './train-setup.js';
import type { TrainOptions } from './types.js';

export interface TrainingOutline {
  rows: number;
  evalRows: number;
  skipped: RowProblem[];
  epochs: number;
  steps: number;
  stepsPerEpoch: number;
  rowsPerStep: number;
  warmupSteps: number;
  /** Tokens of a row, image tokens counted. */
  tokens: { shortest: number; longest: number; mean: number; total: number };
  /** The first row with its labels marked. */
  sample: string;
  warnings: string[];
}

/** Reads and checks config and data, and says what a run would do. */
export async function outlineTraining(
  input: string | TrainConfigInput,
  options: Pick<TrainOptions, 'overrides' | 'signal'> = {},
): Promise<{ config: TrainConfig; plan: TrainingOutline }> {
  const { signal } = options;
  const { config, modelDir, warnings } = await resolveTraining(input, options, signal ? { signal } : {});
  await checkOutputDir(resolve(config.output_dir), {
    resume: Boolean(config.resume_from_checkpoint),
    overwrite: config.overwrite_output_dir,
    inputs: [modelDir, ...config.adapters],
    create: false,
  });
  const data = await loadTrainingData(config, { modelDir, ...(signal && { signal }) });
  const steps = planSteps(config, data);
  const { rows, lengths } = data.train;
  const [first] = rows as [(typeof rows)[0]];
  const total = lengths.reduce((sum, length) => sum + length, 0);
  const plan: TrainingOutline = {
    rows: rows.length,
    evalRows: data.evaluation.rows.length,
    skipped: data.skipped,
    epochs: steps.schedule.epochs,
    steps: steps.schedule.totalSteps,
    stepsPerEpoch: steps.schedule.stepsPerEpoch,
    rowsPerStep: config.per_device_train_batch_size * config.gradient_accumulation_steps,
    warmupSteps: steps.warmupSteps,
    tokens: {
      shortest: lengths.reduce((a, b) => Math.min(a, b)),
      longest: lengths.reduce((a, b) => Math.max(a, b)),
      mean: total / lengths.length,
      total,
    },
    sample: markedSample(data.processor, await encodeRow(data.processor, first, config, signal)),
    warnings: [...warnings, ...trainingWarnings(config, data, steps).map(({ message }) => message)],
  };
  return { config: data.config, plan };
}
