/** Keys that are right each by itself and wrong together. */
import type { z } from 'zod';
import type { Problem } from './dialects.js';
import type { trainConfigSchema } from './schema.js';

type Config = z.infer<typeof trainConfigSchema>;

export function contradictions(config: Config, origin: Map<string, string>): Problem[] {
  const problems: Problem[] = [];
  const at = (key: keyof Config) => origin.get(key) ?? key;
  const refuse = (key: keyof Config, message: string) =>
    problems.push({ path: at(key), message: `${at(key)}${message}` });
  const adapters = config.sft_type !== 'full';

  if (!adapters && (config.quant_bits !== null || config.quant_method !== null)) {
    refuse('sft_type', ': full cannot train quantised weights. Use qlora, or leave quant_bits out');
  }
  const quantizes = config.quant_bits !== null || config.sft_type === 'qlora' || config.quant_method !== null;
  if (config.base_dtype === 'fp8') {
    const fp8 = ': fp8 ';
    if (!adapters) {
      refuse(
        'base_dtype',
        `${fp8}is for frozen weights, which sft_type: full does not have. Use lora, or leave it out`,
      );
    } else if (quantizes) {
      refuse(
        'base_dtype',
        `${fp8}and quantised weights (qlora, quant_bits, quant_method) are two forms of the same weights. Keep one of them`,
      );
    }
    if (config.torch_dtype === 'float32' || config.torch_dtype === 'float16') {
      refuse('base_dtype', `${fp8}is for bfloat16, not for torch_dtype: ${config.torch_dtype}. Leave one of them out`);
    }
    if (config.device === 'cpu') {
      refuse('base_dtype', `${fp8}needs a GPU (Hopper or newer), and device is cpu. Leave base_dtype out`);
    }
  }
  if (!adapters) {
    for (const [key, given] of [
      ['use_dora', config.use_dora],
      ['modules_to_save', config.modules_to_save.length > 0],
      ['lorap_lr_ratio', config.lorap_lr_ratio !== null],
      ['use_rslora', config.use_rslora],
      ['lora_bias', config.lora_bias !== 'none'],
      ['lora_dtype', config.lora_dtype !== null],
    ] as const) {
      if (given) refuse(key, ' belongs to adapters and means nothing with sft_type: full. Leave it out');
    }
  } else {
    for (const [key, given] of [
      ['freeze_parameters', config.freeze_parameters.length > 0],
      ['freeze_parameters_regex', config.freeze_parameters_regex !== null],
      ['freeze_parameters_ratio', config.freeze_parameters_ratio > 0],
    ] as const) {
      if (given) {
        refuse(
          key,
          ` belongs to sft_type: full; with ${config.sft_type} target_modules says what is trained. Leave it out`,
        );
      }
    }
  }
  if (!adapters && config.adapters.length > 0) {
    refuse(
      'adapters',
      ' are not trained by sft_type: full. Merge them first (martlet export) and give that folder as model',
    );
  }
  if (config.non_finite === 'rollback' && config.save_only_model) {
    refuse(
      'save_only_model',
      ': non_finite: rollback goes back to checkpoints with their optimiser. Leave one of them out',
    );
  }
  const pissa = String(config.init_weights).startsWith('pissa');
  if (pissa && config.use_dora) refuse('init_weights', ': pissa cannot be combined with use_dora. Keep one of them');
  if (pissa && (quantizes || config.base_dtype === 'fp8')) {
    refuse(
      'init_weights',
      ': pissa takes the base weights apart, which quantised ones do not allow. Use true or gaussian',
    );
  }
  if (pissa && config.adapters.length > 0) {
    refuse('init_weights', ' has no effect when the run starts from an adapter. Leave one of them out');
  }

  const kwargs = config.lr_scheduler_kwargs ?? {};
  const allowed: Record<string, string[]> = {
    cosine: ['num_cycles'],
    cosine_with_restarts: ['num_cycles'],
    cosine_with_min_lr: ['num_cycles', 'min_lr', 'min_lr_rate'],
    polynomial: ['power', 'lr_end'],
    inverse_sqrt: ['timescale'],
  };
  for (const key of Object.keys(kwargs)) {
    if (!(allowed[config.lr_scheduler_type] ?? []).includes(key)) {
      refuse(
        'lr_scheduler_kwargs',
        `.${key} does not belong to lr_scheduler_type ${config.lr_scheduler_type}. Leave it out`,
      );
    }
  }
  if (config.lr_scheduler_type === 'cosine_with_min_lr') {
    const given = [kwargs.min_lr, kwargs.min_lr_rate].filter((value) => value !== undefined).length;
    if (given !== 1) refuse('lr_scheduler_kwargs', ': cosine_with_min_lr needs min_lr or min_lr_rate, one of them');
  }
  const rate = config.learning_rate ?? (adapters ? 1e-4 : 1e-5);
  if (config.lr_scheduler_type === 'polynomial' && rate <= (kwargs.lr_end ?? 1e-7)) {
    refuse('lr_scheduler_kwargs', `: lr_end ${kwargs.lr_end ?? 1e-7} must be below learning_rate ${rate}`);
  }
  if (config.optim_args !== null && config.optim !== 'sgd') {
    refuse('optim_args', ` belongs to optim: sgd, not to ${config.optim}. Leave it out`);
  } else if (config.optim_args !== null && parseOptimArgs(config.optim_args) === undefined) {
    refuse('optim_args', ` is ${JSON.stringify(config.optim_args)}: write momentum=0.9 or momentum=0.9,nesterov=true`);
  }

  if (config.packing && config.packing_length === null && config.max_length === null) {
    refuse('packing', ': true needs packing_length or max_length: the tokens of a packed row');
  }
  if (config.packing && config.group_by_length) {
    refuse('group_by_length', ' has no effect with packing. Leave one of them out');
  }
  if (config.packing_length !== null && config.max_length !== null && config.packing_length < config.max_length) {
    refuse('packing_length', ` is less than max_length ${config.max_length}: a row would not fit. Raise it`);
  }
  if (['left', 'right', 'split'].includes(config.truncation_strategy) && config.max_length === null) {
    refuse('truncation_strategy', `: ${config.truncation_strategy} needs max_length`);
  }

  const rows = config.val_dataset.length > 0 || config.split_dataset_ratio > 0;
  const evaluates = rows && (config.eval_strategy ?? config.save_strategy) !== 'no';
  for (const [key, given] of [
    ['predict_with_generate', config.predict_with_generate],
    ['early_stop_interval', config.early_stop_interval !== null],
    ['metric_for_best_model', config.metric_for_best_model !== 'loss'],
  ] as const) {
    if (!given || evaluates) continue;
    refuse(
      key,
      rows
        ? ' needs evaluations: set eval_strategy to steps or epoch'
        : ' needs evaluation rows: give val_dataset or split_dataset_ratio',
    );
  }
  if (!rows) {
    if (config.load_best_model_at_end) {
      refuse('load_best_model_at_end', ' needs evaluation rows: give val_dataset or split_dataset_ratio');
    }
  } else if (config.load_best_model_at_end) {
    const evaluations = config.eval_strategy ?? config.save_strategy;
    const every = config.eval_steps ?? config.save_steps;
    if (config.save_strategy === 'no') {
      refuse('load_best_model_at_end', ' needs checkpoints: set save_strategy to steps or epoch');
    } else if (evaluations !== config.save_strategy) {
      refuse(
        'load_best_model_at_end',
        ` needs every checkpoint evaluated: save_strategy is ${config.save_strategy}, eval_strategy ${evaluations}. Make them the same`,
      );
    } else if (evaluations === 'steps' && config.save_steps % every !== 0) {
      refuse(
        'load_best_model_at_end',
        ` needs every checkpoint evaluated: save_steps ${config.save_steps} is not a multiple of eval_steps ${every}`,
      );
    }
  }
  if (['exact_match', 'rouge_l', 'bleu'].includes(config.metric_for_best_model) && !config.predict_with_generate) {
    refuse('metric_for_best_model', `: ${config.metric_for_best_model} needs predict_with_generate: true`);
  }
  return problems;
}

/** `momentum=0.9,nesterov=true`; undefined when it cannot be read. */
export function parseOptimArgs(text: string): { momentum: number; nesterov: boolean } | undefined {
  const out = { momentum: 0, nesterov: false };
  for (const part of text.split(',')) {
    const [key, value] = part.split('=').map((piece) => piece.trim());
    const number = Number(value);
    if (key === 'momentum' && value !== undefined && value !== '' && number >= 0 && number < 1) out.momentum = number;
    else if (key === 'nesterov' && /^(true|false)$/i.test(value ?? '')) out.nesterov = value?.toLowerCase() === 'true';
    else return undefined;
  }
  // torch.optim.SGD refuses it too
  return out.nesterov && out.momentum === 0 ? undefined : out;
}
