/**
 * `npm run bench [-- options]`: martlet beside transformers + PEFT on one machine, the same weights and rows, in one run.
 *
 *   --only A,B          shapes of bench/shapes.json; default llava-7b
 *   --tasks A,B         of decode, train, vision, recompute, merge, quantized, data, methods, cached, curve, done in the order given; default all that the shape
 *                       has. The gate is always first; results of a part get a file of their own. quantized: decoding from int8 and NF4 weights.
 *                       data: a run of martlet from JPEG files and text, and how long it waits for them. methods: the shape's list of LoRA, QLoRA
 *                       and full runs, each beside its planned memory. cached: training on rows whose pictures' features are kept. curve: the losses of a longer run in bfloat16 and in fp8
 *   --methods A,B       of lora, fp8, nf4, int8, full: those of the list alone. fp8 (LoRA with base_dtype: fp8) has a gate of its own: loss and gradients
 *                       against martlet's in bfloat16; it and the curve in fp8 are left out without a GPU
 *   --batches 2,8,4     rows in a step; default the shape's. Of methods: those of the list alone
 *   --answers 1,16      answers at once in decoding; default the shape's
 *   --peer A,B          forms of the peer, of default and tuned (bench/peer.py says what they are); default default. tuned compiles for 20 to 90 s
 *                       for each task
 *   --tiny              the shapes' small doubles: a trial of the scripts, results go to build/bench
 *   --device cuda|cpu   default cuda
 *   --quick             each task once (martlet, peer; the next one peer, martlet) instead of twice (martlet, peer, peer, martlet); 10 timed steps
 *   --budget SECONDS    stops in time; each shape may use an even part of what is left, and what does not fit is left out and named in the
 *                       results; default 3600
 *   --out DIR           default bench/results
 *   --force             times even if the gate fails; the results say so and are never published
 *   --remove            deletes a shape's checkpoint after its run: several 15 GB ones fit one after the other
 *
 * Environment: BENCH_DIR = where checkpoints and merged models are written (default: the system's temporary folder), BENCH_PYTHON (default python3:
 * needs torch, transformers, peft, safetensors), COMMIT (default: git's), OUT = a second folder for the results.
 *
 * Each side is a process that answers task after task. First the checkpoint and the gate: the mean loss of some batches and the LoRA gradients of the
 * first against transformers + PEFT in float32, beside transformers + PEFT in bfloat16 against the same (the peer's two are kept beside the checkpoint for the next run). Then task
 * after task, the sides taking turns, with only one side's model on the device. A task is begun if there is time for all sides. A shape that
 * transformers does not have is measured alone, without a gate. Results are written after each figure.
 */
import { execFileSync, spawn } from 'node:child_process';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
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
/** Batches that the gate's loss is the mean of: that of one wanders by 1e-3 and more with bfloat16's roundings, on either side. */
const GATE_LOSSES = 8;
/** Of base products in fp8 against martlet's own in bfloat16: the share that the loss is off by, and the cosine of the gradients. */
const FP8_LIMITS = { lossShare: 0.01, cosine: 0.99 };
/** Of the curve in fp8 beside bfloat16's: the share that the end is off by. */
const CURVE_LIMIT = 0.01;
/** The share that a curve must fall by to say anything. */
const CURVE_FALL = 0.05;
/** That make_checkpoint.py writes. */
const ROWS = 32;
/** Steps that are the end of a curve. */
const CURVE_END = 20;
const TASKS = ['decode', 'train', 'vision', 'recompute', 'merge', 'quantized', 'data', 'methods', 'cached', 'curve'];
const PEERS = ['default', 'tuned'];
/** What weights are loaded as for a method. */
const QUANTIZATION = { lora: 'none', full: 'none', fp8: 'fp8', nf4: 'nf4', int8: 'int8' };

const { values: options } = parseArgs({
  options: {
    only: { type: 'string', default: 'llava-7b' },
    tasks: { type: 'string', default: TASKS.join(',') },
    batches: { type: 'string' },
    tiny: { type: 'boolean', default: false },
    device: { type: 'string', default: 'cuda' },
    quick: { type: 'boolean', default: false },
    peer: { type: 'string', default: 'default' },
    answers: { type: 'string' },
    methods: { type: 'string' },
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
const forms = options.peer.split(',');
const strange = forms.find((form) => !PEERS.includes(form));
if (strange !== undefined) throw new Error(`--peer knows ${PEERS.join(', ')}, not ${strange}`);
/** What can be measured of a shape. */
const tasksOf = ({ tasks: own = TASKS, vision, methods, curve, config }) =>
  own.filter(
    (task) =>
      (!['vision', 'cached'].includes(task) || vision) &&
      (task !== 'methods' || methods) &&
      (task !== 'curve' || curve) &&
      (task !== 'data' || config.model_type === 'llava'),
  );
const folderBytes = (folder) => readdirSync(folder).reduce((sum, name) => sum + statSync(join(folder, name)).size, 0);
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
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const ms = (seconds) => `${(seconds * 1000).toFixed(0)} ms`;

/** What the weights of a task are loaded as. */
const weightsOf = ({ quantization, load }) => quantization ?? load ?? 'none';

const titleOf = (task) =>
  [
    task.kind,
    task.mode,
    !task.method && weightsOf(task) !== 'none' && weightsOf(task),
    task.method,
    task.optim,
    task.r && `r ${task.r}`,
    task.attention,
    task.batch && `${task.batch} ${task.kind === 'decode' ? 'answers' : 'rows'}`,
    task.recompute && task.recompute !== 'none' && 'recompute',
  ]
    .filter(Boolean)
    .join(' ');

/** A result in a few words. */
const WORDS = {
  decode: (r) => `${median(r.tokensPerSecond).toFixed(1)} tok/s, first token ${ms(median(r.firstTokenSeconds))}`,
  vision: (r) => `${r.pictures} pictures in ${ms(median(r.visionSeconds))}`,
  gradients: (r) => `loss ${r.loss}, ${r.tensors} tensors`,
  data: (r) =>
    `${r.dataTokensPerSecond.toFixed(0)} tok/s of rows of ${r.rowTokens.toFixed(0)} tokens, ${(r.dataWait * 100).toFixed(1)} % of it waiting`,
  curve: (r) => `loss ${r.losses[0].toFixed(4)} → ${r.end.toFixed(4)}`,
  bandwidth: (r) => `${(median(r.copyBytesPerSecond) / 1e12).toFixed(2)} TB/s`,
  merge: (r) => `${r.mergeSeconds.toFixed(1)} s ${r.parts ? JSON.stringify(r.parts) : `(${r.mergedTensors} tensors)`}`,
  cached: (r) => WORDS.train(r),
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
  const part = [
    ...(isPart ? tasks : []),
    ...(options.methods?.split(',') ?? []),
    ...(options.batches ? [`${options.batches.replaceAll(',', '-')}-rows`] : []),
    ...(options.answers ? [`${options.answers.replaceAll(',', '-')}-answers`] : []),
    ...(options.peer === 'default' ? [] : forms),
  ];
  const file = `${date}-${slug}-${[shapeName, ...part].join('-')}.json`;
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
    time: new Date().toISOString(),
    ...machine,
    commit: commit(),
    command: `npm run bench -- ${process.argv.slice(2).join(' ')}`.trim(),
    row: shape.row,
    prompt: shape.prompt,
    vision: shape.vision,
    modelBytes: 0,
    gate: null,
    fp8Gate: null,
    curve: null,
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
      leaveOut(side.lost ? `${title} and what comes after it` : title, result.error.split('\n')[0]);
      return undefined;
    }
    if (result.seconds?.length) {
      const [middle, p10, p90] = [0.5, 0.1, 0.9].map((q) => quantile(result.seconds, q));
      const tokens = result.batch * shape.row.tokens;
      Object.assign(result, { tokens, median: middle, p10, p90, tokensPerSecond: tokens / middle });
    }
    if (result.kind === 'curve') result.end = mean(result.losses.slice(-CURVE_END));
    say(`${title}: ${wordsOf(result)}`);
    return result;
  }

  const gradients = (side) => join(dir, `gradients-${side}.safetensors`);
  const gateTask = (side) => ({ kind: 'gradients', batch: GATE_BATCH, losses: GATE_LOSSES, file: gradients(side) });
  /** Distance of a side's loss and gradients from the reference's. */
  const distance = (side, loss, reference) => ({
    loss,
    lossDifference: Math.abs(loss - reference),
    ...compareGradients(gradients(side), gradients('reference')),
  });

  async function checkpoint(peer) {
    const made = await perform(peer, { kind: 'checkpoint', shape: shapeName }, about(existsSync(dir) ? 5 : 45));
    if (made) results.modelBytes = folderBytes(join(dir, 'model'));
    return made;
  }

  /**
   * Loss and gradients of the peer in float32 and in bfloat16. They follow from checkpoint and versions alone: what is there from the last run on this
   * checkpoint is taken.
   */
  async function peerGradients(peer) {
    const path = join(dir, 'gate.json');
    const of = JSON.stringify({
      losses: GATE_LOSSES,
      gpu: machine.gpu,
      ...machine.versions,
      martlet: undefined,
      node: undefined,
    });
    if (existsSync(path)) {
      const kept = JSON.parse(readFileSync(path, 'utf8'));
      if (kept.of === of) {
        say('gate: gradients of the peer are there');
        return kept;
      }
    }
    const losses = {};
    for (const [mode, name] of [
      ['reference', 'reference'],
      ['default', 'peer'],
    ]) {
      const loaded = await perform(peer, { kind: 'load', mode }, about(25));
      losses[name] = loaded && (await perform(peer, gateTask(name), about(10)))?.loss;
      await perform(peer, { kind: 'unload' }, 0);
    }
    if (losses.reference === undefined || losses.peer === undefined) return undefined;
    writeFileSync(path, JSON.stringify({ of, ...losses }));
    return losses;
  }

  async function gate(peer, martlet) {
    const other = await peerGradients(peer);
    const own =
      (await martlet.turn({ kind: 'load', quantization: 'none' })) &&
      (await perform(martlet.process, gateTask('martlet'), about(10)));
    if (!other || !own) return;
    const ours = distance('martlet', own.loss, other.reference);
    const beside = distance('peer', other.peer, other.reference);
    const within = {
      loss: ours.lossDifference < LIMITS.lossDifference,
      cosine: ours.cosine > LIMITS.cosine,
    };
    const besidePeer = {
      loss: ours.lossDifference <= beside.lossDifference,
      cosine: ours.cosine >= beside.cosine - LIMITS.peerCosine,
    };
    results.gate = {
      rule: RULE,
      limits: LIMITS,
      lossBatches: GATE_LOSSES,
      referenceLoss: other.reference,
      ...ours,
      peer: beside,
      passed: (within.loss || besidePeer.loss) && (within.cosine || besidePeer.cosine),
    };
    const { lossDifference, cosine, worstTensor } = results.gate;
    say(
      `gate ${results.gate.passed ? 'passed' : 'FAILED'}: loss off by ${lossDifference.toExponential(1)}, cosine of the gradients ${cosine.toFixed(6)}, lowest ${worstTensor.cosine.toFixed(6)} (${worstTensor.name}); the peer in bfloat16: ${beside.lossDifference.toExponential(1)}, ${beside.cosine.toFixed(6)}`,
    );
    save();
  }

  /** Whether loss and gradients in fp8 are near martlet's in bfloat16: what timings in fp8 need. Found out once. */
  async function fp8Gate() {
    if (results.fp8Gate) return results.fp8Gate.passed || options.force;
    const found = {};
    for (const [quantization, name] of [
      ['none', 'martlet'],
      ['fp8', 'fp8'],
    ]) {
      if (!(await martlet.turn({ kind: 'load', quantization }))) return false;
      found[name] = (await perform(martlet.process, gateTask(name), about(10)))?.loss;
      if (found[name] === undefined) return false;
    }
    const near = compareGradients(gradients('fp8'), gradients('martlet'));
    const lossShare = Math.abs(found.fp8 / found.martlet - 1);
    const passed = lossShare < FP8_LIMITS.lossShare && near.cosine > FP8_LIMITS.cosine;
    results.fp8Gate = {
      rule: `against martlet in bfloat16: loss off by less than ${FP8_LIMITS.lossShare * 100} %, cosine of the LoRA gradients above ${FP8_LIMITS.cosine}`,
      limits: FP8_LIMITS,
      loss: found.fp8,
      bfloat16Loss: found.martlet,
      lossShare,
      ...near,
      passed,
    };
    say(
      `gate of fp8 ${passed ? 'passed' : 'FAILED'}: loss off by ${(lossShare * 100).toFixed(3)} %, cosine of the gradients ${near.cosine.toFixed(6)}, lowest ${near.worstTensor.cosine.toFixed(6)} (${near.worstTensor.name})`,
    );
    failed ||= !passed;
    save();
    return passed || options.force;
  }

  /** Whether what is asked of fp8 can be measured; if not, that is noted. */
  async function fp8Ready(stage) {
    if (options.device !== 'cuda') {
      leaveOut(stage, 'fp8 needs a GPU');
      return false;
    }
    if (await fp8Gate()) return true;
    leaveOut(stage, `the gate of fp8 ${results.fp8Gate ? 'failed' : 'was not reached'}`);
    return false;
  }

  /** Seconds of a step by row as last measured, by side: what the next one will take. */
  const rowSeconds = {};
  /** About what a task takes on a side, its model's loading apart. */
  function needed(label, task) {
    const [own, tuned] = [label === 'martlet', label === 'peer-tuned'];
    const seconds = {
      // The compiler takes most of the tuned peer's time.
      decode: own ? 5 : tuned ? 60 : 18,
      vision: 15,
      merge: 35,
      copy: 15,
      data: 25,
      curve: () => 5 + task.steps * task.batch * (rowSeconds[label] ?? 0.1),
      cached: () => 5 + (task.warmup + task.steps) * task.batch * (rowSeconds[label] ?? 0.1),
      train: () => {
        const slower = task.recompute && task.recompute !== 'none' ? 1.5 : 1;
        const row = (rowSeconds[label] ?? (own || tuned ? 0.1 : 0.25)) * slower;
        return 3 + 1.2 * (task.warmup + task.steps) * task.batch * row + (tuned ? 25 : 0);
      },
    }[task.kind];
    return about(typeof seconds === 'function' ? seconds() : seconds);
  }

  function record(label, round, result) {
    if (result.median && result.batch > 1) rowSeconds[label] = result.median / result.batch;
    results.runs.push({ side: label, round, ...result });
    save();
  }

  /** martlet, or the peer in a form: takes turns on the device. */
  class Player {
    /** The task that loaded what is on the device, as JSON; absent while nothing is. */
    #loaded;
    /** Whether that is as it was loaded. */
    #fresh = false;

    constructor(label) {
      this.label = label;
    }

    get process() {
      this.current ??= open(this.label);
      return this.current;
    }

    /** Gives the device up. martlet's process ends: no peak is of what was loaded before. */
    async rest() {
      if (this.#loaded === undefined) return;
      this.#loaded = undefined;
      if (this.label === 'martlet') {
        await this.current.end();
        this.current = undefined;
      } else {
        await perform(this.current, { kind: 'unload' }, 0);
      }
    }

    /** Has the model that `load` says on the device, the others' being off it. */
    async turn(load, fresh = true) {
      for (const other of players) if (other !== this) await other.rest();
      if (this.#loaded === JSON.stringify(load) && (this.#fresh || !fresh) && !this.current.lost) return true;
      await this.rest();
      const result = await perform(this.process, load, about(12));
      if (!result) return false;
      this.#loaded = JSON.stringify(load);
      this.#fresh = true;
      record(this.label, 1, result);
      return true;
    }

    /** One figure. */
    async play(task, round) {
      const { load: quantization, ...asked } = task;
      const martlet = this.label === 'martlet';
      if (martlet && (task.kind === 'merge' || task.kind === 'data')) {
        // From files to files: no model on the device before.
        for (const player of players) await player.rest();
      } else {
        const load = martlet
          ? { kind: 'load', quantization, ...(task.kind === 'cached' && { visionCache: true }) }
          : { kind: 'load', mode: this.label.slice('peer-'.length) };
        if (!(await this.turn(load, task.kind !== 'train' || task.method === 'full'))) return undefined;
      }
      // The peer's adapter stays on its model; both are at another place after full training or merging.
      if (martlet ? task.method === 'full' : task.kind === 'train' || task.kind === 'merge') this.#fresh = false;
      // Beside fp8 the peer trains its LoRA in bfloat16.
      if (!martlet && asked.method === 'fp8') asked.method = 'lora';
      const result = await perform(
        this.process,
        martlet ? (task.kind === 'decode' ? { ...asked, quantization } : asked) : asked,
        0,
      );
      if (result) record(this.label, round, result);
      if (task.kind === 'merge' || task.method === 'full') await this.rest();
      return result;
    }

    async end() {
      await this.current?.end();
    }
  }

  const open = (label) =>
    label === 'martlet'
      ? new Side(label, process.execPath, [here('martlet.mjs'), dir, options.device])
      : new Side(label, python, [here('peer.py'), dir, options.device]);
  const martlet = new Player('martlet');
  const peers = alone ? [] : forms.map((form) => new Player(`peer-${form}`));
  const players = [martlet, ...peers];

  let turns = 0;
  /**
   * One task on all sides, begun if there is time for all: in turn, and back again where it is measured twice. Who begins changes, so that the model
   * that is loaded stays.
   */
  async function inTurns(task, sides, twice = false) {
    const order = turns++ % 2 ? [...sides].reverse() : sides;
    const all = twice && !options.quick ? [...order, ...[...order].reverse()] : order;
    const seconds = all.reduce((sum, { label }) => sum + needed(label, task) + about(6), 0);
    if (remaining() < seconds) {
      leaveOut(titleOf(task), `${remaining().toFixed(0)} s left, about ${seconds.toFixed(0)} s needed for all sides`);
      return;
    }
    for (const [i, side] of all.entries()) await side.play(task, i < order.length ? 1 : 2);
  }

  const repeats = (large, tiny) => (options.tiny ? tiny : large);
  const steps = options.quick ? Math.min(10, shape.steps) : shape.steps;
  const numbers = (option, own) => option?.split(',').map(Number) ?? own;
  const decode = (batch, load = 'none') => ({
    kind: 'decode',
    load,
    batch,
    promptTokens: shape.prompt.tokens,
    newTokens: shape.prompt.newTokens,
    warmup: repeats(2, 1),
    // Many answers are many tokens.
    repeats: batch > 1 ? 1 : repeats(3, 2),
  });
  const train = (task) => ({ kind: 'train', load: 'none', warmup: shape.warmup, steps, ...task });
  const training = async (recompute) => {
    for (const batch of numbers(options.batches, shape.batches))
      await inTurns(train({ batch, recompute }), players, true);
  };
  const target = join(folder, 'martlet-bench-merged');

  const STAGES = {
    async decode() {
      for (const batch of numbers(options.answers, shape.prompt.answers)) await inTurns(decode(batch), players, true);
    },
    train: () => training(false),
    recompute: () => training(true),
    async vision() {
      const task = { kind: 'vision', load: 'none', warmup: repeats(3, 1), repeats: repeats(10, 2) };
      // Compiling is of the decoder's layers: the tower is the same in each form.
      await inTurns({ ...task, attention: 'sdpa' }, [martlet, ...peers.slice(0, 1)]);
      await inTurns({ ...task, attention: 'eager' }, peers.slice(0, 1));
    },
    async merge() {
      if (remaining() > needed('copy', { kind: 'copy' })) {
        // What disk and page cache allow, in the same folder.
        const before = performance.now();
        execFileSync('cp', ['-r', join(dir, 'model'), target]);
        const mergeSeconds = (performance.now() - before) / 1000;
        const bytes = folderBytes(target);
        rmSync(target, { recursive: true });
        say(`cp -r: ${mergeSeconds.toFixed(1)} s`);
        record('copy', 1, { kind: 'merge', mergeSeconds, bytes });
      } else {
        leaveOut('cp -r', NO_TIME);
      }
      // Merging is the same in each form.
      await inTurns({ kind: 'merge', out: target }, [martlet, ...peers.slice(0, 1)]);
    },
    async quantized() {
      for (const load of ['int8', 'nf4']) await inTurns(decode(1, load), [martlet]);
    },
    async data() {
      const batch = Math.max(...numbers(options.batches, shape.batches));
      const out = join(folder, 'martlet-bench-data');
      await inTurns({ kind: 'data', batch, warmup: shape.warmup, steps, out }, [martlet]);
    },
    async methods() {
      const batches = numbers(options.batches, undefined);
      const named = options.methods?.split(',');
      for (const { peer, ...task } of shape.methods) {
        if ((batches && !batches.includes(task.batch)) || (named && !named.includes(task.method))) continue;
        const load = QUANTIZATION[task.method];
        if (task.method === 'fp8' && !(await fp8Ready(titleOf({ kind: 'train', ...task })))) continue;
        // Of full training only the default form is the least that the peer can take; adapters of a rank of their own have no stored one.
        await inTurns(
          train({ ...task, load }),
          peer ? [martlet, ...peers.slice(0, task.method === 'full' ? 1 : 2)] : [martlet],
        );
      }
    },
    /** Every row has been read once before steps are timed. */
    async cached() {
      const batch = Math.max(...numbers(options.batches, shape.batches));
      const warmup = Math.ceil(ROWS / batch) + shape.warmup;
      await inTurns({ kind: 'cached', load: 'none', batch, recompute: false, warmup, steps }, [martlet]);
    },
    async curve() {
      const task = { kind: 'curve', recompute: 'none', ...shape.curve };
      const ends = {};
      for (const [method, name] of [
        ['lora', 'bfloat16'],
        ['fp8', 'fp8'],
      ]) {
        const asked = { ...task, method, load: QUANTIZATION[method] };
        if (method === 'fp8' && !(await fp8Ready(titleOf(asked)))) return;
        const seconds = needed('martlet', asked) + about(12);
        if (remaining() < seconds) {
          leaveOut(titleOf(asked), `${remaining().toFixed(0)} s left, about ${seconds.toFixed(0)} s needed`);
          return;
        }
        const result = await martlet.play(asked, 1);
        if (!result?.losses) return;
        ends[name] = result.end;
        ends.begin ??= mean(result.losses.slice(0, CURVE_END));
      }
      const share = Math.abs(ends.fp8 / ends.bfloat16 - 1);
      const passed = share < CURVE_LIMIT && ends.bfloat16 < (1 - CURVE_FALL) * ends.begin;
      results.curve = { ...shape.curve, of: CURVE_END, limit: CURVE_LIMIT, fall: CURVE_FALL, ...ends, share, passed };
      failed ||= !passed;
      say(
        `curve ${passed ? 'passed' : 'FAILED'}: ${ends.begin.toFixed(4)} → ${ends.bfloat16.toFixed(4)} in bfloat16, ${ends.fp8.toFixed(4)} in fp8 (${(share * 100).toFixed(2)} % off)`,
      );
      save();
    },
  };

  say(`${shape.title}: ${budget.toFixed(0)} s; results in ${relative(root, join(outDir, file))}`);
  // The checkpoint's maker and the gate's reference.
  const maker = open('peer');
  // Importing takes seconds: the others begin with it now.
  for (const player of players) player.process;
  try {
    const made = await checkpoint(maker);
    if (made && !alone) {
      await gate(maker, martlet);
      if (!results.gate?.passed) {
        failed = true;
        if (!options.force) {
          leaveOut('every timing', `the gate ${results.gate ? 'failed' : 'was not reached'}`);
          return false;
        }
      }
    }
    if (!made) return false;
    const bytes = options.device === 'cuda' ? 2 ** 32 : 2 ** 27;
    const copied = await perform(maker, { kind: 'bandwidth', bytes, warmup: 3, repeats: 10 }, about(3));
    if (copied) record('device', 1, copied);
    await maker.end();
    for (const task of tasks) if (tasksOf(shape).includes(task)) await STAGES[task]();
  } finally {
    await Promise.all([maker, ...players].map((side) => side.end()));
    rmSync(target, { recursive: true, force: true });
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
