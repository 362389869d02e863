/**
 * `npm run bench [-- options]`: martlet beside transformers + PEFT on one machine, the same weights and rows, in one run.
 *
 *   --only llava-7b     the shape (bench/shapes.json); default llava-7b
 *   --batches 2,4,8     rows in a step; default the shape's
 *   --tiny              the shape `tiny`: a trial of the scripts, results go to build/bench
 *   --device cuda|cpu   default cuda
 *   --quick             one round instead of two (martlet, peer; else martlet, peer, peer, martlet), no recompute rows
 *   --tuned             also the tuned peer: compiled layers, static cache (minutes of compiling)
 *   --budget SECONDS    stops in time: a stage that does not fit is left out and named in the results; default 3600
 *   --out DIR           default bench/results
 *   --force             times even if the gate fails; the results say so and are never published
 *
 * Environment: BENCH_DIR = where the checkpoint is made (default: the system's temporary folder), BENCH_PYTHON (default python3: needs torch,
 * transformers, peft, safetensors), COMMIT (default: git's), OUT = a second folder for the results.
 *
 * Stages in order of weight: checkpoint, gate (loss and LoRA gradients of one batch against transformers + PEFT in float32), timing. Results are
 * written after each stage.
 */
import { execFileSync, spawn } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = fileURLToPath(new URL('..', import.meta.url));
const here = (name) => join(root, 'bench', name);
const LIMITS = { lossDifference: 2e-3, cosine: 0.999 };
const GATE_BATCH = 2;

const { values: options } = parseArgs({
  options: {
    only: { type: 'string', default: 'llava-7b' },
    batches: { type: 'string' },
    tiny: { type: 'boolean', default: false },
    device: { type: 'string', default: 'cuda' },
    quick: { type: 'boolean', default: false },
    tuned: { type: 'boolean', default: false },
    budget: { type: 'string', default: '3600' },
    out: { type: 'string' },
    force: { type: 'boolean', default: false },
  },
});
const name = options.tiny ? 'tiny' : options.only;
const shape = JSON.parse(readFileSync(here('shapes.json'), 'utf8'))[name];
if (!shape) throw new Error(`bench/shapes.json has no shape ${name}`);
const python = process.env.BENCH_PYTHON ?? 'python3';
const dir = join(process.env.BENCH_DIR ?? tmpdir(), `martlet-bench-${name}`);
const outDir = options.out ?? join(root, name === 'tiny' ? 'build/bench' : 'bench/results');

const began = performance.now();
const elapsed = () => (performance.now() - began) / 1000;
const remaining = () => Number(options.budget) - elapsed();
const say = (text) => console.log(`[${elapsed().toFixed(0).padStart(4)} s] ${text}`);

/** What a failed stage throws; a stage that ran out of time is none. */
class StageError extends Error {}

/** Runs a process, hands over each JSON line of its output; kills it when `limit` seconds are over. True if it came to its end in time. */
function run(command, args, limit, onResult = () => {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, {
      cwd: root,
      stdio: ['ignore', 'pipe', 'inherit'],
      env: { PYTHONUNBUFFERED: '1', HF_HUB_OFFLINE: '1', TOKENIZERS_PARALLELISM: 'false', ...process.env },
    });
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      child.kill('SIGKILL');
    }, limit * 1000);
    let rest = '';
    child.stdout.setEncoding('utf8').on('data', (text) => {
      const lines = (rest + text).split('\n');
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith('{')) onResult(JSON.parse(line));
        else console.log(line);
      }
    });
    child.on('error', reject);
    child.on('close', (code, signal) => {
      clearTimeout(timer);
      if (late) resolve(false);
      else if (code === 0) resolve(true);
      else reject(new StageError(`${command} ${args[0]} ended with ${code ?? signal}`));
    });
  });
}

const sides = {
  martlet: (tasks, limit, onResult) =>
    run(
      process.execPath,
      [here('martlet.mjs'), JSON.stringify({ dir, device: options.device, tasks })],
      limit,
      onResult,
    ),
  peer: (mode, tasks, limit, onResult) =>
    run(python, [here('peer.py'), JSON.stringify({ dir, device: options.device, mode, tasks })], limit, onResult),
};

function environment() {
  const code = `
import json, platform, torch, transformers, peft, os
cuda = torch.cuda.is_available()
print(json.dumps({
  "gpu": torch.cuda.get_device_name() if cuda else None,
  "gpuMemory": torch.cuda.get_device_properties(0).total_memory if cuda else 0,
  "cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)),
  "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if cuda else None,
    "transformers": transformers.__version__, "peft": peft.__version__, "python": platform.python_version()}}))`;
  const found = JSON.parse(execFileSync(python, ['-c', code], { encoding: 'utf8', env: process.env }));
  let driver = null;
  try {
    driver = execFileSync('nvidia-smi', ['--query-gpu=driver_version', '--format=csv,noheader'], { encoding: 'utf8' })
      .split('\n')[0]
      .trim();
  } catch {
    // no NVIDIA driver
  }
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
  return { ...found, driver, versions: { martlet: version, node: process.versions.node, ...found.versions } };
}

function commit() {
  if (process.env.COMMIT) return process.env.COMMIT;
  try {
    return execFileSync('git', ['-C', root, 'rev-parse', 'HEAD'], {
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
    }).trim();
  } catch {
    return null;
  }
}

const machine = environment();
if (options.device === 'cuda' && machine.gpu === null) {
  console.error(
    'torch sees no CUDA device here. Run the benchmark on a GPU machine, or try the scripts with --tiny --device cpu.',
  );
  process.exit(1);
}
const date = new Date().toISOString().slice(0, 10);
const slug = (machine.gpu ?? 'cpu')
  .toLowerCase()
  .replace(/^nvidia /, '')
  .replaceAll(/[^a-z0-9]+/g, '-');
const file = join(outDir, `${date}-${slug}-${name}.json`);
const results = {
  what: name,
  title: shape.title,
  date,
  ...machine,
  commit: commit(),
  command: `npm run bench -- ${process.argv.slice(2).join(' ')}`.trim(),
  row: shape.row,
  prompt: shape.prompt,
  gate: null,
  runs: [],
  leftOut: [],
  seconds: 0,
};

function save() {
  results.seconds = Math.round(elapsed());
  mkdirSync(outDir, { recursive: true });
  writeFileSync(`${file}.tmp`, `${JSON.stringify(results, null, 1)}\n`);
  renameSync(`${file}.tmp`, file);
  if (process.env.OUT && existsSync(process.env.OUT))
    copyFileSync(file, join(process.env.OUT, `${date}-${slug}-${name}.json`));
}

/** Runs `work(limit)` if `needed` seconds are left. */
async function stage(title, needed, work) {
  if (remaining() < needed) {
    say(`left out: ${title} (${remaining().toFixed(0)} s left, about ${needed} s needed)`);
    results.leftOut.push({ stage: title, why: 'no time left' });
  } else {
    say(title);
    const finished = await work(remaining());
    if (!finished) {
      say(`cut off: ${title}`);
      results.leftOut.push({ stage: title, why: 'ran out of time; what it had measured is there' });
    }
  }
  save();
}

const median = (values) => quantile(values, 0.5);
function quantile(values, q) {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (sorted.length - 1) * q;
  const low = Math.floor(at);
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (at - low);
}

/** Adds what is read off the raw numbers. */
function summarise(side, round, result) {
  const entry = { side, round, ...result };
  if (result.seconds?.length) {
    entry.tokens = result.batch * shape.row.tokens;
    for (const [key, q] of [
      ['median', 0.5],
      ['p10', 0.1],
      ['p90', 0.9],
    ])
      entry[key] = quantile(result.seconds, q);
    entry.tokensPerSecond = entry.tokens / entry.median;
  }
  const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
  const words = {
    load: () => `load ${result.seconds.toFixed(2)} s`,
    decode: () =>
      `decode ${median(result.tokensPerSecond).toFixed(1)} tok/s, first token ${(median(result.firstTokenSeconds) * 1000).toFixed(0)} ms`,
    train: () => {
      const what = `train ${result.batch} rows${result.recompute ? ', recompute' : ''}`;
      return result.error
        ? `${what}: ${result.error}`
        : `${what}: ${entry.tokensPerSecond.toFixed(0)} tok/s (${(entry.median * 1000).toFixed(0)} ms, p10 ${(entry.p10 * 1000).toFixed(0)}, p90 ${(entry.p90 * 1000).toFixed(0)}), peak ${gib(result.peakAllocated)}`;
    },
  };
  say(`  ${side}: ${result.kind === 'decode' && result.error ? `decode: ${result.error}` : words[result.kind]()}`);
  results.runs.push(entry);
  save();
}

const decode = { kind: 'decode', promptTokens: shape.prompt.tokens, newTokens: shape.prompt.newTokens };
const settings = (recompute) =>
  (options.batches?.split(',').map(Number) ?? shape.batches).map((batch) => ({
    kind: 'train',
    batch,
    recompute,
    warmup: shape.warmup,
    steps: shape.steps,
  }));
const training = options.quick ? settings(false) : [...settings(false), ...settings(true)];

async function gate() {
  const gradients = (side) => join(dir, `gradients-${side}.safetensors`);
  const losses = {};
  const found = {};
  const note = (side) => (result) => {
    if (result.kind === 'gradients') losses[side ?? result.as] = result.loss;
    if (result.kind === 'compare') found[result.as] = result;
  };
  const task = (side) => ({ kind: 'gradients', batch: GATE_BATCH, file: gradients(side), as: side });
  const compare = (own, reference, as) => ({
    kind: 'compare',
    own: gradients(own),
    reference: gradients(reference),
    as,
  });
  const load = { kind: 'load' };
  const finished =
    (await sides.martlet([load, task('martlet')], remaining(), note('martlet'))) &&
    (await sides.peer(
      'reference',
      [
        load,
        task('reference'),
        { kind: 'unload' },
        { kind: 'set_mode', mode: 'default' },
        load,
        task('peer'),
        compare('martlet', 'reference', 'martlet'),
        compare('peer', 'reference', 'peer'),
        compare('martlet', 'peer', 'both'),
      ],
      remaining(),
      note(),
    ));
  if (!finished) return false;
  const { tensors, worstTensor } = found.martlet;
  results.gate = {
    limits: LIMITS,
    loss: losses,
    lossDifference: Math.abs(losses.martlet - losses.reference),
    cosine: found.martlet.cosine,
    normRatio: found.martlet.normRatio,
    worstTensor,
    tensors,
    peer: { lossDifference: Math.abs(losses.peer - losses.reference), cosine: found.peer.cosine },
    martletAndPeer: { lossDifference: Math.abs(losses.martlet - losses.peer), cosine: found.both.cosine },
  };
  results.gate.passed =
    results.gate.lossDifference < LIMITS.lossDifference && results.gate.cosine > LIMITS.cosine && tensors > 0;
  say(
    `  losses ${JSON.stringify(losses)}; gradient cosine to float32: martlet ${found.martlet.cosine.toFixed(6)}, peer ${found.peer.cosine.toFixed(6)}; to each other ${found.both.cosine.toFixed(6)}`,
  );
  return true;
}

async function main() {
  const large = name !== 'tiny';
  say(
    `${shape.title} on ${machine.gpu ?? 'the CPU'}, torch ${machine.versions.torch}; results in ${relative(root, file)}`,
  );
  await stage('checkpoint', large ? 60 : 10, (limit) =>
    run(python, [here('make_checkpoint.py'), '--shape', name, '--out', dir, '--device', options.device], limit),
  );
  await stage('gate: loss and LoRA gradients against float32', large ? 60 : 10, gate);
  if (!results.gate?.passed) {
    say(`the gate ${results.gate ? 'failed' : 'was not reached'}: ${JSON.stringify(results.gate)}`);
    if (!options.force || !results.gate) {
      process.exitCode = 1;
      return;
    }
  }
  const rounds = { warmup: 1, repeats: large ? 3 : 2 };
  const martlet = (round, extra) => (limit) =>
    sides.martlet([{ kind: 'load' }, ...extra, ...training], limit, (result) => summarise('martlet', round, result));
  const peer = (round, extra) => (limit) =>
    sides.peer('default', [{ kind: 'load' }, ...extra, ...training], limit, (result) =>
      summarise('peer-default', round, result),
    );
  await stage('martlet, round 1', large ? 30 : 5, martlet(1, [{ ...decode, ...rounds }]));
  await stage('transformers + PEFT, default, round 1', large ? 60 : 5, peer(1, [{ ...decode, ...rounds }]));
  if (options.tuned) {
    await stage('transformers + PEFT, tuned: training', large ? 90 : 5, (limit) =>
      sides.peer('tuned', [{ kind: 'load' }, ...training], limit, (result) => summarise('peer-tuned', 1, result)),
    );
  }
  if (!options.quick) {
    await stage('transformers + PEFT, default, round 2', large ? 60 : 5, peer(2, []));
    await stage('martlet, round 2', large ? 30 : 5, martlet(2, [{ ...decode, ...rounds }]));
  }
  if (options.tuned) {
    await stage('transformers + PEFT, tuned: decoding', large ? 60 : 5, (limit) =>
      sides.peer('tuned', [{ kind: 'load' }, { ...decode, warmup: 2, repeats: rounds.repeats }], limit, (result) =>
        summarise('peer-tuned', 1, result),
      ),
    );
  }
  say(
    `done; ${relative(root, file)}${results.leftOut.length ? `, left out: ${results.leftOut.map((s) => s.stage).join('; ')}` : ''}`,
  );
}

try {
  await main();
} catch (error) {
  results.leftOut.push({ stage: 'the rest', why: error.message });
  save();
  if (!(error instanceof StageError)) throw error;
  console.error(error.message);
  process.exitCode = 1;
}
