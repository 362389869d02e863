/**
 * Measures how long jobs hold up the event loop. A late turn is the loop's own fault only as far as its thread was not waiting
 * for a core: Linux says how long it waited, so that other work on the machine does not count.
 */
import { readFileSync, writeSync } from 'node:fs';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { getSystemInfo, loadModel, trainLoRA } from '../../../lib/index.js';
import { childArgs, LONG_QUESTION } from '../../support/process.js';

const RESOLUTION_MS = 5;
const { config, model, block } = childArgs<{ config: Record<string, unknown>; model: string; block: number }>();

/** Milliseconds that the main thread ran, and that it was ready to run and had no core. */
function mainThread(): { ran: number; waited: number } {
  const [ran, waited] = readFileSync(`/proc/self/task/${process.pid}/schedstat`, 'utf8').split(' ');
  return { ran: Number(ran) / 1e6, waited: Number(waited) / 1e6 };
}

interface Delays {
  /** perf_hooks, less the interval of its own timer, ms */
  measured: number;
  /** less the time without a core, ms */
  own: number;
  /** longest time without a core between two turns, ms */
  waited: number;
  turns: number;
}

async function measure(work: () => Promise<void>): Promise<Delays> {
  const histogram = monitorEventLoopDelay({ resolution: RESOLUTION_MS });
  const delays = { measured: 0, own: 0, waited: 0, turns: 0 };
  let last = { time: performance.now(), waited: mainThread().waited };
  const timer = setInterval(() => {
    const now = { time: performance.now(), waited: mainThread().waited };
    const late = now.time - last.time - RESOLUTION_MS;
    const waited = now.waited - last.waited;
    delays.own = Math.max(delays.own, late - waited);
    delays.waited = Math.max(delays.waited, waited);
    delays.turns++;
    last = now;
  }, RESOLUTION_MS);
  histogram.enable();
  await work();
  histogram.disable();
  clearInterval(timer);
  return { ...delays, measured: histogram.max / 1e6 - RESOLUTION_MS };
}

async function main(): Promise<void> {
  getSystemInfo(); // loads libtorch, once a process and in one piece: that is not a job
  const out = {
    load: await measure(async () => {
      const loaded = await loadModel(model, { device: 'cpu' });
      await loaded.dispose();
    }),
    train: await measure(async () => {
      for await (const _ of trainLoRA(config));
    }),
    generate: await measure(async () => {
      const loaded = await loadModel(model, { device: 'cpu' });
      for (let i = 0; i < 3; i++) await loaded.generate(LONG_QUESTION);
      for await (const _ of loaded.stream(LONG_QUESTION));
      await loaded.dispose();
    }),
    blocked: await measure(async () => {
      await new Promise((resolve) => setTimeout(resolve, 20));
      const until = mainThread().ran + block;
      while (mainThread().ran < until);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }),
  };
  writeSync(1, `${JSON.stringify(out)}\n`);
}

void main();
