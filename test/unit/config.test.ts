/** Config files of both dialects, YAML's traps, strictness, overrides. */
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import {
  configToYaml,
  type LoadConfigOptions,
  loadTrainConfig,
  quantizationOf,
  resolveTrainConfig,
} from '../../lib/config/index.js';
import { parseYaml } from '../../lib/config/yaml.js';
import type { MartletError, TrainConfig } from '../../lib/index.js';
import { projectRoot } from '../support/fixtures.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

const BASE = 'model: m\ndataset: d.json\n';
const parse = (yaml: string, overrides?: LoadConfigOptions['overrides']) => {
  const { value, positions } = parseYaml(yaml);
  return resolveTrainConfig(value, { file: 'c.yaml', positions }, { overrides });
};
const resolved = (yaml: string, overrides?: LoadConfigOptions['overrides']) => parse(BASE + yaml, overrides).config;

/** `line: message` of every problem. */
function problems(yaml: string, overrides?: LoadConfigOptions['overrides']): string[] {
  try {
    parse(yaml, overrides);
  } catch (error) {
    const { code, details } = error as MartletError;
    assert.equal(code, 'ERR_MARTLET_CONFIG');
    return (details.problems as { line?: number; message: string }[]).map(({ line, message }) => `${line}: ${message}`);
  }
  return assert.fail('was accepted');
}

test("the tutorial's file, unmodified", async () => {
  const { config, warnings } = await loadTrainConfig(join(projectRoot, 'test/fixtures/tutorial/qwen_vl_lora.yaml'));
  const wanted: Partial<TrainConfig> = {
    experiment_name: 'qwen_vl_7b_lora',
    model_type: 'qwen-vl-chat',
    model: 'qwen/Qwen-VL-Chat-7B', // a folder of this name comes before the id that is published
    torch_dtype: 'float16', // fp16 twice, which is no contradiction
    device: 'auto',
    dataset: [{ path: 'custom_data/data.json', dataset_root: './custom_data', image_folder: 'images' }],
    val_dataset: [],
    sft_type: 'lora',
    lora_rank: 8,
    lora_alpha: 32,
    lora_dropout: 0.05,
    target_modules: ['c_attn', 'qkv_proj'],
    num_train_epochs: 3,
    per_device_train_batch_size: 2,
    gradient_accumulation_steps: 4,
    learning_rate: 1e-4,
    weight_decay: 0.01,
    lr_scheduler_type: 'cosine',
    warmup_ratio: 0.05,
    logging_steps: 10,
    save_steps: 100,
    output_dir: './output/qwen_vl_lora',
    gradient_checkpointing: true,
    eval_strategy: 'no',
    seed: 42,
  };
  for (const [key, value] of Object.entries(wanted)) assert.deepEqual(config[key as keyof TrainConfig], value, key);
  assert.equal(warnings.length, 1);
  assert.match(warnings.join('\n'), /framework has no effect/);
});

test("ms-swift's flat keys, of every version, give the same config as the nested ones", () => {
  const nested = parse(`
model_id: m
model_args: { torch_dtype: bf16, device_map: auto }
dataset: { train: [{ file_name: d.json }], eval: e.json }
sft_type: lora
lora_args: { r: 16, lora_alpha: 8, target_modules: [q_proj] }
train_args: { learning_rate: 2e-4, per_device_train_batch_size: 4 }
evaluation_strategy: epoch
`).config;
  for (const flat of [
    // 4.x, 3.x, 2.x
    'model: m\ntuner_type: lora\ntorch_dtype: bfloat16\ndataset: d.json\nval_dataset: e.json\nlora_rank: 16\neval_strategy: epoch\n',
    'model: m\ntrain_type: lora\nbf16: true\ndataset: [d.json]\nval_dataset: [e.json]\nlora_r: 16\neval_strategy: epoch\n',
    'model_id_or_path: m\nsft_type: lora\ndtype: bf16\ndataset: [d.json]\neval_dataset: e.json\nlora_rank: 16\nevaluation_strategy: epoch\n',
  ]) {
    const rest = 'lora_alpha: 8\nlora_target_modules: q_proj\nlearning_rate: 2e-4\nper_device_train_batch_size: 4\n';
    assert.deepEqual(parse(flat + rest).config, nested);
  }
});

test('snake_case, kebab-case and camelCase are one key, in objects too', () => {
  const config = resolved('lora-rank: 4\nlearningRate: 1e-3\n');
  assert.deepEqual([config.lora_rank, config.learning_rate], [4, 1e-3]);
  assert.equal(resolveTrainConfig({ model: 'm', dataset: 'd', loraArgs: { loraAlpha: 3 } }).config.lora_alpha, 3);
});

test('YAML 1.2: words, numbers and nothing are what they look like', () => {
  const config = resolved(
    'evaluation_strategy: no\nsave_strategy: no\nlearning_rate: 1e-4\nwarmup_ratio: .05\nlora_rank: 010\nmax_length: null\nsystem: ~\nadam_epsilon: 1E-8\n',
  );
  assert.deepEqual(
    [config.eval_strategy, config.save_strategy, config.learning_rate, config.warmup_ratio, config.lora_rank],
    ['no', 'no', 1e-4, 0.05, 10],
  );
  assert.deepEqual([config.max_length, config.system, config.adam_epsilon], [null, null, 1e-8]);
  // what a YAML 1.1 program writes for `no`
  assert.equal(resolved('save_strategy: false\n').save_strategy, 'no');
  assert.deepEqual(problems(`${BASE}learning_rate: "1e-4"\ndataset_shuffle: yes\n`), [
    '3: learning_rate is the text "1e-4": write the number without quotes',
    '4: dataset_shuffle is the text "yes": expected boolean, received string',
  ]);
});

test('JSON, a byte order mark, Windows line ends', async () => {
  const file = join(root, 'config.json');
  writeFileSync(file, JSON.stringify({ model: 'm', dataset: ['a.json#5'], lora_args: { r: 2 } }));
  const { config } = await loadTrainConfig(file);
  assert.deepEqual([config.lora_rank, config.dataset], [2, [{ path: 'a.json', sample: 5 }]]);
  assert.deepEqual(problems('\uFEFFmodel: m\r\ndataset: d\r\nlora_rnak: 8\r\n'), [
    '3: lora_rnak is not a known key: did you mean lora_rank?',
  ]);
});

test('every problem is reported at once, each at its own line; the message shows five', () => {
  const yaml = `model: m
dataset:
  train:
    - file_nme: d.json
lora_args:
  r: eight
train_args:
  learning_rat: 1e-4
  lr_scheduler_type: cosien
lora_args_2: 1
xyzzy: 1
`;
  assert.deepEqual(problems(yaml), [
    '4: dataset.train.0.file_nme is not a known key: did you mean file_name?',
    '4: dataset.train.0 names no file: give it a file_name or path',
    '6: lora_args.r is the text "eight": expected number, received string',
    '8: train_args.learning_rat is not a known key: did you mean learning_rate?',
    '9: train_args.lr_scheduler_type is the text "cosien": expected one of "linear"|"cosine"|"cosine_with_restarts"|"cosine_with_min_lr"|"constant"|"constant_with_warmup"|"polynomial"|"inverse_sqrt"',
    '10: lora_args_2 is not a known key: did you mean lora_args?',
    '11: xyzzy is not a known key. docs/configuration.md lists the keys',
  ]);
  assert.throws(
    () => parse(yaml),
    ({ message, details }: MartletError) => {
      assert.match(message, /^c\.yaml:4:7: dataset\.train\.0\.file_nme .*did you mean file_name\?$/m);
      assert.match(message, /… and 2 more \(details\.problems\)$/);
      assert.deepEqual([details.file, details.path, details.line], ['c.yaml', 'dataset.train.0.file_nme', 4]);
      return true;
    },
  );
});

test('contradictions are errors, agreements are not', () => {
  assert.deepEqual(problems(`${BASE}lora_rank: 8\nlora_args: { r: 16 }\n`), [
    '4: lora_args.r contradicts lora_rank, which sets the same option: keep one of them',
  ]);
  assert.equal(resolved('lora_rank: 8\nlora_args: { r: 8 }\n').lora_rank, 8);
  assert.deepEqual(problems(`${BASE}torch_dtype: bf16\nfp16: true\n`), [
    '4: fp16: true means torch_dtype float16, but torch_dtype says bfloat16: keep one of them',
  ]);
  assert.equal(resolved('torch_dtype: fp16\nfp16: true\nbf16: false\n').torch_dtype, 'float16');
  assert.match(
    problems('model: m\ndataset: { train: a, eval: b }\nval_dataset: c\n').join(),
    /contradicts dataset\.eval/,
  );
  for (const [keys, message] of [
    ['sft_type: full\nadapters: out', /adapters are not trained by sft_type: full/],
    ['sft_type: full\nuse_rslora: true', /use_rslora belongs to adapters/],
    ['sft_type: full\nlora_bias: all', /lora_bias belongs to adapters/],
    ['base_dtype: fp8\nsft_type: full', /base_dtype: fp8 is for frozen weights/],
    ['base_dtype: fp8\nsft_type: qlora', /base_dtype: fp8 and quantised weights/],
    ['base_dtype: fp8\nquant_bits: 8', /base_dtype: fp8 and quantised weights/],
    ['base_dtype: fp8\ntorch_dtype: fp16', /base_dtype: fp8 is for bfloat16, not for torch_dtype: float16/],
    ['base_dtype: fp8\ndevice: cpu', /base_dtype: fp8 needs a GPU/],
    ['base_dtype: fp8\ninit_weights: pissa', /init_weights: pissa takes the base weights apart/],
    ['base_dtype: fp9', /base_dtype is the text "fp9"/],
    ['val_dataset: v\neval_strategy: no\npredict_with_generate: true', /predict_with_generate needs evaluations/],
    ['val_dataset: v\nsave_strategy: no\nearly_stop_interval: 2', /early_stop_interval needs evaluations/],
    ['early_stop_interval: 2', /early_stop_interval needs evaluation rows/],
    ['load_best_model_at_end: true', /load_best_model_at_end needs evaluation rows/],
    ['non_finite: rollback\nsave_only_model: true', /save_only_model: non_finite: rollback goes back to checkpoints/],
  ] as const)
    assert.match(problems(`${BASE}${keys}\n`).join(), message);
});

test('base_dtype: fp8 goes with lora and lora_llm, comes back from args.yaml, and is what weights are loaded as', () => {
  assert.equal(resolved('').base_dtype, 'auto');
  assert.equal(quantizationOf(resolved('')), 'none');
  for (const more of ['', 'torch_dtype: bf16\ndevice: cuda\n', 'sft_type: lora_llm\n', 'use_dora: true\n']) {
    const config = resolved(`base_dtype: fp8\n${more}`);
    assert.equal(quantizationOf(config), 'fp8');
    const again = resolveTrainConfig(parseYaml(configToYaml(config)).value as object).config;
    assert.deepEqual(again, config);
    assert.equal(again.quant_bits, null);
  }
});

test('what is not supported is refused unless its value changes nothing', () => {
  const accepted = parse(`${BASE}packing: false\ndeepspeed: null\nuse_dora: false\nloss_scale: default\n`);
  assert.deepEqual(accepted.warnings, []);
  assert.deepEqual(problems(`${BASE}streaming: true\ndeepspeed: zero2\n`), [
    '3: streaming: true is not supported yet. Leave the key out',
    '4: deepspeed: "zero2" is not supported yet. Leave the key out',
  ]);
  assert.match(parse(`${BASE}dataset_num_proc: 4\n`).warnings.join(), /dataset_num_proc has no effect: rows/);
});

test('--set wins over the file, in either dialect, and is checked in the same way', () => {
  const config = resolved('lora_rank: 8\nlora_args: { lora_alpha: 16 }\n', [
    'lora_args.r=4',
    'train_args.learning_rate=1e-5',
    'target_modules=[q_proj, v_proj]',
    'evaluation_strategy=no',
    'dataset=a.json#3',
  ]);
  assert.deepEqual(
    [config.lora_rank, config.lora_alpha, config.learning_rate, config.target_modules, config.dataset],
    [4, 16, 1e-5, ['q_proj', 'v_proj'], [{ path: 'a.json', sample: 3 }]],
  );
  assert.equal(resolved('', { loraRank: 3 }).lora_rank, 3);
  assert.deepEqual(problems(BASE, ['lora_rnak=3', 'novalue', 'lora_rank=[', 'output_dir=', '__proto__.polluted=1']), [
    'undefined: --set novalue: write KEY=VALUE',
    'undefined: --set lora_rank=[: the value is not valid YAML: unexpected end of the stream within a flow collection',
    'undefined: --set lora_rnak is not a known key: did you mean lora_rank?',
    'undefined: --set __proto__ is not a known key. docs/configuration.md lists the keys',
    'undefined: --set output_dir is null: expected string, received null',
  ]);
  assert.equal(({} as Record<string, unknown>).polluted, undefined);
});

test('where only text will do, --set takes text that YAML would read as something else', () => {
  const config = resolved('', ['output_dir=2024', 'system=Answer: yes or no', 'model=1.5', 'experiment_name=true']);
  assert.deepEqual(
    [config.output_dir, config.system, config.model, config.experiment_name],
    ['2024', 'Answer: yes or no', '1.5', 'true'],
  );
  const other = resolved('system: x\n', ['system=null', 'resume_from_checkpoint=true']);
  assert.deepEqual([other.system, other.resume_from_checkpoint], [null, true]);
});

test('target modules: a name, a list, all-linear, a regular expression', () => {
  const modules = (yaml: string) => resolved(`target_modules: ${yaml}\n`).target_modules;
  assert.deepEqual(modules('q_proj'), ['q_proj']);
  assert.deepEqual(modules('[q_proj, self_attn.v_proj]'), ['q_proj', 'self_attn.v_proj']);
  assert.equal(modules('all-linear'), 'all-linear');
  assert.equal(modules('[all-linear]'), 'all-linear');
  assert.equal(modules("'.*\\.(q|v)_proj'"), '.*\\.(q|v)_proj');
  assert.match(problems(`${BASE}target_modules: []\n`).join(), /3: target_modules/);
});

test('names of the language are no keys and no values', () => {
  assert.equal(problems(`${BASE}constructor: 1\n__proto__: 2\n`).length, 2);
  assert.equal(parse('model: constructor\ndataset: toString\n').config.model, 'constructor');
});

test("dropout is the model's own; beside lora_rank the adapters' is meant", () => {
  assert.equal(resolved('').dropout, null);
  assert.equal(resolved('dropout: 0').dropout, 0);
  assert.equal(resolved('train_args:\n  dropout: 0.1').dropout, 0.1);
  assert.deepEqual(problems(`${BASE}lora_args:\n  dropout: 0.1`), [
    '4: lora_args.dropout is not a known key: did you mean lora_dropout?',
  ]);
  assert.match(problems(`${BASE}dropout: 1`)[0] as string, /^3: dropout/);
});

test('defaults that depend on other keys', () => {
  const lora = resolved('');
  assert.deepEqual([lora.learning_rate, lora.gradient_accumulation_steps, lora.eval_strategy], [1e-4, 16, 'no']);
  const full = resolved('sft_type: full\nper_device_train_batch_size: 3\nval_dataset: v.json\nsave_steps: 7\n');
  assert.deepEqual(
    [full.learning_rate, full.gradient_accumulation_steps, full.eval_strategy, full.eval_steps],
    [1e-5, 6, 'steps', 7],
  );
  assert.equal(resolved('strict: false\n').on_bad_row, 'skip');
});

test('packing needs the tokens of a packed row', () => {
  for (const keys of ['packing: true', 'packing: true\nmax_length: null\npacking_length: null']) {
    assert.match(problems(`${BASE}${keys}\n`)[0] as string, /packing: true needs packing_length or max_length/);
  }
  assert.equal(resolved('packing: true\nmax_length: 512\n').packing, true);
  assert.equal(resolved('packing: true\npacking_length: 512\n').packing, true);
});

test('args.yaml is a config file that gives the same config again', () => {
  const { config } = parse(`${BASE}system: "no"\nexperiment_name: "1e5"\nlearning_rate: 1e-7\nadapters: a\n`);
  assert.deepEqual(parse(configToYaml(config)).config, config);
});

test('a file that is none: missing, another ending, too large, empty', async () => {
  const cases: [string, string | undefined, RegExp][] = [
    ['none.yaml', undefined, /none\.yaml cannot be read/],
    ['config.txt', BASE, /ends in \.yaml, \.yml or \.json/],
    ['large.yaml', `#${'x'.repeat(2 ** 20)}\n${BASE}`, /a config has less than/],
    ['empty.yaml', '# nothing\n', /empty\.yaml is empty/],
  ];
  for (const [name, text, message] of cases) {
    const file = join(root, name);
    if (text !== undefined) writeFileSync(file, text);
    await assert.rejects(loadTrainConfig(file), { code: 'ERR_MARTLET_CONFIG', message });
  }
});

test('the example of the quickstart has no key that is ignored', () => {
  assert.deepEqual(parse(readFileSync(join(projectRoot, 'examples/quickstart/quickstart.yaml'), 'utf8')).warnings, []);
});
