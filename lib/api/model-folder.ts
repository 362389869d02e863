/** Folders with a model's weights written anew and all its other files as they were. */
import { readdir, readFile, rm } from 'node:fs/promises';
import { join, relative, resolve } from 'node:path';
import { MartletError } from '../errors.js';
import { copyFileAtomic, exists, isDirectory, listDir, makeDir, writeDirAtomic, writeFileAtomic } from '../files.js';
import { throwIfAborted } from './abort.js';

export const DEFAULT_SHARD_SIZE = '5GB';

/**
 * Weight files: written anew by a merge or a full save; and what transformers' Trainer leaves beside them (training_args.bin, optimizer.pt). A .bin of
 * another name is weights only if an index names it: tokenizers have such files too. Everything else in a model folder is kept byte for byte.
 */
const WEIGHT_FILE =
  /\.(safetensors|pt|pth|h5|msgpack|onnx|gguf)$|^(.*pytorch_model.*|model(-\d+-of-\d+)?|mm_projector|non_lora_trainables|training_args|optimizer|scheduler)\.bin$|\.index\.json$/;

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
  const before = await weightFiles(outputDir);
  let written: T | undefined;
  await writeDirAtomic(resolve(outputDir), 'merge', async (dir) => {
    await copyModelFiles(modelDir, dir, signal);
    written = await writeWeights(dir);
    throwIfAborted(signal);
  });
  await removeStaleWeights(outputDir, before, (written as unknown as T).shards);
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
async function removeStaleWeights(outputDir: string, before: Set<string>, shards: string[]): Promise<void> {
  const index = shards.length > 1 ? 'model.safetensors.index.json' : '';
  for (const name of before) {
    if (!shards.includes(name) && name !== index) await rm(join(outputDir, name), { force: true });
  }
}

/** By their names, or since an index names them. */
async function weightFiles(dir: string): Promise<Set<string>> {
  const names = await listDir(dir);
  const indexed = new Set<string>();
  for (const name of names.filter((candidate) => candidate.endsWith('.index.json'))) {
    try {
      const { weight_map } = JSON.parse(await readFile(join(dir, name), 'utf8')) as { weight_map?: object };
      for (const shard of Object.values(weight_map ?? {})) indexed.add(shard as string);
    } catch {
      // reading the weights says what is wrong with it
    }
  }
  return new Set(names.filter((name) => WEIGHT_FILE.test(name) || indexed.has(name)));
}

/** Copies the files of a model folder, weights and hidden files left out, byte for byte. */
export async function copyModelFiles(modelDir: string, target: string, signal?: AbortSignal): Promise<void> {
  const weights = await weightFiles(modelDir);
  for (const name of (await readdir(modelDir)).sort()) {
    throwIfAborted(signal);
    if (weights.has(name) || name.startsWith('.')) continue;
    const source = join(modelDir, name);
    if (await isDirectory(source)) {
      await makeDir(join(target, name));
      await copyModelFiles(source, join(target, name), signal);
    } else {
      await copyFileAtomic(source, join(target, name));
    }
  }
}
