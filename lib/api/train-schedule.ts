/**
 * Which rows each optimiser step sees. A pure function of the plan: a resumed run computes the same batches from the step number
 * alone. Counting is transformers': an epoch has `ceil(batches / accumulation)` steps, the last of which may be short.
 */
import { firstFit, groupByLength } from './packing.js';
import { Rng } from './rng.js';

export interface SchedulePlan {
  rows: number;
  batchSize: number;
  accumulation: number;
  /** May be fractional. Ignored when maxSteps > 0. */
  epochs: number;
  /** > 0 wins over epochs. */
  maxSteps: number;
  /** Shuffle the rows once, before everything else. */
  shuffleDataset: boolean;
  /** Shuffle again for each epoch. */
  shuffleEpochs: boolean;
  dataSeed: number;
  seed: number;
  /** > 0: several rows to one of the batch, up to this many tokens. */
  packingLength: number;
  /** Rows of similar length go into one step. */
  groupByLength: boolean;
}

export interface StepRows {
  /** from 1 */
  step: number;
  /** from 0 */
  epoch: number;
  /** Epochs done when the step ends, as logged. */
  epochProgress: number;
  /** Row numbers, one array for each micro-batch. */
  microBatches: number[][];
}

export class Schedule {
  readonly plan: SchedulePlan;
  readonly batchesPerEpoch: number;
  readonly stepsPerEpoch: number;
  readonly totalSteps: number;
  /** Epochs begun by the last step. */
  readonly epochs: number;
  /** Rows after packing: what a batch counts. */
  readonly units: number;
  readonly #base: Uint32Array;
  readonly #bins: number[][] | undefined;
  readonly #lengths: number[];
  #cached: { epoch: number; order: Uint32Array } | undefined;

  /** `lengths`: tokens of each row; needed for packing and grouping. */
  constructor(plan: SchedulePlan, lengths: number[] = []) {
    this.plan = plan;
    this.#lengths = lengths;
    const rows = plan.shuffleDataset
      ? new Rng(plan.dataSeed).permutation(plan.rows)
      : Uint32Array.from({ length: plan.rows }, (_, i) => i);
    this.#bins = plan.packingLength > 0 ? firstFit(rows, lengths, plan.packingLength) : undefined;
    this.#base = this.#bins ? Uint32Array.from(this.#bins, (_, i) => i) : rows;
    this.units = this.#base.length;
    this.batchesPerEpoch = Math.ceil(this.units / plan.batchSize);
    this.stepsPerEpoch = Math.max(1, Math.ceil(this.batchesPerEpoch / plan.accumulation));
    this.totalSteps = plan.maxSteps > 0 ? plan.maxSteps : Math.ceil(plan.epochs * this.stepsPerEpoch);
    this.epochs = Math.ceil(this.totalSteps / this.stepsPerEpoch);
  }

  /** The rows of step `step` (from 1 to totalSteps). */
  step(step: number): StepRows {
    const { batchSize, accumulation } = this.plan;
    const epoch = Math.floor((step - 1) / this.stepsPerEpoch);
    const order = this.#order(epoch);
    const first = ((step - 1) % this.stepsPerEpoch) * accumulation;
    const last = Math.min(first + accumulation, this.batchesPerEpoch);
    const microBatches: number[][] = [];
    for (let batch = first; batch < last; batch++) {
      const units = Array.from(order.subarray(batch * batchSize, Math.min((batch + 1) * batchSize, this.units)));
      microBatches.push(this.#bins ? units.flatMap((unit) => (this.#bins as number[][])[unit] as number[]) : units);
    }
    return { step, epoch, epochProgress: epoch + last / this.batchesPerEpoch, microBatches };
  }

  /** The steps from `first` to the last. */
  *from(first: number): Generator<StepRows> {
    for (let step = first; step <= this.totalSteps; step++) yield this.step(step);
  }

  #order(epoch: number): Uint32Array {
    if (this.#cached?.epoch !== epoch) {
      const base = this.#base;
      const { seed, batchSize, accumulation } = this.plan;
      // stream 0 is the shuffle of the dataset itself
      const rng = new Rng(seed, epoch + 1);
      const order = this.plan.groupByLength
        ? groupByLength(rng, this.#lengths, batchSize * accumulation)
        : this.plan.shuffleEpochs
          ? rng.permutation(this.units).map((i) => base[i] as number)
          : base;
      this.#cached = { epoch, order };
    }
    return this.#cached.order;
  }
}

/** Steps of linear warm-up: `warmup_steps` wins over `warmup_ratio`. */
export function warmupSteps(totalSteps: number, steps: number, ratio: number): number {
  return steps > 0 ? steps : Math.ceil(totalSteps * ratio);
}
