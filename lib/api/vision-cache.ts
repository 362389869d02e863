/** Where a loaded model keeps the features of pictures, as the arguments of `load`. */
import { join } from 'node:path';
import type { LoadArgs } from '../native/binding.js';
import { cacheDir } from '../native/libtorch.js';
import { parseSize } from './size.js';

export function visionCacheArgs(cache: {
  mode: 'off' | 'memory' | 'disk';
  size: number | string;
  dir?: string | null;
}): Pick<LoadArgs, 'visionCache'> {
  if (cache.mode === 'off') return {};
  const dir = cache.dir ?? join(cacheDir(), 'vision');
  return { visionCache: { bytes: parseSize(cache.size, 'vision_cache_size'), ...(cache.mode === 'disk' && { dir }) } };
}
