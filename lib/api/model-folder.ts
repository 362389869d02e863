/** Folders with a model's weights written anew and all its other files as they were. */
import { readdir, readFile, rm } from 'node:fs/promises';
import { join, relative, resolve } from 'node:path';
import { MartletError } from '../errors.js';
import { copyFileAtomic, exists, isDirectory, listDir, makeDir, writeDirAtomic, writeFileAtomic } from '../files.js';
import { throwIfAborted } from './abort.js';

export const DEFAULT_SHARD_SIZE = '5GB';

/** Weight files: written anew by a merge or a full save. Everything else in a model folder is kept byte for byte. */
const WEIGHT_FILE = /\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf)$|\.(safetensors|bin)\.index\.json$/;

export interface ModelFolder {
  modelDir: string;
  outputDir: string;
  /** Other folders that are read: `outputDir` may not hold them. */
  inputs?: string[];
  /** Write into a folder that already holds files. */
  overwrite?: boolean | undefined;
  signal?: AbortSignal | undefined;
}

/**
 * Copies what is not weights, lets `writeWeights` add the weights, and then makes `outputDir` appear whole or not at all.
 *
 * Rejects with `ERR_MARTLET_IO` when `outputDir` holds files or a folder that is read, or cannot be written.
 */
export async function writeModelFolder<T extends { shards: string[] }>(
  { modelDir, outputDir, inputs = [], overwrite, signal }: ModelFolder,
  writeWeights: (dir: string) => Promise<T>,
): Promise<T> {
  for (const input of [modelDir, ...inputs]) {
    if (!relative(resolve(outputDir), resolve(input)).startsWith('..')) {
      throw new MartletError(
        'ERR_MARTLET_IO',
        `outputDir ${outputDir} is, or holds, ${input}, which is read: choose another folder.`,
        { path: outputDir, input },
      );
    }
  }
  await checkOutputDir(outputDir, overwrite === true);
  let written: T | undefined;
  await writeDirAtomic(resolve(outputDir), 'merge', async (dir) => {
    await copyModelFiles(modelDir, dir, signal);
    written = await writeWeights(dir);
    throwIfAborted(signal);
  });
  await removeStaleWeights(outputDir, (written as unknown as T).shards);
  return written as unknown as T;
}

/** Changes the folder's config.json; left byte for byte where `change` gives undefined. */
export async function changeConfig(
  dir: string,
  change: (config: Record<string, unknown>) => Record<string, unknown> | undefined,
): Promise<void> {
  const path = join(dir, 'config.json');
  const changed = change(JSON.parse(await readFile(path, 'utf8')) as Record<string, unknown>);
  if (changed !== undefined) await writeFileAtomic(path, `${JSON.stringify(changed, null, 2)}\n`);
}

async function checkOutputDir(outputDir: string, overwrite: boolean): Promise<void> {
  if ((await exists(outputDir)) && !(await isDirectory(outputDir))) {
    throw new MartletError('ERR_MARTLET_IO', `outputDir ${outputDir} is a file: choose another name.`, {
      path: outputDir,
    });
  }
  const names = await listDir(outputDir);
  if (names.length > 0 && !overwrite) {
    throw new MartletError(
      'ERR_MARTLET_IO',
      `outputDir ${outputDir} already holds files. Choose another folder, or write into this one with overwrite: true.`,
      { path: outputDir, files: names.length },
    );
  }
}

/** In a folder written over: weights of the model that was there before, which a loader would mix up with the new ones. */
async function removeStaleWeights(outputDir: string, shards: string[]): Promise<void> {
  const index = shards.length > 1 ? 'model.safetensors.index.json' : '';
  for (const name of await listDir(outputDir)) {
    if (WEIGHT_FILE.test(name) && !shards.includes(name) && name !== index) await rm(join(outputDir, name));
  }
}

/** Copies the files of a model folder, weights and hidden files left out, byte for byte. */
export async function copyModelFiles(modelDir: string, target: string, signal?: AbortSignal): Promise<void> {
  for (const name of (await readdir(modelDir)).sort()) {
    throwIfAborted(signal);
    if (WEIGHT_FILE.test(name) || name.startsWith('.')) continue;
    const source = join(modelDir, name);
    if (await isDirectory(source)) {
      await makeDir(join(target, name));
      await copyModelFiles(source, join(target, name), signal);
    } else {
      await copyFileAtomic(source, join(target, name));
    }
  }
}
