import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before } from 'node:test';

/** A new, empty folder from each call, until the tests of the file that asked for it have ended. */
export function temporaryFolders(): () => Promise<string> {
  let root: string;
  let counter = 0;
  before(async () => {
    root = await mkdtemp(join(tmpdir(), 'martlet-'));
  });
  after(() => rm(root, { recursive: true }));
  return async () => {
    const dir = join(root, String(counter++));
    await mkdir(dir);
    return dir;
  };
}
