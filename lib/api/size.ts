import { MartletError } from '../errors.js';

const UNITS: Record<string, number> = {
  '': 1,
  KB: 1e3,
  MB: 1e6,
  GB: 1e9,
  TB: 1e12,
  KIB: 2 ** 10,
  MIB: 2 ** 20,
  GIB: 2 ** 30,
  TIB: 2 ** 40,
};

/** Bytes of `5GB`, `512MiB` or a number. Decimal units as in Hugging Face's `max_shard_size`. */
export function parseSize(size: number | string, field: string): number {
  const match = /^\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*$/i.exec(String(size));
  const bytes = match ? Number(match[1]) * (UNITS[(match[2] ?? '').toUpperCase()] as number) : Number.NaN;
  if (!Number.isFinite(bytes) || bytes < 1) {
    throw new MartletError('ERR_MARTLET_USAGE', `${field} must be a number of bytes or a size like 5GB, not ${size}.`, {
      field,
      value: size,
    });
  }
  return Math.floor(bytes);
}
