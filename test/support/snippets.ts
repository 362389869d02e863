/** A folder that looks like a clone and like a project with martlet installed at once, and what documents show run in it. */
import { spawn } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot } from './fixtures.js';
import { CALM } from './process.js';

export interface Snippet {
  /** `js`, `sh`, `yaml`, `json`, `jsonl` */
  language: string;
  text: string;
  line: number;
}

/** The fenced blocks of a document that are marked by `run` behind their language. */
export function snippetsOf(path: string): Snippet[] {
  const document = readFileSync(join(projectRoot, path), 'utf8');
  return [...document.matchAll(/^```(\w+) run\n([\s\S]*?)^```$/gm)].map((match) => ({
    language: match[1] as string,
    text: match[2] as string,
    line: document.slice(0, match.index).split('\n').length,
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
