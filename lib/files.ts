/** File output that is either whole or absent: temporary name, fsync, rename. */
import { randomBytes } from 'node:crypto';
import { constants } from 'node:fs';
import { access, copyFile, mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { MartletError } from './errors.js';

const REMEDIES: Record<string, string> = {
  EACCES: 'Check the permissions of that folder, or choose another one.',
  EPERM: 'Check the permissions of that folder, or choose another one.',
  EROFS: 'That file system is read-only: choose another folder.',
  ENOSPC:
    'The disk is full: free some space or choose another disk, then run again (resume_from_checkpoint: true continues a training run).',
  EDQUOT: 'The disk quota is used up: free some space or choose another disk.',
  ENOTDIR: 'A part of that path is a file, not a folder.',
  EFBIG: 'The file is larger than this process may write: raise the limit (ulimit -f).',
  EISDIR: 'That path is a folder, not a file.',
  ENOENT: 'Check the path.',
  EMFILE: 'Too many open files: raise the limit (ulimit -n).',
};

/** Turns a failed file operation into `ERR_MARTLET_IO`; any other error passes unchanged. */
export function ioError(cause: unknown, action: string, path: string): unknown {
  const error = cause as NodeJS.ErrnoException;
  if (cause instanceof MartletError || typeof error?.errno !== 'number') return cause;
  const remedy = REMEDIES[error.code ?? ''] ?? '';
  return new MartletError(
    'ERR_MARTLET_IO',
    `cannot ${action} ${path}: ${error.message}${remedy === '' ? '' : `. ${remedy}`}`,
    { path, errno: error.code },
    { cause },
  );
}

function temporaryName(path: string): string {
  return join(dirname(path), `.${basename(path)}.${process.pid}-${randomBytes(4).toString('hex')}.tmp`);
}

/** Makes a rename or a new file in `dir` survive a power cut. Some file systems refuse to sync a folder: nothing more can be done there. */
async function syncDir(dir: string): Promise<void> {
  const handle = await open(dir, constants.O_RDONLY);
  try {
    await handle.sync();
  } catch (error) {
    if (!['EINVAL', 'ENOTSUP', 'EPERM'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
  } finally {
    await handle.close();
  }
}

/** Writes a whole file: readers see the old content or the new, never a part. */
export async function writeFileAtomic(path: string, data: string | Uint8Array): Promise<void> {
  const temporary = temporaryName(path);
  try {
    const handle = await open(temporary, 'wx');
    try {
      await handle.writeFile(data);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(temporary, path);
    await syncDir(dirname(path));
  } catch (error) {
    await rm(temporary, { force: true });
    throw ioError(error, 'write', path);
  }
}

/** Copies one file byte for byte under a temporary name, then renames it. */
export async function copyFileAtomic(source: string, target: string): Promise<void> {
  const temporary = temporaryName(target);
  try {
    await copyFile(source, temporary);
    const handle = await open(temporary, 'r+');
    try {
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(temporary, target);
  } catch (error) {
    await rm(temporary, { force: true });
    throw ioError(error, `copy ${source} to`, target);
  }
}

/**
 * Fills `target` as a whole: `fill` writes into a temporary folder beside it, which is renamed at the end. When `fill` fails, nothing
 * is left behind. If `target` holds files already, `replace` puts the new folder in its place; `merge` moves the new files into it
 * one by one, over those of the same name.
 */
export async function writeDirAtomic(
  target: string,
  existing: 'replace' | 'merge',
  fill: (dir: string) => Promise<void>,
): Promise<void> {
  const temporary = temporaryName(resolve(target));
  const old = temporaryName(resolve(target));
  try {
    await makeDir(dirname(temporary));
    await mkdir(temporary);
    await fill(temporary);
    await syncDir(temporary);
    if ((await listDir(target)).length === 0) {
      await rename(temporary, target);
    } else if (existing === 'replace') {
      await rename(target, old);
      await rename(temporary, target);
      await rm(old, { recursive: true, force: true });
    } else {
      await moveInto(temporary, target);
      await rm(temporary, { recursive: true, force: true });
      await syncDir(target);
    }
    await syncDir(dirname(temporary));
  } catch (error) {
    await rm(temporary, { recursive: true, force: true });
    throw ioError(error, 'write', target);
  }
}

/** Folders that are in both places are merged: the system renames none onto one that holds files. */
async function moveInto(from: string, target: string): Promise<void> {
  for (const name of await readdir(from)) {
    const [source, place] = [join(from, name), join(target, name)];
    if ((await isDirectory(source)) && (await isDirectory(place))) await moveInto(source, place);
    else await rename(source, place);
  }
}

/** Temporary names of this file, and of native/core/base/fs.cpp for weights. */
const UNFINISHED = /^\..+\.\d+-[0-9a-f]{8}\.tmp$|^(adapter_config|.+\.safetensors(\.index)?)(\.json)?\.tmp-\d+$/;

/** Removes what killed processes left of unfinished files and folders in `dir`. Only for a folder that nobody else writes to. */
export async function removeUnfinished(dir: string): Promise<void> {
  for (const name of await listDir(dir)) {
    if (UNFINISHED.test(name)) await rm(join(dir, name), { recursive: true, force: true });
  }
}

/** Creates `dir` and the folders above it. (`mkdir` with `recursive` never ends where the system answers ENOENT, as /proc does.) */
export async function makeDir(dir: string): Promise<void> {
  const missing: string[] = [];
  for (let at = resolve(dir); !(await isDirectory(at)); at = dirname(at)) missing.push(at);
  try {
    for (const path of missing.reverse()) {
      await mkdir(path).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'EEXIST') throw error;
      });
    }
  } catch (error) {
    throw ioError(error, 'create the folder', dir);
  }
}

/** Creates `dir` and proves that files can be written there. */
export async function ensureWritableDir(dir: string): Promise<void> {
  try {
    await makeDir(dir);
    await access(dir, constants.W_OK | constants.X_OK);
    const probe = temporaryName(join(dir, 'probe'));
    await (await open(probe, 'wx')).close();
    await rm(probe, { force: true });
  } catch (error) {
    throw ioError(error, 'write to the folder', dir);
  }
}

/** Names in `dir`; an absent folder has none. */
export async function listDir(dir: string): Promise<string[]> {
  try {
    return (await readdir(dir)).sort();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw ioError(error, 'read the folder', dir);
  }
}

export async function exists(path: string): Promise<boolean> {
  return (await statOrNull(path)) !== null;
}

export async function isDirectory(path: string): Promise<boolean> {
  return (await statOrNull(path))?.isDirectory() ?? false;
}

async function statOrNull(path: string) {
  try {
    return await stat(path);
  } catch (error) {
    if (['ENOENT', 'ENOTDIR'].includes((error as NodeJS.ErrnoException).code ?? '')) return null;
    throw ioError(error, 'read', path);
  }
}
