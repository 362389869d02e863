/** Where a row's picture is. */
import { access } from 'node:fs/promises';
import { dirname, isAbsolute, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { RowError } from './rows.js';
import type { DatasetSpec } from './types.js';

const isRemote = (source: string) => /^(https?|data):/i.test(source);

export class ImageResolver {
  readonly #roots: string[];

  /** Tried in order: dataset_root/image_folder, dataset_root, the data file's folder, the working directory. */
  constructor(spec: DatasetSpec) {
    const root = spec.dataset_root ?? dirname(spec.path);
    const roots = [
      ...(spec.image_folder === undefined ? [] : [resolve(root, spec.image_folder)]),
      ...(spec.dataset_root === undefined ? [] : [resolve(spec.dataset_root)]),
      resolve(dirname(spec.path)),
      process.cwd(),
    ];
    this.#roots = [...new Set(roots)];
  }

  /** An absolute path, or the URL or data URI as it is. */
  async resolve(source: string): Promise<string> {
    if (isRemote(source)) return source;
    if (/^file:/i.test(source)) return fileURLToPath(source);
    if (source.length > 256 && /^[A-Za-z0-9+/]+={0,2}$/.test(source)) return `data:image/unknown;base64,${source}`;
    if (isAbsolute(source)) return source;
    const inside = this.#roots
      .map((root) => join(root, source))
      .filter((path, i) => !relative(this.#roots[i] as string, path).startsWith('..'));
    if (inside.length === 0) {
      throw new RowError(
        `the picture ${source} lies outside every folder it may be in (${this.#roots.join(', ')}): use a path below one, or an absolute path`,
        'image',
      );
    }
    for (const path of inside) {
      try {
        await access(path);
        return path;
      } catch {
        // the next place
      }
    }
    throw new RowError(`the picture ${source} does not exist; looked for ${inside.join(', ')}`, 'image');
  }
}
