/** Memory predictions for the run at hand: the level of recompute that fits, and what would help when nothing does. */
import { quantizationOf, type TrainConfig } from '../config/index.js';
import type { ModelDescription, Recompute } from '../native/binding.js';
import { Engine } from '../native/engine.js';
import { loadAddon } from '../native/load.js';
import { bytes } from '../report/format.js';
import { estimateMemory, holdsFp8, type MemoryEstimate, type MemoryOptions, trainedElements } from './memory-plan.js';
import { parseSize } from './size.js';
import type { TrainData } from './train-setup.js';

export const RECOMPUTE_LEVELS: Recompute[] = ['none', 'cheap', 'mlp', 'layer'];
/** Share of the memory that a plan fills: the rest is the driver's and the allocator's. */
export const USABLE = 0.92;

export async function describeModel(modelDir: string): Promise<ModelDescription> {
  const engine = new Engine();
  try {
    return (await engine.call('describe', { modelDir })).result;
  } finally {
    await engine.close();
  }
}

/** Tokens of the largest micro-batch that the config can bring about. */
export function largestBatchTokens(config: TrainConfig, lengths: number[]): number {
  if (config.packing)
    return config.per_device_train_batch_size * ((config.packing_length ?? config.max_length) as number);
  const longest = [...lengths].sort((a, b) => b - a).slice(0, config.per_device_train_batch_size);
  return longest.reduce((a, b) => a + b, 0);
}

/** The options of a prediction for this config; `changes` win. Half of the tokens are taken as labelled. */
export function memoryOptions(
  config: TrainConfig,
  model: ModelDescription,
  tokens: number,
  changes: Partial<MemoryOptions> = {},
): MemoryOptions {
  const quantization = changes.quantization ?? quantizationOf(config);
  const computeBytes = bytesOf(config.torch_dtype === 'auto' ? model.dtype : config.torch_dtype);
  return {
    quantization,
    doubleQuantization: config.bnb_4bit_use_double_quant,
    computeBytes,
    adapterBytes: config.lora_dtype === null ? computeBytes : bytesOf(config.lora_dtype),
    pairsDrop: config.sft_type !== 'full' && config.lora_dropout > 0,
    trainedNorms: config.sft_type === 'full' && !config.freeze_llm,
    drops: (config.dropout ?? 1) > 0 && model.decoder.dropout > 0,
    writtenOut: (quantization !== 'fp8' || allHoldFp8(model)) && writesOut(config, model),
    recompute: fixedRecompute(config.gradient_checkpointing) ?? 'layer',
    tokens,
    labelled: Math.ceil(tokens / 2),
    cpu: config.device === 'cpu',
    ...changes,
  };
}

/** Where one linear of a layer stays in bfloat16, the layer is not taken in fp8 as a whole. */
function allHoldFp8(model: ModelDescription): boolean {
  const quantizable = new Set(model.parameters.filter((one) => one.quantizable).map(({ name }) => name));
  return model.linears.every((linear) => !quantizable.has(`${linear.path}.weight`) || holdsFp8(linear));
}

const bytesOf = (dtype: string | null): number => (dtype === 'float32' ? 4 : 2);

/** Whether native code takes the decoder’s layers as native/core/language/frozen_layer.h does, as far as the run’s options say. */
function writesOut(config: TrainConfig, model: ModelDescription): boolean {
  return (
    model.decoder.writtenOut &&
    config.sft_type !== 'full' &&
    config.lora_dropout === 0 &&
    !config.use_dora &&
    config.lora_bias === 'none' &&
    config.trainable_parameters.length === 0 &&
    !config.trainable_parameters_regex &&
    // trained as a whole: nothing in the layers
    config.modules_to_save.every((name) => name === 'all-embedding' || EMBEDDINGS.test(name))
  );
}
const EMBEDDINGS = /(^|\.)(embed_tokens|lm_head|wte)$/;

export function predict(config: TrainConfig, model: ModelDescription, options: MemoryOptions): MemoryEstimate {
  return estimateMemory(model, trainedElements(config, model), config.optim, options);
}

function fixedRecompute(setting: TrainConfig['gradient_checkpointing']): Recompute | undefined {
  if (setting === 'auto') return undefined;
  return setting === true ? 'layer' : setting === false ? 'none' : setting;
}

/** What gradient_checkpointing means: `auto` is the least recompute that fits the budget. */
export async function chooseRecompute(config: TrainConfig, modelDir: string, data: TrainData): Promise<Recompute> {
  const fixed = fixedRecompute(config.gradient_checkpointing);
  if (fixed !== undefined) return fixed;
  const model = await describeModel(modelDir);
  const tokens = largestBatchTokens(config, data.train.lengths);
  const budget = memoryBudget(config);
  return (
    RECOMPUTE_LEVELS.find(
      (recompute) => predict(config, model, memoryOptions(config, model, tokens, { recompute })).total <= budget,
    ) ?? 'layer'
  );
}

/** Bytes that the run may take. */
export function memoryBudget(config: TrainConfig): number {
  if (config.memory_budget !== null) return parseSize(config.memory_budget, 'memory_budget');
  const { devices } = JSON.parse(loadAddon().addon.systemInfo()) as {
    devices: { name: string; totalMemory: number; freeMemory: number }[];
  };
  const name = config.device === 'auto' || config.device === 'cuda' ? 'cuda:0' : config.device;
  const device = devices.find((entry) => entry.name === name) ?? devices[0];
  return USABLE * (device?.freeMemory || device?.totalMemory || Number.POSITIVE_INFINITY);
}

/** For a run that does not fit: what each remedy would save, by the prediction. */
export async function savingsText(config: TrainConfig, modelDir: string, tokens: number): Promise<string> {
  const model = await describeModel(modelDir);
  const now = predict(config, model, memoryOptions(config, model, tokens));
  const remedies: { what: string; saved: number }[] = [];
  const offer = (what: string, options: Partial<MemoryOptions>, changed: TrainConfig = config) => {
    const saved = now.total - predict(changed, model, memoryOptions(changed, model, tokens, options)).total;
    if (saved > 0) remedies.push({ what, saved });
  };
  offer('gradient_checkpointing: layer', { recompute: 'layer' });
  const qlora = config.base_dtype === 'fp8' ? 'sft_type: qlora in place of base_dtype: fp8' : 'sft_type: qlora';
  if (config.sft_type !== 'full') offer(qlora, { quantization: 'nf4' });
  else offer('sft_type: lora', {}, { ...config, sft_type: 'lora' });
  offer('half the tokens of the row (max_length, max_pixels)', {
    tokens: Math.ceil(tokens / 2),
    labelled: Math.ceil(tokens / 4),
  });
  offer('optim: adamw_8bit', {}, { ...config, optim: 'adamw_8bit' });
  // What saves next to nothing beside the best is no advice.
  const worth = Math.max(...remedies.map(({ saved }) => saved)) / 20;
  const advice = remedies.flatMap(({ what, saved }) => (saved < worth ? [] : [`${what} saves about ${bytes(saved)}`]));
  return `About ${bytes(now.total)} are needed. ${advice.length === 0 ? 'Use a larger device.' : `${advice.join('; ')}.`}`;
}
