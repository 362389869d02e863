/** Large reference tensors that lie beside the project's folder, where they are there (test/reference/take_small.py says how they were made). */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot } from './fixtures.js';

/** The folder, or `skip` for a test's options: why it cannot run here. */
export function sharedReference(name: string): { dir: string; skip: string | false } {
  const dir = join(projectRoot, '../shared/reference', name);
  return { dir, skip: existsSync(dir) ? false : `needs ../shared/reference/${name}, which is not here` };
}
