/**
 * `npm run bench [-- options]`: martlet beside transformers + PEFT on one machine, the same weights and rows, in one run.
 *
 *   --only A,B          shapes of bench/shapes.json; default llava-7b
 *   --tasks A,B         of decode, vision, train, recompute, merge, methods; default all that the shape has. The gate is always first; results of a
 *                       part get a file of their own. methods: the shape's list of LoRA, QLoRA and full runs, each beside its planned memory
 *   --batches 2,4,8     rows in a step; default the shape's
 *   --tiny              the shapes' small doubles: a trial of the scripts, results go to build/bench
 *   --device cuda|cpu   default cuda
 *   --quick             one round (martlet, peer) instead of two (martlet, peer, peer, martlet); 10 timed steps
 *   --tuned             also the tuned peer: compiled layers, static cache (minutes of compiling)
 *   --budget SECONDS    stops in time; each shape may use an even part of what is left, and what does not fit is left out and named in the
 *                       results; default 3600
 *   --out DIR           default bench/results
 *   --force             times even if the gate fails; the results say so and are never published
 *   --remove            deletes a shape's checkpoint after its run: several 15 GB ones fit one after the other
 *
 * Environment: BENCH_DIR = where checkpoints and merged models are written (default: the system's temporary folder), BENCH_PYTHON (default python3:
 * needs torch, transformers, peft, safetensors), COMMIT (default: git's), OUT = a second folder for the results.
 *
 * Each side is a process that answers task after task. In order of weight: checkpoint; gate (loss and LoRA gradients of one batch against
 * transformers + PEFT in float32, beside transformers + PEFT in bfloat16 against the same); decoding, training and the vision tower of martlet, then
 * of the peer; merging; training with recompute. A shape that transformers does not have is measured alone, without a gate. Results are written after
 * each task.
 */
import { execFileSync, spawn } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { compareGradients } from './safetensors.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
const here = (name) => join(root, 'bench', name);
/**
 * A side passes that is inside the first two; or no further off than the peer in bfloat16 is, by `peerCosine` at most: random weights of 7B lose more
 * than the limit to bfloat16 itself.
 */
const LIMITS = { lossDifference: 2e-3, cosine: 0.999, peerCosine: 2e-4 };
const RULE = `loss off by less than ${LIMITS.lossDifference} or no further than the peer in bfloat16; cosine of the gradients above ${LIMITS.cosine} or at least the peer's in bfloat16 − ${LIMITS.peerCosine}`;
const GATE_BATCH = 2;
const TASKS = ['decode', 'vision', 'train', 'recompute', 'merge', 'methods'];
/** What weights are loaded as for a method. */
const QUANTIZATION = { lora: 'none', full: 'none', nf4: 'nf4', int8: 'int8' };

const { values: options } = parseArgs({
  options: {
    only: { type: 'string', default: 'llava-7b' },
    tasks: { type: 'string', default: TASKS.join(',') },
    batches: { type: 'string' },
    tiny: { type: 'boolean', default: false },
    device: { type: 'string', default: 'cuda' },
    quick: { type: 'boolean', default: false },
    tuned: { type: 'boolean', default: false },
    budget: { type: 'string', default: '3600' },
    out: { type: 'string' },
    force: { type: 'boolean', default: false },
    remove: { type: 'boolean', default: false },
  },
});
const shapes = JSON.parse(readFileSync(here('shapes.json'), 'utf8'));
const tasks = options.tasks.split(',');
const unknown = tasks.find((task) => !TASKS.includes(task));
if (unknown !== undefined) throw new Error(`--tasks knows ${TASKS.join(', ')}, not ${unknown}`);
/** What can be measured of a shape. */
const tasksOf = ({ tasks: own = TASKS, vision, methods }) =>
  own.filter((task) => (task !== 'vision' || vision) && (task !== 'methods' || methods));
/** The shapes that are measured. */
const jobs = options.only.split(',').map((name) => {
  const shapeName = options.tiny ? shapes[name]?.tiny : name;
  if (!shapes[shapeName]) throw new Error(`bench/shapes.json has no shape ${name}`);
  return shapeName;
});
const python = process.env.BENCH_PYTHON ?? 'python3';
const outDir = options.out ?? join(root, options.tiny ? 'build/bench' : 'bench/results');

const began = performance.now();
const elapsed = () => (performance.now() - began) / 1000;
const say = (text) => console.log(`[${elapsed().toFixed(0).padStart(4)} s] ${text}`);

const OUT_OF_MEMORY = 'out of memory';
const NO_TIME = 'no time left';

/** A process that answers tasks, one JSON line each. */
class Side {
  /** Why it answers no more; absent while it does. */
  lost;

  constructor(name, command, args) {
    this.name = name;
    this.child = spawn(command, args, {
      cwd: root,
      stdio: ['pipe', 'pipe', 'inherit'],
      env: { PYTHONUNBUFFERED: '1', HF_HUB_OFFLINE: '1', TOKENIZERS_PARALLELISM: 'false', ...process.env },
    });
    this.child.stdin.on('error', () => {}); // It has ended, which `ended` tells.
    this.ended = new Promise((resolve) => {
      const end = (why) => {
        this.lost ??= why;
        resolve({ error: this.lost });
      };
      this.child.on('error', (error) => end(error.message));
      this.child.on('close', (code, signal) => end(`its process ended with ${code ?? signal}`));
    });
    createInterface({ input: this.child.stdout }).on('line', (line) => {
      if (line.startsWith('{')) this.answer?.(JSON.parse(line));
      else console.log(line);
    });
  }

  /** The task's result, or `{ error }`. When `limit` seconds are over, the process is killed. */
  async ask(task, limit) {
    const answer = new Promise((resolve) => {
      this.answer = resolve;
    });
    const timer = setTimeout(() => {
      this.lost ??= NO_TIME;
      this.child.kill('SIGKILL');
    }, limit * 1000);
    this.child.stdin.write(`${JSON.stringify(task)}\n`);
    const result = await Promise.race([answer, this.ended]);
    clearTimeout(timer);
    return result;
  }

  /** Lets it end; one that does not within 10 s is killed. */
  async end() {
    this.child.stdin.end();
    const timer = setTimeout(() => this.child.kill('SIGKILL'), 10_000);
    await this.ended;
    clearTimeout(timer);
  }
}

function environment() {
  const code = `
import json, os, platform, torch
from importlib.metadata import version
cuda = torch.cuda.is_available()
print(json.dumps({
  "gpu": torch.cuda.get_device_name() if cuda else None,
  "gpuMemory": torch.cuda.get_device_properties(0).total_memory if cuda else 0,
  "cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)),
  "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if cuda else None,
    "transformers": version("transformers"), "peft": version("peft"), "python": platform.python_version()}}))`;
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

const median = (values) => quantile(values, 0.5);
function quantile(values, q) {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (sorted.length - 1) * q;
  const low = Math.floor(at);
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (at - low);
}

const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
const ms = (seconds) => `${(seconds * 1000).toFixed(0)} ms`;

const titleOf = (task) =>
  [
    task.kind,
    task.mode,
    task.quantization,
    task.method,
    task.optim,
    task.r && `r ${task.r}`,
    task.attention,
    task.batch && `${task.batch} rows`,
    task.recompute && task.recompute !== 'none' && 'recompute',
  ]
    .filter(Boolean)
    .join(' ');

/** A result in a few words. */
const WORDS = {
  decode: (r) => `${median(r.tokensPerSecond).toFixed(1)} tok/s, first token ${ms(median(r.firstTokenSeconds))}`,
  vision: (r) => `${r.pictures} pictures in ${ms(median(r.visionSeconds))}`,
  gradients: (r) => `loss ${r.loss}, ${r.tensors} tensors`,
  merge: (r) => `${r.mergeSeconds.toFixed(1)} s ${r.parts ? JSON.stringify(r.parts) : `(${r.mergedTensors} tensors)`}`,
  train: (r) =>
    `${r.tokensPerSecond.toFixed(0)} tok/s (${ms(r.median)}, p10 ${ms(r.p10)}, p90 ${ms(r.p90)}), peak ${gib(r.peakAllocated)}${r.plannedPeak ? `, planned ${gib(r.plannedPeak)}` : ''}`,
};
const wordsOf = (result) =>
  WORDS[result.kind]?.(result) ?? (result.seconds ? `${result.seconds.toFixed(2)} s` : 'done');

/** Measures one job within `budget` seconds; true if nothing failed. */
async function benchmark(shapeName, budget) {
  const shape = shapes[shapeName];
  const folder = process.env.BENCH_DIR ?? tmpdir();
  const dir = join(folder, `martlet-bench-${shapeName}`);
  const alone = shape.peer === 'none';
  const isPart = tasksOf(shape).some((task) => !tasks.includes(task));
  const file = `${date}-${slug}-${[shapeName, ...(isPart ? tasks : [])].join('-')}.json`;
  const [started, deadline] = [elapsed(), elapsed() + budget];
  const remaining = () => deadline - elapsed();
  /** About how long a task takes; a trial's are short. */
  const about = (seconds) => (options.tiny ? 1 : seconds);
  const results = {
    what: shapeName,
    part: isPart,
    tasks,
    ...(alone && { peer: 'none' }),
    ...(shape.note && { note: shape.note }),
    ...(shape.lora && { lora: shape.lora }),
    title: shape.title,
    date,
    ...machine,
    commit: commit(),
    command: `npm run bench -- ${process.argv.slice(2).join(' ')}`.trim(),
    row: shape.row,
    prompt: shape.prompt,
    vision: shape.vision,
    gate: null,
    runs: [],
    leftOut: [],
    seconds: 0,
  };
  let failed = false;

  function save() {
    results.seconds = Math.round(elapsed() - started);
    mkdirSync(outDir, { recursive: true });
    const path = join(outDir, file);
    writeFileSync(`${path}.tmp`, `${JSON.stringify(results, null, 1)}\n`);
    renameSync(`${path}.tmp`, path);
    if (process.env.OUT && existsSync(process.env.OUT)) copyFileSync(path, join(process.env.OUT, file));
  }

  function leaveOut(stage, why) {
    say(`left out: ${stage} (${why})`);
    results.leftOut.push({ stage, why });
    save();
  }

  /** Does a task if `needed` seconds are left; gives its result, or nothing. What failed is said, and the next task may still succeed. */
  async function perform(side, task, needed) {
    if (side.lost) return undefined; // said already
    const title = `${side.name}: ${titleOf(task)}`;
    if (remaining() < needed) {
      leaveOut(title, `${remaining().toFixed(0)} s left, about ${needed.toFixed(0)} s needed`);
      return undefined;
    }
    const result = await side.ask(task, remaining());
    if (result.error) {
      // Memory that does not suffice for a batch is a result.
      if (task.kind === 'train' && result.error === OUT_OF_MEMORY) {
        say(`${title}: ${result.error}`);
        return result;
      }
      failed ||= result.error !== NO_TIME;
      leaveOut(side.lost ? `${title} and what comes after it` : title, result.error);
      return undefined;
    }
    if (result.seconds?.length) {
      const [middle, p10, p90] = [0.5, 0.1, 0.9].map((q) => quantile(result.seconds, q));
      const tokens = result.batch * shape.row.tokens;
      Object.assign(result, { tokens, median: middle, p10, p90, tokensPerSecond: tokens / middle });
    }
    say(`${title}: ${wordsOf(result)}`);
    return result;
  }

  const gradients = (side) => join(dir, `gradients-${side}.safetensors`);
  const gateTask = (side) => ({ kind: 'gradients', batch: GATE_BATCH, file: gradients(side) });
  /** Distance of a side's loss and gradients from the reference's. */
  const distance = (side, loss, reference) => ({
    loss,
    lossDifference: Math.abs(loss - reference),
    ...compareGradients(gradients(side), gradients('reference')),
  });

  const checkpoint = (peer) => perform(peer, { kind: 'checkpoint', shape: shapeName }, about(existsSync(dir) ? 5 : 45));

  /** Leaves martlet loaded. */
  async function gate(peer, martlet) {
    if (!(await checkpoint(peer))) return;
    /** Loss and gradients of the peer in a mode. */
    const ofPeer = async (mode, name) => {
      const loaded = await perform(peer, { kind: 'load', mode }, about(25));
      const found = loaded && (await perform(peer, gateTask(name), about(10)));
      await perform(peer, { kind: 'unload' }, 0);
      return found;
    };
    const reference = await ofPeer('reference', 'reference');
    const other = await ofPeer('default', 'peer');
    const own =
      (await measure(martlet, 'martlet', 1, [{ kind: 'load' }])) &&
      (await perform(martlet, gateTask('martlet'), about(10)));
    if (!reference || !own) return;
    const ours = distance('martlet', own.loss, reference.loss);
    const beside = other && distance('peer', other.loss, reference.loss);
    const within = {
      loss: ours.lossDifference < LIMITS.lossDifference,
      cosine: ours.cosine > LIMITS.cosine,
    };
    const besidePeer = {
      loss: beside !== undefined && ours.lossDifference <= beside.lossDifference,
      cosine: beside !== undefined && ours.cosine >= beside.cosine - LIMITS.peerCosine,
    };
    results.gate = {
      rule: RULE,
      limits: LIMITS,
      referenceLoss: reference.loss,
      ...ours,
      ...(beside && { peer: beside }),
      passed: (within.loss || besidePeer.loss) && (within.cosine || besidePeer.cosine),
    };
    const { lossDifference, cosine, worstTensor } = results.gate;
    say(
      `gate ${results.gate.passed ? 'passed' : 'FAILED'}: loss off by ${lossDifference.toExponential(1)}, cosine of the gradients ${cosine.toFixed(6)}, lowest ${worstTensor.cosine.toFixed(6)} (${worstTensor.name}); the peer in bfloat16: ${beside ? `${beside.lossDifference.toExponential(1)}, ${beside.cosine.toFixed(6)}` : 'not measured'}`,
    );
    save();
  }

  /** Seconds of a step by row as last measured, by side: what the next stage will take. */
  const rowSeconds = {};
  /** Does tasks that are recorded as runs of `label`, each if its time and `reserve` seconds are left. True if the last was done. */
  async function measure(side, label, round, tasks, reserve = 0) {
    let done = false;
    for (const task of tasks) {
      const slower = task.recompute && task.recompute !== 'none' ? 1.5 : 1;
      const steps = (task.warmup + task.steps) * task.batch * (rowSeconds[label] ?? 0.3) * slower;
      const needed = { load: 12, decode: 20, vision: 15, merge: 35, train: 3 + 1.2 * steps }[task.kind];
      const result = await perform(side, task, about(needed) + reserve);
      done = result !== undefined;
      if (!done) continue;
      if (result.median && task.batch > 1) rowSeconds[label] = result.median / task.batch;
      results.runs.push({ side: label, round, ...result });
      save();
    }
    return done;
  }

  const repeats = (large, tiny) => (options.tiny ? tiny : large);
  const { tokens: promptTokens, newTokens } = shape.prompt ?? {};
  const wanted = (kind, list) => (tasks.includes(kind) && tasksOf(shape).includes(kind) ? list : []);
  const decode = wanted('decode', [{ kind: 'decode', promptTokens, newTokens, warmup: 1, repeats: repeats(3, 2) }]);
  const vision = (...kinds) =>
    wanted(
      'vision',
      kinds.map((kind) => ({ kind: 'vision', warmup: repeats(3, 1), repeats: repeats(10, 2), ...kind })),
    );
  const batches = options.batches?.split(',').map(Number) ?? shape.batches ?? [];
  const { warmup } = shape;
  const steps = options.quick ? Math.min(10, shape.steps) : shape.steps;
  const train = (recompute) =>
    wanted(
      recompute ? 'recompute' : 'train',
      batches.map((batch) => ({ kind: 'train', batch, recompute, warmup, steps })),
    );
  const merge = wanted('merge', [{ kind: 'merge', out: join(folder, 'martlet-bench-merged') }]);
  const later = [...merge, ...train(true)];
  const methods = wanted('methods', shape.methods ?? []).map((task) => ({ kind: 'train', warmup, steps, ...task }));
  /** Runs on the same weights; the one before a full run has to let go of its own. */
  const methodsOf = (...names) => methods.filter(({ method }) => names.includes(method));
  const load = { kind: 'load', mode: 'default' };

  say(`${shape.title}: ${budget.toFixed(0)} s; results in ${relative(root, join(outDir, file))}`);
  const open = (side) =>
    side === 'martlet'
      ? new Side(side, process.execPath, [here('martlet.mjs'), dir, options.device])
      : new Side(side, python, [here('peer.py'), dir, options.device]);
  const [peer, martlet] = [open('peer'), open('martlet')];
  const sides = [peer, martlet];
  try {
    if (alone) {
      const made = await checkpoint(peer);
      await peer.end();
      if (!made || !(await measure(martlet, 'martlet', 1, [{ kind: 'load' }]))) return false;
    } else {
      await gate(peer, martlet);
      if (!results.gate?.passed) {
        failed = true;
        if (!options.force || !existsSync(join(dir, 'shape.json'))) {
          leaveOut('every timing', `the gate ${results.gate ? 'failed' : 'was not reached'}`);
          return false;
        }
      }
    }
    await measure(martlet, 'martlet', 1, [...decode, ...vision({}), ...train(false), ...methodsOf('lora')]);
    // The peer's first numbers weigh more than these.
    await measure(martlet, 'martlet', 1, later, isPart ? 0 : about(budget * 0.45));
    await martlet.end();
    // A process each, so that no peak is of what was loaded before.
    for (const method of ['nf4', 'int8', 'full']) {
      if (methodsOf(method).length === 0) continue;
      const again = open('martlet');
      sides.push(again);
      const loaded = { kind: 'load', quantization: QUANTIZATION[method] };
      await measure(again, 'martlet', 1, [loaded, ...methodsOf(method)]);
      await again.end();
    }
    if (!alone) {
      const beside = (method) => methodsOf(method).filter((task) => task.peer);
      const first = [
        ...decode,
        ...vision({ attention: 'sdpa' }, { attention: 'eager' }),
        ...train(false),
        ...beside('lora'),
      ];
      const full = beside('full');
      if (first.length + later.length > 0) await measure(peer, 'peer-default', 1, [load, ...first]);
      if (full.length > 0) {
        if (first.length > 0) await perform(peer, { kind: 'unload' }, 0);
        await measure(peer, 'peer-default', 1, [load, ...full]);
      }
      if (full.length > 0 && later.length > 0) {
        await perform(peer, { kind: 'unload' }, 0);
        await measure(peer, 'peer-default', 1, [load]);
      }
      await measure(peer, 'peer-default', 1, later);
      await peer.end();
    }
    if (!options.quick && !isPart && !alone) {
      const again = [open('peer'), open('martlet')];
      sides.push(...again);
      await measure(again[0], 'peer-default', 2, [load, ...train(false)]);
      await again[0].end();
      await measure(again[1], 'martlet', 2, [{ kind: 'load' }, ...decode, ...train(false)]);
      await again[1].end();
    }
    if (options.tuned && !isPart && !alone) {
      // Each in a process of its own: what is compiled for one would stay for the other.
      for (const tasks of [train(false), decode.map((task) => ({ ...task, warmup: 2 }))]) {
        const tuned = open('peer');
        sides.push(tuned);
        await measure(tuned, 'peer-tuned', 1, [{ kind: 'load', mode: 'tuned' }, ...tasks]);
        await tuned.end();
      }
    }
  } finally {
    await Promise.all(sides.map((side) => side.end()));
    save();
    if (options.remove) rmSync(dir, { recursive: true, force: true });
  }
  return !failed;
}

say(`${machine.gpu ?? 'the CPU'}, torch ${machine.versions.torch}; ${options.budget} s at most`);
for (const [i, job] of jobs.entries()) {
  const budget = (Number(options.budget) - elapsed()) / (jobs.length - i);
  if (!(await benchmark(job, budget))) process.exitCode = 1;
}
say('done');
