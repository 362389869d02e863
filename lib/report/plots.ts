/** One SVG a scalar, with a smoothed curve beside the loss: `images/train_loss.svg`. Drawn by hand: axes, ticks and a line are all there is. */
import { join } from 'node:path';
import { makeDir, writeFileAtomic } from '../files.js';
import { significant } from './format.js';

interface Point {
  step: number;
  value: number;
}

const [WIDTH, HEIGHT] = [720, 400];
const MARGIN = { left: 78, right: 16, top: 34, bottom: 40 };
/** ms-swift's: 0.9 on the training loss. */
const SMOOTHED: Record<string, number> = { 'train/loss': 0.9 };
/** Points of a drawn line; longer curves are thinned. */
const MAX_POINTS = 2000;

export class Plots {
  readonly #dir: string;
  readonly #series = new Map<string, Point[]>();

  constructor(dir: string) {
    this.#dir = dir;
  }

  add(step: number, values: Record<string, number>): void {
    for (const [tag, value] of Object.entries(values)) {
      if (!Number.isFinite(value)) continue;
      const series = this.#series.get(tag) ?? [];
      this.#series.set(tag, series);
      // a step that was done again after a crash
      while ((series.at(-1)?.step ?? -1) >= step) series.pop();
      series.push({ step, value });
    }
  }

  async write(): Promise<void> {
    if (this.#series.size === 0) return;
    await makeDir(this.#dir);
    for (const [tag, series] of this.#series) {
      const name = `${tag.replaceAll(/\(.*\)/g, '').replaceAll(/[^A-Za-z0-9]+/g, '_')}.svg`;
      await writeFileAtomic(join(this.#dir, name), plotSvg(tag, series, SMOOTHED[tag]));
    }
  }
}

/** The text of one plot. */
export function plotSvg(title: string, series: Point[], smoothing?: number): string {
  const points = thinned(series);
  const xs = scale(points.map(({ step }) => step));
  const ys = scale(points.map(({ value }) => value));
  const x = (step: number) => MARGIN.left + ((step - xs.low) / xs.span) * (WIDTH - MARGIN.left - MARGIN.right);
  const y = (value: number) =>
    HEIGHT - MARGIN.bottom - ((value - ys.low) / ys.span) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const line = (values: Point[], style: string) =>
    `<polyline fill="none" ${style} points="${values.map(({ step, value }) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(' ')}"/>`;
  const text = (content: string, at: string) =>
    `<text ${at} font-family="sans-serif" font-size="12" fill="#444">${xml(content)}</text>`;
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${HEIGHT}" viewBox="0 0 ${WIDTH} ${HEIGHT}">`,
    `<rect width="${WIDTH}" height="${HEIGHT}" fill="#fff"/>`,
    `<text x="${MARGIN.left}" y="20" font-family="sans-serif" font-size="14" fill="#000">${xml(title)}</text>`,
    ...ticks(ys).flatMap((value) => [
      `<line x1="${MARGIN.left}" x2="${WIDTH - MARGIN.right}" y1="${y(value).toFixed(1)}" y2="${y(value).toFixed(1)}" stroke="#ddd"/>`,
      text(significant(value), `x="${MARGIN.left - 6}" y="${(y(value) + 4).toFixed(1)}" text-anchor="end"`),
    ]),
    ...ticks(xs).map((step) =>
      text(significant(step), `x="${x(step).toFixed(1)}" y="${HEIGHT - MARGIN.bottom + 18}" text-anchor="middle"`),
    ),
    text('step', `x="${WIDTH / 2}" y="${HEIGHT - 6}" text-anchor="middle"`),
    line(points, `stroke="#4878d0" stroke-width="1.2"${smoothing === undefined ? '' : ' opacity="0.35"'}`),
    ...(smoothing === undefined ? [] : [line(thinned(smooth(series, smoothing)), 'stroke="#4878d0" stroke-width="2"')]),
    '</svg>',
  ];
  return `${parts.join('\n')}\n`;
}

function smooth(series: Point[], factor: number): Point[] {
  let sum = 0;
  return series.map(({ step, value }, i) => {
    sum = factor * sum + (1 - factor) * value;
    return { step, value: sum / (1 - factor ** (i + 1)) };
  });
}

/** Every n-th point, and the last. */
function thinned(series: Point[]): Point[] {
  const every = Math.ceil(series.length / MAX_POINTS);
  return series.filter((_, i) => i % every === 0 || i === series.length - 1);
}

function scale(values: number[]): { low: number; span: number } {
  const low = values.reduce((a, b) => Math.min(a, b));
  const span = values.reduce((a, b) => Math.max(a, b)) - low;
  // a constant is drawn in the middle
  return span > 0 ? { low, span } : { low: low - (Math.abs(low) || 1) / 2, span: Math.abs(low) || 1 };
}

/** About five round numbers. */
function ticks({ low, span }: { low: number; span: number }): number[] {
  const raw = span / 5;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = ([1, 2, 5, 10].find((factor) => factor * power >= raw) ?? 10) * power;
  const out: number[] = [];
  for (let value = Math.ceil(low / step) * step; value <= low + span * 1.0001; value += step)
    out.push(Number(value.toPrecision(12)));
  return out;
}

function xml(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;');
}
