/** What the runs of one result (bench/results/*.json) say: figures by side and setting, and the measures that bench/bounds.json names. */

export const SIDES = {
  martlet: 'martlet',
  'peer-default': 'transformers + PEFT, default',
  'peer-tuned': 'transformers + PEFT, tuned',
};
export const PEERS = Object.keys(SIDES).filter((side) => side !== 'martlet');

export function median(values) {
  if (values.length === 0) return undefined;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = (sorted.length - 1) / 2;
  return (sorted[Math.floor(middle)] + sorted[Math.ceil(middle)]) / 2;
}

const isOf = (run, wanted) => Object.entries(wanted).every(([key, value]) => run[key] === value);
/** The settings of decoding and loading that older results leave out. */
const completed = (run) => ({
  ...(run.kind === 'decode' && { batch: 1 }),
  ...(['decode', 'load'].includes(run.kind) && { quantization: 'none' }),
  ...run,
});
/** Of those that have no method, unless one is asked for. */
export const runsOf = (result, wanted) =>
  result.runs.map(completed).filter((run) => isOf(run, wanted) && (wanted.method !== undefined || !run.method));

/** Of the rounds that ended: tokens/s by the median of their step medians, the widest p10–p90, the highest peak. Else the error, or nothing. */
export function training(result, wanted) {
  const runs = runsOf(result, { kind: 'train', ...wanted });
  const done = runs.filter((run) => run.tokensPerSecond);
  if (done.length === 0) return { error: runs[0]?.error };
  return {
    rate: median(done.map((run) => run.tokensPerSecond)),
    low: Math.min(...done.map((run) => run.tokens / run.p90)),
    high: Math.max(...done.map((run) => run.tokens / run.p10)),
    peak: Math.max(...done.map((run) => run.peakAllocated)),
  };
}

/** Of all repeats of all rounds. */
export function decoding(result, wanted) {
  const runs = runsOf(result, { kind: 'decode', ...wanted }).filter((run) => run.tokensPerSecond);
  if (runs.length === 0) return {};
  return {
    rate: median(runs.flatMap((run) => run.tokensPerSecond)),
    firstToken: median(runs.flatMap((run) => run.firstTokenSeconds)),
    peak: Math.max(...runs.map((run) => run.peakAllocated)),
  };
}

/** Seconds, and bytes/s of the files. */
export function loading(result, side, quantization = 'none') {
  const seconds = median(runsOf(result, { kind: 'load', side, quantization }).map((run) => run.seconds));
  return { seconds, rate: seconds && result.modelBytes ? result.modelBytes / seconds : undefined };
}

/** Bytes/s of a copy on the device. */
export const copyRate = (result) =>
  median(result.runs.filter(({ kind }) => kind === 'bandwidth').flatMap((run) => run.copyBytesPerSecond));

/** Bytes that a token of martlet's one answer reads: weights, and the cache at the middle of the answer. */
export function tokenBytes(result, quantization) {
  const bytes = runsOf(result, { kind: 'load', side: 'martlet', quantization }).find(
    (run) => run.tokenBytes,
  )?.tokenBytes;
  if (!bytes) return undefined;
  return bytes.weights + bytes.position * (result.prompt.tokens + result.prompt.newTokens / 2);
}

/** Share of the copy bandwidth that decoding one answer reaches. */
export function bandwidthShare(result, quantization) {
  const { rate } = decoding(result, { side: 'martlet', batch: 1, quantization });
  const [bytes, copy] = [tokenBytes(result, quantization), copyRate(result)];
  return rate && bytes && copy ? (rate * bytes) / copy : undefined;
}

export const seconds = (result, kind, side, wanted = {}) =>
  median(
    runsOf(result, { kind, side, ...wanted }).flatMap((run) =>
      kind === 'vision' ? run.visionSeconds : run.mergeSeconds,
    ),
  );

/** Of the peer in whichever form did it: what the forms do not differ in. */
const ofPeer = (measure) => PEERS.map(measure).find((value) => value !== undefined);

const ratio = (a, b) => (a && b ? a / b : undefined);

/** By the names in bench/bounds.json: a result and what the measure is of → a number, or undefined where the result does not have it. */
export const MEASURES = {
  trainRatio: (result, { side, ...setting }) =>
    ratio(training(result, { side: 'martlet', ...setting }).rate, training(result, { side, ...setting }).rate),
  /** tokens/s, where the GPU's name has `gpu` in it. */
  trainRate: (result, { gpu, ...setting }) =>
    result.gpu?.includes(gpu) ? training(result, { side: 'martlet', ...setting }).rate : undefined,
  /** The same with features of pictures that are kept. */
  cachedRate: (result, { gpu }) =>
    result.gpu?.includes(gpu)
      ? runsOf(result, { kind: 'cached', side: 'martlet' }).find((run) => run.tokensPerSecond)?.tokensPerSecond
      : undefined,
  /** Milliseconds to the first token of one answer. */
  firstToken(result, { gpu }) {
    const { firstToken } = decoding(result, { side: 'martlet', batch: 1, quantization: 'none' });
    return firstToken && result.gpu?.includes(gpu) ? firstToken * 1000 : undefined;
  },
  trainPeak(result, setting) {
    const { peak } = training(result, { side: 'martlet', ...setting });
    return peak && peak / 2 ** 30;
  },
  methodRatio: (result, { method, to, ...setting }) =>
    ratio(
      training(result, { side: 'martlet', method, ...setting }).rate,
      training(result, { side: 'martlet', method: to, ...setting }).rate,
    ),
  methodPeak(result, setting) {
    const { peak } = training(result, { side: 'martlet', ...setting });
    return peak && peak / 2 ** 30;
  },
  /** Beside the peer's LoRA of the same rows in bfloat16. */
  methodOverPeer: (result, { side, method, ...setting }) =>
    ratio(
      training(result, { side: 'martlet', method, ...setting }).rate,
      training(result, { side, method: 'lora', ...setting }).rate,
    ),
  fp8Loss: ({ fp8Gate }) => (fp8Gate ? fp8Gate.lossShare * 100 : undefined),
  fp8Cosine: ({ fp8Gate }) => fp8Gate?.cosine,
  fp8Curve: ({ curve }) => (curve ? curve.share * 100 : undefined),
  decodeRatio(result, { side, answers }) {
    const of = (name) => decoding(result, { side: name, batch: answers, quantization: 'none' }).rate;
    return ratio(of('martlet'), of(side));
  },
  firstTokenRatio(result, { side }) {
    const of = (name) => decoding(result, { side: name, batch: 1, quantization: 'none' }).firstToken;
    return ratio(of(side), of('martlet'));
  },
  bandwidthShare: (result, { weights }) => bandwidthShare(result, weights),
  visionRatio: (result, { attention }) =>
    ratio(
      ofPeer((side) => seconds(result, 'vision', side, { attention })),
      seconds(result, 'vision', 'martlet'),
    ),
  loadRate(result) {
    const { rate } = loading(result, 'martlet');
    return rate && rate / 1e9;
  },
  loadRatio: (result) =>
    ratio(
      ofPeer((side) => loading(result, side).seconds),
      loading(result, 'martlet').seconds,
    ),
  mergeOverCopy: (result) => ratio(seconds(result, 'merge', 'martlet'), seconds(result, 'merge', 'copy')),
  mergeRatio: (result) =>
    ratio(
      ofPeer((side) => seconds(result, 'merge', side)),
      seconds(result, 'merge', 'martlet'),
    ),
  dataWait: (result) => result.runs.find(({ kind, error }) => kind === 'data' && !error)?.dataWait,
};
