/** Memory plans: from a config.json alone, against what a run takes, and the tutorial's four sizes. */
import assert from 'node:assert/strict';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { describeModel, memoryOptions, predict } from '../../lib/api/memory-advice.js';
import { resolveTrainConfig } from '../../lib/config/index.js';
import { planTraining } from '../../lib/index.js';
import { cli } from '../support/cli.js';
import { engineFixtures } from '../support/engine-fixtures.js';
import { projectRoot } from '../support/fixtures.js';
import { smallConfig } from '../support/train.js';

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
  const total = (tokens: number, changes: Parameters<typeof memoryOptions>[2]) =>
    predict(config, model, memoryOptions(config, tokens, changes)).total / GIB;
  const elements = model.parameters.reduce((sum, { numel }) => sum + numel, 0);
  assert.ok(elements > 7.0e9 && elements < 7.1e9, String(elements));
  const qlora = total(1024, { quantization: 'nf4', recompute: 'layer' });
  assert.ok(qlora > 4.5 && qlora < 8.3, String(qlora));
  const whole = total(8192, { recompute: 'layer' });
  assert.ok(whole > 15 && whole < 18.5, String(whole));
  const kept = total(8192, { recompute: 'cheap' });
  assert.ok(kept > 36 && kept < 42, String(kept));
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

test('the head gets no pair, whatever its name', async () => {
  const model = join(projectRoot, 'test/fixtures/minicpm_v_4_5/model'); // llm.lm_head
  const plan = await planTraining({ model, lora_rank: 4, max_length: 64 }, { gpu: '1GB' });
  assert.equal(plan.trainableParams, 14_080, 'as many as a run of it counts');
});

test('the rows of the data are measured', async () => {
  const dir = join(root, 'data');
  await mkdir(dir);
  const plan = await planTraining(smallConfig(dir), { gpu: '1GB' });
  assert.deepEqual([plan.tokens.source, plan.fits], ['data', true]);
  assert.ok(plan.tokens.longest > 60);
});
