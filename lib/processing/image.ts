/** Pictures from wherever they are to raw RGB, as Pillow's `convert('RGB')` gives it: alpha dropped, palettes and grey expanded, 16 bit cut to 8. */
import { readFile, stat } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import sharp, { type Sharp, type SharpOptions } from 'sharp';
import { MartletError } from '../errors.js';
import type { ImageSource } from './types.js';

export const DEFAULT_MAX_IMAGE_PIXELS = 268_402_689; // sharp's own default
const MAX_FILE_BYTES = 256 * 2 ** 20;
const FETCH_TIMEOUT_MS = 20_000;
const FETCH_TRIES = 3;

export interface DecodeOptions {
  /** Turn as the EXIF orientation says. */
  exifOrientation: boolean;
  maxPixels: number;
  signal?: AbortSignal;
}

export interface DecodedImage {
  data: Uint8Array;
  width: number;
  height: number;
}

/** A short name of a picture for messages. */
export function imageLabel(source: ImageSource): string {
  if (typeof source === 'string') return source.length > 120 ? `${source.slice(0, 60)}…` : source;
  if (source instanceof URL) return source.protocol === 'data:' ? 'data: URI' : source.href;
  return source instanceof Uint8Array ? `${source.byteLength} bytes` : 'sharp instance';
}

/** @throws ERR_MARTLET_IMAGE (path, what is wrong, remedy), ERR_MARTLET_ABORTED */
export async function decodeImage(source: ImageSource, options: DecodeOptions): Promise<DecodedImage> {
  const label = imageLabel(source);
  let pipeline = isSharp(source)
    ? source.clone()
    : sharp(await imageBytes(source, options.signal), sharpOptions(options.maxPixels));
  if (options.exifOrientation) pipeline = pipeline.autoOrient();
  try {
    const { data, info } = await pipeline
      .toColourspace('srgb')
      .removeAlpha()
      .raw({ depth: 'uchar' })
      .toBuffer({ resolveWithObject: true });
    return {
      data: info.channels === 3 ? data : grey(data, info.width * info.height),
      width: info.width,
      height: info.height,
    };
  } catch (cause) {
    throw imageError(label, cause, options.maxPixels);
  }
}

/** Size after EXIF turning, from the header alone. */
export async function imageSize(
  source: ImageSource,
  options: DecodeOptions,
): Promise<{ width: number; height: number }> {
  const label = imageLabel(source);
  const input =
    typeof source === 'string' && isPath(source)
      ? await checkedPath(source)
      : await imageBytesOrSharp(source, options.signal);
  try {
    const metadata = await (isSharp(input) ? input.clone() : sharp(input, sharpOptions(options.maxPixels))).metadata();
    const turned = options.exifOrientation && (metadata.orientation ?? 1) >= 5;
    const { width, height } = metadata;
    if (width * height > options.maxPixels) throw new Error('Input image exceeds pixel limit');
    return turned ? { width: height, height: width } : { width, height };
  } catch (cause) {
    throw imageError(label, cause, options.maxPixels);
  }
}

function sharpOptions(maxPixels: number): SharpOptions {
  // Pillow knows no colour profiles.
  return { limitInputPixels: maxPixels, failOn: 'error', ignoreIcc: true, pages: 1 };
}

function isSharp(value: unknown): value is Sharp {
  return (
    typeof value === 'object' &&
    value !== null &&
    typeof (value as Sharp).toBuffer === 'function' &&
    typeof (value as Sharp).clone === 'function'
  );
}

function isPath(source: string): boolean {
  return !/^(https?|data|file):/i.test(source);
}

function grey(data: Uint8Array, pixels: number): Uint8Array {
  const out = new Uint8Array(pixels * 3);
  const channels = data.length / pixels;
  for (let i = 0; i < pixels; i++) out.fill(data[i * channels] as number, i * 3, i * 3 + 3);
  return out;
}

function imageError(label: string, cause: unknown, maxPixels: number): MartletError {
  if (cause instanceof MartletError) return cause;
  const message = (cause as Error).message.split('\n')[0] ?? '';
  const remedy = /exceeds pixel limit/i.test(message)
    ? `It has more than ${maxPixels} pixels: make it smaller, or raise max_image_pixels.`
    : 'Open it in a viewer, save it again as PNG or JPEG, or leave the row out.';
  return new MartletError(
    'ERR_MARTLET_IMAGE',
    `The picture ${label} cannot be decoded: ${message}. ${remedy}`,
    { path: label },
    { cause },
  );
}

async function checkedPath(path: string): Promise<string> {
  try {
    const info = await stat(path);
    if (!info.isFile()) throw new Error('it is not a file');
    if (info.size === 0) throw new Error('it has zero bytes');
    if (info.size > MAX_FILE_BYTES) throw new Error(`it has ${info.size} bytes, more than ${MAX_FILE_BYTES}`);
    return path;
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
    throw new MartletError(
      'ERR_MARTLET_IMAGE',
      missing
        ? `The picture ${path} does not exist. Check the path and image_folder.`
        : `The picture ${path} cannot be read: ${(cause as Error).message}.`,
      { path },
      { cause },
    );
  }
}

async function imageBytesOrSharp(source: ImageSource, signal?: AbortSignal): Promise<Uint8Array | Sharp> {
  return isSharp(source) ? source : imageBytes(source, signal);
}

async function imageBytes(source: string | URL | Uint8Array, signal?: AbortSignal): Promise<Uint8Array> {
  if (source instanceof Uint8Array) {
    if (source.byteLength === 0) throw new MartletError('ERR_MARTLET_IMAGE', 'An empty buffer was given as a picture.');
    return source;
  }
  const text = source instanceof URL ? source.href : source;
  if (/^data:/i.test(text)) return dataUri(text);
  if (/^https?:/i.test(text)) return download(text, signal);
  return readFile(await checkedPath(/^file:/i.test(text) ? fileURLToPath(text) : text), { signal });
}

function dataUri(uri: string): Uint8Array {
  const match = /^data:([^,]*?)(;base64)?,(.*)$/is.exec(uri);
  const bytes =
    match &&
    (match[2]
      ? Buffer.from(match[3] as string, 'base64')
      : Buffer.from(decodeURIComponent(match[3] as string), 'latin1'));
  if (!bytes || bytes.length === 0)
    throw new MartletError('ERR_MARTLET_IMAGE', 'A data: URI holds no picture. Write it as data:image/png;base64,…');
  return bytes;
}

async function download(url: string, signal?: AbortSignal): Promise<Uint8Array> {
  let last: unknown;
  for (let attempt = 1; attempt <= FETCH_TRIES; attempt++) {
    const timeout = AbortSignal.timeout(FETCH_TIMEOUT_MS);
    try {
      const response = await fetch(url, { signal: signal ? AbortSignal.any([signal, timeout]) : timeout });
      if (!response.ok || !response.body) {
        last = new Error(`HTTP ${response.status}`);
        await response.body?.cancel();
        if (response.status < 500 && response.status !== 429) break;
        continue;
      }
      const chunks: Uint8Array[] = [];
      let size = 0;
      for await (const chunk of response.body) {
        size += chunk.byteLength;
        if (size > MAX_FILE_BYTES)
          throw new MartletError('ERR_MARTLET_IMAGE', `The picture ${url} is larger than ${MAX_FILE_BYTES} bytes.`, {
            path: url,
          });
        chunks.push(chunk);
      }
      return Buffer.concat(chunks);
    } catch (error) {
      if (error instanceof MartletError) throw error;
      if (signal?.aborted)
        throw new MartletError('ERR_MARTLET_ABORTED', 'The operation was aborted.', {}, { cause: signal.reason });
      last = error;
    }
  }
  throw new MartletError(
    'ERR_MARTLET_IMAGE',
    `The picture ${url} could not be fetched: ${(last as Error).message}.`,
    { path: url },
    { cause: last },
  );
}
