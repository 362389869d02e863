/** Every option of the training engine through a config: it runs, does what it says, and refuses what it cannot do. */
import assert from 'node:assert/strict';
import { cpSync, existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { loadModel, mergeAdapter, quantizeModel, type TrainEvent, trainLoRA } from '../../lib/index.js';
import { Engine } from '../../lib/native/engine.js';
import { cases, getCase, llava } from '../support/fixtures.js';
import { temporaryFolders } from '../support/folders.js';
import { modelWithBadToken, modelWithLargeHead, tokenOnlyIn } from '../support/planted.js';
import { type FixtureTensor, patchTensor, readSafetensors } from '../support/safetensors.js';
import { digest, losses, MODEL, smallConfig, steps, train } from '../support/train.js';

const folder = temporaryFolders();
const adapterOf = (dir: string) => digest(join(dir, 'out', 'adapter_model.safetensors'));
const adapterConfig = (dir: string) => JSON.parse(readFileSync(join(dir, 'out', 'adapter_config.json'), 'utf8'));
const keysOf = (dir: string) => [...readSafetensors(join(dir, 'out', 'adapter_model.safetensors')).keys()];
const start = (events: TrainEvent[]) => events[0] as Extract<TrainEvent, { type: 'start' }>;
const warnings = (events: TrainEvent[]) =>
  events.flatMap((event) => (event.type === 'warning' ? [event.message] : [])).join('\n');
const row = (name: string) => {
  const { messages, images } = getCase(name);
  return { messages, images: images.map((image) => join(llava, 'images', image)) };
};
const fast = { save_strategy: 'no', max_steps: 3 };

describe('optimisers and schedules', () => {
  for (const optim of ['adamw_torch', 'adamw_8bit', 'paged_adamw_8bit', 'paged_adamw_32bit', 'sgd', 'adafactor']) {
    test(`${optim}: learns, and a continued run gives the same bits`, async () => {
      const changes = {
        optim,
        max_steps: 6,
        save_steps: 3,
        lora_rank: 64, // large enough for 8-bit moments
        learning_rate: optim === 'sgd' ? 0.1 : 2e-3,
        ...(optim === 'sgd' && { optim_args: 'momentum=0.9,nesterov=true' }),
      };
      const learning = await folder();
      const single = await train(smallConfig(learning, { ...changes, dataset: await valFile(learning) }));
      const curve = losses(single.events);
      assert.ok((curve.at(-1) as number) < (curve[0] as number) - 0.2, String(curve));
      const whole = await folder();
      await train(smallConfig(whole, changes));
      const cut = await folder();
      const run = trainLoRA(smallConfig(cut, changes));
      for await (const event of run) if (event.type === 'checkpoint' && event.step === 3) break;
      await train(smallConfig(cut, { ...changes, resume_from_checkpoint: true }));
      assert.equal(adapterOf(cut), adapterOf(whole));
    });
  }

  test('paged states are the plain ones on the CPU', async () => {
    const [a, b] = [await folder(), await folder()];
    await train(smallConfig(a, fast));
    await train(smallConfig(b, { ...fast, optim: 'paged_adamw' }));
    assert.equal(adapterOf(a), adapterOf(b));
  });

  test('lr_scheduler_kwargs reach the schedule, as an object or as JSON', async () => {
    for (const kwargs of [{ min_lr: 1e-3 }, '{"min_lr": 0.001}']) {
      const { events } = await train(
        smallConfig(await folder(), {
          ...fast,
          lr_scheduler_type: 'cosine_with_min_lr',
          lr_scheduler_kwargs: kwargs,
          warmup_steps: 1,
        }),
      );
      const rates = steps(events).map(({ learningRate }) => learningRate);
      assert.equal(rates[0], 0);
      assert.ok(
        Math.abs((rates[2] as number) - (0.5 * (1 + Math.cos(Math.PI / 2)) * 0.8 + 0.2) * 5e-3) < 1e-12,
        String(rates),
      );
    }
  });

  test('neftune, label smoothing and dropout change the run, and the same seed repeats it', async () => {
    const plain = await folder();
    await train(smallConfig(plain, { ...fast, lora_dropout: 0 }));
    for (const changes of [{ neftune_noise_alpha: 5 }, { label_smoothing_factor: 0.1 }]) {
      const [a, b] = [await folder(), await folder()];
      for (const dir of [a, b]) await train(smallConfig(dir, { ...fast, lora_dropout: 0, ...changes }));
      assert.equal(adapterOf(a), adapterOf(b));
      assert.notEqual(adapterOf(a), adapterOf(plain));
    }
  });

  test('every level of recompute gives the same adapter to the bit', async () => {
    const digests = [];
    for (const level of [false, 'cheap', 'mlp', true, 'auto']) {
      const dir = await folder();
      await train(smallConfig(dir, { ...fast, gradient_checkpointing: level }));
      digests.push(adapterOf(dir));
    }
    assert.equal(new Set(digests).size, 1);
  });
});

describe('what is trained', () => {
  test('DoRA, rsLoRA, initialisations: they run, load again, and score as they did in training', async () => {
    for (const changes of [
      { use_dora: true },
      { use_rslora: true },
      { init_weights: 'gaussian' },
      { init_weights: false, lora_alpha: 1, lora_dropout: 0, learning_rate: 2e-3 },
      { init_weights: 'pissa' },
      { init_weights: 'pissa_niter_4' },
      { lorap_lr_ratio: 4, learning_rate: 1e-3 },
    ]) {
      const dir = await folder();
      const { events } = await train(
        smallConfig(dir, {
          ...fast,
          max_steps: 6,
          dataset: await valFile(dir),
          val_dataset: await valFile(dir),
          eval_strategy: 'steps',
          eval_steps: 6,
          ...changes,
        }),
      );
      const curve = losses(events);
      assert.ok((curve.at(-1) as number) < (curve[0] as number) - 0.1, `${JSON.stringify(changes)} ${curve}`);
      const evaluated = events.find((event) => event.type === 'eval');
      const model = await loadModel(MODEL, { device: 'cpu', adapters: { a: join(dir, 'out') } });
      const { loss } = await model.score(row('single'));
      await model.dispose();
      assert.ok(
        Math.abs(loss - (evaluated?.loss as number)) < 2e-4,
        `${JSON.stringify(changes)} ${loss} ${evaluated?.loss}`,
      );
    }
  });

  test('lora_dtype is the dtype of the saved pairs', async () => {
    const dir = await folder();
    await train(smallConfig(dir, { ...fast, torch_dtype: 'bfloat16', lora_dtype: 'float32' }));
    const header = (path: string) => {
      const bytes = readFileSync(path);
      return JSON.parse(bytes.subarray(8, 8 + Number(bytes.readBigUInt64LE(0))).toString()) as Record<
        string,
        { dtype?: string }
      >;
    };
    const dtypes = (folderName: string) =>
      new Set(
        Object.values(header(join(folderName, 'out', 'adapter_model.safetensors'))).flatMap(({ dtype }) => dtype ?? []),
      );
    assert.deepEqual([...dtypes(dir)], ['F32']);
    const half = await folder();
    await train(smallConfig(half, { ...fast, torch_dtype: 'bfloat16', lora_dtype: 'bfloat16' }));
    assert.deepEqual([...dtypes(half)], ['BF16']);
  });

  test('modules_to_save, biases and trainable_parameters are saved with the adapter, and merged', async () => {
    const dir = await folder();
    const { events } = await train(
      smallConfig(dir, {
        ...fast,
        modules_to_save: ['lm_head', 'multi_modal_projector'],
        trainable_parameters: ['model.language_model.norm'],
        target_modules: ['q_proj'],
      }),
    );
    assert.ok(start(events).parts.projector > 0);
    const keys = keysOf(dir);
    for (const key of [
      'lm_head.weight',
      'model.multi_modal_projector.linear_1.bias',
      'model.language_model.norm.weight',
    ]) {
      assert.ok(keys.includes(`base_model.model.${key}`), key);
    }
    assert.deepEqual(adapterConfig(dir).modules_to_save.sort(), [
      'lm_head',
      'model.language_model.norm',
      'model.multi_modal_projector',
    ]);
    const merged = await mergeAdapter({ adapter: join(dir, 'out'), outputDir: join(dir, 'merged') });
    assert.equal(merged.mergedTensors, 3 + 1 + 4 + 1);
    const model = await loadModel(MODEL, { device: 'cpu', adapters: { a: join(dir, 'out') } });
    const whole = await loadModel(merged.outputDir, { device: 'cpu' });
    const [a, b, base] = [
      await model.score(row('single')),
      await whole.score(row('single')),
      await model.score({ ...row('single'), adapter: null }),
    ];
    await Promise.all([model.dispose(), whole.dispose()]);
    assert.ok(Math.abs(a.loss - b.loss) < 1e-5);
    assert.ok(Math.abs(a.loss - base.loss) > 1e-2, 'the base model has its own head again');

    const biased = await folder();
    await train(
      smallConfig(biased, {
        ...fast,
        lora_bias: 'lora_only',
        freeze_vit: false,
        target_modules: '.*vision_tower.*q_proj',
      }),
    );
    assert.ok(keysOf(biased).some((key) => key.endsWith('q_proj.base_layer.bias')));
    assert.equal(adapterConfig(biased).bias, 'lora_only');
  });

  test('modules_to_save wins over target_modules, as in PEFT', async () => {
    const dir = await folder();
    const { events } = await train(
      smallConfig(dir, {
        ...fast,
        modules_to_save: ['v_proj', 'layers.1.self_attn'],
        target_modules: ['q_proj', 'v_proj'],
      }),
    );
    assert.equal(start(events).targets, 2, 'q_proj of the language model in the layers 0 and 2');
    assert.match(warnings(events), /target_modules match 5 module\(s\) of modules_to_save \(v_proj\).*as in PEFT/);
    assert.match(warnings(events), /target_modules match 2 module\(s\) of modules_to_save \(layers\.1\.self_attn\)/);
    const keys = keysOf(dir);
    assert.ok(keys.some((key) => key.endsWith('layers.0.self_attn.v_proj.weight')));
    assert.ok(keys.some((key) => key.endsWith('layers.1.self_attn.k_proj.weight')));
    assert.ok(!keys.some((key) => /(v_proj|layers\.1\.self_attn\.\w+)\.lora_/.test(key)));
    const model = await loadModel(MODEL, { device: 'cpu', adapters: { a: join(dir, 'out') } });
    await model.dispose();

    await assert.rejects(
      train(smallConfig(await folder(), { ...fast, modules_to_save: ['v_proj'], target_modules: ['v_proj'] })),
      { code: 'ERR_MARTLET_CONFIG', message: /did match are trained as a whole, by modules_to_save \(v_proj\)/ },
    );
    await assert.rejects(
      train(
        smallConfig(await folder(), {
          ...fast,
          sft_type: 'qlora',
          modules_to_save: ['v_proj'],
          target_modules: ['q_proj', 'v_proj'],
        }),
      ),
      { code: 'ERR_MARTLET_CONFIG', message: /v_proj\.weight is quantised.*Use lora instead/ },
    );
  });

  test('lora_llm: adapters on the language model, vision tower and projector in full, each with its rate', async () => {
    const dir = await folder();
    const { events } = await train(smallConfig(dir, { ...fast, sft_type: 'lora_llm', vit_lr: 1e-5, aligner_lr: 1e-4 }));
    const { parts } = start(events);
    assert.ok(parts.vision > 50_000 && parts.projector > 5_000 && parts.language > 0);
    const keys = keysOf(dir);
    assert.ok(keys.some((key) => key.includes('vision_tower') && key.endsWith('layer_norm1.weight')));
    assert.ok(!keys.some((key) => /(vision_tower|multi_modal_projector).*lora_/.test(key)));
    const before = new Map(
      [1, 2].flatMap((i) => [...readSafetensors(join(MODEL, `model-0000${i}-of-00002.safetensors`))]),
    );
    const after = readSafetensors(join(dir, 'out', 'adapter_model.safetensors'));
    const moved = (key: string, old: string) => {
      const [a, b] = [after.get(key)?.data, before.get(old)?.data];
      assert.ok(a && b, key);
      return Math.max(...a.map((value, i) => Math.abs(value - (b[i] as number))));
    };
    const [stored] = [...before.keys()].filter((key) => /vision_tower.*encoder\.layers\.0\.mlp\.fc1\.weight/.test(key));
    const vision = moved('base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.weight', stored as string);
    assert.ok(vision > 1e-6 && vision < 1e-4, String(vision));
  });

  test('a name that matches nothing is a warning with the nearest names; none matching is an error', async () => {
    const { events } = await train(smallConfig(await folder(), { ...fast, target_modules: ['q_proj', 'v_porj'] }));
    assert.match(warnings(events), /v_porj matches nothing in this model\. Near: v_proj/);
    await assert.rejects(train(smallConfig(await folder(), { ...fast, target_modules: ['v_porj'] })), {
      code: 'ERR_MARTLET_CONFIG',
      message: /v_proj/,
    });
    await assert.rejects(train(smallConfig(await folder(), { ...fast, target_modules: ['lm_head'] })), {
      code: 'ERR_MARTLET_CONFIG',
      message: /lm_head gets no adapter: .* modules_to_save trains it as a whole/,
    });
    const beside = await train(smallConfig(await folder(), { ...fast, target_modules: ['q_proj', 'embed_tokens'] }));
    assert.match(warnings(beside.events), /embed_tokens gets no adapter/);
    assert.doesNotMatch(warnings(beside.events), /matches nothing/);
    await assert.rejects(train(smallConfig(await folder(), { ...fast, modules_to_save: ['lm_haed'] })), {
      code: 'ERR_MARTLET_CONFIG',
      message: /lm_head/,
    });
    const full = await train(
      smallConfig(await folder(), {
        ...fast,
        sft_type: 'full',
        learning_rate: 1e-4,
        freeze_llm: true,
        trainable_parameters: ['model.language_model.layers.2.', 'no.such'],
      }),
    );
    assert.match(warnings(full.events), /no\.such matches nothing/);
    assert.ok(start(full.events).parts.language > 0 && start(full.events).parts.vision === 0);
    await assert.rejects(
      train(
        smallConfig(await folder(), {
          ...fast,
          sft_type: 'full',
          freeze_parameters: [''].concat('model', 'lm_head').slice(1),
        }),
      ),
      { code: 'ERR_MARTLET_CONFIG', message: /Nothing is left to train/ },
    );
  });

  test('parameters chosen by expressions: trained beside adapters, frozen in full training, alone or by a share', async () => {
    const regex = String.raw`language_model\.(layers\.1\..*norm|norm)`;
    const dir = await folder();
    await train(smallConfig(dir, { ...fast, target_modules: ['q_proj'], trainable_parameters_regex: regex }));
    const whole = keysOf(dir).filter((key) => !key.includes('lora_'));
    assert.deepEqual(
      whole.sort(),
      ['layers.1.input_layernorm', 'layers.1.post_attention_layernorm', 'norm'].map(
        (name) => `base_model.model.model.language_model.${name}.weight`,
      ),
    );

    const before = readModel(MODEL);
    const changed = async (changes: Record<string, unknown>) => {
      const out = await folder();
      await train(smallConfig(out, { ...fast, sft_type: 'full', learning_rate: 1e-4, ...changes }));
      const found = readModel(join(out, 'out'));
      assert.equal(found.size, before.size);
      return [...found].filter(([name, { data }]) => data.some((x, i) => x !== before.get(name)?.data[i]));
    };
    const kept = /mlp|norm|embed_tokens|lm_head/;
    const some = (await changed({ freeze_parameters_regex: kept.source })).map(([name]) => name);
    assert.equal(some.length, 3 * 4, 'the attentions of three layers');
    assert.ok(some.every((name) => !kept.test(name)));
    // beats what is frozen
    const both = await changed({ freeze_parameters_regex: '.', trainable_parameters_regex: 'lm_head' });
    assert.deepEqual(
      both.map(([name]) => name),
      ['language_model.lm_head.weight'],
    );
    const all = (await changed({})).length;
    const late = (await changed({ freeze_parameters_ratio: 0.9 })).length;
    assert.ok(late > 0 && late < all / 2, `${late} of ${all}`);
    for (const key of ['trainable_parameters_regex', 'freeze_parameters_regex']) {
      await assert.rejects(train(smallConfig(await folder(), { ...fast, sft_type: 'full', [key]: '(' })), {
        code: 'ERR_MARTLET_CONFIG',
        message: new RegExp(key.replace('_regex', '')),
      });
    }
  });

  test('a run from an adapter says which options the adapter settles; rates of frozen parts are said to do nothing', async () => {
    const dir = await folder();
    const { events } = await train(smallConfig(dir, { ...fast, max_steps: 1, vit_lr: 1e-5, aligner_lr: 1e-5 }));
    assert.match(warnings(events), /vit_lr has no effect: nothing of the vision tower is trained/);
    assert.match(warnings(events), /aligner_lr has no effect: nothing of the projector is trained/);
    const warm = async (changes: Record<string, unknown>) => {
      const config = smallConfig(await folder(), { ...fast, max_steps: 1, adapters: join(dir, 'out'), ...changes });
      const warmed = await train(config);
      assert.equal(start(warmed.events).targets, 21, 'the modules of the adapter');
      return warnings(warmed.events);
    };
    assert.match(
      await warm({ lora_rank: 16, use_dora: true, modules_to_save: ['lm_head'], target_modules: ['q_proj'] }),
      /lora_rank, use_dora, target_modules, modules_to_save: without effect/,
    );
    assert.doesNotMatch(await warm({ target_modules: 'all-linear' }), /without effect/);
    assert.match(
      await warm({ freeze_llm: true, freeze_vit: false }),
      /freeze_llm: true is without effect: the adapter in .* holds 21 pair\(s\) of the language model \(.*, …\)/,
    );

    const eyes = await folder();
    await train(
      smallConfig(eyes, { ...fast, max_steps: 1, freeze_vit: false, target_modules: '.*vision_tower.*q_proj' }),
    );
    const seen = await train(smallConfig(await folder(), { ...fast, max_steps: 1, adapters: join(eyes, 'out') }));
    assert.ok(start(seen.events).parts.vision > 0);
    assert.match(
      warnings(seen.events),
      /freeze_vit: true is without effect: .* holds \d+ pair\(s\) of the vision tower/,
    );
  });

  test('lora_target: all means all-linear; a list beside it wins, as in the tutorial', async () => {
    const all = await train(smallConfig(await folder(), { ...fast, max_steps: 1, lora_target: 'all' }));
    assert.equal(start(all.events).targets, 21);
    const listed = await train(
      smallConfig(await folder(), { ...fast, max_steps: 1, lora_target: 'all', target_modules: ['q_proj'] }),
    );
    assert.equal(start(listed.events).targets, 3);
  });
});

/** The tensors of every shard of a model folder. */
function readModel(dir: string): Map<string, FixtureTensor> {
  const shards = readdirSync(dir).filter((name) => name.endsWith('.safetensors'));
  return new Map(shards.flatMap((name) => [...readSafetensors(join(dir, name))]));
}

async function valFile(dir: string): Promise<string> {
  const path = join(dir, 'val.json');
  writeFileSync(path, JSON.stringify([row('single')]));
  return path;
}

describe('quantised bases', () => {
  test('qlora: trains on nf4 or int8, whichever way it is asked for; merges onto either base', async () => {
    for (const [changes, method] of [
      [{ sft_type: 'qlora' }, 'nf4'],
      [{ quant_method: 'bnb', quant_bits: 8 }, 'int8'],
      [{ torch_dtype: 'int8' }, 'int8'],
    ] as const) {
      const dir = await folder();
      const config = smallConfig(dir, { ...fast, max_steps: 6, ...changes });
      if (!('torch_dtype' in changes)) config.torch_dtype = 'float32';
      const { events } = await train(config);
      const curve = losses(events);
      assert.ok((curve.at(-1) as number) < (curve[0] as number) - 0.2, String(curve));
      const out = join(dir, 'out');
      const original = await mergeAdapter({ adapter: out, outputDir: join(dir, 'original') });
      const quantized = await mergeAdapter({ adapter: out, outputDir: join(dir, 'quantized'), base: 'quantized' });
      const scores: number[] = [];
      for (const load of [
        () => loadModel(MODEL, { device: 'cpu', dtype: 'float32', quantization: method, adapters: { a: out } }),
        () => loadModel(quantized.outputDir, { device: 'cpu', dtype: 'float32' }),
        () => loadModel(original.outputDir, { device: 'cpu', dtype: 'float32' }),
      ]) {
        const model = await load();
        scores.push((await model.score(row('single'))).loss);
        await model.dispose();
      }
      const [trained, onQuantized, onOriginal] = scores as [number, number, number];
      assert.ok(Math.abs(trained - onQuantized) < 1e-4, `what was trained: ${scores}`);
      assert.ok(Math.abs(trained - onOriginal) < 0.5 && onOriginal !== onQuantized, String(scores));
    }
    await assert.rejects(
      mergeAdapter({
        adapter: join(llava, 'adapter-peft'),
        model: MODEL,
        outputDir: join(await folder(), 'never'),
        base: 'quantized',
      }),
      { code: 'ERR_MARTLET_USAGE', message: /quant_bits/ },
    );
  });

  test('fp8: refused on the CPU with what it needs, and an adapter trained on it merges into the weights it leaves', async () => {
    await assert.rejects(train(smallConfig(await folder(), { ...fast, torch_dtype: 'bfloat16', base_dtype: 'fp8' })), {
      code: 'ERR_MARTLET_CONFIG',
      message: /base_dtype: fp8 needs a GPU/,
    });
    const engine = new Engine();
    await assert.rejects(
      engine.call('load', { modelDir: MODEL, device: 'cpu', dtype: 'bfloat16', quantization: 'fp8' }),
      { code: 'ERR_MARTLET_CONFIG', message: /compute capability 9\.0.*Leave base_dtype out/ },
    );
    await engine.close();

    const dir = await folder();
    await train(smallConfig(dir, { ...fast, torch_dtype: 'bfloat16' }));
    const out = join(dir, 'out');
    const args = join(out, 'args.yaml');
    writeFileSync(args, readFileSync(args, 'utf8').replace('base_dtype: auto', 'base_dtype: fp8'));
    const [original, rounded] = await Promise.all(
      (['original', 'quantized'] as const).map(async (base) => {
        const merged = await mergeAdapter({ adapter: out, outputDir: join(dir, base), base });
        return readSafetensors(join(merged.outputDir, 'model.safetensors'));
      }),
    );
    assert(original && rounded);
    for (const [name, tensor] of original) {
      const [a, b] = [tensor.data, rounded.get(name)?.data] as [Float32Array, Float32Array];
      const isBase = /language_model.*_proj\.weight$/.test(name);
      // e4m3: three bits behind the point, of numbers that are not the least.
      const largest = a.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
      const off = a.reduce((most, value, i) => Math.max(most, Math.abs(value - (b[i] as number))), 0);
      assert.ok(isBase ? off > 0 && off < largest / 16 : off === 0, `${name}: ${off} of ${largest}`);
    }
    assert.doesNotMatch(readFileSync(join(dir, 'quantized', 'args.yaml'), 'utf8'), /fp8/);
  });

  test('a model saved quantised is smaller, loads as it is, trains, and gives the same loss as quantising on load', async () => {
    for (const quantization of ['nf4', 'int8'] as const) {
      const outputDir = join(await folder(), quantization);
      const report = await quantizeModel({ model: MODEL, outputDir, quantization, dtype: 'float32', device: 'cpu' });
      assert.equal(report.quantizedTensors, 21);
      const config = JSON.parse(readFileSync(join(outputDir, 'config.json'), 'utf8'));
      assert.deepEqual(config.quantization_config.llm_int8_skip_modules.sort(), [
        'lm_head',
        'model.multi_modal_projector',
        'model.vision_tower',
        'multi_modal_projector',
        'vision_tower',
      ]);
      const [stored, onLoad, plain] = [
        await loadModel(outputDir, { device: 'cpu', dtype: 'float32' }),
        await loadModel(MODEL, { device: 'cpu', dtype: 'float32', quantization }),
        await loadModel(MODEL, { device: 'cpu', dtype: 'float32' }),
      ];
      const [a, b, c] = [
        await stored.score(row('single')),
        await onLoad.score(row('single')),
        await plain.score(row('single')),
      ];
      assert.equal(a.loss, b.loss);
      assert.ok(
        Math.abs(a.loss - c.loss) < (quantization === 'nf4' ? 0.6 : 0.05) && a.loss !== c.loss,
        `${a.loss} ${c.loss}`,
      );
      assert.equal(stored.parameters, plain.parameters);
      await Promise.all([stored.dispose(), onLoad.dispose(), plain.dispose()]);
      await assert.rejects(loadModel(outputDir, { quantization }), {
        code: 'ERR_MARTLET_CONFIG',
        message: /quantised already/,
      });
      const dir = await folder();
      const { events } = await train(smallConfig(dir, { ...fast, model: outputDir }));
      assert.ok(losses(events).every(Number.isFinite));
      const merged = await mergeAdapter({ adapter: join(dir, 'out'), outputDir: join(dir, 'merged') });
      const whole = await loadModel(merged.outputDir, { device: 'cpu', dtype: 'float32' });
      await whole.dispose();
      await assert.rejects(train(smallConfig(await folder(), { ...fast, model: outputDir, sft_type: 'full' })), {
        code: 'ERR_MARTLET_CONFIG',
        message: /quantised/,
      });
    }
  });
});

describe('data', () => {
  test('packing: fewer, fuller steps, every row once an epoch, the same bits each time', async () => {
    const changes = {
      packing: true,
      max_length: 128,
      max_steps: -1,
      num_train_epochs: 2,
      save_strategy: 'no',
      lora_dropout: 0,
    };
    const [a, b] = [await folder(), await folder()];
    const { events } = await train(smallConfig(a, changes));
    await train(smallConfig(b, changes));
    assert.equal(adapterOf(a), adapterOf(b));
    const plain = await train(smallConfig(await folder(), { ...changes, packing: false }));
    assert.ok(start(events).steps < start(plain.events).steps);
    const tokens = (list: TrainEvent[]) => steps(list).at(-1)?.tokens;
    assert.equal(tokens(events), tokens(plain.events));
  });

  test('a packed batch has the loss of its rows, whatever the bins', async () => {
    const all = {
      max_steps: 1,
      save_strategy: 'no',
      lora_dropout: 0,
      dataset_shuffle: false,
      train_dataloader_shuffle: false,
    };
    const one = await train(
      smallConfig(await folder(), { ...all, per_device_train_batch_size: cases.size, gradient_accumulation_steps: 1 }),
    );
    const packed = await train(
      smallConfig(await folder(), {
        ...all,
        packing: true,
        packing_length: 100,
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 99,
      }),
    );
    assert.ok(Math.abs((losses(one.events)[0] as number) - (losses(packed.events)[0] as number)) < 1e-5);
  });

  test('truncation: left, right and split keep what fits; pictures whole', async () => {
    const runs: Record<string, Awaited<ReturnType<typeof train>>> = {};
    for (const strategy of ['delete', 'right', 'left', 'split']) {
      runs[strategy] = await train(
        smallConfig(await folder(), {
          ...fast,
          max_steps: 1,
          max_length: 40,
          truncation_strategy: strategy,
          on_bad_row: 'skip',
        }),
      );
    }
    const rows = (strategy: string) => start(runs[strategy]?.events as TrainEvent[]).rows;
    assert.ok(rows('delete') < rows('left'), JSON.stringify(Object.keys(runs).map((key) => [key, rows(key)])));
    assert.ok(rows('split') > cases.size - (runs.split?.result.skipped.length ?? 0));
    await assert.rejects(train(smallConfig(await folder(), { ...fast, truncation_strategy: 'left' })), {
      code: 'ERR_MARTLET_CONFIG',
      message: /needs max_length/,
    });
  });

  test('pieces of a row are set aside together, and asked once', async () => {
    const dir = await folder();
    const rows = ['one', 'two', 'three', 'four'].map((id) => ({
      id,
      messages: [
        { role: 'user', content: 'Count.' },
        { role: 'assistant', content: `${id} `.repeat(30) },
      ],
    }));
    writeFileSync(join(dir, 'long.json'), JSON.stringify(rows));
    const { events } = await train(
      smallConfig(dir, {
        ...fast,
        max_steps: 1,
        eval_strategy: 'steps',
        eval_steps: 1,
        dataset: join(dir, 'long.json'),
        max_length: 24,
        truncation_strategy: 'split',
        split_dataset_ratio: 0.25,
        predict_with_generate: true,
        max_new_tokens: 2,
      }),
    );
    assert.ok(start(events).rows > 6, String(start(events).rows));
    assert.match(warnings(events), new RegExp(`${start(events).rows} of ${start(events).rows} rows are pieces`));
    const answers = readFileSync(join(dir, 'out', 'predict.jsonl'), 'utf8')
      .trim()
      .split('\n');
    assert.equal(answers.length, 1);
    const { id } = JSON.parse(answers[0] as string);
    // the rows that are left are the pieces of the other three
    const other = await folder();
    writeFileSync(join(other, 'long.json'), JSON.stringify(rows.filter((row) => row.id !== id)));
    const rest = await train(
      smallConfig(other, {
        ...fast,
        max_steps: 1,
        dataset: join(other, 'long.json'),
        max_length: 24,
        truncation_strategy: 'split',
      }),
    );
    assert.equal(start(rest.events).rows, start(events).rows);
  });

  test('group_by_length runs every row', async () => {
    const { events } = await train(
      smallConfig(await folder(), { ...fast, group_by_length: true, max_steps: -1, num_train_epochs: 1 }),
    );
    assert.equal(steps(events).length, Math.ceil(Math.ceil(cases.size / 2) / 2));
  });
});

describe('runs', () => {
  test('predict_with_generate: answers, scores, and the best checkpoint by them', async () => {
    const dir = await folder();
    const { events, result } = await train(
      smallConfig(dir, {
        val_dataset: await valFile(dir),
        predict_with_generate: true,
        max_new_tokens: 20,
        metric_for_best_model: 'rouge_l',
        eval_steps: 10,
        save_steps: 10,
        max_steps: 40,
        dataset: await valFile(dir),
      }),
    );
    const evals = events.filter((event) => event.type === 'eval');
    assert.equal(evals.length, 4);
    const last = evals.at(-1);
    assert.equal(last?.exactMatch, 1, 'one row is learnt by heart');
    assert.ok((last?.rougeL as number) > 0.99 && (last?.bleu as number) > 0.99);
    const [line] = readFileSync(join(dir, 'out', 'predict.jsonl'), 'utf8')
      .trim()
      .split('\n');
    assert.equal(JSON.parse(line as string).answer, getCase('single').messages[1]?.content);
    assert.ok(result.bestCheckpoint !== undefined && existsSync(result.bestCheckpoint));
    const first = evals.findIndex(({ rougeL }) => rougeL === Math.max(...evals.map((event) => event.rougeL as number)));
    assert.equal(result.bestCheckpoint, join(dir, 'out', `checkpoint-${evals[first]?.step}`));
  });

  test('predict_with_generate: several rows at once give the answers that each gives alone', async () => {
    const told = [];
    for (const size of [1, 3, 100]) {
      const dir = await folder();
      const path = join(dir, 'val.json');
      const names = ['single', 'text-only', 'single', 'text-only', 'single'];
      writeFileSync(path, JSON.stringify(names.map((name, i) => ({ ...row(name), id: `${name} ${i}` }))));
      await train(
        smallConfig(dir, {
          val_dataset: path,
          predict_with_generate: true,
          per_device_eval_batch_size: size,
          max_new_tokens: 20,
          eval_steps: 6,
          max_steps: 6,
        }),
      );
      told.push(readFileSync(join(dir, 'out', 'predict.jsonl'), 'utf8'));
    }
    assert.equal(told[0]?.trim().split('\n').length, 5);
    assert.deepEqual(told, [told[0], told[0], told[0]]);
  });

  test("load_best_model_at_end: the best checkpoint's weights stand in output_dir, adapters and whole models", async () => {
    const worse = { lr_scheduler_type: 'constant', learning_rate: 0.02, lora_dropout: 0, max_steps: 6 };
    const whole = { ...worse, sft_type: 'full', max_shard_size: '200KB' };
    // Learning other rows by heart: the loss of the row that is evaluated rises.
    const unlike = async (dir: string) => {
      writeFileSync(join(dir, 'train.json'), JSON.stringify([row('chinese'), row('text-only')]));
      return { dataset: join(dir, 'train.json'), val_dataset: await valFile(dir), eval_steps: 1, save_steps: 2 };
    };
    for (const changes of [worse, whole]) {
      const dir = await folder();
      const { result, events } = await train(
        smallConfig(dir, { ...changes, ...(await unlike(dir)), load_best_model_at_end: true }),
      );
      const evals = events.flatMap((event) => (event.type === 'eval' && event.step % 2 === 0 ? [event] : []));
      const best = evals.reduce((a, b) => (b.loss < a.loss ? b : a));
      assert.notEqual(best.step, result.steps, 'the last is the best: nothing was tested');
      assert.equal(result.bestCheckpoint, join(dir, 'out', `checkpoint-${best.step}`));
      const weights = readdirSync(result.bestCheckpoint as string).filter((name) =>
        /^(adapter_)?model.*\.(safetensors|json)$/.test(name),
      );
      assert.ok(weights.length > ('sft_type' in changes ? 2 : 0), String(weights));
      const digests = (folderName: string) => weights.map((name) => digest(join(dir, 'out', folderName, name)));
      assert.deepEqual(digests('.'), digests(`checkpoint-${best.step}`));
      assert.notDeepEqual(digests('.'), digests(`checkpoint-${result.steps}`));
      const model = await loadModel('sft_type' in changes ? join(dir, 'out') : MODEL, {
        device: 'cpu',
        dtype: 'float32',
        ...(!('sft_type' in changes) && { adapters: { a: join(dir, 'out') } }),
      });
      const { loss } = await model.score(row('single'));
      await model.dispose();
      assert.ok(Math.abs(loss - best.loss) < 1e-4, `${loss} ${best.loss}`);
      assert.match(readFileSync(join(dir, 'out', 'logs', 'train.log'), 'utf8'), /holds the weights of .*the best/);
    }
    const plain = await folder();
    const { result } = await train(smallConfig(plain, { ...worse, ...(await unlike(plain)) }));
    const last = join(plain, 'out', `checkpoint-${result.steps}`);
    assert.equal(adapterOf(plain), digest(join(last, 'adapter_model.safetensors')), 'without it the last');

    for (const [changes, message] of [
      [{ val_dataset: [] }, /needs evaluation rows/],
      [{ save_strategy: 'no' }, /needs checkpoints/],
      [{ save_strategy: 'epoch', eval_strategy: 'steps' }, /every checkpoint evaluated/],
      [{ save_steps: 3, eval_steps: 2 }, /save_steps 3 is not a multiple of eval_steps 2/],
    ] as const) {
      const dir = await folder();
      const config = smallConfig(dir, { val_dataset: await valFile(dir), load_best_model_at_end: true, ...changes });
      await assert.rejects(train(config), { code: 'ERR_MARTLET_CONFIG', message });
    }
  });

  test('early_stop_interval ends a run that does not improve; the best checkpoint and the last are there', async () => {
    const dir = await folder();
    const { result, events } = await train(
      smallConfig(dir, {
        val_dataset: await valFile(dir),
        early_stop_interval: 2,
        eval_steps: 1,
        save_steps: 1,
        save_total_limit: 2,
        max_steps: 50,
        learning_rate: 0,
      }),
    );
    assert.deepEqual([result.steps, result.stoppedEarly, result.stopped], [3, true, false]);
    assert.match(warnings(events), /stopped early/);
    assert.deepEqual(
      readdirSync(join(dir, 'out'))
        .filter((name) => name.startsWith('checkpoint'))
        .sort(),
      ['checkpoint-1', 'checkpoint-3'],
    );
    assert.equal(result.bestCheckpoint, join(dir, 'out', 'checkpoint-1'));
  });

  test('a row without a finite loss: stop names it and the module; skip and rollback go on and count', async () => {
    const names = [...cases.keys()];
    const bad = 'text-only';
    const model = modelWithBadToken(join(await folder(), 'model'), tokenOnlyIn(bad, names));
    const changes = {
      ...fast,
      model,
      save_strategy: 'steps',
      save_steps: 1,
      max_steps: 10,
      target_modules: ['q_proj', 'v_proj'],
    };
    await assert.rejects(
      train(smallConfig(await folder(), changes)),
      (error: Error & { code: string; details: Record<string, unknown> }) => {
        assert.equal(error.code, 'ERR_MARTLET_NON_FINITE');
        assert.equal(error.details.where, 'the output of model.language_model.embed_tokens');
        assert.deepEqual(error.details.samples, [`data.json row ${names.indexOf(bad)} (id ${bad})`]);
        assert.match(error.message, /text-only/);
        return true;
      },
    );
    for (const policy of ['skip', 'rollback']) {
      const { result, events } = await train(smallConfig(await folder(), { ...changes, non_finite: policy }));
      assert.equal(result.steps, 10);
      assert.ok(result.skippedSteps >= 2 && result.skippedSteps < 10, String(result.skippedSteps));
      assert.match(warnings(events), policy === 'skip' ? /left out/ : /Back to the weights of .*checkpoint-/);
      assert.ok(losses(events).every(Number.isFinite));
    }
  });

  test('an evaluation row without a finite loss: named, and never the best', async () => {
    const names = [...cases.keys()];
    const dir = await folder();
    const model = modelWithBadToken(join(dir, 'model'), tokenOnlyIn('single', names));
    const other = join(dir, 'other.json');
    writeFileSync(other, JSON.stringify([row('chinese'), row('text-only')]));
    writeFileSync(join(dir, 'val.json'), JSON.stringify([row('chinese'), row('single')]));
    const { result, events } = await train(
      smallConfig(dir, {
        ...fast,
        model,
        dataset: other,
        val_dataset: join(dir, 'val.json'),
        save_strategy: 'steps',
        save_steps: 1,
      }),
    );
    const evals = events.filter((event) => event.type === 'eval');
    assert.equal(evals.length, 3);
    assert.ok(evals.every(({ loss }) => Number.isNaN(loss)));
    assert.match(warnings(events), /evaluation at step 1: the loss is not finite in val\.json row 1\./);
    assert.equal(result.bestCheckpoint, undefined);
    const trained = await train(
      smallConfig(await folder(), { ...fast, model, dataset: join(dir, 'val.json'), max_steps: 1, non_finite: 'skip' }),
    );
    assert.equal(trained.result.skippedSteps, 1);
    assert.doesNotMatch(warnings(trained.events), /does not depend on its picture/, 'two losses that are not numbers');
  });

  test('float16: planted overflows are skipped, counted and said; the scale falls until the run learns', async () => {
    const model = modelWithLargeHead(join(await folder(), 'model'), 40);
    const { result, events } = await train(
      smallConfig(await folder(), { ...fast, model, torch_dtype: 'float16', max_steps: 12, learning_rate: 1e-3 }),
    );
    assert.ok(result.skippedSteps >= 1, 'nothing overflowed: nothing was tested');
    assert.match(warnings(events), /overflowed float16 at loss scale 65536/);
    const scales = steps(events).map(({ lossScale }) => lossScale);
    assert.equal(scales.at(-1), 65536 / 2 ** result.skippedSteps);
    assert.ok(Number.isNaN(steps(events)[0]?.gradNorm), 'no norm rather than a wrong one');
    const curve = losses(events);
    assert.equal(curve[0] !== undefined && Number.isFinite(curve[0]), true);
    assert.ok((curve.at(-1) as number) < (curve[0] as number));

    // more halvings than non_finite allows of steps in a row
    const large = modelWithLargeHead(join(await folder(), 'model'), 640);
    const far = await train(
      smallConfig(await folder(), {
        ...fast,
        model: large,
        torch_dtype: 'float16',
        max_steps: 16,
        learning_rate: 1e-6,
      }),
    );
    assert.ok(far.result.skippedSteps > 10 && far.result.skippedSteps < 16, String(far.result.skippedSteps));
  });

  test('advice: a flat loss, rows without pictures, a rate out of the usual range, pictures that change nothing', async () => {
    const dir = await folder();
    writeFileSync(join(dir, 'text.json'), JSON.stringify([row('text-only'), row('spaces')]));
    const { events } = await train(
      smallConfig(dir, { ...fast, dataset: join(dir, 'text.json'), learning_rate: 0, max_steps: 30, lora_dropout: 0 }),
    );
    assert.match(warnings(events), /no row has a picture/);
    assert.match(warnings(events), /the loss is flat/);
    assert.match(warnings(events), /learning_rate 0 is unusual/);
    const blind = join(dir, 'blind');
    cpSync(MODEL, blind, { recursive: true });
    for (const file of readdirSync(blind).filter((name) => name.endsWith('.safetensors'))) {
      const path = join(blind, file);
      for (const name of readSafetensors(path).keys()) {
        if (name.includes('multi_modal_projector.linear_2')) patchTensor(path, name, (data) => void data.fill(0));
      }
    }
    const grey = /does not depend on its picture/;
    const one = { ...fast, max_steps: 1 };
    assert.match(warnings((await train(smallConfig(await folder(), { ...one, model: blind }))).events), grey);
    assert.doesNotMatch(warnings((await train(smallConfig(await folder(), one))).events), grey);
    const plots = readdirSync(join(dir, 'out', 'images'));
    assert.ok(plots.includes('train_loss.svg') && plots.includes('train_learning_rate.svg'), String(plots));
  });
});
