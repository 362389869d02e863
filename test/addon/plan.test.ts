/** Memory plans: from a config.json alone, against what a run takes, and the tutorial's four sizes. */
import assert from 'node:assert/strict';
import { cp, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { describeModel, memoryOptions, predict } from '../../lib/api/memory-advice.js';
import { resolveTrainConfig } from '../../lib/config/index.js';
import { planTraining } from '../../lib/index.js';
import { cli } from '../support/cli.js';
import { engineFixtures } from '../support/engine-fixtures.js';
import { projectRoot } from '../support/fixtures.js';
import { smallConfig, train } from '../support/train.js';

const LLAVA_7B = join(engineFixtures, 'llava-1.5-7b');
const GIB = 2 ** 30;

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

test("the tutorial's 8, 12, 24 and 48 GB: plans for a 7B model that fit, the more memory the less is recomputed", async () => {
  const plans = await Promise.all(
    ['8GB', '12', '24GB', '48GB'].map((gpu) =>
      planTraining({ model: LLAVA_7B, max_length: 1024, per_device_train_batch_size: 4, lora_rank: 8 }, { gpu }),
    ),
  );
  for (const plan of plans) {
    assert.ok(plan.fits && plan.memory.total <= plan.budget, JSON.stringify(plan));
    const { total, ...parts } = plan.memory;
    assert.ok(Math.abs(total - Object.values(parts).reduce((a, b) => a + b, 0)) < 1);
    const { per_device_train_batch_size: batch = 4, gradient_accumulation_steps: steps = 4 } = plan.settings;
    assert.equal(batch * steps, 16, 'the rows of a step stay as many');
  }
  assert.deepEqual(
    plans.map(({ settings }) => settings.quant_bits),
    [4, 4, undefined, undefined],
  );
  assert.equal(plans[3]?.settings.gradient_checkpointing, 'none');
  assert.equal(plans[0]?.trainableParams, 19_988_480, "PEFT's count for rank 8 on the seven linears of 32 layers");
});

test('sizes of LLaVA-1.5-7B: weights, QLoRA at 1,024 tokens, LoRA at 8,192', async () => {
  const model = await describeModel(LLAVA_7B);
  const { config } = resolveTrainConfig({ model: LLAVA_7B, dataset: '-', lora_rank: 8 });
  const total = (tokens: number, changes: Parameters<typeof memoryOptions>[3]) =>
    predict(config, model, memoryOptions(config, model, tokens, changes)).total / GIB;
  const elements = model.parameters.reduce((sum, { numel }) => sum + numel, 0);
  assert.ok(elements > 7.0e9 && elements < 7.1e9, String(elements));
  const qlora = total(1024, { quantization: 'nf4', recompute: 'layer' });
  assert.ok(qlora > 4.5 && qlora < 8.3, String(qlora));
  const whole = total(8192, { recompute: 'layer' });
  assert.ok(whole > 15 && whole < 18.5, String(whole));
  const kept = total(8192, { recompute: 'cheap' });
  assert.ok(kept > 36 && kept < 42, String(kept));
});

test('fp8: a byte a weight of the language model and scales by rows; the rest as in bfloat16, activations too', async () => {
  const model = await describeModel(LLAVA_7B);
  const { config } = resolveTrainConfig({ model: LLAVA_7B, dataset: '-', lora_rank: 8, lora_dropout: 0 });
  const of = (quantization: 'none' | 'fp8') =>
    predict(config, model, memoryOptions(config, model, 16384, { quantization, recompute: 'none', cpu: false }));
  const [full, fp8] = [of('none'), of('fp8')];
  // Of 32 layers: q, k, v and output of 4,096 by 4,096; gate, up and down of 11,008 by 4,096.
  const elements = 32 * (4 * 4096 * 4096 + 3 * 11008 * 4096);
  const scales = 32 * 4 * (4 * (4096 + 4096) + 3 * (11008 + 4096));
  assert.equal(full.weights - fp8.weights, elements - scales);
  assert.equal(fp8.activations, full.activations, 'the layers are written out as in bfloat16');
  assert.equal(fp8.adapters + fp8.optimizer, full.adapters + full.optimizer);
  // Codes of the widest weight, transposed, and of its gradient.
  assert.equal(fp8.workspace - full.workspace, 2 * 11008 * (4096 + 16384));

  const asked = { model: LLAVA_7B, max_length: 1024, per_device_train_batch_size: 1, lora_rank: 8, base_dtype: 'fp8' };
  const own = await planTraining(asked, { gpu: '24GB' });
  assert.deepEqual([own.fits, own.settings.quant_bits, own.settings.base_dtype], [true, undefined, undefined]);
  const small = await planTraining(asked, { gpu: '8GB' });
  assert.deepEqual(
    [small.settings.sft_type, small.settings.quant_bits, small.settings.base_dtype],
    ['qlora', 4, 'auto'],
    'what is smaller takes its place',
  );
});

test('fp8: linears of sizes that it does not hold count as bfloat16, and their layers under autograd', async () => {
  const model = await describeModel(LLAVA_7B);
  const { config } = resolveTrainConfig({ model: LLAVA_7B, dataset: '-', lora_dropout: 0 });
  const odd = {
    ...model,
    linears: model.linears.map((linear) => (linear.path.endsWith('.down_proj') ? { ...linear, in: 11004 } : linear)),
  };
  const weights = (of: typeof model) =>
    predict(config, of, memoryOptions(config, of, 1024, { quantization: 'fp8' })).weights;
  assert.equal(weights(odd) - weights(model), 32 * (11008 * 4096 - 4 * (11008 + 4096)));
  assert.equal(memoryOptions(config, model, 1024, { quantization: 'fp8' }).writtenOut, true);
  assert.equal(memoryOptions(config, odd, 1024, { quantization: 'fp8' }).writtenOut, false);
});

test('a model that does not fit at all is said so; a config without its data is planned from max_length', async () => {
  const plan = await planTraining({ model: LLAVA_7B, max_length: 1024 }, { gpu: '2GB' });
  assert.equal(plan.fits, false);
  assert.match(plan.notes.join(), /nothing fits/);
  await assert.rejects(planTraining({ model: join(root, 'nowhere') }, { gpu: '8GB' }), {
    code: 'ERR_MARTLET_MODEL_NOT_FOUND',
  });
  const { code, stdout } = await cli([
    'plan',
    '--model',
    LLAVA_7B,
    '--gpu',
    '24GB',
    '--set',
    'max_length=1024',
    '--json',
  ]);
  assert.equal(code, 0);
  assert.equal(JSON.parse(stdout).tokens.source, 'max_length');
  const text = await cli(['plan', '--model', LLAVA_7B, '--gpu', '1GB']);
  assert.equal(text.code, 1);
  assert.match(text.stdout, /does not fit: about .* GiB[\s\S]*weights/);
});

test('a plan says that it does not count what a trained vision tower keeps', async () => {
  const notes = async (changes: object) =>
    (await planTraining({ model: LLAVA_7B, max_length: 1024, ...changes }, { gpu: '48GB' })).notes.join();
  assert.match(await notes({ freeze_vit: false }), /vision tower that is trained .* not counted/);
  assert.match(await notes({ sft_type: 'lora_llm' }), /not counted/);
  assert.doesNotMatch(await notes({ freeze_aligner: false }), /vision/);
});

test('LoRA without dropout keeps less: its layers are written out', async () => {
  const activations = async (changes: object) =>
    (
      await planTraining(
        { model: LLAVA_7B, max_length: 1024, gradient_checkpointing: 'none', lora_dropout: 0, ...changes },
        { gpu: '1000GB' },
      )
    ).memory.activations;
  const least = await activations({});
  for (const changes of [{ modules_to_save: ['lm_head'] }, { sft_type: 'qlora' }])
    assert.equal(await activations(changes), least);
  for (const changes of [
    { lora_dropout: 0.05 },
    { use_dora: true },
    { lora_bias: 'all' },
    { modules_to_save: ['all-norm'] },
    { trainable_parameters: ['norm'] },
  ])
    assert.ok((await activations(changes)) > 1.3 * least, JSON.stringify(changes));
});

test('the head gets no pair, whatever its name', async () => {
  const model = join(projectRoot, 'test/fixtures/minicpm_v_4_5/model'); // llm.lm_head
  const plan = await planTraining({ model, lora_rank: 4, max_length: 64 }, { gpu: '1GB' });
  assert.equal(plan.trainableParams, 14_080, 'as many as a run of it counts');
});

test('modules_to_save counts whole modules, which get no pairs', async () => {
  for (const modules_to_save of [['lm_head'], ['v_proj', 'lm_head'], ['layers.1']]) {
    const changes = { modules_to_save, target_modules: ['q_proj', 'v_proj'], max_steps: 1, save_strategy: 'no' };
    const dir = join(root, `saved ${modules_to_save}`);
    await mkdir(dir);
    const config = smallConfig(dir, changes);
    const plan = await planTraining(config, { gpu: '8GB' });
    const { result } = await train(config);
    assert.equal(plan.trainableParams, result.trainableParams, modules_to_save.join());
  }
});

test('the rows of the data are measured', async () => {
  const dir = join(root, 'data');
  await mkdir(dir);
  const plan = await planTraining(smallConfig(dir), { gpu: '1GB' });
  assert.deepEqual([plan.tokens.source, plan.fits], ['data', true]);
  assert.ok(plan.tokens.longest > 60);
});

test('torch_dtype: auto counts bytes as the weights are stored, else as config.json says', async () => {
  const plan = (model: string, changes: object = {}) =>
    planTraining({ model, max_length: 64, lora_rank: 4, ...changes }, { gpu: '1GB' });
  const weights = async (model: string, changes?: object) => (await plan(model, changes)).memory.weights;
  const stored = join(projectRoot, 'test/fixtures/llava/model-4x');
  assert.equal(await weights(stored), await weights(stored, { torch_dtype: 'float32' }));
  assert.equal(await weights(stored), 2 * (await weights(stored, { torch_dtype: 'bfloat16' })));
  const config = JSON.parse(await readFile(join(stored, 'config.json'), 'utf8'));
  for (const [name, files] of Object.entries({
    // the weights win over what config.json says
    both: { config: { ...config, torch_dtype: 'float16' }, weights: true },
    config: { config, weights: false },
    nested: { config: { ...config, torch_dtype: undefined }, weights: false },
  })) {
    const dir = join(root, `dtype-${name}`);
    await cp(stored, dir, { recursive: true, filter: (path) => files.weights || !/safetensors/.test(path) });
    await writeFile(join(dir, 'config.json'), JSON.stringify(files.config));
    assert.equal(await weights(dir), await weights(stored), name);
  }
  const half = join(root, 'dtype-half');
  await mkdir(half);
  await writeFile(join(half, 'config.json'), JSON.stringify({ ...config, torch_dtype: 'float16' }));
  assert.equal(await weights(half), (await weights(stored)) / 2);
});

/** The published Qwen-VL-Chat's config.json where it differs from the fixture's. */
const QWEN_VL_CHAT = {
  hidden_size: 4096,
  num_hidden_layers: 32,
  num_attention_heads: 32,
  intermediate_size: 22016,
  vocab_size: 151936,
  fp32: false,
  bf16: true,
  torch_dtype: 'bfloat16',
  visual: {
    width: 1664,
    layers: 48,
    heads: 16,
    mlp_ratio: 4.9231,
    image_size: 448,
    patch_size: 14,
    output_dim: 4096,
    image_start_id: 151857,
  },
};

test("the tutorial's settings for Qwen-VL-Chat itself: 12, 24 and 48 GB fit with the same rows in a step, 8 GB cannot", async () => {
  const model = join(root, 'qwen-vl-chat');
  await mkdir(model);
  const config = JSON.parse(
    await readFile(join(projectRoot, 'test/fixtures/qwen_vl_chat/model/config.json'), 'utf8'),
  ) as object;
  await writeFile(join(model, 'config.json'), JSON.stringify({ ...config, ...QWEN_VL_CHAT }));
  const { parameters } = await describeModel(model);
  const elements = parameters.reduce((sum, { numel }) => sum + numel, 0);
  assert.ok(elements > 9.6e9 && elements < 9.7e9, `${elements}`);
  const settings = [
    { gpu: '8GB', batch: 1, steps: 8, torch_dtype: 'int8', sft_type: 'qlora' },
    { gpu: '12GB', batch: 1, steps: 4, torch_dtype: 'fp16', sft_type: 'lora' },
    { gpu: '24GB', batch: 2, steps: 2, torch_dtype: 'fp16', sft_type: 'lora' },
    { gpu: '48GB', batch: 4, steps: 1, torch_dtype: 'bf16', sft_type: 'lora' },
  ];
  const plans = await Promise.all(
    settings.map(({ gpu, batch, steps, ...rest }) =>
      planTraining(
        {
          model,
          ...rest,
          lora_rank: 8,
          target_modules: ['c_attn', 'qkv_proj'],
          per_device_train_batch_size: batch,
          gradient_accumulation_steps: steps,
          gradient_checkpointing: true,
          max_length: 1024,
        },
        { gpu },
      ),
    ),
  );
  const [small, ...others] = plans;
  for (const [i, plan] of plans.entries()) {
    const { batch = 0, steps = 0 } = settings[i] ?? {};
    const { per_device_train_batch_size = batch, gradient_accumulation_steps = steps } = plan.settings;
    assert.equal(per_device_train_batch_size * gradient_accumulation_steps, batch * steps);
    assert.equal(plan.trainableParams, 32 * 8 * (4096 + 3 * 4096), 'c_attn of every layer');
  }
  for (const plan of others) {
    assert.ok(plan.fits && plan.memory.total <= plan.budget, JSON.stringify(plan));
    assert.equal(plan.tokens.longest, 1024, 'rows are not cut');
  }
  assert.equal(others[0]?.settings.quant_bits, 4, '19 GB of fp16 weights fit no 12 GB');
  // Its tower, embeddings and head are 6.4 GB in 16 bits, its layers 3.3 GB in NF4: no setting makes 8 GB of it, and the plan says so.
  assert.equal(small?.fits, false);
  assert.equal(small?.settings.quant_bits, 4, 'int8 gives way to what is smaller');
  assert.match(small?.notes.join() ?? '', /nothing fits/);
  const least = await planTraining(
    { model, sft_type: 'qlora', target_modules: ['c_attn'], max_length: 1024 },
    { gpu: '12GB' },
  );
  assert.ok((small?.memory.weights ?? 0) > (small?.budget ?? 0) && least.fits, 'the weights alone are more');
});
