/** Jobs in worker threads. The main thread plays a scenario and prints what it saw; workers run this very file. */
import { writeSync } from 'node:fs';
import { parentPort, Worker, workerData } from 'node:worker_threads';
import { loadModel, trainLoRA } from '../../../lib/index.js';
import { childArgs, LONG_QUESTION } from '../../support/process.js';

type Job =
  | { kind: 'generate'; model: string; tokens: number; device?: 'cuda' }
  | { kind: 'train'; config: Record<string, unknown> };

async function generate(model: string, maxNewTokens: number, device: 'cpu' | 'cuda' = 'cpu'): Promise<number[]> {
  const loaded = await loadModel(model, { device });
  const ids: number[] = [];
  for await (const { tokenId } of loaded.stream({ ...LONG_QUESTION, maxNewTokens })) {
    if (ids.length === 0) parentPort?.postMessage({ running: true });
    ids.push(tokenId);
  }
  await loaded.dispose();
  return ids;
}

async function train(config: Record<string, unknown>): Promise<number[]> {
  const losses: number[] = [];
  for await (const event of trainLoRA(config)) {
    if (event.type === 'start') parentPort?.postMessage({ running: true });
    if (event.type === 'step') losses.push(event.loss);
  }
  return losses;
}

const perform = (job: Job) => (job.kind === 'train' ? train(job.config) : generate(job.model, job.tokens, job.device));

function start(job: Job): { worker: Worker; running: Promise<void>; result: Promise<number[]> } {
  const worker = new Worker(new URL(import.meta.url), { workerData: job, argv: process.argv.slice(2) });
  const result = new Promise<number[]>((resolve, reject) => {
    worker.on('message', (message) => message.result && resolve(message.result));
    worker.on('error', reject);
    worker.on('exit', (code) => reject(new Error(`the worker ended with ${code} before its result`)));
  });
  result.catch(() => {}); // a terminated worker has none
  const running = new Promise<void>((resolve, reject) => {
    worker.on('message', (message) => message.running && resolve());
    result.catch(reject);
  });
  return { worker, running, result };
}

async function main(): Promise<void> {
  if (parentPort) {
    parentPort.postMessage({ result: await perform(workerData as Job) });
    return;
  }
  const { scenario, jobs } = childArgs<{ scenario: 'results' | 'terminate'; jobs: Job[] }>();
  if (scenario === 'results') {
    // side by side in workers, then the same in the main thread
    const inWorkers = await Promise.all(jobs.map((job) => start(job).result));
    const here: number[][] = [];
    for (const job of jobs)
      here.push(await perform({ ...job, ...(job.kind === 'train' && { config: again(job.config) }) }));
    writeSync(1, `${JSON.stringify({ inWorkers, here })}\n`);
    return;
  }
  const [terminated, ...rest] = jobs as [Job, ...Job[]];
  const { worker, running, result } = start(terminated);
  await running;
  await new Promise((resolve) => setTimeout(resolve, 100));
  const started = performance.now();
  await worker.terminate();
  const seconds = (performance.now() - started) / 1000;
  const finished = await result.then(
    () => true,
    () => false,
  );
  const after: number[][] = [];
  for (const job of rest) after.push(await perform(job), await start(job).result);
  writeSync(1, `${JSON.stringify({ seconds, finished, after })}\n`);
}

/** The same run into a folder of its own. */
const again = (config: Record<string, unknown>) => ({ ...config, output_dir: `${config.output_dir}-again` });

void main();
