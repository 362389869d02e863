/** Finds a model: a local folder, else a cache of the Hugging Face hub or of ModelScope, else downloaded from the hub. */
import { resolve } from 'node:path';
import { MartletError, requireText } from '../errors.js';
import { exists, isDirectory } from '../files.js';
import { findInHuggingFaceCache, findInModelScopeCache, huggingFaceCache, modelScopeCaches } from './cache.js';
import { type DownloadProgress, downloadModel, hubEndpoint } from './download.js';

export type { DownloadProgress };

export interface ResolveOptions {
  signal?: AbortSignal;
  /** Called while files come from the hub; never for a model that is on this machine. */
  onProgress?: (progress: DownloadProgress) => void;
}

/** Ids that tutorials use → those that are published. */
const MODEL_ALIASES: Record<string, string> = { 'qwen/Qwen-VL-Chat-7B': 'Qwen/Qwen-VL-Chat' };

/** The published id of a model, whatever a tutorial calls it. */
export function publishedId(id: string): string {
  return (Object.hasOwn(MODEL_ALIASES, id) && MODEL_ALIASES[id]) || id;
}

/** `organisation/name`, as hubs name models. */
const HUB_ID = /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*$/;

/**
 * The folder of a model given as a folder or a hub id. Rejects with `ERR_MARTLET_MODEL_NOT_FOUND` (naming every place searched),
 * `ERR_MARTLET_HUB` (network, access, damaged download), `_USAGE` (no text) or `_ABORTED`.
 */
export async function resolveModel(given: string, options: ResolveOptions = {}): Promise<string> {
  requireText(given, 'model');
  const local = resolve(given);
  const dirOrId = publishedId(given);
  if (await isDirectory(local)) {
    if (await exists(resolve(local, 'config.json'))) return local;
    const adapter = await exists(resolve(local, 'adapter_config.json'));
    throw new MartletError(
      'ERR_MARTLET_MODEL_NOT_FOUND',
      `${local} is not a model folder: it has no config.json.${
        adapter ? ' It is an adapter: give it as the adapter, and its base model as the model.' : ''
      }`,
      { model: dirOrId, searched: [local] },
    );
  }
  if (!HUB_ID.test(dirOrId)) {
    throw new MartletError(
      'ERR_MARTLET_MODEL_NOT_FOUND',
      `there is no folder ${local}, and ${JSON.stringify(dirOrId)} is no hub id (organisation/name). Check the path of the model.`,
      { model: dirOrId, searched: [local] },
    );
  }
  const cached = (await findInHuggingFaceCache(dirOrId)) ?? (await findInModelScopeCache(dirOrId));
  if (cached !== undefined) return cached;
  if (isOffline()) {
    const searched = [local, huggingFaceCache(), ...modelScopeCaches()];
    throw new MartletError(
      'ERR_MARTLET_MODEL_NOT_FOUND',
      `${dirOrId} is not on this machine, and HF_HUB_OFFLINE forbids downloading it. Looked in ${searched.join(', ')}. ` +
        'Unset HF_HUB_OFFLINE, copy the model to one of these places, or give its folder.',
      { model: dirOrId, searched },
    );
  }
  return downloadModel(dirOrId, { ...options, endpoint: hubEndpoint() });
}

function isOffline(): boolean {
  return /^(1|true|yes|on)$/i.test(process.env.HF_HUB_OFFLINE ?? '');
}
