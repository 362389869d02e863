import { requireText } from '../errors.js';
import { resolveModel } from '../hub/index.js';
import { Engine } from '../native/engine.js';
import { abortedError, throwIfAborted } from './abort.js';
import { DEFAULT_SHARD_SIZE, writeModelFolder } from './model-folder.js';
import { checkOptions } from './options.js';
import { parseSize } from './size.js';
import type { ConvertOptions, ConvertReport } from './types.js';

/**
 * Writes a model's weights as safetensors, one tensor at a time, and all its other files as they were. Weights of torch.save
 * (`pytorch_model*.bin`) are read without running anything that is in them. `outputDir` appears whole or not at all.
 *
 * Rejects with `ERR_MARTLET_MODEL_NOT_FOUND`, `_WEIGHTS`, `_IO` (the folder holds files already; disk full) or `_ABORTED`.
 */
export async function convertCheckpoint(options: ConvertOptions): Promise<ConvertReport> {
  const started = performance.now();
  checkOptions('convertCheckpoint', options);
  const { outputDir, dtype, overwrite, signal, onProgress } = options;
  requireText(outputDir, 'outputDir');
  throwIfAborted(signal);
  const maxShardSize = parseSize(options.maxShardSize ?? DEFAULT_SHARD_SIZE, 'maxShardSize');
  const modelDir = await resolveModel(options.model, { signal });
  const engine = new Engine();
  try {
    const { shards, tensors } = await writeModelFolder({ modelDir, outputDir, overwrite, signal }, async (dir) => {
      const { result } = await engine.call(
        'convert',
        { modelDir, outputDir: dir, ...(dtype && { dtype }), maxShardSize },
        { signal, onEvent: (event) => onProgress?.(event as { done: number; total: number }) },
      );
      return result;
    });
    return { outputDir, shards, tensors, seconds: (performance.now() - started) / 1000 };
  } catch (error) {
    throw abortedError(error, signal);
  } finally {
    await engine.close();
  }
}
