/** Where the Hugging Face hub's and ModelScope's own tools keep models, in their layouts. */
import { readFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { exists, isDirectory, listDir } from '../files.js';

/** `$HF_HUB_CACHE`, else `$HF_HOME/hub`, else `~/.cache/huggingface/hub`. */
export function huggingFaceCache(): string {
  const { HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME } = process.env;
  if (HF_HUB_CACHE) return HF_HUB_CACHE;
  return join(HF_HOME || join(XDG_CACHE_HOME || join(homedir(), '.cache'), 'huggingface'), 'hub');
}

/** Newer and older places of ModelScope's downloads. */
export function modelScopeCaches(): string[] {
  const root = process.env.MODELSCOPE_CACHE || join(homedir(), '.cache', 'modelscope', 'hub');
  return [join(root, 'models'), root];
}

/** Folder of one model in the hub cache: `blobs/`, `refs/`, `snapshots/`. */
export function repositoryDir(id: string): string {
  return join(huggingFaceCache(), `models--${id.replace('/', '--')}`);
}

export async function findInHuggingFaceCache(id: string): Promise<string | undefined> {
  const repository = repositoryDir(id);
  const ref = join(repository, 'refs', 'main');
  if (!(await exists(ref))) return undefined;
  const snapshot = join(repository, 'snapshots', (await readFile(ref, 'utf8')).trim());
  return (await isComplete(snapshot)) ? snapshot : undefined;
}

export async function findInModelScopeCache(id: string): Promise<string | undefined> {
  for (const cache of modelScopeCaches()) {
    // ModelScope writes dots of a name as three underscores
    for (const name of new Set([id, id.replaceAll('.', '___')])) {
      const dir = join(cache, name);
      if (await isComplete(dir)) return dir;
    }
  }
  return undefined;
}

/** True when a folder has config.json and weights, every shard of the index included: other tools may have been cut off in a download. */
async function isComplete(dir: string): Promise<boolean> {
  if (!(await isDirectory(dir)) || !(await exists(join(dir, 'config.json')))) return false;
  const names = await listDir(dir);
  const index = names.find((name) => /\.(safetensors|bin)\.index\.json$/.test(name));
  if (index === undefined) return names.some((name) => /\.(safetensors|bin)$/.test(name));
  try {
    const { weight_map } = JSON.parse(await readFile(join(dir, index), 'utf8')) as {
      weight_map: Record<string, string>;
    };
    const shards = new Set(Object.values(weight_map));
    const present = await Promise.all([...shards].map((shard) => exists(join(dir, shard))));
    return present.every(Boolean);
  } catch {
    return false;
  }
}
