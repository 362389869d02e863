import { planTraining, type TrainingPlan } from '../api/plan.js';
import { bytes, integer } from '../report/format.js';
import { type OptionSpecs, usageError } from './args.js';
import { type Command, type Invocation, printJson } from './command.js';
import { interruptible } from './jobs.js';

const OPTIONS: OptionSpecs = {
  config: { kind: 'value', placeholder: 'FILE', help: 'YAML or JSON config (also as the first argument)' },
  model: { kind: 'value', placeholder: 'DIR', help: 'a folder with config.json, instead of a config' },
  gpu: {
    kind: 'value',
    placeholder: 'SIZE',
    help: 'memory to plan for, e.g. 8GB, 12GB, 24GB, 48GB; default: the device’s',
  },
  set: {
    kind: 'value',
    multiple: true,
    placeholder: 'KEY=VALUE',
    help: 'override one key of the config; may be repeated',
  },
};

export const command: Command = {
  usage: 'plan --config FILE [--gpu SIZE] [--set KEY=VALUE]',
  description: `Predicts the peak memory of a training run by part, from config.json and the rows alone, and picks micro-batch, recompute and
quantisation that fit. Exit code 1 when nothing fits.`,
  options: () => OPTIONS,
  footer: `Examples:
  martlet plan --config lora.yaml --gpu 24GB
  martlet plan --model ./llava-1.5-7b-hf --gpu 12GB --set max_length=1024`,
  run,
};

async function run({ options, positionals, io }: Invocation): Promise<number> {
  const [file, ...extra] = [...options.strings('config'), ...positionals];
  if (extra.length > 0) throw usageError(`unexpected argument ${extra[0]}: plan takes one config file.`);
  const model = options.string('model');
  if (file === undefined && model === undefined)
    throw usageError('plan needs --config FILE or --model DIR. --help shows more.');
  const overrides = [
    ...options.strings('set'),
    ...(file !== undefined && model !== undefined ? [`model=${model}`] : []),
  ];
  const gpu = options.string('gpu');
  const plan = await interruptible((signal) =>
    planTraining(file ?? { model }, { overrides, signal, ...(gpu !== undefined && { gpu }) }),
  );
  if (options.flag('json')) printJson(io, plan);
  else io.stdout.write(`${planText(plan)}\n`);
  return plan.fits ? 0 : 1;
}

function planText({ fits, budget, memory, settings, tokens, trainableParams, notes }: TrainingPlan): string {
  const { total, ...parts } = memory;
  return [
    `${fits ? 'fits' : 'does not fit'}: about ${bytes(total)} of ${bytes(budget)}, rows of up to ${tokens.longest} tokens, ${integer(trainableParams)} trained parameters`,
    ...Object.entries(parts).map(([name, size]) => `  ${name.padEnd(12)}${bytes(size)}`),
    'set:',
    ...Object.entries(settings).map(([key, value]) => `  ${key}: ${value}`),
    ...notes.map((note) => `note: ${note}`),
  ].join('\n');
}
