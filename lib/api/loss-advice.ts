/** The tutorial's advice on curves: said once, when the losses show it. */

/** Steps at each end that are compared. */
const WINDOW = 10;

export class LossAdvice {
  readonly #first: number[] = [];
  readonly #last: number[] = [];
  #steps = 0;
  #lowest = Number.POSITIVE_INFINITY;
  #said = false;

  /** The loss of one more step; gives what should be said now. */
  add(loss: number): string | undefined {
    this.#steps++;
    if (this.#first.length < WINDOW) this.#first.push(loss);
    this.#last.push(loss);
    if (this.#last.length > WINDOW) this.#last.shift();
    if (this.#said || this.#steps < 3 * WINDOW) return undefined;
    const now = mean(this.#last);
    this.#lowest = Math.min(this.#lowest, now);
    if (now < 1.5 * this.#lowest || now - this.#lowest < 0.1) return undefined;
    this.#said = true;
    return `the loss rises: ${now.toFixed(3)} over the last ${WINDOW} steps, ${this.#lowest.toFixed(3)} at best. Lower learning_rate (a third of it), or add warmup_ratio: 0.05.`;
  }

  atEnd(): string | undefined {
    if (this.#said || this.#steps < 3 * WINDOW) return undefined;
    const [before, after] = [mean(this.#first), mean(this.#last)];
    if (after < 0.98 * before) return undefined;
    return `the loss is flat: ${before.toFixed(3)} at the start, ${after.toFixed(3)} at the end. Raise learning_rate, check that the answers are what is trained (the sample at the start), or train more modules.`;
  }
}

function mean(values: number[]): number {
  return values.reduce((a, b) => a + b, 0) / values.length;
}
