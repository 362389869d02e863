/** What a run needs before its first step: checked rows, the processor, the order of steps, what to warn about. */
import { createHash } from 'node:crypto';
import { basename } from 'node:path';
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { TrainConfig } from '../config/index.js';
import { type LoadedDataset, loadDataset, type Row, type RowProblem } from '../data/index.js';
import { cutSample, isTrained } from '../data/truncate.js';
import { MartletError } from '../errors.js';
import { type EncodedSample, loadProcessor, type Processor } from '../processing/index.js';
import { checkVisionOptions, visionOptionsFromKeys, visionOptionsToKeys } from '../processing/vision-options.js';
import { significant } from '../report/format.js';
import { findCheckpoint, readTrainerState, type TrainerState } from './checkpoint.js';
import { Rng } from './rng.js';
import { Schedule, type SchedulePlan, warmupSteps } from './train-schedule.js';

export interface TrainWarning {
  message: string;
  details?: Record<string, unknown>;
}

/** The rows of a run, and what turns them into samples. */
export interface TrainData {
  /** With the pixel limits and the like in force, those from the environment included: `args.yaml` gives them to inference. */
  config: TrainConfig;
  processor: Processor;
  train: RowSet;
  evaluation: RowSet;
  skipped: RowProblem[];
}

export interface RowSet {
  rows: Row[];
  /** Tokens of each row, image tokens counted. */
  lengths: number[];
}

export interface DataOptions {
  modelDir: string;
  signal?: AbortSignal;
}

/** Reads and checks every row of a run. */
export async function loadTrainingData(given: TrainConfig, { modelDir, signal }: DataOptions): Promise<TrainData> {
  const processor = await trainingProcessor(given, modelDir);
  const config = { ...given, ...visionOptionsToKeys(processor.vision) };
  const read = (specs: TrainConfig['dataset']): Promise<LoadedDataset> =>
    loadDataset(specs, {
      onBadRow: config.on_bad_row,
      processor,
      maxLength: config.max_length ?? Number.POSITIVE_INFINITY,
      truncationStrategy: config.truncation_strategy,
      ...(signal && { signal }),
    });
  const train = await read(config.dataset);
  if (config.val_dataset.length === 0) {
    return { config, processor, ...split(train, config.split_dataset_ratio, config.data_seed), skipped: train.skipped };
  }
  const evaluation = await read(config.val_dataset);
  return { config, processor, train, evaluation, skipped: [...train.skipped, ...evaluation.skipped] };
}

/** An option that the model's family refuses is a fault of the config here. */
async function trainingProcessor(config: TrainConfig, modelDir: string): Promise<Processor> {
  try {
    return await loadProcessor(modelDir, {
      template: config.template,
      labels: config.labels,
      ...(config.system !== null && { system: config.system }),
      exifOrientation: config.exif_orientation,
      maxImagePixels: config.max_image_pixels,
      vision: checkVisionOptions(visionOptionsFromKeys({ ...config }), 'snake_case'),
    });
  } catch (error) {
    if (!(error instanceof MartletError) || error.code !== 'ERR_MARTLET_USAGE') throw error;
    const { key, ...details } = error.details;
    throw new MartletError('ERR_MARTLET_CONFIG', error.message, { ...details, path: key }, { cause: error });
  }
}

/** Sets a random share of the rows aside for evaluation, a row's pieces together; both parts keep the order of the file. */
function split({ rows, lengths }: RowSet, share: number, seed: number): { train: RowSet; evaluation: RowSet } {
  let whole = -1;
  const wholeRow = rows.map(({ source, piece }, i) => {
    const before = rows[i - 1];
    const goesOn = piece !== undefined && before?.piece !== undefined && before.source === source;
    return goesOn ? whole : ++whole;
  });
  const total = whole + 1;
  const count = share === 0 ? 0 : Math.max(1, Math.round(total * share));
  if (count > 0 && count >= total) {
    throw new MartletError(
      'ERR_MARTLET_CONFIG',
      `split_dataset_ratio: ${share} of ${total} rows leaves none to train on. Lower it.`,
      { path: 'split_dataset_ratio', rows: total },
    );
  }
  const aside = new Set(new Rng(seed, SPLIT_STREAM).permutation(total).slice(0, count));
  const part = (wanted: boolean): RowSet => {
    const chosen = (_: unknown, i: number) => aside.has(wholeRow[i] as number) === wanted;
    return { rows: rows.filter(chosen), lengths: lengths.filter(chosen) };
  };
  return { train: part(false), evaluation: part(true) };
}

/** Keeps the split apart from the shuffles, which use the streams 0 (dataset) and 1, 2, … (epochs). */
const SPLIT_STREAM = 2 ** 32 - 2;

/** Leaves out, or refuses, rows that are longer than the model's positions. */
export function limitLength(data: TrainData, config: TrainConfig, maxPositions: number): TrainData {
  const tooLong: RowProblem[] = [];
  const shorten = ({ rows, lengths }: RowSet): RowSet => {
    const fits = lengths.map((length) => maxPositions <= 0 || length <= maxPositions);
    for (const [i, { source, id }] of rows.entries()) {
      if (fits[i]) continue;
      const message = `the row has ${lengths[i]} tokens, the model has ${maxPositions} positions`;
      tooLong.push({ ...source, code: 'ERR_MARTLET_DATASET', message, ...(id !== undefined && { id }) });
    }
    return { rows: rows.filter((_, i) => fits[i]), lengths: lengths.filter((_, i) => fits[i]) };
  };
  const limited = { ...data, train: shorten(data.train), evaluation: shorten(data.evaluation) };
  const [first] = tooLong;
  if (first && (config.truncation_strategy === 'raise' || limited.train.rows.length === 0)) {
    throw new MartletError(
      'ERR_MARTLET_DATASET',
      `${tooLong.length} row(s) are too long${limited.train.rows.length === 0 ? ', and no other is left to train on' : ''}. ${first.file} row ${first.row}: ${first.message}. Shorten them (max_pixels, fewer frames, max_length with truncation_strategy: left)${limited.train.rows.length === 0 ? '' : ', or leave them out with truncation_strategy: delete'}.`,
      { ...first, problems: tooLong },
    );
  }
  return { ...limited, skipped: [...data.skipped, ...tooLong] };
}

/** The order of a run's steps. */
export interface TrainPlan {
  schedule: Schedule;
  /** Absent when nothing is evaluated. */
  evalSchedule: Schedule | undefined;
  warmupSteps: number;
}

export function planSteps(config: TrainConfig, data: TrainData): TrainPlan {
  const schedule = new Schedule(
    {
      rows: data.train.rows.length,
      batchSize: config.per_device_train_batch_size,
      accumulation: config.gradient_accumulation_steps,
      epochs: config.num_train_epochs,
      maxSteps: config.max_steps,
      shuffleDataset: config.dataset_shuffle,
      shuffleEpochs: config.train_dataloader_shuffle,
      dataSeed: config.data_seed,
      seed: config.seed,
      packingLength: config.packing ? ((config.packing_length ?? config.max_length) as number) : 0,
      groupByLength: config.group_by_length,
    },
    data.train.lengths,
  );
  const evaluates = config.eval_strategy !== 'no' && data.evaluation.rows.length > 0;
  return {
    schedule,
    evalSchedule: evaluates
      ? new Schedule({
          ...schedule.plan,
          rows: data.evaluation.rows.length,
          batchSize: config.per_device_eval_batch_size,
          accumulation: 1,
          epochs: 1,
          maxSteps: -1,
          shuffleDataset: false,
          shuffleEpochs: false,
          packingLength: 0,
          groupByLength: false,
        })
      : undefined,
    warmupSteps: warmupSteps(schedule.totalSteps, config.warmup_steps, config.warmup_ratio),
  };
}

/** Where a run that is continued stands. */
export interface ResumePoint {
  dir: string;
  state: TrainerState;
}

/** The checkpoint that the config asks for, refused when its data or batches were others: the continuation could not be exact. */
export async function findResumePoint(
  config: TrainConfig,
  outputDir: string,
  plan: SchedulePlan,
  fingerprint: string,
): Promise<ResumePoint | undefined> {
  if (!config.resume_from_checkpoint) return undefined;
  const dir = await findCheckpoint(outputDir, config.resume_from_checkpoint);
  const state = await readTrainerState(dir);
  const before = state.martlet.schedule;
  // a run may go on for longer than it was meant to; everything else decides which rows a step sees
  const changed = (Object.keys(plan) as (keyof SchedulePlan)[]).filter(
    (key) => key !== 'epochs' && key !== 'maxSteps' && plan[key] !== before[key],
  );
  if (changed.length > 0 || state.martlet.dataset !== fingerprint) {
    const what =
      changed.map((key) => `${key} was ${before[key]} and is ${plan[key]}`).join(', ') || 'the rows have changed';
    throw new MartletError(
      'ERR_MARTLET_CONFIG',
      `${dir} cannot be continued: ${what}. Use the data and batch settings of that run, or start a new run from its weights with adapters: ${dir}.`,
      { path: 'resume_from_checkpoint', checkpoint: dir, changed },
    );
  }
  return { dir, state };
}

/** Identifies the rows of a run by their content and order. Pictures count by path. */
export async function fingerprintRows(rows: Row[]): Promise<string> {
  const hash = createHash('sha256');
  for (const [i, { messages, images, videos, objects, vision, piece }] of rows.entries()) {
    hash.update(JSON.stringify([messages, images, videos, objects, vision, piece]));
    if (i % 500 === 499) await nextTurn(); // a large dataset must not hold up the event loop
  }
  return hash.digest('hex');
}

/** `train.json row 17 (id 42)`. */
export function rowName({ source, id, piece }: Row): string {
  const part = piece === undefined || piece === 0 ? '' : ` piece ${piece + 1}`;
  return `${basename(source.file)} row ${source.row}${part}${id === undefined ? '' : ` (id ${id})`}`;
}

/** Encodes one row for training. A failure names the row. */
export async function encodeRow(
  processor: Processor,
  row: Row,
  { max_length, truncation_strategy }: Pick<TrainConfig, 'max_length' | 'truncation_strategy'>,
  signal?: AbortSignal,
): Promise<EncodedSample> {
  const { source, id, piece, ...input } = row;
  try {
    const whole = await processor.encode({ ...input, id: rowName(row) }, { for: 'train', ...(signal && { signal }) });
    const sample =
      piece === undefined || truncation_strategy === 'delete' || truncation_strategy === 'raise'
        ? whole
        : cutSample(whole, max_length as number, truncation_strategy)[piece];
    if (sample && isTrained(sample)) return sample;
    throw new MartletError(
      'ERR_MARTLET_DATASET',
      'no token of the row is trained: it needs an answer of the assistant.',
      {},
    );
  } catch (error) {
    if (!(error instanceof MartletError) || error.code === 'ERR_MARTLET_ABORTED') throw error;
    throw new MartletError(
      error.code,
      `${rowName(row)}: ${error.message}`,
      { ...error.details, ...source, ...(id !== undefined && { id }) },
      { cause: error },
    );
  }
}

/** A row as text, what is trained in [[ ]], runs of image and video tokens shortened. */
export function markedSample(processor: Processor, { inputIds, labels, decoderLabels }: EncodedSample): string {
  const kindOf = (i: number) =>
    inputIds[i] === processor.imageTokenId
      ? 'image'
      : inputIds[i] === processor.videoTokenId
        ? 'video'
        : decoderLabels || labels?.[i] === -100
          ? 'plain'
          : 'trained';
  let text = '';
  for (let from = 0; from < inputIds.length; ) {
    const kind = kindOf(from);
    let to = from + 1;
    while (to < inputIds.length && kindOf(to) === kind) to++;
    if (kind === 'image' || kind === 'video') text += `<${kind} × ${to - from}>`;
    else {
      const part = processor.decode(inputIds.subarray(from, to), { skipSpecialTokens: false });
      text += kind === 'trained' ? `[[${part}]]` : part;
    }
    from = to;
  }
  if (decoderLabels && labels) text += `[[${processor.decode(labels, { skipSpecialTokens: false })}]]`;
  return text;
}

/** Whether a row shows the model anything. */
export function hasPicture({ images, videos, messages }: Row): boolean {
  return (
    images.length + (videos?.length ?? 0) > 0 ||
    messages.some(({ content }) => typeof content !== 'string' && content.some(({ type }) => type !== 'text'))
  );
}

/** What the tutorial's advice on trouble says, where this run shows it. */
export function trainingWarnings(config: TrainConfig, data: TrainData, plan: TrainPlan): TrainWarning[] {
  const warnings: TrainWarning[] = [];
  const rows = data.train.rows.length;
  if (data.skipped.length > 0) {
    const [first] = data.skipped as [RowProblem];
    warnings.push({
      message: `${data.skipped.length} row(s) are left out; the first: ${first.file} row ${first.row}: ${first.message}`,
      details: { skipped: data.skipped },
    });
  }
  const cut = data.train.rows.filter(({ piece }) => piece !== undefined).length;
  if (cut > 0) {
    warnings.push({
      message: `${cut} of ${rows} rows are pieces of rows longer than max_length ${config.max_length} (truncation_strategy: ${config.truncation_strategy}); a picture that a cut goes through is left out.`,
      details: { pieces: cut },
    });
  }
  if (rows < 100) {
    warnings.push({
      message: `only ${rows} rows: a model learns them by heart. At least 100 are usual.`,
      details: { rows },
    });
  }
  const [low, high] = config.sft_type === 'full' ? [1e-7, 1e-4] : [5e-6, 1e-3];
  if (config.learning_rate > high || config.learning_rate < low) {
    warnings.push({
      message: `learning_rate ${significant(config.learning_rate)} is unusual for sft_type: ${config.sft_type}; ${significant(low)} to ${significant(high)} is usual.`,
      details: { learning_rate: config.learning_rate },
    });
  }
  if (!data.train.rows.some(hasPicture)) {
    warnings.push({ message: 'no row has a picture: the model learns from text alone.' });
  }
  if (plan.warmupSteps >= plan.schedule.totalSteps) {
    warnings.push({
      message: `all ${plan.schedule.totalSteps} steps are warm-up: the learning rate never reaches learning_rate.`,
      details: { warmup_steps: plan.warmupSteps },
    });
  }
  return warnings;
}
