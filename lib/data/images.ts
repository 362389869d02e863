/** Where a row's pictures are. */
import { access } from 'node:fs/promises';
import { dirname, isAbsolute, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { ChatMessage, VideoSource } from '../processing/types.js';
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

  /** Every frame of a video. */
  async video(source: VideoSource): Promise<VideoSource> {
    const { frames, ...rest } = Array.isArray(source) ? { frames: source } : source;
    const paths = await Promise.all(frames.map((frame) => this.resolve(frame as string)));
    return Array.isArray(source) ? paths : { ...rest, frames: paths };
  }

  /** The pictures and videos inside content parts. */
  async message(message: ChatMessage): Promise<ChatMessage> {
    if (typeof message.content === 'string') return message;
    const content = await Promise.all(
      message.content.map(async (part) => {
        if (part.type === 'image' && typeof part.image === 'string')
          return { ...part, image: await this.resolve(part.image) };
        if (part.type === 'video' && part.video !== undefined) return { ...part, video: await this.video(part.video) };
        return part;
      }),
    );
    return { ...message, content };
  }
}
