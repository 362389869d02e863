/** A model folder whose language model is quantised, in the form that transformers with bitsandbytes reads too. */
import { MartletError, requireText } from '../errors.js';
import { resolveModel } from '../hub/index.js';
import type { Dtype, ModelDescription } from '../native/binding.js';
import { Engine } from '../native/engine.js';
import { abortedError, throwIfAborted } from './abort.js';
import { changeConfig, DEFAULT_SHARD_SIZE, writeModelFolder } from './model-folder.js';
import { checkOptions } from './options.js';
import { parseSize } from './size.js';
import type { QuantizeOptions, QuantizeReport } from './types.js';

/**
 * Writes a model quantised: `nf4` (with double quantisation) or `int8` by rows. Vision tower, projector and head keep 16 bits. `outputDir` appears
 * whole or not at all.
 *
 * Rejects with `ERR_MARTLET_MODEL_NOT_FOUND`, `_WEIGHTS`, `_CONFIG` (it is quantised already), `_IO` or `_ABORTED`.
 */
export async function quantizeModel(options: QuantizeOptions): Promise<QuantizeReport> {
  const started = performance.now();
  checkOptions('quantizeModel', options);
  const { outputDir, signal, onProgress, quantization, dtype = 'bfloat16', doubleQuantization = true } = options;
  requireText(outputDir, 'outputDir');
  throwIfAborted(signal);
  if (quantization !== 'nf4' && quantization !== 'int8') {
    throw new MartletError('ERR_MARTLET_USAGE', `quantization must be nf4 or int8, not ${String(quantization)}.`, {
      field: 'quantization',
      value: quantization,
    });
  }
  const maxShardSize = parseSize(options.maxShardSize ?? DEFAULT_SHARD_SIZE, 'maxShardSize');
  const modelDir = await resolveModel(options.model, { signal });
  const engine = new Engine();
  try {
    const { result: description } = await engine.call('describe', { modelDir }, { signal });
    const folder = { modelDir, outputDir, overwrite: options.overwrite, signal };
    const { shards, quantizedTensors, bytes } = await writeModelFolder(folder, async (dir) => {
      const quantization_config = quantizationConfig(description, quantization, dtype, doubleQuantization);
      await changeConfig(dir, (config) => ({ ...config, quantization_config }));
      const { result } = await engine.call(
        'quantize',
        {
          modelDir,
          outputDir: dir,
          quantization,
          doubleQuantization,
          dtype,
          device: options.device ?? 'auto',
          maxShardSize,
        },
        { signal, onEvent: (event) => onProgress?.(event as { done: number; total: number }) },
      );
      return result;
    });
    return { outputDir, shards, quantizedTensors, bytes, seconds: (performance.now() - started) / 1000 };
  } catch (error) {
    throw abortedError(error, signal);
  } finally {
    await engine.close();
  }
}

/** What transformers needs to know to load it. */
function quantizationConfig(
  model: ModelDescription,
  quantization: 'nf4' | 'int8',
  dtype: Dtype,
  doubleQuantization: boolean,
): Record<string, unknown> {
  const quantized = model.parameters.filter(({ quantizable }) => quantizable).map(({ name }) => name);
  // The highest modules with nothing quantised in them: transformers 5 matches whole paths from their beginning, older
  // versions a module's own name.
  const others = model.linears
    .filter(({ path }) => !quantized.includes(`${path}.weight`))
    .flatMap(({ path }) => {
      const parts = path.split('.');
      const above = parts.map((_, i) => parts.slice(0, i + 1).join('.'));
      const depth = above.findIndex((module) => !quantized.some((name) => name.startsWith(`${module}.`)));
      return [above[depth], parts[depth]];
    });
  return {
    quant_method: 'bitsandbytes',
    load_in_4bit: quantization === 'nf4',
    load_in_8bit: quantization === 'int8',
    ...(quantization === 'nf4' && {
      bnb_4bit_quant_type: 'nf4',
      bnb_4bit_use_double_quant: doubleQuantization,
      bnb_4bit_compute_dtype: dtype,
      bnb_4bit_quant_storage: 'uint8',
    }),
    llm_int8_skip_modules: [...new Set([...others, 'lm_head'])].sort(),
  };
}
