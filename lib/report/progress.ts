/** Shows a training run on a terminal as a bar, elsewhere as plain lines. */
import type { TrainEvent } from '../api/types.js';
import { bytes, duration, integer, significant } from './format.js';

/** The part of a stream that the renderer needs; `process.stderr` has it. */
export interface ProgressStream {
  write(text: string): unknown;
  readonly isTTY?: boolean;
  readonly columns?: number;
}

export interface ProgressRenderer {
  /** Shows one event. */
  handle(event: TrainEvent): void;
  /** Shows a line of one's own above the bar. */
  line(text: string): void;
  /** Leaves the cursor on a fresh line. Idempotent. */
  close(): void;
}

const CLEAR_LINE = '\r\x1b[2K';

/** A renderer for `trainLoRA` events: a live bar when `stream` is a terminal, else one line for each event. */
export function createProgressRenderer(stream: ProgressStream): ProgressRenderer {
  const live = stream.isTTY === true;
  let bar = '';
  let totalSteps = 0;

  const line = (text: string) => {
    stream.write(live ? `${CLEAR_LINE}${text}\n${bar}` : `${text}\n`);
  };

  return {
    line,
    handle(event) {
      if (event.type === 'start') totalSteps = event.steps;
      if (event.type === 'step' && live) {
        // a terminal that does not know its size says 0
        bar = stepBar(event, totalSteps, stream.columns || 80);
        stream.write(CLEAR_LINE + bar);
        return;
      }
      if (event.type === 'done' && live) {
        stream.write('\n');
        bar = '';
      }
      for (const text of describe(event, totalSteps)) line(text);
    },
    close() {
      if (bar !== '') stream.write('\n');
      bar = '';
    },
  };
}

/** What `train.log` and a terminal that cannot show a bar say about an event. */
export function describe(event: TrainEvent, totalSteps: number): string[] {
  switch (event.type) {
    case 'start': {
      const share = (100 * event.trainableParams) / event.totalParams;
      const parts = Object.entries(event.parts)
        .filter(([, count]) => count > 0)
        .map(([name, count]) => `${name} ${integer(count)} (${significant((100 * count) / event.trainableParams)} %)`)
        .join(', ');
      return [
        `${integer(event.rows)} rows, ${event.epochs} epochs, ${event.steps} steps, output ${event.outputDir}`,
        `parameters: ${integer(event.totalParams)}, trained ${integer(event.trainableParams)} (${significant(share)} %): ${parts}${
          event.targets > 0 ? `; LoRA in ${event.targets} modules` : ''
        }`,
        `first row, [[ ]] = trained: ${event.sample}`,
      ];
    }
    case 'step':
      return [`step ${event.step}/${totalSteps}  ${figures(event)}`];
    case 'eval':
      return [
        `eval at step ${event.step}: loss ${significant(event.loss)}, token accuracy ${percent(event.tokenAccuracy)}${answerScores(event)}, ${duration(event.seconds)}`,
      ];
    case 'checkpoint':
      return [`checkpoint: ${event.dir}`];
    case 'warning':
      return [`warning: ${event.message}`];
    case 'done':
      return [
        `${event.stopped ? 'stopped' : event.stoppedEarly ? 'stopped early' : 'done'} after ${event.steps} steps, loss ${significant(event.finalLoss)}: ${event.adapterDir}`,
      ];
  }
}

type StepEvent = Extract<TrainEvent, { type: 'step' }>;

const percent = (share: number) => `${(100 * share).toFixed(1)} %`;

function answerScores({ exactMatch, rougeL, bleu }: Extract<TrainEvent, { type: 'eval' }>): string {
  if (exactMatch === undefined) return '';
  return `, exact match ${percent(exactMatch)}, ROUGE-L ${percent(rougeL ?? 0)}, BLEU ${percent(bleu ?? 0)}`;
}

function figures(event: StepEvent): string {
  return [
    `loss ${significant(event.loss)} (mean ${significant(event.smoothedLoss)})`,
    `lr ${significant(event.learningRate)}`,
    `mem ${bytes(event.memory)}`,
    `${integer(event.tokensPerSecond)} tok/s`,
    `left ${duration(event.remaining)}`,
  ].join('  ');
}

function stepBar(event: StepEvent, totalSteps: number, columns: number): string {
  const share = totalSteps > 0 ? event.step / totalSteps : 0;
  const head = `${Math.floor(100 * share)
    .toString()
    .padStart(3)}% `;
  const tail = ` ${event.step}/${totalSteps}  ${figures(event)}`;
  // the last column stays free: writing there makes some terminals wrap
  const width = Math.min(30, columns - 1 - head.length - tail.length - 2);
  if (width < 5) return (head + tail).slice(0, Math.max(0, columns - 1));
  const full = Math.round(width * share);
  return `${head}|${'█'.repeat(full)}${'·'.repeat(width - full)}|${tail}`;
}
