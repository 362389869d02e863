import { trainLoRA } from '../api/train.js';
import { outlineTraining, type TrainingOutline } from '../api/train-plan.js';
import { configToYaml, type TrainConfigInput } from '../config/index.js';
import { ALIASES, IGNORED, trainConfigSchema, UNSUPPORTED } from '../config/schema.js';
import { integer, significant } from '../report/format.js';
import { createProgressRenderer } from '../report/progress.js';
import { type OptionSpecs, usageError } from './args.js';
import { type CliIo, type Command, type Invocation, printJson } from './command.js';
import { interruptible } from './jobs.js';

const OWN_OPTIONS: OptionSpecs = {
  config: { kind: 'value', placeholder: 'FILE', help: 'the YAML or JSON config (may also be the first argument)' },
  set: {
    kind: 'value',
    multiple: true,
    placeholder: 'KEY=VALUE',
    help: 'override one key of the config; may be repeated',
  },
  dry_run: { kind: 'flag', help: 'check everything, print the resolved config and the plan, train nothing' },
};
/** Every spelling of a key that a config file may use; the config's own check judges keys and values. */
const CONFIG_OPTIONS: OptionSpecs = Object.fromEntries([
  ...['fp16', 'bf16', 'strict', 'model_kwargs', ...[ALIASES, UNSUPPORTED, IGNORED].flatMap(Object.keys)].map((key) => [
    key,
    { kind: 'config' },
  ]),
  ...Object.entries(trainConfigSchema.shape).map(([key, { description }]) => [
    key,
    { kind: 'config', help: description },
  ]),
]);

export const command: Command = {
  usage: 'train --config FILE [--set KEY=VALUE] [--KEY VALUE …]',
  description: `Fine-tunes a vision-language model (alias: sft). Every key of the config is an option too: --learning_rate 1e-4.

Ctrl-C finishes the step, saves and ends with exit code 0; a second Ctrl-C ends at once.`,
  outlivesReader: true,
  options: () => ({ ...OWN_OPTIONS, ...CONFIG_OPTIONS }),
  footer: `Examples:
  martlet train --config lora.yaml
  martlet train --config lora.yaml --set lora_rank=16 --dry-run
  martlet train --model ./llava-1.5-7b-hf --dataset data.json --output_dir out --learning_rate 1e-4`,
  run,
};

async function run({ options, positionals, io }: Invocation): Promise<number> {
  const [first, ...extra] = [...options.strings('config'), ...positionals];
  if (extra.length > 0) throw usageError(`unexpected argument ${extra[0]}: train takes one config file.`);
  const overrides = options
    .all()
    .filter(({ name }) => name === 'set' || name in CONFIG_OPTIONS)
    .map(({ name, value }) => (name === 'set' ? value : `${name}=${value}`));
  if (first === undefined && overrides.length === 0) {
    throw usageError('train needs a config: martlet train --config FILE. --help shows more.');
  }
  const config = first ?? {};
  const json = options.flag('json');
  if (!options.flag('dry_run')) return train(config, overrides, json, io);
  const planned = await interruptible((signal) => outlineTraining(config, { overrides, signal }));
  if (json) printJson(io, planned);
  else io.stdout.write(`${configToYaml(planned.config)}\n${planText(planned.plan)}\n`);
  return 0;
}

async function train(
  config: string | TrainConfigInput,
  overrides: string[],
  json: boolean,
  io: CliIo,
): Promise<number> {
  const abort = new AbortController();
  const run = trainLoRA(config, { overrides, signal: abort.signal });
  const progress = createProgressRenderer(io.stderr);
  let interrupts = 0;
  const interrupt = () => {
    interrupts++;
    if (interrupts > 1) abort.abort();
    run.stop();
    progress.line(
      interrupts > 1 ? 'stopping at once' : 'finishing this step and saving; press Ctrl-C again to stop at once',
    );
  };
  process.on('SIGINT', interrupt);
  process.on('SIGTERM', interrupt);
  try {
    for await (const event of run) {
      if (json) printJson(io, event);
      else progress.handle(event);
    }
    return 0;
  } finally {
    progress.close();
    process.off('SIGINT', interrupt);
    process.off('SIGTERM', interrupt);
  }
}

function planText(plan: TrainingOutline): string {
  const { rows, evalRows, steps, epochs, stepsPerEpoch, warmupSteps, rowsPerStep, tokens } = plan;
  return [
    '# plan',
    `rows: ${integer(rows)} for training, ${integer(evalRows)} for evaluation${plan.skipped.length > 0 ? `, ${plan.skipped.length} left out` : ''}`,
    `steps: ${steps} (${epochs} epochs of ${stepsPerEpoch}, ${rowsPerStep} rows a step, ${warmupSteps} of warm-up)`,
    `tokens in a row, image tokens included: ${tokens.shortest} to ${tokens.longest}, on average ${significant(tokens.mean)}`,
    `first row, [[ ]] = trained: ${plan.sample}`,
    ...plan.warnings.map((warning) => `warning: ${warning}`),
  ].join('\n');
}
