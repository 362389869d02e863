/** Runs the scripts of test/process/children, each in a process of its own with a time limit. */
import { spawn } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { brokenCopy, editJson } from './broken.js';
import { projectRoot } from './fixtures.js';
import { smallConfig } from './train.js';

/** The embedded model: 3 million parameters, 512 positions; a step over many rows takes seconds. */
export const QUICKSTART_MODEL = join(projectRoot, 'examples/quickstart/model');

/**
 * One thread of libtorch, which sleeps while it waits: for jobs that share two cores with other work, where threads that wait for one
 * another make any time limit a matter of luck. Every child gets it; a test file that measures in its own process takes it by
 * `Object.assign(process.env, CALM)` before libtorch is loaded.
 */
export const CALM = { MARTLET_NUM_THREADS: '1', OMP_WAIT_POLICY: 'passive' };

const CHILDREN = new URL('../process/children/', import.meta.url);

export interface ChildResult {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

export interface ChildOptions {
  /** Merged over this process's and {@link CALM}; undefined removes a variable. */
  env?: Record<string, string | undefined>;
  nodeArgs?: string[];
  cwd?: string;
  /** A line for bash that runs the process as `"$@"`, such as `ulimit -f 1; exec "$@"`. */
  shell?: string;
  /** Longest the process may take, in ms. Defaults to a minute. */
  limit?: number;
  /** Sees each line of standard output; may kill. */
  onLine?: (line: string, kill: () => void) => void;
}

/** Runs `dist/test/process/children/<name>.js`, which finds `args` with {@link childArgs}. Rejects when it outlives its limit. */
export function runChild(name: string, args: unknown, options: ChildOptions = {}): Promise<ChildResult> {
  const script = fileURLToPath(new URL(`${name}.js`, CHILDREN));
  return runNode([...(options.nodeArgs ?? []), script, JSON.stringify(args)], options);
}

export function runNode(nodeArgs: string[], options: ChildOptions = {}): Promise<ChildResult> {
  const { shell, cwd, limit = 60_000, onLine } = options;
  const env: NodeJS.ProcessEnv = { ...process.env, ...CALM, ...options.env };
  // a child is not a test file of the runner above it
  delete env.NODE_TEST_CONTEXT;
  return new Promise((resolve, reject) => {
    const child = shell
      ? spawn('bash', ['-c', shell, 'bash', process.execPath, ...nodeArgs], { env, cwd })
      : spawn(process.execPath, nodeArgs, { env, cwd });
    const out = { stdout: '', stderr: '' };
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      child.kill('SIGKILL');
    }, limit);
    let rest = '';
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      out.stdout += text;
      const lines = (rest + text).split('\n');
      rest = lines.pop() as string;
      for (const line of lines) onLine?.(line, () => child.kill('SIGKILL'));
    });
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      out.stderr += text;
    });
    child.on('error', reject);
    child.on('close', (code, signal) => {
      clearTimeout(timer);
      if (late) reject(new Error(`still running after ${limit} ms\n${out.stdout}\n${out.stderr}`));
      else resolve({ code, signal, ...out });
    });
  });
}

/** In a child: what the test handed over. */
export function childArgs<T>(): T {
  return JSON.parse(process.argv[2] as string) as T;
}

/**
 * Starts to count. The function that it gives ends that and says how long, in ms, one thread of this process has been ready to run and had no core
 * (the longest of all threads; Linux counts it): the part of a delay that other work on the machine is to blame for.
 */
export function coreWait(): () => number {
  const start = new Map<string, number>();
  const latest = new Map<string, number>();
  const read = (into: Map<string, number>) => {
    for (const thread of readdirSync('/proc/self/task')) {
      try {
        const [, waited] = readFileSync(`/proc/self/task/${thread}/schedstat`, 'utf8').split(' ');
        into.set(thread, Number(waited) / 1e6);
      } catch {
        // it ended meanwhile
      }
    }
  };
  read(start);
  // a thread that ends takes its count with it
  const timer = setInterval(read, 10, latest);
  return () => {
    clearInterval(timer);
    read(latest);
    return Math.max(...[...latest].map(([thread, waited]) => waited - (start.get(thread) ?? 0)));
  };
}

/** The last line of a child's standard output, as JSON. */
export function lastJson<T>(stdout: string): T {
  return JSON.parse(stdout.trimEnd().split('\n').at(-1) as string) as T;
}

/**
 * The config of a run whose single steps take seconds: the embedded model, `rows` rows of 300 tokens in a step. They are text alone, so
 * that the step begins at once.
 */
export function slowConfig(dir: string, rows = 32): Record<string, unknown> {
  const dataset = join(dir, 'many.json');
  const messages = [
    { role: 'user', content: 'Tell a story.' },
    { role: 'assistant', content: 'the red circle is left of the blue square. '.repeat(16) },
  ];
  writeFileSync(dataset, JSON.stringify(Array.from({ length: rows }, () => ({ messages }))));
  return smallConfig(dir, {
    model: QUICKSTART_MODEL,
    dataset,
    per_device_train_batch_size: rows,
    gradient_accumulation_steps: 1,
    max_steps: 1000,
    save_strategy: 'no',
  });
}

/** A copy of the embedded model with an end token that it never says: its answers fill its positions, which takes about a second. */
export function talkative(root: string): string {
  return brokenCopy(QUICKSTART_MODEL, root, (dir) => {
    editJson(join(dir, 'generation_config.json'), (config) => {
      config.eos_token_id = config.pad_token_id;
    });
    for (const name of ['tokenizer_config.json', 'special_tokens_map.json']) {
      editJson(join(dir, name), (tokens) => {
        tokens.eos_token = tokens.pad_token;
      });
    }
  });
}

/** A question whose answer is as long as the tiny model's positions allow: some hundred tokens. */
export const LONG_QUESTION = {
  messages: [{ role: 'user' as const, content: 'Tell a long story.' }],
  temperature: 0,
  maxNewTokens: 100_000,
  adapter: null,
};
