import { join } from 'node:path';
import { dump } from 'js-yaml';
import { MartletError, requireText } from '../errors.js';
import { exists, writeFileAtomic } from '../files.js';
import { resolveModel } from '../hub/index.js';
import type { MergeArgs } from '../native/binding.js';
import { Engine } from '../native/engine.js';
import { visionOptionsToKeys } from '../processing/vision-options.js';
import { abortedError, throwIfAborted } from './abort.js';
import { ARGS_FILE, adapterBaseModel, readAdapterArgs } from './adapter-args.js';
import { changeConfig, DEFAULT_SHARD_SIZE, writeModelFolder } from './model-folder.js';
import { checkOptions } from './options.js';
import { parseSize } from './size.js';
import type { MergeOptions, MergeReport } from './types.js';

/**
 * Adds an adapter to its base model and writes a Hugging Face folder: merged weights shard by shard, all other files as they were.
 * `outputDir` appears whole or not at all.
 *
 * Rejects with `ERR_MARTLET_ADAPTER`, `_MODEL_NOT_FOUND`, `_WEIGHTS`, `_CUDA_UNAVAILABLE`, `_IO` (the folder holds files already; disk full) or `_ABORTED`.
 */
export async function mergeAdapter(options: MergeOptions): Promise<MergeReport> {
  const started = performance.now();
  checkOptions('mergeAdapter', options);
  const { adapter, outputDir, signal, onProgress } = options;
  requireText(adapter, 'adapter');
  requireText(outputDir, 'outputDir');
  throwIfAborted(signal);
  const maxShardSize = parseSize(options.maxShardSize ?? DEFAULT_SHARD_SIZE, 'maxShardSize');
  if (!(await exists(join(adapter, 'adapter_config.json')))) {
    throw new MartletError(
      'ERR_MARTLET_ADAPTER',
      `${adapter} is not an adapter folder: there is no adapter_config.json in it. Give the output_dir of a training run or one of its checkpoint-N folders.`,
      { path: adapter },
    );
  }
  const modelDir = await resolveModel(options.model ?? (await adapterBaseModel(adapter)), { signal });

  const quantization = options.base === 'quantized' ? await trainedQuantization(adapter) : undefined;
  const engine = new Engine();
  try {
    const folder = { modelDir, outputDir, inputs: [adapter], overwrite: options.overwrite, signal };
    const { shards, mergedTensors, maxAbsError } = await writeModelFolder(folder, async (dir) => {
      // A merged model is never quantised, whatever its base was.
      await changeConfig(dir, ({ quantization_config, ...rest }) =>
        quantization_config === undefined ? undefined : rest,
      );
      await keepPromptArgs(adapter, dir);
      const { result } = await engine.call(
        'merge',
        {
          modelDir,
          adapterDir: adapter,
          outputDir: dir,
          ...(options.dtype && { dtype: options.dtype }),
          ...(quantization && { quantization }),
          maxShardSize,
          device: options.device ?? 'auto',
        },
        { signal, onEvent: (event) => onProgress?.(event as { done: number; total: number }) },
      );
      return result;
    });
    return { outputDir, shards, mergedTensors, maxAbsError, seconds: (performance.now() - started) / 1000 };
  } catch (error) {
    throw abortedError(error, signal);
  } finally {
    await engine.close();
  }
}

/** How the base was quantised when the adapter was trained, from its args.yaml. */
async function trainedQuantization(adapter: string): Promise<MergeArgs['quantization']> {
  const {
    quant_bits: bits,
    bnb_4bit_use_double_quant: double = true,
    base_dtype: base,
    torch_dtype: dtype = 'auto',
  } = await readAdapterArgs(adapter);
  if (base === 'fp8') return { method: 'fp8', doubleQuantization: double, dtype };
  if (bits !== 4 && bits !== 8) {
    throw new MartletError(
      'ERR_MARTLET_USAGE',
      `base: 'quantized' is for adapters trained with qlora or base_dtype: fp8; ${join(adapter, ARGS_FILE)} names no quant_bits and no fp8. Leave base out to merge into the original weights.`,
      { field: 'base', path: adapter },
    );
  }
  return { method: bits === 4 ? 'nf4' : 'int8', doubleQuantization: double, dtype };
}

/** Template, system prompt and pixel limits that the adapter was trained with: the merged model must be asked in the same way. */
async function keepPromptArgs(adapter: string, target: string): Promise<void> {
  const {
    model: _,
    quant_bits: __,
    bnb_4bit_use_double_quant: ___,
    base_dtype: ____,
    torch_dtype: _____,
    vision,
    ...prompt
  } = await readAdapterArgs(adapter);
  const args = { ...prompt, ...visionOptionsToKeys(vision) };
  if (Object.keys(args).length > 0) await writeFileAtomic(join(target, ARGS_FILE), dump(args));
}
