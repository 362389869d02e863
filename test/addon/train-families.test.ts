/** The training engine's options on every family: through the modules, not through the families. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { mergeAdapter, planTraining, quantizeModel, type TrainEvent } from '../../lib/index.js';
import { QWEN_FAMILIES, qwenDir } from '../support/qwen-vl.js';
import { qwenConfig } from '../support/qwen-vl-train.js';
import { digest, losses, steps, train } from '../support/train.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtemp(join(root, 'run-'));
const start = (events: TrainEvent[]) => events[0] as Extract<TrainEvent, { type: 'start' }>;
const fast = { max_steps: 2, save_strategy: 'no', lora_dropout: 0.05 };

for (const family of QWEN_FAMILIES) {
  describe(family, () => {
    test('every level of recompute gives the same adapter to the bit, with vision trained too', async () => {
      const digests = new Set<string>();
      for (const level of ['none', 'cheap', 'mlp', 'layer']) {
        const dir = await folder();
        const { events } = await train(
          qwenConfig(dir, family, {
            ...fast,
            gradient_checkpointing: level,
            freeze_vit: false,
            freeze_aligner: false,
            use_dora: true,
          }),
        );
        const { parts } = start(events);
        assert.ok(parts.vision > 0 && parts.projector > 0 && parts.language > 0);
        digests.add(digest(join(dir, 'out', 'adapter_model.safetensors')));
      }
      assert.equal(digests.size, 1);
    });

    test('qlora on nf4 and int8, lora_llm, whole modules; merged', async () => {
      for (const changes of [
        { sft_type: 'qlora' },
        { sft_type: 'qlora', quant_bits: 8 },
        { sft_type: 'lora_llm', optim: 'adamw_8bit', vit_lr: 1e-5 },
        { modules_to_save: ['merger'], optim: 'adafactor' },
      ]) {
        const dir = await folder();
        const { events, result } = await train(qwenConfig(dir, family, { ...fast, ...changes }));
        assert.ok(losses(events).every(Number.isFinite));
        const merged = await mergeAdapter({ adapter: result.adapterDir, outputDir: join(dir, 'merged') });
        assert.ok(merged.mergedTensors >= 21, JSON.stringify(changes));
      }
      const outputDir = join(await folder(), 'nf4');
      const model = qwenConfig(await folder(), family).model as string;
      const { quantizedTensors } = await quantizeModel({ model, outputDir, quantization: 'nf4', device: 'cpu' });
      assert.equal(quantizedTensors, 21);
      const { quantization_config: config } = JSON.parse(readFileSync(join(outputDir, 'config.json'), 'utf8'));
      assert.ok(config.llm_int8_skip_modules.includes('model.visual'));
    });

    test('packing and cutting rows: pictures and videos whole, as many tokens as said', async () => {
      const packed = await train(qwenConfig(await folder(), family, { ...fast, packing: true, packing_length: 256 }));
      assert.ok(losses(packed.events).every(Number.isFinite));
      for (const strategy of ['left', 'right', 'split']) {
        const { events } = await train(
          qwenConfig(await folder(), family, {
            ...fast,
            max_length: 48,
            truncation_strategy: strategy,
            on_bad_row: 'skip',
            per_device_train_batch_size: 1,
            gradient_accumulation_steps: 1,
          }),
        );
        assert.ok(steps(events).every(({ tokens }, i) => tokens <= 48 * (i + 1)));
      }
    });

    test('a plan from config.json alone', async () => {
      const plan = await planTraining({ model: qwenDir(family, 'model-4x'), max_length: 64 }, { gpu: '1GB' });
      assert.ok(plan.fits && plan.trainableParams > 0);
    });
  });
}
