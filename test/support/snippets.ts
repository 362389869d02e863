/** A folder that looks like a clone and like a project with martlet installed at once, and what documents show run in it. */
import { spawn } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import sharp from 'sharp';
import { projectRoot } from './fixtures.js';
import { CALM } from './process.js';
import { writeRandomModel } from './random-model.js';

export interface Snippet {
  /** `js`, `sh`, `yaml`, `json`, `jsonl` */
  language: string;
  text: string;
  line: number;
  /** Where a reader saves it, where the fence says so: `run custom_data/data.json`. */
  file?: string;
}

/** The fenced blocks of a document that are marked by `run` behind their language. */
export function snippetsOf(path: string): Snippet[] {
  const document = readFileSync(join(projectRoot, path), 'utf8');
  return [...document.matchAll(/^```(\w+) run(?: (\S+))?\n([\s\S]*?)^```$/gm)].map((match) => ({
    language: match[1] as string,
    text: match[3] as string,
    line: document.slice(0, match.index).split('\n').length,
    ...(match[2] !== undefined && { file: match[2] }),
  }));
}

/** `examples/` as in the clone, `import 'martlet'` and `npx martlet` as in a project; what runs writes into the folder itself. */
export function workspace(root: string): string {
  const dir = mkdtempSync(join(root, 'workspace-'));
  const bin = join(dir, 'node_modules', '.bin');
  mkdirSync(bin, { recursive: true });
  symlinkSync(join(projectRoot, 'examples'), join(dir, 'examples'));
  symlinkSync(projectRoot, join(dir, 'node_modules', 'martlet'));
  const script = (name: string, line: string) => {
    writeFileSync(join(bin, name), `#!/bin/sh\n${line}\n`);
    chmodSync(join(bin, name), 0o755);
  };
  script('martlet', `exec '${process.execPath}' '${join(projectRoot, 'dist/lib/cli/main.js')}' "$@"`);
  script('npx', 'exec "$@"'); // npm's own takes a second to find the same
  return dir;
}

/** What a reader of the tutorial has: a picture, and Qwen-VL-Chat (a tiny one) in the cache of Hugging Face. */
export async function addTutorialFiles(dir: string): Promise<void> {
  const hub = join(dir, 'hf/hub/models--Qwen--Qwen-VL-Chat');
  mkdirSync(join(hub, 'refs'), { recursive: true });
  writeFileSync(join(hub, 'refs/main'), '1');
  mkdirSync(join(hub, 'snapshots'), { recursive: true });
  writeRandomModel('qwen_vl_chat', join(hub, 'snapshots/1'));
  mkdirSync(join(dir, 'custom_data/images'), { recursive: true });
  await sharp(join(projectRoot, 'test/fixtures/minicpm_v/images/small.png'))
    .jpeg()
    .toFile(join(dir, 'custom_data/images/cat.jpg'));
}

export interface Finished {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** Runs a program in a workspace. */
export function runIn(dir: string, command: string, args: string[]): Promise<Finished> {
  const env: NodeJS.ProcessEnv = {
    ...process.env,
    ...CALM,
    HF_HOME: join(dir, 'hf'),
    PATH: `${join(dir, 'node_modules', '.bin')}:${process.env.PATH}`,
  };
  delete env.NODE_TEST_CONTEXT;
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { cwd: dir, env, stdio: ['ignore', 'pipe', 'pipe'], timeout: 60_000 });
    const out = { stdout: '', stderr: '' };
    for (const name of ['stdout', 'stderr'] as const)
      child[name].setEncoding('utf8').on('data', (text: string) => {
        out[name] += text;
      });
    child.on('error', reject);
    child.on('close', (code) => resolve({ code, ...out }));
  });
}
