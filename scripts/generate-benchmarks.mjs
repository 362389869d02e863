/**
 * `node scripts/generate-benchmarks.mjs [--check]`: writes docs/benchmarks.md and its charts from bench/results/*.json and bench/bounds.json. With
 * --check it only says whether they are what the results give (exit code 1 if not). Plain Node, no dependency. BENCH_RESULTS and BENCH_PAGE: of
 * another folder, to another page, for a trial.
 */
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { barChart } from './benchmarks/chart.mjs';
import {
  bandwidthShare,
  copyRate,
  decoding,
  loading,
  MEASURES,
  runsOf,
  SIDES,
  seconds,
  tokenBytes,
  training,
} from './benchmarks/figures.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
const resultsDir = process.env.BENCH_RESULTS ?? join(root, 'bench/results');
const page = process.env.BENCH_PAGE ?? join(root, 'docs/benchmarks.md');
/** Beside the page. */
const CHARTS = 'benchmarks';

const WEIGHTS = { none: 'bfloat16', fp8: 'fp8', int8: 'int8', nf4: 'NF4' };
const integer = (value) => Math.round(value).toLocaleString('en-US');
const gib = (bytes) => (bytes / 2 ** 30).toFixed(1);
const gb = (bytes) => (bytes / 1e9).toFixed(1);
const times = (a, b) => (a && b ? `${(a / b).toFixed(2)}×` : '—');
const percent = (share) => (share === undefined ? '—' : `${(share * 100).toFixed(0)} %`);
const table = (header, rows) =>
  [header, header.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |`).join('\n');

const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
const sidesOf = (result) => Object.keys(SIDES).filter((side) => result.runs.some((run) => run.side === side));

/** Charts that the page shows: file name → SVG. */
const charts = new Map();
function chart(result, kind, title, bars) {
  const name = `${result.name.replace(/\.json$/, '')}-${kind}.svg`;
  charts.set(name, barChart(title, bars));
  return `![${title}](${CHARTS}/${name})`;
}

/** The settings that runs of a kind have, each once, in the order of the runs. */
function settingsOf(result, kind, pick) {
  const settings = new Map();
  for (const run of runsOf(result, { kind })) {
    const setting = pick(run);
    settings.set(JSON.stringify(setting), setting);
  }
  return [...settings.values()];
}

function trainingTable(result) {
  const settings = settingsOf(result, 'train', ({ batch, recompute }) => ({ batch, recompute }));
  const sides = sidesOf(result);
  const others = sides.filter((side) => side !== 'martlet');
  const text = ({ rate, low, high, peak, error }) =>
    rate ? `${integer(rate)} (${integer(low)}–${integer(high)}), ${gib(peak)} GiB` : (error ?? '—');
  const nameOf = ({ batch, recompute }) => `${batch} rows${recompute ? ', recompute' : ''}`;
  const rows = settings.map((setting) => {
    const own = training(result, { side: 'martlet', ...setting });
    const beside = others.map((side) => training(result, { side, ...setting }));
    return [nameOf(setting), text(own), ...beside.flatMap((other) => [text(other), times(own.rate, other.rate)])];
  });
  const header = ['setting', SIDES.martlet, ...others.flatMap((side) => [SIDES[side], 'martlet is'])];
  const bars = settings.flatMap((setting) =>
    sides.map((side) => {
      const { rate, error } = training(result, { side, ...setting });
      const words = rate ? integer(rate) : (error ?? 'not measured');
      return { group: nameOf(setting), side, name: SIDES[side], value: rate, text: words };
    }),
  );
  return `${table(header, rows)}\n\n${chart(result, 'train', `${result.title}, LoRA training, tokens/s`, bars)}`;
}

function decodingTable(result) {
  const settings = settingsOf(result, 'decode', ({ batch, quantization }) => ({ batch, quantization }));
  const sides = sidesOf(result);
  const nameOf = ({ batch, quantization }) =>
    `${batch === 1 ? 'one answer' : `${batch} answers`}${quantization === 'none' ? '' : `, ${WEIGHTS[quantization]}`}`;
  const rows = settings.flatMap((setting) => {
    const own = decoding(result, { side: 'martlet', ...setting });
    return sides.flatMap((side) => {
      const { rate, firstToken, peak } = decoding(result, { side, ...setting });
      if (!rate) return [];
      const isOwn = side === 'martlet';
      const bytes = isOwn && setting.batch === 1 ? tokenBytes(result, setting.quantization) : undefined;
      const share = bytes ? bandwidthShare(result, setting.quantization) : undefined;
      return [
        [
          nameOf(setting),
          SIDES[side],
          rate.toFixed(1),
          isOwn ? '' : times(own.rate, rate),
          `${(firstToken * 1000).toFixed(0)} ms`,
          isOwn ? '' : times(firstToken, own.firstToken),
          gib(peak),
          bytes ? gb(bytes) : '',
          share ? percent(share) : '',
        ],
      ];
    });
  });
  const bars = settings.flatMap((setting) =>
    sides.flatMap((side) => {
      const { rate } = decoding(result, { side, ...setting });
      return rate ? [{ group: nameOf(setting), side, name: SIDES[side], value: rate, text: rate.toFixed(0) }] : [];
    }),
  );
  const header = [
    '',
    '',
    'tokens/s',
    'martlet is',
    'first token',
    'martlet is',
    'peak GiB',
    'GB read a token',
    'of copy bandwidth',
  ];
  const copy = copyRate(result);
  const measured = copy
    ? `\n\nA copy on the device, measured in the same run: ${(copy / 1e12).toFixed(2)} TB/s, bytes read and written.`
    : '';
  return `${table(header, rows)}${measured}\n\n${chart(result, 'decode', `${result.title}, decoding, tokens/s`, bars)}`;
}

function loadingTable(result) {
  const own = loading(result, 'martlet').seconds;
  const rows = sidesOf(result).flatMap((side) =>
    Object.keys(WEIGHTS).flatMap((quantization) => {
      const { seconds, rate } = loading(result, side, quantization);
      if (!seconds) return [];
      const isOwn = side === 'martlet';
      return [
        [
          SIDES[side],
          WEIGHTS[quantization],
          `${seconds.toFixed(2)} s`,
          rate ? gb(rate) : '—',
          isOwn ? '' : times(seconds, own),
        ],
      ];
    }),
  );
  return table(['', 'into', 'median', 'GB of files/s', 'martlet is'], rows);
}

/** Median times of the pictures at once, by side and kind of attention in the tower. */
function visionTable(result) {
  const own = seconds(result, 'vision', 'martlet');
  const settings = settingsOf(result, 'vision', ({ side, attention }) => ({ side, attention }));
  const rows = settings.map(({ side, attention }) => {
    const time = seconds(result, 'vision', side, { attention });
    const name = `${SIDES[side]}${side !== 'martlet' && attention ? ` (${attention})` : ''}`;
    return [name, `${(time * 1000).toFixed(1)} ms`, side === 'martlet' ? '' : times(time, own)];
  });
  return table(['', 'median', 'martlet is faster by'], rows);
}

function mergeTable(result) {
  const own = seconds(result, 'merge', 'martlet');
  const names = { ...SIDES, copy: '`cp -r` of the base' };
  const runs = runsOf(result, { kind: 'merge' });
  const rows = runs.map(({ side, mergeSeconds, parts, bytes }) => [
    names[side],
    `${mergeSeconds.toFixed(1)} s`,
    side === 'martlet' ? '' : times(mergeSeconds, own),
    parts
      ? Object.entries(parts)
          .map(([part, time]) => `${part} ${time.toFixed(1)} s`)
          .join(', ')
      : '',
    `${gb(bytes)} GB`,
  ]);
  return table(['', 'from files to files', 'martlet is faster by', 'of that', 'written'], rows);
}

function dataText(result) {
  const run = result.runs.find(({ kind }) => kind === 'data');
  return `${run.batch} rows a step, through the public API from JPEG files of 1,024×768 and text, decoded, resized and tokenised beside the steps: ${integer(run.dataTokensPerSecond)} tokens/s of rows of ${integer(run.rowTokens)} tokens; the engine waited for rows in ${(run.dataWait * 100).toFixed(1)} % of the time.`;
}

const METHODS = {
  lora: 'LoRA',
  fp8: 'LoRA, fp8 base weights',
  nf4: 'QLoRA, NF4 with double quantisation',
  int8: 'QLoRA, int8',
  full: 'full, language model',
};
const RECOMPUTE = { none: 'nothing', cheap: 'norms and products', mlp: 'the MLP', layer: 'everything' };

/** Runs by method: tokens/s and peaks, and the peak that `martlet plan` foretells. */
function methodsTable(result) {
  const own = result.runs.filter(({ side, kind, method }) => side === 'martlet' && kind === 'train' && method);
  /** LoRA of the same rows in the same run. */
  const lora = ({ method, batch, recompute }) =>
    method === 'lora'
      ? undefined
      : own.find((run) => run.method === 'lora' && run.batch === batch && run.recompute === recompute)?.tokensPerSecond;
  const rows = result.runs
    .filter(({ kind, method }) => kind === 'train' && method)
    .map((run) => {
      const setting = [
        [METHODS[run.method], run.r && `r ${run.r}`, run.optim].filter(Boolean).join(', '),
        `${run.batch} × ${result.row.tokens}`,
        RECOMPUTE[run.recompute],
      ];
      const { side, tokensPerSecond, peakAllocated, peakReserved, plannedPeak } = run;
      if (!tokensPerSecond) return [SIDES[side], ...setting, run.error, '—', '—', '—', '—'];
      // On the CPU the peak is the whole process's, which no plan is of.
      const off = result.gpu && plannedPeak && peakAllocated ? plannedPeak / peakAllocated - 1 : undefined;
      const planned =
        off === undefined ? '—' : `${gib(plannedPeak)} (${off < 0 ? '−' : '+'}${Math.abs(off * 100).toFixed(0)} %)`;
      const speed = [integer(tokensPerSecond), side === 'martlet' ? times(tokensPerSecond, lora(run)) : '—'];
      return [SIDES[side], ...setting, ...speed, gib(peakAllocated), gib(peakReserved), planned];
    });
  return table(
    [
      '',
      'method',
      'rows × tokens',
      'recomputed',
      'tokens/s',
      'of own LoRA',
      'peak GiB in tensors',
      'reserved',
      'planned',
    ],
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

const usesFp8 = ({ runs }) => runs.some(({ method }) => method === 'fp8');
/** By its own numbers, as the other gate. */
const passesFp8 = (gate) => Boolean(gate) && gate.lossShare < gate.limits.lossShare && gate.cosine > gate.limits.cosine;
/** A result without a peer claims speed and memory only, and says so. Timings in fp8 have a gate of their own. */
const isTrusted = (result) =>
  (result.peer === 'none' || (Boolean(result.gate) && gateOf(result.gate).trusted)) &&
  (!usesFp8(result) || passesFp8(result.fp8Gate));

function gateText({ peer, gate }) {
  if (peer === 'none') {
    return '**No gate and no peer**: transformers does not have this model, and its original code was not on this machine. The figures are of speed and memory alone; that the arithmetic is right is tested on tiny checkpoints against the original code.';
  }
  const { limits } = gate;
  const losses = gate.lossBatches === undefined ? 'loss' : `mean loss of ${gate.lossBatches} batches`;
  const text = `${losses} and LoRA gradients of one batch against transformers + PEFT in float32. Loss off by ${gate.lossDifference.toExponential(1)} (limit ${limits.lossDifference}), cosine of all ${gate.tensors} gradients ${gate.cosine.toFixed(6)} (limit ${limits.cosine}).`;
  const beside = gate.peer
    ? ` transformers + PEFT in bfloat16 against the same: ${gate.peer.lossDifference.toExponential(1)} and ${gate.peer.cosine.toFixed(6)}.`
    : '';
  const why = gateOf(gate).within
    ? ''
    : ` On random weights of this size bfloat16 itself does not keep inside the limits, so what passes is to be no further from float32 than the peer in bfloat16 is (cosine: by ${limits.peerCosine ?? 2e-4} at most).`;
  return `**Gate**, passed: ${text}${beside}${why}`;
}

function fp8Text({ fp8Gate: { loss, bfloat16Loss, lossShare, limits, cosine, tensors, worstTensor } }) {
  return `**Gate of fp8**, passed: loss and LoRA gradients of one batch against martlet’s own in bfloat16. Loss ${loss.toFixed(4)} beside ${bfloat16Loss.toFixed(4)}, off by ${(lossShare * 100).toFixed(3)} % (limit ${limits.lossShare * 100} %); cosine of all ${tensors} gradients ${cosine.toFixed(5)} (limit ${limits.cosine}), of the worst tensor ${worstTensor.cosine.toFixed(4)}.`;
}

function curveText({ batch, rows, steps, learningRate, of, limit, fall, begin, bfloat16, fp8, share, passed }) {
  const verdict = passed ? 'passed' : '**missed**';
  return `${steps} steps of ${batch} rows, ${rows} different ones, the same in both, at a rate of ${learningRate}; mean losses of ${of} steps. From ${begin.toFixed(4)} to ${bfloat16.toFixed(4)} in bfloat16 and ${fp8.toFixed(4)} in fp8, ${(share * 100).toFixed(2)} % off (limit ${limit * 100} %, of a curve that falls by ${fall * 100} % at least): ${verdict}.`;
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
    `${rows} “Planned” is what \`martlet plan\` foretells for the run, and how far that is from the peak in tensors. martlet trains float32 copies of what is trained with float32 moments. The peer’s full run keeps weights and moments in bfloat16, which is the least that it can take. QLoRA has no peer here: bitsandbytes is not on the machine.${usesFp8(result) ? ' Beside fp8 the peer trains LoRA in bfloat16.' : ''}`,
  ];
  const learning = [`### LoRA training: tokens/s (p10–p90 over steps), peak device memory in tensors`, rows];
  const answering = [
    `### Answering`,
    `One picture, ${prompt?.tokens} prompt tokens, ${prompt?.newTokens} new tokens, greedy. One answer: tokens/s after the first token; the first token is from the call on, its picture in memory. More answers: all their tokens by the time of the whole request. “GB read a token”: martlet’s weights as they are kept, without tower, projector and embedding, and the cache in the middle of the answer.`,
  ];
  const starting = [`### Loading`, `Files in the page cache, to weights on the device; the process runs already.`];
  const fed = [`### From files`, has('data') ? dataText(result) : ''];
  const tower = [
    `### The vision tower`,
    `${vision?.pictures} pictures of ${vision?.size}×${vision?.size} at once through tower and merger. martlet: the engine’s clock while it answers a prompt with all of them, from patches in the host’s memory (float32) to features in the prompt: copying them to the device and the order of the windows are in it. The peer: from patches on the device (bfloat16) to features there.`,
  ];
  const merging = [
    `### Merging the adapter`,
    `From the files of base and adapter to a merged folder, on one file system, beside a plain copy of the base. The peer: loading to the device, PEFT’s merge, save_pretrained. martlet adds in float32 on the CPU and checks each element against float64.`,
  ];
  return [
    `## ${result.title}${part}, ${result.gpu ?? 'CPU'}, ${result.date}`,
    `${machine.join(', ')}. Again with:`,
    `\`\`\`sh\n${result.command}\n\`\`\``,
    gateText(result),
    ...(usesFp8(result) ? [fp8Text(result)] : []),
    ...(result.modelBytes
      ? []
      : [
          'An early result: one side did all its tasks after the other, with both models on the device for the first of them.',
        ]),
    ...(has('train') ? [...learning, trainingTable(result)] : []),
    ...(result.runs.some(({ kind, method }) => kind === 'train' && method) ? [...methodic, methodsTable(result)] : []),
    ...(result.curve ? ['### The curve in fp8', curveText(result.curve)] : []),
    ...(has('decode') ? [...answering, decodingTable(result)] : []),
    ...(has('load') ? [...starting, loadingTable(result)] : []),
    ...(has('data') ? fed : []),
    ...(has('vision') ? [...tower, visionTable(result)] : []),
    ...(has('merge') ? [...merging, mergeTable(result)] : []),
    ...(left.length ? [left.join('\n')] : []),
  ].join('\n\n');
}

/** What is asked of martlet, and the newest figure of it. */
function boundsTable(results) {
  const bounds = JSON.parse(readFileSync(join(root, 'bench/bounds.json'), 'utf8'));
  const rows = bounds.map(({ text, shape, measure, of, atLeast, atMost }) => {
    const found = results
      .filter(({ what }) => what === shape)
      .map((result) => ({ result, value: MEASURES[measure](result, of) }))
      .find(({ value }) => value !== undefined);
    const wanted = atLeast === undefined ? `≤ ${atMost}` : `≥ ${atLeast}`;
    if (!found) return [text, wanted, '—', 'not measured', ''];
    const met = atLeast === undefined ? found.value <= atMost : found.value >= atLeast;
    const where = `${found.result.gpu ?? 'CPU'}, ${found.result.date}`;
    return [
      text,
      wanted,
      found.value >= 100 ? integer(found.value) : found.value.toFixed(2),
      met ? 'met' : '**missed**',
      where,
    ];
  });
  return table(['bound', 'asked', 'measured', '', 'where'], rows);
}

function render() {
  const names = existsSync(resultsDir) ? readdirSync(resultsDir).filter((name) => name.endsWith('.json')) : [];
  const results = names
    .map((name) => ({ name, ...JSON.parse(readFileSync(join(resultsDir, name), 'utf8')) }))
    // The newest first; early results have no time of day.
    .sort((a, b) => compare(b.time ?? b.date, a.time ?? a.date) || compare(b.name, a.name));
  for (const result of results) {
    if (!isTrusted(result))
      throw new Error(`bench/results/${result.name}: the gate did not pass, so its timings say nothing. Remove it.`);
  }
  return `${[
    '# Benchmarks',
    '<!-- Written by scripts/generate-benchmarks.mjs from bench/results. Do not edit by hand. -->',
    'martlet beside transformers + PEFT on the same machine, in the same run, on the same weights (the exact public shape, random bfloat16 weights) and the same rows. "Default" is how people run the peer: float32 adapters, SDPA, eager, fused AdamW. "Tuned" is the peer at its best: bfloat16 adapters, compiled layers, no cache object in training, a static cache with compiled decoding in CUDA graphs; what compiling takes is not counted. Neither gets an attention mask, which is its fastest case. martlet’s step includes the normalising of the pictures, the peer’s does not. Both sides start from the same adapter and take the medians of the same steps, task by task in turn, each with the device to itself; every raw number is in bench/results in [bench](../bench).',
    'Run it on a GPU machine whose Python has torch, transformers and PEFT: `npm run bench` (options: [bench/run.mjs](../bench/run.mjs)). The scripts can be tried without a GPU: `npm run bench -- --tiny --device cpu`.',
    ...(results.length
      ? [
          '## Bounds',
          'What martlet sets itself, and the newest figure for it. “times” are ratios within one run.',
          boundsTable(results),
          ...results.map(section),
        ]
      : ['No results yet.']),
  ].join('\n\n')}\n`;
}

/** Every file: path → content. */
const wanted = new Map([[page, render()]]);
const chartDir = join(dirname(page), CHARTS);
for (const [name, svg] of charts) wanted.set(join(chartDir, name), svg);
const stale = (existsSync(chartDir) ? readdirSync(chartDir) : [])
  .filter((name) => name.endsWith('.svg') && !charts.has(name))
  .map((name) => join(chartDir, name));
if (!process.argv.includes('--check')) {
  for (const path of stale) rmSync(path);
  if (charts.size > 0) mkdirSync(chartDir, { recursive: true });
  for (const [path, content] of wanted) writeFileSync(path, content);
} else {
  const isCurrent = ([path, content]) => existsSync(path) && readFileSync(path, 'utf8') === content;
  if (stale.length > 0 || ![...wanted].every(isCurrent)) {
    console.error('docs/benchmarks.md is not what bench/results give: run node scripts/generate-benchmarks.mjs');
    process.exitCode = 1;
  }
}
