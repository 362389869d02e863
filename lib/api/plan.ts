/** Which settings fit a given memory, and what they would take: from config.json and the lengths of the rows, without loading the model. */
import { readFile } from 'node:fs/promises';
import { resolve } from 'node:path';
import { loadTrainConfig, quantizationOf, type TrainConfig, type TrainConfigInput } from '../config/index.js';
import { MartletError } from '../errors.js';
import { exists, isDirectory } from '../files.js';
import { findInHuggingFaceCache, findInModelScopeCache } from '../hub/cache.js';
import { publishedId } from '../hub/index.js';
import type { Quantization, Recompute } from '../native/binding.js';
import {
  describeModel,
  largestBatchTokens,
  memoryBudget,
  memoryOptions,
  predict,
  RECOMPUTE_LEVELS,
  USABLE,
} from './memory-advice.js';
import { type MemoryEstimate, trainedElements } from './memory-plan.js';
import { checkOptions } from './options.js';
import { parseSize } from './size.js';
import { loadTrainingData } from './train-setup.js';

/** Taken for the longest row where the data cannot be read and there is no max_length. */
const DEFAULT_TOKENS = 1024;
/** Shorter rows than this are no use to a picture. */
const SHORTEST_ROW = 256;

export interface PlanOptions {
  /** Memory of the GPU: bytes or `24GB`. Defaults to memory_budget, else what the device has. */
  gpu?: number | string;
  overrides?: Record<string, unknown> | string[];
  signal?: AbortSignal;
}

export interface TrainingPlan {
  fits: boolean;
  /** Bytes that the run may take. */
  budget: number;
  /** Bytes by part, with the settings below. */
  memory: MemoryEstimate;
  /** What to set; keys that stay as the config has them are not listed. */
  settings: Partial<
    Pick<
      TrainConfig,
      | 'sft_type'
      | 'quant_bits'
      | 'base_dtype'
      | 'per_device_train_batch_size'
      | 'gradient_accumulation_steps'
      | 'gradient_checkpointing'
      | 'optim'
      | 'max_length'
    >
  > & { max_pixels?: number };
  /** Tokens of the longest row that was planned for, and where they come from. */
  tokens: { longest: number; source: 'data' | 'max_length' | 'assumed' };
  trainableParams: number;
  notes: string[];
}

interface Candidate {
  quantization: Quantization;
  recompute: Recompute;
  batch: number;
  tokens: number;
  optim: TrainConfig['optim'];
}

/**
 * Predicts the peak memory of a run by part, and picks micro-batch, recompute, quantisation and, where nothing else helps, shorter rows so that it
 * fits. The rows of a step stay as many as the config asks for.
 */
export async function planTraining(input: string | TrainConfigInput, options: PlanOptions = {}): Promise<TrainingPlan> {
  checkOptions('planTraining', options);
  const notes: string[] = [];
  // a plan needs no data
  const withData =
    typeof input !== 'object' || input === null || 'dataset' in input || 'train_dataset' in input
      ? input
      : { ...input, dataset: '-' };
  const { config } = await loadTrainConfig(withData, { overrides: options.overrides });
  const modelDir = await localModel(config.model);
  const model = await describeModel(modelDir);
  const { lengths, source } = await rowLengths(config, modelDir, notes, options.signal);
  const budget = options.gpu === undefined ? memoryBudget(config) : USABLE * parseSize(gpuSize(options.gpu), 'gpu');

  const estimate = (candidate: Candidate) => {
    const rows = { ...config, per_device_train_batch_size: candidate.batch };
    const longest = lengths.map((length) => Math.min(length, candidate.tokens));
    return predict(
      { ...config, optim: candidate.optim },
      model,
      memoryOptions(config, model, largestBatchTokens(rows, longest), {
        quantization: candidate.quantization,
        recompute: candidate.recompute,
      }),
    );
  };
  const longest = lengths.reduce((a, b) => Math.max(a, b));
  const chosen = candidates(config, longest).find((candidate) => estimate(candidate).total <= budget);
  const last: Candidate = { ...(candidates(config, longest).at(-1) as Candidate) };
  let candidate = chosen ?? last;
  if (!chosen) {
    // the longest row that fits, to the nearest 32 tokens
    for (let tokens = longest - (longest % 32); tokens >= SHORTEST_ROW; tokens -= 32) {
      candidate = { ...last, tokens };
      if (estimate(candidate).total <= budget) break;
    }
  }
  const memory = estimate(candidate);
  if (candidate.tokens < longest) notes.push(`rows are cut to ${candidate.tokens} tokens: longer ones do not fit.`);
  if (!config.freeze_vit || config.sft_type === 'lora_llm')
    notes.push('what a vision tower that is trained keeps for its backward pass is not counted.');
  if (memory.total > budget) notes.push('nothing fits: a smaller model or a larger device is needed.');
  return {
    fits: memory.total <= budget,
    budget,
    memory,
    settings: await settingsOf(config, candidate, longest, modelDir),
    tokens: { longest: Math.min(longest, candidate.tokens), source },
    trainableParams: trainable(config, model),
    notes,
  };
}

/** From the fastest to the smallest. */
function* everyCandidate(config: TrainConfig, tokens: number): Generator<Candidate> {
  const own = quantizationOf(config);
  const quantizations: Candidate['quantization'][] = own === 'nf4' || config.sft_type === 'full' ? [own] : [own, 'nf4'];
  const fixed = config.gradient_checkpointing;
  // true is ms-swift's default and says nothing: the least recompute that fits is the better one
  const levels: Recompute[] = typeof fixed === 'string' && fixed !== 'auto' ? [fixed] : RECOMPUTE_LEVELS;
  for (const optim of new Set<TrainConfig['optim']>([config.optim, 'adamw_8bit'])) {
    for (const quantization of quantizations) {
      for (const recompute of levels) {
        for (
          let batch = config.per_device_train_batch_size;
          batch >= 1;
          batch = batch === 1 ? 0 : Math.ceil(batch / 2)
        ) {
          yield { quantization, recompute, batch, tokens, optim };
        }
      }
    }
  }
}
const candidates = (config: TrainConfig, tokens: number): Candidate[] => [...everyCandidate(config, tokens)];

async function settingsOf(
  config: TrainConfig,
  { quantization, recompute, batch, tokens, optim }: Candidate,
  longest: number,
  modelDir: string,
): Promise<TrainingPlan['settings']> {
  const settings: TrainingPlan['settings'] = { gradient_checkpointing: recompute };
  if (quantization !== quantizationOf(config)) {
    settings.sft_type = 'qlora';
    settings.quant_bits = quantization === 'int8' ? 8 : 4;
    if (config.base_dtype === 'fp8') settings.base_dtype = 'auto';
  }
  if (batch !== config.per_device_train_batch_size) {
    settings.per_device_train_batch_size = batch;
    settings.gradient_accumulation_steps = Math.ceil(
      (config.gradient_accumulation_steps * config.per_device_train_batch_size) / batch,
    );
  }
  if (optim !== config.optim) settings.optim = optim;
  if (tokens < longest) {
    settings.max_length = tokens;
    const pixels = await pixelsOfToken(modelDir);
    if (pixels !== undefined) settings.max_pixels = pixels * Math.max(64, tokens - SHORTEST_ROW);
  }
  return settings;
}

/** Pixels that one image token stands for, where a family's pictures keep their size. */
async function pixelsOfToken(modelDir: string): Promise<number | undefined> {
  const config = JSON.parse(await readFile(resolve(modelDir, 'config.json'), 'utf8')) as {
    vision_config?: { patch_size?: number; spatial_merge_size?: number };
  };
  const { patch_size: patch, spatial_merge_size: merge } = config.vision_config ?? {};
  return patch !== undefined && merge !== undefined ? (patch * merge) ** 2 : undefined;
}

function trainable(config: TrainConfig, model: Parameters<typeof predict>[1]): number {
  const { adapters, parameters } = trainedElements(config, model);
  return adapters + parameters;
}

/** `24`, `24GB` and a number of bytes. */
function gpuSize(size: number | string): number | string {
  return typeof size === 'string' && /^\d{1,3}$/.test(size.trim()) ? `${size}GB` : size;
}

/** A folder with a config.json: nothing is downloaded for a plan. */
async function localModel(model: string): Promise<string> {
  const local = resolve(model);
  if ((await isDirectory(local)) && (await exists(resolve(local, 'config.json')))) return local;
  const id = publishedId(model);
  const cached = (await findInHuggingFaceCache(id)) ?? (await findInModelScopeCache(id));
  if (cached !== undefined) return cached;
  throw new MartletError(
    'ERR_MARTLET_MODEL_NOT_FOUND',
    `there is no folder ${local} with a config.json, and ${id} is in no cache. A plan needs config.json alone: put it into a folder and give that as model.`,
    { model, searched: [local] },
  );
}

async function rowLengths(
  config: TrainConfig,
  modelDir: string,
  notes: string[],
  signal: AbortSignal | undefined,
): Promise<{ lengths: number[]; source: TrainingPlan['tokens']['source'] }> {
  if (config.dataset.every(({ path }) => path !== '-')) {
    try {
      const data = await loadTrainingData(config, { modelDir, ...(signal && { signal }) });
      return { lengths: data.train.lengths, source: 'data' };
    } catch (error) {
      if (!(error instanceof MartletError) || error.code === 'ERR_MARTLET_ABORTED') throw error;
      notes.push(`the rows cannot be measured (${error.message.split('\n')[0]}).`);
    }
  }
  const tokens = config.max_length ?? DEFAULT_TOKENS;
  const source = config.max_length === null ? 'assumed' : 'max_length';
  if (source === 'assumed') notes.push(`rows of ${tokens} tokens are assumed: give max_length or data.`);
  return { lengths: new Array<number>(config.per_device_train_batch_size).fill(tokens), source };
}
