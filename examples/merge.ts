/**
 * Adds an adapter to its base model. The result is an ordinary Hugging Face model folder.
 *
 *   node dist/examples/merge.js [ADAPTER] [OUTPUT]
 *
 * By default it merges what examples/train.ts leaves in output/example.
 */
import { MartletError, mergeAdapter } from 'martlet';

const [adapter = 'output/example', outputDir = 'output/example-merged'] = process.argv.slice(2);

try {
  // The base model is the one that the adapter's args.yaml names.
  const report = await mergeAdapter({
    adapter,
    outputDir,
    overwrite: true,
    onProgress: ({ done, total }) => {
      if (done === total) console.log(`${total} tensors written`);
    },
  });
  console.log(`merged ${report.mergedTensors} tensors into ${report.outputDir} in ${report.seconds.toFixed(1)} s`);
  console.log(`largest rounding error ${report.maxAbsError.toExponential(1)}`);
} catch (error) {
  // Every failure has a code that a program can act on.
  if (!(error instanceof MartletError)) throw error;
  console.error(`${error.code}: ${error.message}`);
  if (error.code === 'ERR_MARTLET_ADAPTER') console.error('Train one first: node dist/examples/train.js');
  process.exitCode = 1;
}
