/** A config as the arguments of native jobs. */

import { parseOptimArgs } from '../config/contradictions.js';
import { quantizationOf, type TrainConfig } from '../config/index.js';
import type { LoadArgs, Recompute, TrainBeginArgs } from '../native/binding.js';
import type { TrainPlan } from './train-setup.js';
import { visionCacheArgs } from './vision-cache.js';

export function loadArgs(config: TrainConfig, modelDir: string): LoadArgs {
  return {
    modelDir,
    device: config.device,
    dtype: config.torch_dtype,
    quantization: quantizationOf(config),
    doubleQuantization: config.bnb_4bit_use_double_quant,
    ...visionCacheArgs({ mode: config.vision_cache, size: config.vision_cache_size, dir: config.vision_cache_dir }),
  };
}

export function beginArgs(config: TrainConfig, plan: TrainPlan, recompute: Recompute): TrainBeginArgs {
  const full = config.sft_type === 'full';
  const wholeParts = config.sft_type === 'lora_llm';
  return {
    method: full ? 'full' : 'lora',
    ...(!full && {
      lora: {
        r: config.lora_rank,
        alpha: config.lora_alpha,
        dropout: config.lora_dropout,
        useRslora: config.use_rslora,
        useDora: config.use_dora,
        bias: config.lora_bias,
        initWeights: String(config.init_weights),
        dtype: config.lora_dtype,
        modulesToSave: config.modules_to_save,
        fullVisionAndProjector: wholeParts,
        targetModules: config.target_modules,
      },
    }),
    ...(config.adapters[0] !== undefined && { adapterDir: config.adapters[0] }),
    freeze: { vision: config.freeze_vit, projector: config.freeze_aligner, language: config.freeze_llm },
    parameters: {
      trainable: config.trainable_parameters,
      trainableRegex: config.trainable_parameters_regex ?? '',
      frozen: config.freeze_parameters,
      frozenRegex: config.freeze_parameters_regex ?? '',
      frozenRatio: config.freeze_parameters_ratio,
    },
    optimizer: optimizer(config),
    schedule: schedule(config, plan),
    learningRate: config.learning_rate,
    vitLearningRate: config.vit_lr,
    alignerLearningRate: config.aligner_lr,
    loraPlusRatio: config.lorap_lr_ratio,
    maxGradNorm: config.max_grad_norm,
    dropout: config.dropout,
    neftuneNoiseAlpha: config.neftune_noise_alpha ?? 0,
    labelSmoothing: config.label_smoothing_factor,
    recompute,
    visionRecompute: config.vit_gradient_checkpointing ?? recompute !== 'none',
    seed: config.seed,
    deterministic: config.deterministic,
    tf32: config.tf32,
  };
}

function optimizer(config: TrainConfig): TrainBeginArgs['optimizer'] {
  const name = config.optim.includes('8bit')
    ? 'adamw_8bit'
    : config.optim === 'sgd' || config.optim === 'adafactor'
      ? config.optim
      : 'adamw';
  return {
    name,
    paged: config.optim.startsWith('paged_'),
    beta1: config.adam_beta1,
    beta2: config.adam_beta2,
    epsilon: config.adam_epsilon,
    weightDecay: config.weight_decay,
    ...(config.optim_args !== null && parseOptimArgs(config.optim_args)),
  };
}

function schedule(config: TrainConfig, plan: TrainPlan): TrainBeginArgs['schedule'] {
  const kwargs = config.lr_scheduler_kwargs ?? {};
  // native code knows shares of the base rate, which each group has its own of
  const share = (rate: number) => (config.learning_rate > 0 ? rate / config.learning_rate : 0);
  return {
    type: config.lr_scheduler_type,
    warmupSteps: plan.warmupSteps,
    totalSteps: plan.schedule.totalSteps,
    ...(kwargs.num_cycles !== undefined && { numCycles: kwargs.num_cycles }),
    ...(kwargs.timescale !== undefined && { timescale: kwargs.timescale }),
    minLrRate: kwargs.min_lr !== undefined ? share(kwargs.min_lr) : (kwargs.min_lr_rate ?? 0),
    endRate: share(kwargs.lr_end ?? 1e-7),
    power: kwargs.power ?? 1,
  };
}
