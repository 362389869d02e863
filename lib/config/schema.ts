/** The one shape that every config becomes: flat, ms-swift's names. Each key is documented here; docs/configuration.md is generated from it. */
import { z } from 'zod';

/** transformers' names. */
export const OPTIMIZERS = [
  'adamw_torch',
  'adamw_torch_fused',
  'adamw_8bit',
  'adamw_bnb_8bit',
  'paged_adamw',
  'paged_adamw_32bit',
  'paged_adamw_8bit',
  'sgd',
  'adafactor',
] as const;
export const SCHEDULES = [
  'linear',
  'cosine',
  'cosine_with_restarts',
  'cosine_with_min_lr',
  'constant',
  'constant_with_warmup',
  'polynomial',
  'inverse_sqrt',
] as const;

const positive = () => z.number().int().positive();
const limit = (description: string) => positive().nullable().default(null).describe(description);
const ratio = () => z.number().min(0).max(1);

export const datasetSpecSchema = z.strictObject({
  path: z.string().min(1).describe('JSON or JSONL file in LLaVA, messages, query/response or alpaca form.'),
  dataset_root: z.string().optional().describe('Folder that pictures are looked for in.'),
  image_folder: z.string().optional().describe('Folder below dataset_root that pictures are looked for in first.'),
  sample: positive().optional().describe('Take only the first N rows (`path#N`).'),
});

/** One data file. */
export type DatasetSpec = z.infer<typeof datasetSpecSchema>;

export const trainConfigSchema = z.strictObject({
  // ---- model
  model: z.string().min(1).describe('Folder of the base model, or its hub id.'),
  model_type: z
    .string()
    .nullable()
    .default(null)
    .describe("The model's family. Defaults to what config.json says; a contradiction is an error."),
  sft_type: z
    .enum(['lora', 'qlora', 'full', 'lora_llm'])
    .default('lora')
    .describe(
      'What is trained: `lora` adapters; `qlora` = adapters on quantised weights (quant_bits 4 unless given); `full` weights; `lora_llm` = adapters on the language model, vision tower and projector in full.',
    ),
  torch_dtype: z
    .enum(['auto', 'float32', 'bfloat16', 'float16'])
    .default('auto')
    .describe(
      'Precision of the arithmetic; `auto` = as the checkpoint is stored. Adapters and optimiser state are float32 always.',
    ),
  quant_method: z
    .enum(['bnb'])
    .nullable()
    .default(null)
    .describe("How the language model's weights are quantised as they are loaded: `bnb` = bitsandbytes' formats."),
  quant_bits: z
    .union([z.literal(4), z.literal(8)])
    .nullable()
    .default(null)
    .describe('4 = NF4, 8 = int8 by rows. Vision tower, projector and head stay as they are.'),
  base_dtype: z
    .enum(['auto', 'fp8'])
    .default('auto')
    .describe(
      "What the language model's frozen linears are kept and multiplied in beside adapters: `auto` = torch_dtype (or quant_bits); `fp8` = 8-bit floats (e4m3 by rows, gradients too), faster and half the weights' memory, on GPUs from Hopper on, in bfloat16.",
    ),
  bnb_4bit_quant_type: z.literal('nf4').default('nf4').describe('The 4-bit data type.'),
  bnb_4bit_use_double_quant: z.boolean().default(true).describe("NF4: keep the blocks' scales in 8 bits too."),
  tf32: z
    .boolean()
    .default(false)
    .describe('Let float32 products use TF32 on CUDA: faster, about 10 bits of mantissa.'),
  device: z
    .string()
    .regex(/^(auto|cpu|cuda(:\d+)?)$/, 'expected auto, cpu, cuda or cuda:N')
    .default('auto')
    .describe('`auto` = the first CUDA device, else the CPU.'),
  template: z
    .enum(['default', 'ms-swift'])
    .default('default')
    .describe("`default` = the checkpoint's own chat template; `ms-swift` = ms-swift's registered one."),
  labels: z
    .enum(['default', 'official'])
    .default('default')
    .describe(
      "What is trained: `default` = the answers with their end token; `official` = as the model's authors did it (Qwen-VL-Chat: the marks of every turn as well).",
    ),
  system: z.string().nullable().default(null).describe('System prompt of rows that have none.'),
  adapters: z.array(z.string()).max(1).default([]).describe('PEFT adapter folder to start from.'),

  // ---- data
  dataset: z
    .array(datasetSpecSchema)
    .min(1)
    .describe('Training files: a path, a list of paths (`path#N` takes N rows), or objects.'),
  val_dataset: z.array(datasetSpecSchema).default([]).describe('Evaluation files.'),
  split_dataset_ratio: ratio()
    .default(0)
    .describe('Share of the training rows that is set aside for evaluation when there is no val_dataset.'),
  dataset_shuffle: z.boolean().default(true).describe('Shuffle the rows once, by data_seed.'),
  train_dataloader_shuffle: z.boolean().default(true).describe('Shuffle the order again in every epoch, by seed.'),
  data_seed: z.number().int().min(0).default(42).describe('Seed of dataset_shuffle and the split.'),
  max_length: positive()
    .nullable()
    .default(null)
    .describe("Longest row in tokens, image tokens counted. null = the model's positions."),
  truncation_strategy: z
    .enum(['delete', 'left', 'right', 'split', 'raise'])
    .default('delete')
    .describe(
      'What happens to a longer row: `delete` leaves it out and reports it, `left` and `right` cut that end off, `split` makes several rows of it, `raise` stops before training. A picture is kept or dropped whole.',
    ),
  packing: z
    .boolean()
    .default(false)
    .describe(
      'Fill each row of a batch with several data rows up to packing_length, first fit by length. They do not see each other.',
    ),
  packing_length: positive().nullable().default(null).describe('Tokens of a packed row. null = max_length.'),
  group_by_length: z.boolean().default(false).describe('Put rows of similar length into one batch (not with packing).'),
  on_bad_row: z
    .enum(['error', 'skip'])
    .default('error')
    .describe('A row that cannot be used: `error` stops before training and names all of them, `skip` reports them.'),
  vision_cache: z
    .enum(['off', 'memory', 'disk'])
    .default('memory')
    .describe(
      'Keep what pictures become in front of the language model where that part is frozen and has no dropout, so that each picture goes through the vision tower once a run (`disk`: once for all runs with these weights).',
    ),
  vision_cache_size: z
    .string()
    .regex(/^\d+(\.\d+)?\s*([KMGT]i?B|B)?$/i, 'expected a size such as 2GB')
    .default('2GB')
    .describe('What the cache takes at most; what was unused for longest goes first.'),
  vision_cache_dir: z
    .string()
    .nullable()
    .default(null)
    .describe("Folder of `vision_cache: disk`. null = `vision` in martlet's cache folder."),
  exif_orientation: z.boolean().default(true).describe('Turn pictures as their EXIF orientation says.'),
  max_image_pixels: positive()
    .default(268_402_689)
    .describe('Larger pictures are refused (guards against decompression bombs).'),

  // ---- pictures at their own size (Qwen2-VL and later)
  max_pixels: limit(
    "Most pixels of a picture after resizing. null = the environment's MAX_PIXELS, else the checkpoint's.",
  ),
  min_pixels: limit("Fewest pixels of a picture after resizing. null = MIN_PIXELS, else the checkpoint's."),
  image_max_token_num: limit(
    'Most image tokens of a picture: another way to say max_pixels. null = IMAGE_MAX_TOKEN_NUM.',
  ),
  image_min_token_num: limit(
    'Fewest image tokens of a picture: another way to say min_pixels. null = IMAGE_MIN_TOKEN_NUM.',
  ),
  video_max_pixels: limit(
    "Most pixels of one video frame after resizing. null = VIDEO_MAX_PIXELS, else the checkpoint's.",
  ),
  video_min_pixels: limit(
    "Fewest pixels of one video frame after resizing. null = VIDEO_MIN_PIXELS, else the checkpoint's.",
  ),
  video_total_pixels: limit(
    "Most pixels of all temporal patches of a video: lowers the frames' limit for long videos. null = VIDEO_TOTAL_PIXELS, else none.",
  ),
  video_max_token_num: limit(
    'Most tokens of one video frame: another way to say video_max_pixels. null = VIDEO_MAX_TOKEN_NUM.',
  ),
  video_min_token_num: limit(
    'Fewest tokens of one video frame: another way to say video_min_pixels. null = VIDEO_MIN_TOKEN_NUM.',
  ),
  fps: z
    .number()
    .positive()
    .nullable()
    .default(null)
    .describe('Frames a second of videos that do not say. null = FPS, else 2.'),
  norm_bbox: z
    .enum(['norm1000', 'none'])
    .nullable()
    .default(null)
    .describe(
      "Coordinates of boxes: thousandths of the picture, or (`none`) pixels of the resized picture. null = the family's: none for Qwen2.5-VL.",
    ),
  bbox_format: z
    .enum(['legacy', 'new'])
    .nullable()
    .default(null)
    .describe(
      '`legacy`: boxes and names between tags such as `<|box_start|>`; `new`: `[x1, y1, x2, y2]` and the plain name. null = QWENVL_BBOX_FORMAT, else legacy.',
    ),

  // ---- pictures cut into slices (MiniCPM-V)
  max_slice_nums: limit(
    "Most slices that a picture is cut into, the whole view not counted. null = MAX_SLICE_NUMS, else the checkpoint's.",
  ),
  use_image_id: z
    .boolean()
    .nullable()
    .default(null)
    .describe("Write each picture's number before it. null = the checkpoint's."),

  // ---- LoRA
  lora_rank: positive().max(4096).default(8).describe('Rank r of the adapters.'),
  lora_alpha: z.number().positive().default(32).describe('Scaling: alpha / r, or alpha / √r with use_rslora.'),
  lora_dropout: z.number().min(0).lt(1).default(0.05).describe('Dropout on the input of A, in training only.'),
  target_modules: z
    .union([z.array(z.string().min(1)).min(1), z.string().min(1)])
    .default('all-linear')
    .describe(
      '`all-linear` (every linear of the language model but the head, and of parts that are not frozen), a list of names or endings, or one regular expression.',
    ),
  lora_dtype: z
    .enum(['float32', 'bfloat16', 'float16'])
    .nullable()
    .default(null)
    .describe(
      "Precision that adapters are computed and saved in. null = computed in the model's, saved in float32. The optimiser's copy is float32 always.",
    ),
  lora_bias: z
    .enum(['none', 'all', 'lora_only'])
    .default('none')
    .describe("Biases of the base model that are trained too: all, or those of modules with an adapter (PEFT's bias)."),
  lorap_lr_ratio: z
    .number()
    .positive()
    .nullable()
    .default(null)
    .describe('LoRA+: B learns this many times faster than A; 10 to 16 is usual.'),
  init_weights: z
    .union([z.boolean(), z.string().regex(/^(true|false|gaussian|pissa|pissa_niter_\d{1,3})$/)])
    .default(true)
    .describe(
      'How adapters begin: `true` = A uniform, B zero; `false` = both random; `gaussian`; `pissa` or `pissa_niter_N` = principal components of the weights (saved as plain LoRA of twice the rank).',
    ),
  use_dora: z.boolean().default(false).describe('DoRA: a trained length for each row of the adapted weight.'),
  modules_to_save: z
    .array(z.string().min(1))
    .default([])
    .describe('Modules trained as a whole and saved with the adapter: names or endings, `all-embedding`, `all-norm`.'),
  use_rslora: z.boolean().default(false).describe('Rank-stabilised scaling alpha / √r.'),
  freeze_vit: z.boolean().default(true).describe('Keep the vision tower as it is. Wins over target_modules.'),
  freeze_aligner: z.boolean().default(true).describe('Keep the projector as it is. Wins over target_modules.'),
  freeze_llm: z.boolean().default(false).describe('Keep the language model as it is. Wins over target_modules.'),

  trainable_parameters: z
    .array(z.string().min(1))
    .default([])
    .describe('Beginnings of parameter names that are trained in full, whatever is frozen; beside adapters too.'),
  trainable_parameters_regex: z
    .string()
    .min(1)
    .nullable()
    .default(null)
    .describe('The same, searched for in the names.'),
  freeze_parameters: z
    .array(z.string().min(1))
    .default([])
    .describe('Full training: beginnings of parameter names that are frozen.'),
  freeze_parameters_regex: z.string().min(1).nullable().default(null).describe('The same, searched for in the names.'),
  freeze_parameters_ratio: ratio()
    .default(0)
    .describe('Full training: share of the parameters, from the first on, that is frozen.'),

  // ---- training
  num_train_epochs: z.number().positive().default(3).describe('Passes over the data; a fraction ends early.'),
  max_steps: z.number().int().min(-1).default(-1).describe('Optimiser steps; wins over num_train_epochs unless −1.'),
  per_device_train_batch_size: positive().default(1).describe('Rows of a micro-batch.'),
  per_device_eval_batch_size: positive()
    .default(1)
    .describe('Rows of an evaluation batch, and of answers at once (predict_with_generate).'),
  gradient_accumulation_steps: positive()
    .nullable()
    .default(null)
    .describe('Micro-batches of a step. null = enough for 16 rows a step.'),
  learning_rate: z
    .number()
    .min(0)
    .nullable()
    .default(null)
    .describe('Highest learning rate. null = 1e-4 for adapters, 1e-5 for full.'),
  vit_lr: z.number().min(0).nullable().default(null).describe('Of the vision tower. null = learning_rate.'),
  aligner_lr: z.number().min(0).nullable().default(null).describe('Of the projector. null = learning_rate.'),
  optim: z
    .enum(OPTIMIZERS)
    .default('adamw_torch')
    .describe(
      '`adamw_torch`; `adamw_8bit` = moments in 8-bit blocks; `paged_…` = moments in pinned host memory; `sgd`; `adafactor`.',
    ),
  optim_args: z
    .string()
    .nullable()
    .default(null)
    .describe('For sgd: `momentum=0.9`, `nesterov=true`, joined by commas.'),
  weight_decay: z.number().min(0).default(0.1).describe("AdamW's decay; not on biases and norms."),
  adam_beta1: ratio().default(0.9).describe("AdamW's β₁."),
  adam_beta2: ratio().default(0.95).describe("AdamW's β₂."),
  adam_epsilon: z.number().positive().default(1e-8).describe("AdamW's ε."),
  max_grad_norm: z.number().min(0).default(1).describe('Gradients are scaled down to this norm; 0 = never.'),
  lr_scheduler_type: z.enum(SCHEDULES).default('cosine').describe('Schedule of the learning rate, as in transformers.'),
  lr_scheduler_kwargs: z
    .strictObject({
      num_cycles: z.number().positive().optional(),
      min_lr: z.number().min(0).optional(),
      min_lr_rate: ratio().optional(),
      power: z.number().positive().optional(),
      lr_end: z.number().min(0).optional(),
      timescale: positive().optional(),
    })
    .nullable()
    .default(null)
    .describe('Of the schedule: num_cycles, min_lr or min_lr_rate, power and lr_end, timescale. An object or JSON.'),
  warmup_ratio: ratio().default(0).describe('Share of the steps in which the learning rate rises from 0.'),
  warmup_steps: z
    .number()
    .int()
    .min(0)
    .default(0)
    .describe('Steps in which the learning rate rises; wins over warmup_ratio unless 0.'),
  gradient_checkpointing: z
    .union([z.boolean(), z.enum(['none', 'cheap', 'mlp', 'layer', 'auto'])])
    .default(true)
    .describe(
      'What is computed again in the backward pass instead of being kept: `none` (false), `cheap` (norms and products), `mlp`, `layer` (true: least memory, about a third slower), `auto` = the least that fits memory_budget.',
    ),
  vit_gradient_checkpointing: z
    .boolean()
    .nullable()
    .default(null)
    .describe('Whether a vision tower that is trained computes its layers again. null = as gradient_checkpointing.'),
  memory_budget: z
    .string()
    .regex(/^\d+(\.\d+)?\s*([KMGT]i?B)?$/i, 'expected a size such as 24GB')
    .nullable()
    .default(null)
    .describe("For gradient_checkpointing: auto, and the plan. null = the device's memory."),
  neftune_noise_alpha: z
    .number()
    .min(0)
    .nullable()
    .default(null)
    .describe('NEFTune: strength of the noise on text embeddings; 5 to 15 is usual.'),
  dropout: z
    .number()
    .min(0)
    .lt(1)
    .nullable()
    .default(null)
    .describe(
      "Dropout of the model's own layers in training (BLIP-2's Q-Former, OPT and T5). null = what config.json says, 0.1 as a rule; 0 = none. Other families have no such layers: more than 0 is an error there.",
    ),
  label_smoothing_factor: z
    .number()
    .min(0)
    .lt(1)
    .default(0)
    .describe('Share of the target that is spread over the whole vocabulary.'),
  non_finite: z
    .enum(['stop', 'skip', 'rollback'])
    .default('stop')
    .describe(
      'When the loss or a gradient is not finite: `stop`; `skip` the step; `rollback` to the last checkpoint and go on with the next rows.',
    ),
  seed: z
    .number()
    .int()
    .min(0)
    .default(42)
    .describe('Fixes initial adapters, dropout and order: two runs give the same bits on the CPU.'),
  deterministic: z.boolean().default(false).describe('Same bits on CUDA too, slower.'),

  // ---- output
  output_dir: z
    .string()
    .min(1)
    .default('output')
    .describe('Folder of the run: final adapter, checkpoint-N, logs, runs, args.yaml.'),
  overwrite_output_dir: z.boolean().default(false).describe('Replace a run that output_dir holds.'),
  resume_from_checkpoint: z
    .union([z.boolean(), z.string().min(1)])
    .nullable()
    .default(null)
    .describe('true = the newest checkpoint of output_dir; or the path of one.'),
  logging_steps: positive().default(5).describe('Steps between log lines and step events.'),
  logging_first_step: z.boolean().default(true).describe('Log the first step too.'),
  save_strategy: z.enum(['steps', 'epoch', 'no']).default('steps').describe('When checkpoints are written.'),
  save_steps: positive().default(500).describe('Steps between checkpoints.'),
  save_total_limit: positive().nullable().default(null).describe('Checkpoints that are kept; null = all.'),
  save_only_model: z
    .boolean()
    .default(false)
    .describe('Leave the optimiser out of checkpoints; they cannot be resumed then.'),
  eval_strategy: z
    .enum(['steps', 'epoch', 'no'])
    .nullable()
    .default(null)
    .describe(
      'When loss and token accuracy on the evaluation rows are computed. null = as save_strategy if there are such rows.',
    ),
  eval_steps: positive().nullable().default(null).describe('Steps between evaluations. null = save_steps.'),
  predict_with_generate: z
    .boolean()
    .default(false)
    .describe('Evaluation also answers each row and compares: exact match, ROUGE-L, BLEU.'),
  max_new_tokens: positive().default(64).describe('Longest answer of predict_with_generate.'),
  metric_for_best_model: z
    .enum(['loss', 'token_acc', 'exact_match', 'rouge_l', 'bleu'])
    .default('loss')
    .describe('What tells the best checkpoint; all but loss count upwards.'),
  early_stop_interval: positive()
    .nullable()
    .default(null)
    .describe('Evaluations without a better metric after which the run ends.'),
  load_best_model_at_end: z
    .boolean()
    .default(false)
    .describe(
      "At the end put the best checkpoint's weights into output_dir, not the last step's. Every checkpoint must be evaluated.",
    ),
  report_to: z
    .array(z.enum(['tensorboard', 'none']))
    .default(['tensorboard'])
    .describe('`tensorboard` writes event files to runs/; `none` does not.'),
  max_shard_size: z
    .string()
    .regex(/^\d+(\.\d+)?\s*([KMGT]i?B|B)?$/i, 'expected a size such as 5GB')
    .default('5GB')
    .describe('Largest weight file of a full model.'),
  experiment_name: z.string().nullable().default(null).describe('A name for the logs.'),
});

/** A resolved config: every key present. */
export type TrainConfig = Omit<
  z.infer<typeof trainConfigSchema>,
  'gradient_accumulation_steps' | 'learning_rate' | 'eval_strategy' | 'eval_steps'
> & {
  gradient_accumulation_steps: number;
  learning_rate: number;
  eval_strategy: 'steps' | 'epoch' | 'no';
  eval_steps: number;
};

/** What `trainLoRA` takes as an object: YAML's keys, or their camelCase twins, of either dialect. */
export type TrainConfigInput = Record<string, unknown>;

export const TRAIN_CONFIG_KEYS = Object.keys(trainConfigSchema.shape) as (keyof TrainConfig)[];

/** Other names of a key: ms-swift 2.x, 3.x and 4.x, transformers, and the tutorial. */
export const ALIASES: Record<string, keyof TrainConfig> = {
  model_id: 'model',
  model_id_or_path: 'model',
  model_name_or_path: 'model',
  tuner_type: 'sft_type',
  train_type: 'sft_type',
  dtype: 'torch_dtype',
  device_map: 'device',
  template_type: 'template',
  adapter_name_or_path: 'adapters',
  run_name: 'experiment_name',
  full_determinism: 'deterministic',
  train_dataset: 'dataset',
  eval_dataset: 'val_dataset',
  dataset_test_ratio: 'split_dataset_ratio',
  r: 'lora_rank',
  lora_r: 'lora_rank',
  lora_target_modules: 'target_modules',
  target_regex: 'target_modules',
  evaluation_strategy: 'eval_strategy',
  batch_size: 'per_device_train_batch_size',
  max_train_steps: 'max_steps',
  lora_target: 'target_modules',
  init_lora_weights: 'init_weights',
  label_smoothing: 'label_smoothing_factor',
  early_stopping_patience: 'early_stop_interval',
  nan_policy: 'non_finite',
  recompute: 'gradient_checkpointing',
};

/** Options of ms-swift that martlet does not do yet: their default is accepted, anything else is an error. */
export const UNSUPPORTED: Record<string, unknown[]> = {
  tuner_backend: ['peft'],
  model_revision: [null, 'main', 'master'],
  model_kwargs: [null, {}],
  columns: [null, {}],
  val_dataset_shuffle: [false],
  dataloader_drop_last: [false],
  acc_strategy: ['token'],
  target_parameters: [null, []],
  sequence_parallel_size: [1],
  streaming: [false],
  optimizer: [null],
  optimizer_type: [null],
  loss_scale: ['default', null],
  deepspeed: [null],
  fsdp: [null, ''],
  push_to_hub: [false],
  use_liger_kernel: [false],
};

/** Keys that mean nothing here, with the reason that the warning gives. */
export const IGNORED: Record<string, string> = {
  framework: 'martlet has one framework',
  type: 'the form of a data file is recognised',
  dataloader_num_workers: 'rows are always prepared ahead of the step',
  dataloader_pin_memory: 'rows are always prepared ahead of the step',
  dataloader_prefetch_factor: 'rows are always prepared ahead of the step',
  dataloader_persistent_workers: 'rows are always prepared ahead of the step',
  dataset_num_proc: 'rows are always prepared ahead of the step',
  lazy_tokenize: 'rows are always prepared ahead of the step',
  load_from_cache_file: 'nothing is cached',
  padding_free: 'batches never hold padding',
  use_logits_to_keep: 'logits are made for trained tokens only, always',
  gradient_checkpointing_kwargs: 'there is one way to recompute',
  remove_unused_columns: 'columns that are not used are never read',
  ddp_find_unused_parameters: 'one process trains',
  ddp_timeout: 'one process trains',
  attn_impl: 'the attention kernel is chosen by device and dtype',
  use_hf: 'the model is looked for on disk, in the Hugging Face cache and on the hub',
  add_version: 'output_dir is used as it is',
  model_author: 'it changes nothing',
  model_name: 'it changes nothing',
  logging_dir: 'logs go to output_dir/logs and output_dir/runs',
  task_type: 'the task is always a chat answer',
};
