import { adapterBaseModel } from '../api/adapter-args.js';
import { convertCheckpoint } from '../api/convert.js';
import { mergeAdapter } from '../api/merge.js';
import { quantizeModel } from '../api/quantize.js';
import { bytes, duration, significant } from '../report/format.js';
import { type OptionSpecs, type Options, usageError } from './args.js';
import { type CliIo, type Command, type Invocation, printJson } from './command.js';
import { interruptible, resolveWithNotice } from './jobs.js';

const OPTIONS: OptionSpecs = {
  adapters: {
    kind: 'value',
    aliases: ['adapter_name_or_path', 'adapter', 'ckpt_dir'],
    placeholder: 'DIR',
    help: 'the adapter folder: the output_dir of a training run, or one of its checkpoints',
  },
  model: {
    kind: 'value',
    aliases: ['model_id'],
    placeholder: 'DIR|ID',
    help: "the base model; the adapter's own by default",
  },
  output_dir: { kind: 'value', placeholder: 'DIR', help: 'where the merged model goes; ADAPTER-merged by default' },
  dtype: {
    kind: 'value',
    aliases: ['torch_dtype'],
    placeholder: 'float32|bfloat16|float16',
    help: 'as stored by default',
  },
  device: {
    kind: 'value',
    placeholder: 'auto|cpu|cuda|cuda:N',
    help: 'where the sums of merging are computed; default auto',
  },
  max_shard_size: { kind: 'value', placeholder: 'SIZE', help: 'largest weight file, e.g. 2GB; default 5GB' },
  overwrite: { kind: 'flag', aliases: ['exist_ok'], help: 'write into a folder that already holds files' },
  base: {
    kind: 'value',
    placeholder: 'original|quantized',
    help: 'quantized: merge into the weights that a qlora or fp8 adapter was trained against',
  },
  quant_method: { kind: 'value', placeholder: 'bnb', help: 'write --model quantised instead of merging' },
  quant_bits: { kind: 'value', placeholder: '4|8', help: '4 = NF4 with double quantisation (default), 8 = int8' },
  safetensors: {
    kind: 'flag',
    help: "writes the model's own weights as safetensors instead (from pytorch_model*.bin); needs --model, takes no adapter",
  },
  merge_lora: { kind: 'flag', help: 'accepted for ms-swift command lines; merging is what export does' },
};

export const command: Command = {
  usage:
    'export --adapters DIR [--model DIR|ID] [--output_dir DIR] | export --model DIR --quant_method bnb | export --safetensors --model DIR|ID --output_dir DIR',
  description: `Merges a LoRA adapter into its base model (alias: merge-lora). The result is a Hugging Face folder: merged weights, all other
files of the base model byte for byte. With --quant_method it writes a model quantised instead, with --safetensors it converts a model's weights.`,
  options: () => OPTIONS,
  footer: `Examples:
  martlet export --adapters out --output_dir merged
  martlet export --safetensors --model Qwen-VL-Chat --output_dir Qwen-VL-Chat-safetensors`,
  run,
};

async function run({ options, positionals, io }: Invocation): Promise<number> {
  if (positionals.length > 0) throw usageError(`unexpected argument ${positionals[0]}.`);
  if (options.string('quant_method') !== undefined || options.string('quant_bits') !== undefined) {
    return quantize(options, io);
  }
  if (options.flag('safetensors')) return convert(options, io);
  const adapter = options.string('adapters');
  if (adapter === undefined) throw usageError('export needs --adapters DIR. --help shows more.');
  if (options.string('merge_lora') === 'false')
    throw usageError('export without merging is not available: leave --merge_lora out.');
  const dtype = options.dtype('dtype');
  const report = await interruptible(async (signal) =>
    mergeAdapter({
      adapter,
      model: await resolveWithNotice(options.string('model') ?? (await adapterBaseModel(adapter)), io, signal),
      outputDir: options.string('output_dir') ?? `${adapter.replace(/\/+$/, '')}-merged`,
      ...(dtype !== undefined && dtype !== 'auto' && { dtype }),
      maxShardSize: options.string('max_shard_size'),
      device: options.device('device'),
      base: options.choice('base', ['original', 'quantized']),
      overwrite: options.flag('overwrite'),
      signal,
    }),
  );
  const { mergedTensors, shards, maxAbsError, seconds } = report;
  const text =
    `merged ${mergedTensors} tensors into ${report.outputDir} (${shards.length} weight files) in ${duration(seconds)}; ` +
    `largest rounding error ${significant(maxAbsError)}`;
  return print(options, io, report, text);
}

function print(options: Options, io: CliIo, report: object, text: string): number {
  if (options.flag('json')) printJson(io, report);
  else io.stdout.write(`${text}\n`);
  return 0;
}

async function quantize(options: Options, io: CliIo): Promise<number> {
  const model = options.string('model');
  if (model === undefined || options.string('adapters') !== undefined) {
    throw usageError('--quant_method writes --model quantised: give --model, and merge adapters first.');
  }
  options.choice('quant_method', ['bnb']);
  const bits = options.choice('quant_bits', ['4', '8']) ?? '4';
  const dtype = options.dtype('dtype');
  const report = await interruptible(async (signal) =>
    quantizeModel({
      model: await resolveWithNotice(model, io, signal),
      outputDir: options.string('output_dir') ?? `${model.replace(/\/+$/, '')}-bnb-${bits}bit`,
      quantization: bits === '4' ? 'nf4' : 'int8',
      ...(dtype !== undefined && dtype !== 'auto' && { dtype }),
      maxShardSize: options.string('max_shard_size'),
      overwrite: options.flag('overwrite'),
      signal,
    }),
  );
  const { quantizedTensors, shards, seconds } = report;
  const files = `${shards.length} weight files, ${bytes(report.bytes)}`;
  const text = `quantised ${quantizedTensors} tensors into ${report.outputDir} (${files}) in ${duration(seconds)}`;
  return print(options, io, report, text);
}

async function convert(options: Options, io: CliIo): Promise<number> {
  const model = options.string('model');
  const outputDir = options.string('output_dir');
  if (model === undefined || outputDir === undefined)
    throw usageError('export --safetensors needs --model DIR|ID and --output_dir DIR.');
  if (options.string('adapters') !== undefined)
    throw usageError(
      'export --safetensors converts a model without an adapter: merging one writes safetensors anyway.',
    );
  const dtype = options.dtype('dtype');
  const report = await interruptible(async (signal) =>
    convertCheckpoint({
      model: await resolveWithNotice(model, io, signal),
      outputDir,
      ...(dtype !== undefined && dtype !== 'auto' && { dtype }),
      maxShardSize: options.string('max_shard_size'),
      overwrite: options.flag('overwrite'),
      signal,
    }),
  );
  const { shards, tensors, seconds } = report;
  const text = `wrote ${tensors} tensors into ${outputDir} (${shards.length} weight files) in ${duration(seconds)}`;
  return print(options, io, report, text);
}
