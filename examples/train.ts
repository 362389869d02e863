/**
 * Fine-tunes by LoRA and prints what happens. By default the quickstart's tiny model and data, and a few steps only:
 *
 *   node dist/examples/train.js [CONFIG] [KEY=VALUE …]
 *
 * Ctrl-C finishes the step that runs, saves the adapter and ends.
 */
import { trainLoRA } from 'martlet';

const [config = 'examples/quickstart/quickstart.yaml', ...overrides] = process.argv.slice(2);

// The run starts at once. What is given as overrides wins over the file, as `--set` does.
const run = trainLoRA(config, {
  overrides: ['max_steps=20', 'output_dir=output/example', ...overrides],
});
process.once('SIGINT', () => run.stop());

for await (const event of run) {
  switch (event.type) {
    case 'start':
      console.log(
        `${event.rows} rows, ${event.steps} steps, ${event.trainableParams} of ${event.totalParams} parameters`,
      );
      console.log(`first row, [[ ]] = trained: ${event.sample}`);
      break;
    case 'step':
      console.log(`step ${event.step}: loss ${event.loss.toFixed(4)}, ${Math.round(event.tokensPerSecond)} tokens/s`);
      break;
    case 'warning':
      console.warn(`warning: ${event.message}`);
      break;
  }
}

// The same object is a promise of the result.
const { adapterDir, finalLoss } = await run;
console.log(`final loss ${finalLoss.toFixed(4)}; the adapter is in ${adapterDir}`);
