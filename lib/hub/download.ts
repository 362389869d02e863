/** Downloads a model repository into the hub cache, in the layout of Hugging Face's own tools. */
import { createHash, type Hash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { open, rename, rm, stat, symlink } from 'node:fs/promises';
import { dirname, join, relative } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { MartletError } from '../errors.js';
import { exists, ioError, makeDir, writeFileAtomic } from '../files.js';
import { repositoryDir } from './cache.js';

const DEFAULT_ENDPOINT = 'https://huggingface.co';
const ATTEMPTS = 4;
/** Milliseconds before the second attempt; doubles each time. */
const FIRST_PAUSE = 500;

export interface DownloadProgress {
  /** The file that is coming. */
  file: string;
  /** Files done and to do. */
  done: number;
  total: number;
  /** Bytes here so far and in all; the sum is 0 when the hub does not say. */
  bytes: number;
  totalBytes: number;
}

export interface DownloadOptions {
  endpoint: string;
  signal?: AbortSignal;
  onProgress?: (progress: DownloadProgress) => void;
}

/** `$HF_ENDPOINT`, else the public hub. */
export function hubEndpoint(): string {
  return (process.env.HF_ENDPOINT || DEFAULT_ENDPOINT).replace(/\/+$/, '');
}

interface RemoteFile {
  path: string;
  size: number | undefined;
  /** Of the content, for large files. */
  sha256: string | undefined;
  /** Name in `blobs/`. */
  blob: string;
}

/** Brings the newest revision of `id` here; resolves to its snapshot folder. An interrupted download continues where it ended. */
export async function downloadModel(id: string, options: DownloadOptions): Promise<string> {
  const { revision, files } = await listFiles(id, options);
  const repository = repositoryDir(id);
  const snapshot = join(repository, 'snapshots', revision);
  const totalBytes = files.reduce((sum, file) => sum + (file.size ?? 0), 0);
  let bytes = 0;
  try {
    for (const [done, file] of files.entries()) {
      const report = (fileBytes: number) =>
        options.onProgress?.({ file: file.path, done, total: files.length, bytes: bytes + fileBytes, totalBytes });
      const blob = join(repository, 'blobs', file.blob);
      await makeDir(dirname(blob));
      if (!(await exists(blob))) await downloadFile(id, revision, file, blob, report, options);
      bytes += (await stat(blob)).size;
      const link = join(snapshot, file.path);
      await makeDir(dirname(link));
      await rm(link, { force: true });
      await symlink(relative(dirname(link), blob), link);
    }
    // last, so that a snapshot named by a ref is whole
    await makeDir(join(repository, 'refs'));
    await writeFileAtomic(join(repository, 'refs', 'main'), revision);
  } catch (error) {
    throw (error as NodeJS.ErrnoException).syscall === undefined ? error : ioError(error, 'download to', repository);
  }
  return snapshot;
}

async function listFiles(id: string, options: DownloadOptions): Promise<{ revision: string; files: RemoteFile[] }> {
  const url = `${options.endpoint}/api/models/${id}?blobs=true`;
  const response = await retrying(id, url, options, () => request(url, {}, id, options));
  let info: { sha?: unknown; siblings?: unknown };
  try {
    info = (await response.json()) as typeof info;
  } catch (cause) {
    throw hubError(id, `${url} did not answer with JSON`, { url }, cause);
  }
  if (
    typeof info.sha !== 'string' ||
    !/^[\w.-]+$/.test(info.sha) ||
    info.sha.startsWith('.') ||
    !Array.isArray(info.siblings)
  ) {
    throw hubError(id, `${url} gave an answer without "sha" and "siblings"`, { url });
  }
  const all = info.siblings.map((entry) => remoteFile(id, entry));
  const safetensors = all.some(({ path }) => path.endsWith('.safetensors'));
  const wanted = all.filter(({ path }) => isNeeded(path, safetensors));
  if (!wanted.some(({ path }) => path === 'config.json')) {
    throw new MartletError(
      'ERR_MARTLET_MODEL_NOT_FOUND',
      `${id} on ${options.endpoint} has no config.json: it is not a model that martlet can load.`,
      { model: id },
    );
  }
  return { revision: info.sha, files: wanted };
}

function remoteFile(id: string, entry: unknown): RemoteFile {
  const { rfilename, size, blobId, lfs } = entry as {
    rfilename?: unknown;
    size?: unknown;
    blobId?: unknown;
    lfs?: { sha256?: unknown; size?: unknown };
  };
  // names come from outside: none may lead out of the cache
  const parts = typeof rfilename === 'string' ? rfilename.split('/') : [];
  if (
    parts.length === 0 ||
    parts.some((part) => part === '' || part === '.' || part === '..') ||
    /[\\\0]/.test(String(rfilename))
  ) {
    throw hubError(id, `the hub names a file ${JSON.stringify(rfilename)}, which is no safe path`, { file: rfilename });
  }
  const hex = (value: unknown) => (typeof value === 'string' && /^[0-9a-f]{40,64}$/.test(value) ? value : undefined);
  const sha256 = hex(lfs?.sha256);
  const bytes = lfs?.size ?? size;
  return {
    path: rfilename as string,
    size: typeof bytes === 'number' ? bytes : undefined,
    sha256,
    blob: sha256 ?? hex(blobId) ?? createHash('sha256').update(`${id}/${rfilename}`).digest('hex'),
  };
}

/** Weights in one format only, and no other framework's. */
function isNeeded(path: string, safetensors: boolean): boolean {
  if (path.split('/').some((part) => part.startsWith('.'))) return false;
  if (/\.(pth|pt|onnx|onnx_data|gguf|ggml|h5|msgpack|ot|tflite|mlmodel|zip|tar|gz|png|jpe?g|gif|webp|mp4)$/i.test(path))
    return false;
  return !(safetensors && /\.bin(\.index\.json)?$/.test(path));
}

async function downloadFile(
  id: string,
  revision: string,
  file: RemoteFile,
  blob: string,
  report: (bytes: number) => void,
  options: DownloadOptions,
): Promise<void> {
  const url = `${options.endpoint}/${id}/resolve/${revision}/${file.path.split('/').map(encodeURIComponent).join('/')}`;
  const partial = `${blob}.incomplete`;
  await retrying(id, url, options, async () => {
    await appendRest(id, url, partial, report, options);
    await verify(id, file, partial);
    await rename(partial, blob);
  });
}

/** Tries again, with growing pauses, what failed for a reason that may pass: a broken connection, a busy hub. */
async function retrying<T>(id: string, url: string, options: DownloadOptions, work: () => Promise<T>): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await work();
    } catch (error) {
      const final = error instanceof MartletError || (error as NodeJS.ErrnoException).syscall !== undefined;
      if (options.signal?.aborted || final) throw error;
      if (attempt === ATTEMPTS) {
        const reason = (error as Error).message;
        throw hubError(
          id,
          `${url} failed ${ATTEMPTS} times, the last time: ${reason}. Check the network (HF_ENDPOINT sets another hub)`,
          { url },
          error,
        );
      }
      await sleep(FIRST_PAUSE * 2 ** (attempt - 1), undefined, { signal: options.signal });
    }
  }
}

/** Asks for what `partial` lacks and appends it. */
async function appendRest(
  id: string,
  url: string,
  partial: string,
  report: (bytes: number) => void,
  options: DownloadOptions,
): Promise<void> {
  const have = (await exists(partial)) ? (await stat(partial)).size : 0;
  const response = await request(url, have > 0 ? { Range: `bytes=${have}-` } : {}, id, options);
  if (response.status === 416) return; // nothing is missing: verify() judges what is there
  const continued = response.status === 206;
  const handle = await open(partial, continued ? 'a' : 'w');
  let bytes = continued ? have : 0;
  try {
    for await (const chunk of response.body as unknown as AsyncIterable<Uint8Array>) {
      await handle.appendFile(chunk);
      bytes += chunk.length;
      report(bytes);
    }
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** A damaged file is removed, so that the next attempt starts afresh. */
async function verify(id: string, file: RemoteFile, path: string): Promise<void> {
  const { size } = await stat(path);
  if (file.size !== undefined && size < file.size)
    throw new Error(`${file.path} ended after ${size} of ${file.size} bytes`);
  const problem =
    file.size !== undefined && size !== file.size
      ? `has ${size} bytes, not ${file.size}`
      : file.sha256 !== undefined && (await sha256(path)) !== file.sha256
        ? 'has the wrong checksum'
        : undefined;
  if (problem === undefined) return;
  await rm(path, { force: true });
  throw hubError(id, `the download of ${file.path} ${problem}; it was removed, try again`, { file: file.path });
}

async function sha256(path: string): Promise<string> {
  const hash: Hash = createHash('sha256');
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(chunk as Buffer);
  return hash.digest('hex');
}

/** One request. Statuses that another attempt cannot change become errors with a remedy; others throw plainly, to be tried again. */
async function request(
  url: string,
  headers: Record<string, string>,
  id: string,
  options: DownloadOptions,
): Promise<Response> {
  const token = process.env.HF_TOKEN;
  const authorization: Record<string, string> = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(url, { headers: { ...headers, ...authorization }, signal: options.signal });
  if (response.ok || response.status === 416) return response;
  await response.body?.cancel();
  const details = { url, status: response.status };
  if (response.status === 401 || response.status === 403) {
    throw hubError(
      id,
      `the hub refuses access (${response.status}). If the model is gated, accept its terms there and set HF_TOKEN; else check the name`,
      details,
    );
  }
  if (response.status === 404) {
    throw new MartletError(
      'ERR_MARTLET_MODEL_NOT_FOUND',
      `${id} is neither a folder here nor on ${options.endpoint}. Check the name.`,
      {
        model: id,
        ...details,
      },
    );
  }
  throw new Error(`${url} answered ${response.status}`);
}

function hubError(id: string, problem: string, details: Record<string, unknown>, cause?: unknown): MartletError {
  return new MartletError(
    'ERR_MARTLET_HUB',
    `cannot download ${id}: ${problem}.`,
    { model: id, ...details },
    { cause },
  );
}
