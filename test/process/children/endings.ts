/** Ends the process in the middle of a job, in the way that it is told. */
import { writeSync } from 'node:fs';
import { loadModel, trainLoRA } from '../../../lib/index.js';
import { childArgs, LONG_QUESTION } from '../../support/process.js';

const { job, ending, model, config } = childArgs<{
  job: 'train' | 'generate' | 'load' | 'none';
  ending: 'exit' | 'throw' | 'idle' | 'return';
  model: string;
  config: Record<string, unknown>;
}>();

/** `settled` says that the job did not last until the end came. */
let settled = false;
const watch = (promise: Promise<unknown>) =>
  promise.then(
    () => {
      settled = true;
    },
    () => {
      settled = true;
    },
  );

function end(): void {
  writeSync(1, settled ? 'too late\n' : 'in mid-job\n');
  if (ending === 'exit') process.exit(7);
  if (ending === 'throw') throw new Error('thrown on purpose');
}

async function main(): Promise<void> {
  if (job === 'train') {
    const run = trainLoRA(config);
    watch(run.result);
    for await (const event of run) {
      if (event.type === 'start') setTimeout(end, 300); // inside the first step, which takes longer
    }
    return;
  }
  if (job === 'load') {
    let first = true;
    const onProgress = () => {
      if (first) process.nextTick(end); // not in the callback, whose errors are its caller's
      first = false;
    };
    watch(loadModel(model, { device: 'cpu', dtype: 'float32', onProgress }));
    return;
  }
  const loaded = await loadModel(model, { device: 'cpu' });
  if (job === 'generate') {
    for await (const _ of loaded.stream(LONG_QUESTION)) end();
    return;
  }
  writeSync(1, 'loaded\n');
  process.exitCode = 5;
}

void main();
