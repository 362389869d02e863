/** The list of families. Adding one: its file, and one line here. */
import { join } from 'node:path';
import { MartletError } from '../errors.js';
import { createBlip2Processor } from './blip2.js';
import { readJsonFile } from './json.js';
import { createLlavaProcessor } from './llava.js';
import { createMiniCpmVProcessor } from './minicpm_v.js';
import { createQwenVlChatProcessor } from './qwen_vl.js';
import { createQwen25VlProcessor } from './qwen2_5_vl.js';
import { createQwen2VlProcessor } from './qwen2_vl.js';
import { createQwen3VlProcessor } from './qwen3_vl.js';
import type { Processor, ProcessorOptions } from './types.js';

/** What a family's file exports: a processor for the checkpoint in `modelDir`, whose config.json is `config`. */
export type ProcessorFactory = (
  modelDir: string,
  config: Record<string, unknown>,
  options: ProcessorOptions,
) => Promise<Processor>;

const FAMILIES: Record<string, ProcessorFactory> = {
  'blip-2': createBlip2Processor,
  llava: createLlavaProcessor,
  minicpmv: createMiniCpmVProcessor,
  qwen: createQwenVlChatProcessor,
  qwen2_vl: createQwen2VlProcessor,
  qwen2_5_vl: createQwen25VlProcessor,
  qwen3_vl: createQwen3VlProcessor,
};

/** Known by name, and refused with the versions that are supported. */
const REFUSED: Record<string, ProcessorFactory> = { minicpmv4_6: createMiniCpmVProcessor };

/**
 * The processor for a checkpoint: text to ids, pictures to RGB with a plan, ids to text.
 *
 * @throws ERR_MARTLET_MODEL_NOT_FOUND, ERR_MARTLET_UNSUPPORTED_MODEL, ERR_MARTLET_TOKENIZER, ERR_MARTLET_TEMPLATE
 */
export async function loadProcessor(modelDir: string, options: ProcessorOptions = {}): Promise<Processor> {
  const path = join(modelDir, 'config.json');
  const config = await readJsonFile(
    path,
    'ERR_MARTLET_MODEL_NOT_FOUND',
    'A model folder holds config.json, the tokenizer and the weights.',
  );
  const type = typeof config.model_type === 'string' ? config.model_type : '';
  const factory = [FAMILIES, REFUSED].find((list) => Object.hasOwn(list, type))?.[type];
  if (!factory) {
    throw new MartletError(
      'ERR_MARTLET_UNSUPPORTED_MODEL',
      `${path} has model_type ${JSON.stringify(config.model_type ?? null)}, which is not supported. Supported: ${Object.keys(FAMILIES).join(', ')}.`,
      { path, modelType: config.model_type ?? null },
    );
  }
  return factory(modelDir, config, options);
}
