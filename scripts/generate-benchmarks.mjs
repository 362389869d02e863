/**
 * `node scripts/generate-benchmarks.mjs [--check]`: writes docs/benchmarks.md from bench/results/*.json. With --check it only says whether the
 * page is what the results give (exit code 1 if not). Plain Node, no dependency.
 */
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const resultsDir = join(root, 'bench/results');
const page = join(root, 'docs/benchmarks.md');

const SIDES = {
  martlet: 'martlet',
  'peer-default': 'transformers + PEFT, default',
  'peer-tuned': 'transformers + PEFT, tuned',
};
const BAR = 40;

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = (sorted.length - 1) / 2;
  return (sorted[Math.floor(middle)] + sorted[Math.ceil(middle)]) / 2;
}
const integer = (value) => Math.round(value).toLocaleString('en-US');
const gib = (bytes) => (bytes / 2 ** 30).toFixed(1);
const table = (header, rows) =>
  [header, header.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |`).join('\n');

/** Runs of one side and kind, keyed by setting. */
const runsOf = (result, side, kind) =>
  result.runs.filter((run) => run.side === side && run.kind === kind && !run.method);
const sidesOf = (result) => Object.keys(SIDES).filter((side) => result.runs.some((run) => run.side === side));

function trainingTable(result) {
  const settings = [];
  for (const { kind, batch, recompute, method } of result.runs) {
    if (kind === 'train' && !method && !settings.some((s) => s.batch === batch && s.recompute === recompute))
      settings.push({ batch, recompute });
  }
  const sides = sidesOf(result);
  const at = (side, { batch, recompute }) =>
    runsOf(result, side, 'train').filter((run) => run.batch === batch && run.recompute === recompute);
  /** Of the rounds that ended: tokens/s by the median of their step medians, the widest p10–p90, the highest peak. */
  const cell = (side, setting) => {
    const runs = at(side, setting);
    const done = runs.filter((run) => run.tokensPerSecond);
    if (done.length === 0) return runs.length ? { text: runs[0].error } : { text: '—' };
    const rate = median(done.map((run) => run.tokensPerSecond));
    const peak = Math.max(...done.map((run) => run.peakAllocated));
    const low = Math.min(...done.map((run) => run.tokens / run.p90));
    const high = Math.max(...done.map((run) => run.tokens / run.p10));
    return { rate, peak, text: `${integer(rate)} (${integer(low)}–${integer(high)}), ${gib(peak)} GiB` };
  };
  const others = sides.filter((side) => side !== 'martlet');
  const ratio = (a, b) => (a.rate && b.rate ? `${(a.rate / b.rate).toFixed(2)}×` : '—');
  const rows = settings.map((setting) => {
    const own = cell('martlet', setting);
    const cells = others.map((side) => cell(side, setting));
    return [
      `${setting.batch} rows${setting.recompute ? ', recompute' : ''}`,
      own.text,
      ...cells.flatMap((other) => [other.text, ratio(own, other)]),
    ];
  });
  const header = ['setting', SIDES.martlet, ...others.flatMap((side) => [SIDES[side], 'martlet is'])];
  const bars = settings.flatMap((setting) =>
    sides.map((side) => ({
      label: `${setting.batch} rows${setting.recompute ? ', recompute' : ''}`,
      side,
      rate: cell(side, setting).rate,
    })),
  );
  return `${table(header, rows)}\n\n${chart(bars)}`;
}

function chart(bars) {
  const shown = bars.filter(({ rate }) => rate);
  const highest = Math.max(...shown.map(({ rate }) => rate));
  const lines = shown.map(({ label, side, rate }) => {
    const bar = '█'.repeat(Math.max(1, Math.round((rate / highest) * BAR))).padEnd(BAR);
    return `${label.padEnd(18)} ${SIDES[side].padEnd(30)} ${bar} ${integer(rate)}`;
  });
  return ['```text', ...lines, '```'].join('\n');
}

function decodingTable(result) {
  const rows = sidesOf(result).flatMap((side) => {
    const runs = runsOf(result, side, 'decode').filter((run) => run.tokensPerSecond);
    const loads = runsOf(result, side, 'load')
      .filter(({ quantization = 'none' }) => quantization === 'none')
      .map((run) => run.seconds);
    const decode = runs.length
      ? [
          median(runs.flatMap((run) => run.tokensPerSecond)).toFixed(1),
          `${(median(runs.flatMap((run) => run.firstTokenSeconds)) * 1000).toFixed(0)} ms`,
          gib(Math.max(...runs.map((run) => run.peakAllocated))),
        ]
      : ['—', '—', '—'];
    return [[SIDES[side], ...decode, loads.length ? `${median(loads).toFixed(2)} s` : '—']];
  });
  return table(['', 'tokens/s, one answer', 'first token', 'peak GiB', 'load'], rows);
}

/** Median times of the pictures at once, by side and kind of attention in the tower. */
function visionTable(result) {
  const cells = result.runs
    .filter(({ kind }) => kind === 'vision')
    .map(({ side, attention, visionSeconds }) => ({
      name: `${SIDES[side]}${attention ? ` (${attention})` : ''}`,
      seconds: median(visionSeconds),
    }));
  const own = cells.find(({ name }) => name === SIDES.martlet)?.seconds;
  const rows = cells.map(({ name, seconds }) => [
    name,
    `${(seconds * 1000).toFixed(1)} ms`,
    own && name !== SIDES.martlet ? `${(seconds / own).toFixed(2)}×` : '',
  ]);
  return table(['', 'median', 'martlet is faster by'], rows);
}

function mergeTable(result) {
  const rows = result.runs
    .filter(({ kind }) => kind === 'merge')
    .map(({ side, mergeSeconds, parts, bytes }) => [
      SIDES[side],
      `${mergeSeconds.toFixed(1)} s`,
      parts
        ? Object.entries(parts)
            .map(([part, seconds]) => `${part} ${seconds.toFixed(1)} s`)
            .join(', ')
        : '',
      `${(bytes / 1e9).toFixed(1)} GB`,
    ]);
  return table(['', 'from files to files', 'of that', 'written'], rows);
}

const METHODS = {
  lora: 'LoRA',
  nf4: 'QLoRA, NF4 with double quantisation',
  int8: 'QLoRA, int8',
  full: 'full, language model',
};
const RECOMPUTE = { none: 'nothing', cheap: 'norms and products', mlp: 'the MLP', layer: 'everything' };

/** Runs by method: tokens/s and peaks, and the peak that `martlet plan` foretells. */
function methodsTable(result) {
  const rows = result.runs
    .filter(({ kind, method }) => kind === 'train' && method)
    .map((run) => {
      const setting = [
        [METHODS[run.method], run.r && `r ${run.r}`, run.optim].filter(Boolean).join(', '),
        `${run.batch} × ${result.row.tokens}`,
        RECOMPUTE[run.recompute],
      ];
      const { side, tokensPerSecond, peakAllocated, peakReserved, plannedPeak } = run;
      if (!tokensPerSecond) return [SIDES[side], ...setting, run.error, '—', '—', '—'];
      // On the CPU the peak is the whole process's, which no plan is of.
      const off = result.gpu && plannedPeak && peakAllocated ? plannedPeak / peakAllocated - 1 : undefined;
      const planned =
        off === undefined ? '—' : `${gib(plannedPeak)} (${off < 0 ? '−' : '+'}${Math.abs(off * 100).toFixed(0)} %)`;
      return [SIDES[side], ...setting, integer(tokensPerSecond), gib(peakAllocated), gib(peakReserved), planned];
    });
  return table(
    ['', 'method', 'rows × tokens', 'recomputed', 'tokens/s', 'peak GiB in tensors', 'reserved', 'planned'],
    rows,
  );
}

/** Inside a limit; or, where bfloat16 itself is not, no further from float32 than the peer in bfloat16 is. */
function gateOf(gate) {
  const { limits, peer } = gate;
  const loss = gate.lossDifference < limits.lossDifference;
  const cosine = gate.cosine > limits.cosine;
  const lossBeside = peer !== undefined && gate.lossDifference <= peer.lossDifference;
  const cosineBeside = peer !== undefined && gate.cosine >= peer.cosine - (limits.peerCosine ?? 2e-4);
  return { within: loss && cosine, trusted: (loss || lossBeside) && (cosine || cosineBeside) };
}

/** A result without a peer claims speed and memory only, and says so. */
const isTrusted = ({ peer, gate }) => peer === 'none' || (Boolean(gate) && gateOf(gate).trusted);

function gateText({ peer, gate }) {
  if (peer === 'none') {
    return '**No gate and no peer**: transformers does not have this model, and its original code was not on this machine. The figures are of speed and memory alone; that the arithmetic is right is tested on tiny checkpoints against the original code.';
  }
  const { limits } = gate;
  const text = `loss and LoRA gradients of one batch against transformers + PEFT in float32. Loss off by ${gate.lossDifference.toExponential(1)} (limit ${limits.lossDifference}), cosine of all ${gate.tensors} gradients ${gate.cosine.toFixed(6)} (limit ${limits.cosine}).`;
  const beside = gate.peer
    ? ` transformers + PEFT in bfloat16 against the same: ${gate.peer.lossDifference.toExponential(1)} and ${gate.peer.cosine.toFixed(6)}.`
    : '';
  const why = gateOf(gate).within
    ? ''
    : ` On random weights of this size bfloat16 itself does not keep inside the limits, so what passes is to be no further from float32 than the peer in bfloat16 is (cosine: by ${limits.peerCosine ?? 2e-4} at most).`;
  return `**Gate**, passed: ${text}${beside}${why}`;
}

function section(result) {
  const { versions, row, prompt, vision, lora } = result;
  const part = result.part ? ` (${result.tasks.join(', ')})` : '';
  const has = (kind) => result.runs.some((run) => run.kind === kind && !run.method);
  const machine = [
    result.gpu ? `${result.gpu} (driver ${result.driver})` : `CPU, ${result.cores} cores`,
    `torch ${versions.torch}`,
    ...(versions.cudnn ? [`cuDNN ${versions.cudnn}`] : []),
    `transformers ${versions.transformers}`,
    `PEFT ${versions.peft}`,
    `Node ${versions.node}`,
    `martlet ${versions.martlet} at commit ${result.commit?.slice(0, 12) ?? 'unknown'}`,
  ];
  const left = result.leftOut.map(({ stage, why }) => `- Not measured: ${stage} (${why}).`);
  const decoder = row.decoderTokens
    ? ` ${row.tokens - row.decoderTokens} of them are the encoder’s, the others the decoder’s.`
    : '';
  const views = row.views ? ` in ${row.views} views` : '';
  const targets = lora
    ? `r ${lora.r} on ${Array.isArray(lora.targets) ? lora.targets.join(', ') : `\`${lora.targets}\``}`
    : 'r 8 on the seven linears of every language layer';
  const rows = `Rows of ${row.tokens} tokens, ${row.imageTokens} of them a picture’s (${row.picture}×${row.picture}${views}), ${row.labelled} labelled.${decoder} LoRA: ${targets}. The vision tower is in the loop and frozen; AdamW; bfloat16.${result.note ? ` ${result.note}` : ''}`;
  const methodic = [
    `### Methods: tokens/s and device memory`,
    `${rows} “Planned” is what \`martlet plan\` foretells for the run, and how far that is from the peak in tensors. martlet trains float32 copies of what is trained with float32 moments. The peer’s full run keeps weights and moments in bfloat16, which is the least that it can take. QLoRA has no peer here: bitsandbytes is not on the machine.`,
  ];
  const training = [`### LoRA training: tokens/s (p10–p90 over steps), peak device memory in tensors`, rows];
  const answering = [
    `### Answering and loading`,
    `One picture, ${prompt?.tokens} prompt tokens, ${prompt?.newTokens} new tokens, greedy; files in the page cache.`,
  ];
  const tower = [
    `### The vision tower`,
    `${vision?.pictures} pictures of ${vision?.size}×${vision?.size} at once through tower and merger. martlet: the engine’s clock while it answers a prompt with all of them, from patches in the host’s memory (float32) to features in the prompt: copying them to the device and the order of the windows are in it. The peer: from patches on the device (bfloat16) to features there.`,
  ];
  const merging = [
    `### Merging the adapter`,
    `From the files of base and adapter to a merged folder, on one file system. The peer: loading to the device, PEFT’s merge, save_pretrained. martlet adds in float32 on the CPU and checks each element against float64.`,
  ];
  return [
    `## ${result.title}${part}, ${result.gpu ?? 'CPU'}, ${result.date}`,
    `${machine.join(', ')}. Again with:`,
    `\`\`\`sh\n${result.command}\n\`\`\``,
    gateText(result),
    ...(has('train') ? [...training, trainingTable(result)] : []),
    ...(result.runs.some(({ method }) => method) ? [...methodic, methodsTable(result)] : []),
    ...(has('decode') ? [...answering, decodingTable(result)] : []),
    ...(has('vision') ? [...tower, visionTable(result)] : []),
    ...(has('merge') ? [...merging, mergeTable(result)] : []),
    ...(left.length ? [left.join('\n')] : []),
  ].join('\n\n');
}

function render() {
  const names = existsSync(resultsDir) ? readdirSync(resultsDir).filter((name) => name.endsWith('.json')) : [];
  const results = names
    .sort()
    .reverse()
    .map((name) => ({ name, ...JSON.parse(readFileSync(join(resultsDir, name), 'utf8')) }));
  for (const result of results) {
    if (!isTrusted(result))
      throw new Error(`bench/results/${result.name}: the gate did not pass, so its timings say nothing. Remove it.`);
  }
  return `${[
    '# Benchmarks',
    '<!-- Written by scripts/generate-benchmarks.mjs from bench/results. Do not edit by hand. -->',
    'martlet beside transformers + PEFT on the same machine, in the same run, on the same weights (the exact public shape, random bfloat16 weights) and the same rows. "Default" is how people run the peer: float32 adapters, SDPA, eager, fused AdamW. "Tuned" is bfloat16 adapters, compiled layers, no cache object in training, a static cache with compiled decoding. Neither gets an attention mask, which is its fastest case. martlet’s step includes the normalising of the pictures, the peer’s does not. Both sides start from the same adapter and take the medians of the same steps; every raw number is in bench/results in [bench](../bench).',
    'Run it on a GPU machine whose Python has torch, transformers and PEFT: `npm run bench` (options: [bench/run.mjs](../bench/run.mjs)). The scripts can be tried without a GPU: `npm run bench -- --tiny --device cpu`.',
    ...(results.length ? results.map(section) : ['No results yet.']),
  ].join('\n\n')}\n`;
}

const wanted = render();
if (!process.argv.includes('--check')) {
  writeFileSync(page, wanted);
} else if (!existsSync(page) || readFileSync(page, 'utf8') !== wanted) {
  console.error('docs/benchmarks.md is not what bench/results give: run node scripts/generate-benchmarks.mjs');
  process.exitCode = 1;
}
