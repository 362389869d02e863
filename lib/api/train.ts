import { resolve } from 'node:path';
import { loadTrainConfig, type TrainConfig, type TrainConfigInput } from '../config/index.js';
import { isDirectory, removeUnfinished } from '../files.js';
import { publishedId, type ResolveOptions, resolveModel } from '../hub/index.js';
import { loadAddon } from '../native/load.js';
import { bytes } from '../report/format.js';
import { abortedError, throwIfAborted } from './abort.js';
import { warmStartWarnings } from './adapter-args.js';
import { checkOptions } from './options.js';
import { checkOutputDir, lockOutputDir } from './output-dir.js';
import { type RunControl, startRun } from './train-run.js';
import { loadTrainingData } from './train-setup.js';
import { runTrainer } from './trainer.js';
import type { TrainOptions, TrainResult, TrainRun } from './types.js';

/**
 * Fine-tunes a vision-language model as a config file (or object) says: LoRA by default, `sft_type: full` for all weights.
 *
 * The run starts at once. Await it for the result, iterate it for events, or both. It rejects with a MartletError:
 * `ERR_MARTLET_CONFIG`, `_DATASET`, `_IMAGE`, `_MODEL_NOT_FOUND`, `_WEIGHTS`, `_IO`, `_OUT_OF_MEMORY`, `_NON_FINITE` (with the rows of
 * the step) or `_ABORTED`. Checkpoints that were finished stay.
 */
export function trainLoRA(config: string | TrainConfigInput, options: TrainOptions = {}): TrainRun {
  return startRun(async (control) => {
    try {
      checkOptions('trainLoRA', options);
      return await run(config, options, control);
    } catch (error) {
      throw abortedError(error, control.signal);
    }
  }, options?.signal);
}

async function run(input: string | TrainConfigInput, options: TrainOptions, control: RunControl): Promise<TrainResult> {
  const { signal } = control;
  throwIfAborted(signal);
  let announced = false;
  const { config, modelDir, warnings } = await resolveTraining(input, options, {
    signal,
    onProgress: ({ total, totalBytes }) => {
      if (!announced)
        control.emit({
          type: 'warning',
          message: `the model is not on this machine: downloading ${total} files, ${bytes(totalBytes)}`,
        });
      announced = true;
    },
  });
  const outputDir = resolve(config.output_dir);
  await checkOutputDir(outputDir, {
    resume: Boolean(config.resume_from_checkpoint),
    overwrite: config.overwrite_output_dir,
    inputs: [modelDir, ...config.adapters],
    create: true,
  });
  loadAddon(); // a missing libtorch should show before a large dataset is read
  const unlock = await lockOutputDir(outputDir);
  try {
    await removeUnfinished(outputDir);
    const data = await loadTrainingData(config, { modelDir, signal });
    return await runTrainer({ config: data.config, modelDir, outputDir, data, warnings }, control);
  } finally {
    await unlock();
  }
}

/** The config of a run and its model on this machine. A local model is named by its full path, so that `args.yaml` holds from anywhere. */
export async function resolveTraining(
  input: string | TrainConfigInput,
  options: Pick<TrainOptions, 'overrides'>,
  resolving: ResolveOptions = {},
): Promise<{ config: TrainConfig; modelDir: string; warnings: string[] }> {
  const { config, warnings, given } = await loadTrainConfig(input, { overrides: options.overrides });
  const local = await isDirectory(config.model);
  const modelDir = await resolveModel(config.model, resolving);
  const model = local ? modelDir : publishedId(config.model);
  return {
    config: { ...config, model },
    modelDir,
    warnings: [...warnings, ...(await warmStartWarnings(config, given))],
  };
}
