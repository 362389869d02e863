/** BLIP-2 with OPT and T5 from end to end, on the tiny models of the fixtures: YAML, training, answers, merging, what is refused. */
import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { dump } from 'js-yaml';
import { infer, loadModel, type MartletError, type Model, mergeAdapter, trainLoRA } from '../../lib/index.js';
import type { ChatMessage } from '../../lib/processing/types.js';
import { BLIP2_FORMS, type Blip2Form, blip2Cases, blip2Dir, blip2Image } from '../support/blip2.js';
import { brokenCopy, editJson } from '../support/broken.js';
import { cli, jsonLines } from '../support/cli.js';
import { projectRoot } from '../support/fixtures.js';
import { CALM } from '../support/process.js';
import { readSafetensors } from '../support/safetensors.js';
import { collect, FEW_STEPS, losses, smallConfig, train } from '../support/train.js';

Object.assign(process.env, CALM);

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));
const folder = () => mkdtempSync(join(root, 'run-'));

/** PEFT's own targets for `blip-2`. */
const TARGETS = { opt: ['q_proj', 'v_proj'], t5: ['q', 'v'] };
const ALIGNER = /^(qformer\.|language_projection\.|query_tokens$)/;
const picture = blip2Image('landscape.png');

function turns(...texts: string[]): ChatMessage[] {
  return texts.map((content, i) => ({ role: i % 2 === 0 ? 'user' : 'assistant', content }));
}

const rowsOf = (form: Blip2Form) =>
  blip2Cases(form).cases.map(({ name, messages, images }) => ({ id: name, messages, images: images.map(blip2Image) }));

/** FEW_STEPS on a tiny BLIP-2 and all rows of the fixture; keys given win. */
function config(form: Blip2Form, dir: string, changes: Record<string, unknown> = {}): Record<string, unknown> {
  const dataset = join(dir, 'data.json');
  writeFileSync(dataset, JSON.stringify(rowsOf(form)));
  return {
    model: blip2Dir(form, 'model-new'),
    dataset,
    output_dir: join(dir, 'out'),
    ...FEW_STEPS,
    target_modules: TARGETS[form],
    ...changes,
  };
}

async function withModel<T>(dir: string, use: (model: Model) => Promise<T>, options: object = {}): Promise<T> {
  const model = await loadModel(dir, { device: 'cpu', dtype: 'float32', ...options });
  try {
    return await use(model);
  } finally {
    await model.dispose();
  }
}

const questions = [
  { messages: turns('<image>\nWhat is in the picture?'), images: [picture] },
  { messages: turns('<image>'), images: [picture] }, // a caption
  { messages: turns('<image>Where is it?', 'On the left.', 'How many?'), images: [picture] },
  { messages: turns('Tell me a story about the sea.'), images: [] },
].map((question) => ({ ...question, temperature: 0, maxNewTokens: 8 }));

/** Scores and answers are the same, and those of the bare base model are not. */
async function sameAnswers(form: Blip2Form, adapted: Model, merged: Model): Promise<void> {
  for (const row of rowsOf(form)) {
    const [one, two] = [await adapted.score(row), await merged.score(row)];
    assert.ok(Math.abs(one.loss - two.loss) < 1e-4, `${row.id}: ${one.loss} ${two.loss}`);
    const bare = await adapted.score({ ...row, adapter: null });
    assert.ok(Math.abs(one.loss - bare.loss) > 1e-4, `${row.id}: the adapter does something`);
  }
  for (const question of questions) {
    const answer = await adapted.generate(question);
    assert.deepEqual((await merged.generate(question)).tokenIds, answer.tokenIds);
    let text = '';
    for await (const chunk of adapted.stream(question)) text += chunk.text;
    assert.equal(text, answer.text);
  }
}

for (const form of BLIP2_FORMS) {
  describe(form, () => {
    for (const layout of ['model-new', 'model-5x', 'model-old']) {
      test(`${layout}: losses and answers are transformers', from messages and files on`, async () => {
        const expected = JSON.parse(readFileSync(blip2Dir(form, 'expected.json'), 'utf8'));
        const old = layout === 'model-old';
        await withModel(blip2Dir(form, layout), async (model) => {
          const requests = [];
          const answers: number[][] = [];
          for (const { id, ...row } of rowsOf(form)) {
            const { loss } = await model.score(row);
            const wanted = old ? expected.oldLosses[id] : expected.losses[id].loss;
            assert.ok(Math.abs(loss - wanted) < 2e-5, `${id}: ${loss} ${wanted}`);
            const answer = (old ? expected.oldGreedy : expected.greedy)[id];
            if (answer === undefined) continue;
            const messages = row.messages.slice(0, -1);
            const request = { ...row, messages, temperature: 0, maxNewTokens: 24 };
            const { tokenIds } = await model.generate(request);
            assert.deepEqual([...tokenIds], answer, id);
            requests.push(request, { ...request, maxNewTokens: 3 + requests.length });
            answers.push(answer, answer.slice(0, 3 + answers.length));
          }
          const batch = await model.generateBatch(requests);
          assert.deepEqual(
            batch.map(({ tokenIds }) => [...tokenIds]),
            answers,
          );
        });
      });
    }

    test('LoRA from a YAML file, the adapter in use, the merged model', async () => {
      const dir = folder();
      const yaml = join(dir, 'config.yaml');
      writeFileSync(yaml, dump(config(form, dir, { max_steps: 12, dropout: 0, lora_dropout: 0 })));
      const { events, result } = await collect(trainLoRA(yaml));
      const start = events.find(({ type }) => type === 'start');
      assert.ok(start?.type === 'start' && start.parts.language > 0 && start.parts.projector === 0);
      const end = form === 'opt' ? '\n' : '</s>';
      assert.ok(start.sample.includes(`${end}]]`), start.sample);
      assert.match(start.sample, /\[\[/);
      const loss = losses(events);
      assert.ok((loss.at(-1) as number) < (loss[0] as number) - 0.1, `the loss falls: ${loss}`);

      const { target_modules: targets } = JSON.parse(
        readFileSync(join(result.adapterDir, 'adapter_config.json'), 'utf8'),
      );
      assert.deepEqual([...targets].sort(), TARGETS[form]);
      const outputDir = join(dir, 'merged');
      const report = await mergeAdapter({ adapter: result.adapterDir, outputDir, dtype: 'float32' });
      // OPT: two layers; T5: three of the encoder, and two of the decoder with two attentions
      assert.equal(report.mergedTensors, 2 * (form === 'opt' ? 2 : 3 + 2 * 2));
      for (const name of ['tokenizer.json', 'preprocessor_config.json', form === 'opt' ? 'merges.txt' : 'spiece.model'])
        assert.deepEqual(
          readFileSync(join(outputDir, name)),
          readFileSync(join(blip2Dir(form, 'model-new'), name)),
          name,
        );
      await withModel(
        blip2Dir(form, 'model-new'),
        (adapted) => withModel(outputDir, (merged) => sameAnswers(form, adapted, merged)),
        { adapters: { a: result.adapterDir } },
      );
      const answer = await infer({
        model: blip2Dir(form, 'model-new'),
        adapter: result.adapterDir,
        image: picture,
        text: 'What is in the picture?',
        ...{ device: 'cpu', dtype: 'float32', temperature: 0, maxNewTokens: 8 },
      });
      assert.equal(answer.usage.promptTokens, (await promptIds(form, '<image>\nWhat is in the picture?')).length);
    });

    test('the old layout, without image tokens, trains and answers as the new one does', async () => {
      const dir = folder();
      const same = { dropout: 0, lora_dropout: 0, max_steps: 4 };
      const now = await train(config(form, folder(), same));
      const before = await train(config(form, dir, { ...same, model: blip2Dir(form, 'model-old') }));
      const [a, b] = [losses(now.events), losses(before.events)];
      // OPT's old table has fewer rows, so its losses differ a little
      for (const [i, loss] of a.entries()) assert.ok(Math.abs(loss - (b[i] as number)) < 0.05, `${a} ${b}`);
      const outputDir = join(dir, 'merged');
      await mergeAdapter({ adapter: before.result.adapterDir, outputDir, dtype: 'float32' });
      assert.equal(existsSync(join(outputDir, 'tokenizer.json')), form === 'opt');
      await withModel(
        blip2Dir(form, 'model-old'),
        (adapted) => withModel(outputDir, (merged) => sameAnswers(form, adapted, merged)),
        { adapters: { a: before.result.adapterDir } },
      );
    });

    test('the classic stage: Q-Former, projection and query tokens alone, the whole model is saved', async () => {
      const dir = folder();
      const stage = { sft_type: 'full', freeze_llm: true, freeze_vit: true, freeze_aligner: false };
      const { events, result } = await train(config(form, dir, { ...stage, learning_rate: 1e-3 }));
      const start = events.find(({ type }) => type === 'start');
      assert.ok(start?.type === 'start' && start.parts.projector > 0 && start.parts.language === 0);
      const before = readSafetensors(join(blip2Dir(form, 'model-5x'), 'model.safetensors'));
      const now = readSafetensors(join(result.outputDir, 'model.safetensors'));
      let changed = 0;
      for (const [name, { data }] of before) {
        const value = now.get(name);
        if (name === 'language_model.lm_head.weight' && !value) continue; // tied
        const differs = !value?.data.every((x, i) => x === data[i]);
        if (differs) assert.match(name, ALIGNER);
        changed += differs ? 1 : 0;
      }
      assert.ok(changed > 40, `${changed} tensors were trained`);
      await withModel(result.outputDir, (model) => model.generate(questions[0] as (typeof questions)[0]));
    });

    test('the aligner whole beside LoRA, resumed to the same bits, merged', async () => {
      const changes = { freeze_aligner: false, save_steps: 3, max_steps: 6 };
      const whole = await train(config(form, folder(), changes));
      const dir = folder();
      await train(config(form, dir, changes));
      const again = await train(
        config(form, dir, {
          ...changes,
          resume_from_checkpoint: join(dir, 'out/checkpoint-3'),
          overwrite_output_dir: true,
        }),
      );
      assert.deepEqual(losses(again.events), losses(whole.events).slice(3));
      const saved = [...readSafetensors(join(whole.result.adapterDir, 'adapter_model.safetensors')).keys()];
      assert.ok(saved.includes('base_model.model.query_tokens'), saved.join('\n'));
      assert.ok(saved.some((name) => name.startsWith('base_model.model.language_projection.')));
      assert.ok(saved.some((name) => name.startsWith('base_model.model.qformer.')));
      const outputDir = join(folder(), 'merged');
      await mergeAdapter({ adapter: whole.result.adapterDir, outputDir, dtype: 'float32' });
      await withModel(
        blip2Dir(form, 'model-new'),
        (adapted) => withModel(outputDir, (merged) => sameAnswers(form, adapted, merged)),
        { adapters: { a: whole.result.adapterDir } },
      );
    });

    test('LoRA on Q-Former, projection and the vision tower', async () => {
      const targets = [...TARGETS[form], 'query', 'value', 'language_projection', 'qkv'];
      const { events } = await train(
        config(form, folder(), { target_modules: targets, freeze_aligner: false, freeze_vit: false, max_steps: 2 }),
      );
      const start = events.find(({ type }) => type === 'start');
      assert.ok(start?.type === 'start');
      // two vision layers; three Q-Former layers, two of them with cross-attention; the projection
      assert.equal(start.targets, 2 * (form === 'opt' ? 2 : 3 + 2 * 2) + 2 + 2 * (3 + 2) + 1);
      assert.ok(Object.values(start.parts).every((count) => count > 0));
    });

    test("dropout is config.json's unless the config says otherwise", async () => {
      const first = async (changes: Record<string, unknown>) =>
        losses(
          (await train(config(form, folder(), { lora_dropout: 0, max_steps: 1, ...changes }))).events,
        )[0] as number;
      const none = await first({ dropout: 0 });
      const usual = await first({});
      assert.ok(Math.abs(none - usual) > 1e-4, `${none} ${usual}`);
      assert.equal(await first({ dropout: 0.1 }), usual);
      assert.notEqual(await first({ dropout: 0.5 }), usual);
    });

    test('qlora, packing, all weights, evaluation with answers', async () => {
      for (const changes of [
        { sft_type: 'qlora' },
        { sft_type: 'qlora', quant_bits: 8 },
        { packing: true, packing_length: 160 },
        { sft_type: 'full', freeze_vit: false, freeze_aligner: false, learning_rate: 1e-4 },
        { sft_type: 'lora_llm' },
        { target_modules: 'all-linear', gradient_checkpointing: 'none' },
      ]) {
        const { events } = await train(config(form, folder(), { max_steps: 2, save_strategy: 'no', ...changes }));
        const loss = losses(events);
        assert.ok(
          loss.length === 2 && loss.every((value) => value > 0 && value < 20),
          `${JSON.stringify(changes)} ${loss}`,
        );
      }
      const dir = folder();
      const { events } = await train(
        config(form, dir, {
          split_dataset_ratio: 0.25,
          predict_with_generate: true,
          max_new_tokens: 8,
          eval_strategy: 'steps',
          eval_steps: 2,
          max_steps: 2,
        }),
      );
      const evaluated = events.find(({ type }) => type === 'eval');
      assert.ok(evaluated?.type === 'eval' && Number.isFinite(evaluated.loss), JSON.stringify(evaluated));
    });

    test('rows that are cut keep their pictures whole, and T5 its answers', async () => {
      const cut = {
        max_length: 44,
        truncation_strategy: 'right',
        on_bad_row: 'skip',
        max_steps: 2,
        save_strategy: 'no',
      };
      for (const strategy of form === 'opt' ? ['left', 'right', 'split'] : ['left', 'right']) {
        const { events } = await train(
          config(form, folder(), {
            ...cut,
            truncation_strategy: strategy,
            per_device_train_batch_size: 1,
            gradient_accumulation_steps: 1,
          }),
        );
        const counts = events.flatMap((event) => (event.type === 'step' ? [event.tokens] : []));
        assert.ok(counts.length === 2 && counts.every((tokens, i) => tokens <= 44 * (i + 1)), `${strategy} ${counts}`);
      }
    });

    test('packed rows do not see each other', async () => {
      const same = {
        dropout: 0,
        lora_dropout: 0,
        max_steps: 1,
        dataset_shuffle: false,
        train_dataloader_shuffle: false,
      };
      const all = { per_device_train_batch_size: 16, gradient_accumulation_steps: 1 };
      const [apart, packed] = [
        losses((await train(config(form, folder(), { ...same, ...all }))).events),
        losses((await train(config(form, folder(), { ...same, ...all, packing: true, packing_length: 400 }))).events),
      ];
      assert.ok(Math.abs((apart[0] as number) - (packed[0] as number)) < 1e-4, `${apart} ${packed}`);
    });

    test('the command line: a question, a caption, a file of both', async () => {
      const common = ['--model', blip2Dir(form, 'model-new'), '--device', 'cpu', '--max_new_tokens', '6', '--json'];
      const ask = async (...args: string[]) => {
        const { code, stdout, stderr } = await cli(['infer', ...common, '--temperature', '0', ...args]);
        assert.equal(code, 0, stderr);
        return jsonLines(stdout) as unknown as { tokenIds: number[]; usage: { promptTokens: number } }[];
      };
      const [question] = await ask('--image', picture, '--text', 'What is in the picture?');
      assert.equal(question?.usage.promptTokens, (await promptIds(form, '<image>\nWhat is in the picture?')).length);
      const [caption] = await ask('--image', picture, '--text', '');
      assert.equal(caption?.usage.promptTokens, 8 + 1); // query tokens, and </s>
      const input = join(folder(), 'items.jsonl');
      const items = ['What is in the picture?', ''].map((text) => JSON.stringify({ image: picture, text }));
      writeFileSync(input, items.join('\n'));
      const both = await ask('--input', input);
      assert.deepEqual(
        both.map(({ tokenIds }) => tokenIds),
        [question?.tokenIds, caption?.tokenIds],
      );
    });

    describe('what is refused', () => {
      const refused = async (
        run: () => PromiseLike<unknown>,
        code: string,
        ...says: RegExp[]
      ): Promise<MartletError> => {
        try {
          await run();
        } catch (error) {
          assert.equal((error as MartletError).code, code, (error as Error).message);
          for (const pattern of says) assert.match((error as Error).message, pattern);
          return error as MartletError;
        }
        return assert.fail('was accepted');
      };

      test('rows whose image tokens are not those of their pictures, with file, row and id', async () => {
        const dir = folder();
        const dataset = join(dir, 'rows.jsonl');
        const good = { messages: turns('<image>What?', 'A cat.'), images: [picture] };
        for (const [row, pattern] of [
          [
            {
              messages: [
                { role: 'user', content: [{ type: 'image' }, { type: 'text', text: 'the tag <image>' }] },
                { role: 'assistant', content: 'A cat.' },
              ],
              images: [picture],
            },
            /9 image tokens.*8 features/,
          ],
          [{ messages: turns('<image><image>What?', 'A cat.'), images: [picture] }, /2/],
        ] as const) {
          const rows = [good, { id: 'bad', ...row }, good].map((entry) => JSON.stringify(entry));
          writeFileSync(dataset, rows.join('\n'));
          const error = await refused(
            () => trainLoRA({ ...config(form, dir), dataset }),
            'ERR_MARTLET_DATASET',
            /row 1 \(line 2\), id bad/,
            pattern,
          );
          assert.deepEqual([error.details.file, error.details.row, error.details.id], [dataset, 1, 'bad']);
        }
      });

      test('embeddings with fewer rows than the tokenizer has ids, or other than config.json says', async () => {
        const vocabulary = (size: number) =>
          brokenCopy(blip2Dir(form, 'model-5x'), root, (dir) =>
            editJson(join(dir, 'config.json'), (value) => {
              value.text_config.vocab_size = size;
            }),
          );
        const few = vocabulary(form === 'opt' ? 326 : 285);
        await refused(() => loadModel(few, { device: 'cpu' }), 'ERR_MARTLET_WEIGHTS', /embed_tokens|shared|lm_head/);
        const fewer = brokenCopy(blip2Dir(form, 'model-old'), root, (dir) =>
          editJson(join(dir, 'config.json'), (value) => {
            value.text_config.vocab_size = 200;
          }),
        );
        const error = await refused(() => loadModel(fewer, { device: 'cpu' }), 'ERR_MARTLET_TOKENIZER', /200 rows/);
        assert.equal(error.details.vocabSize, 200);
        rmSync(few, { recursive: true });
        rmSync(fewer, { recursive: true });
      });

      if (form === 'opt') {
        test('texts longer than the positions', async () => {
          const long = 'many words '.repeat(60);
          await withModel(blip2Dir(form, 'model-new'), async (model) => {
            const row = { messages: turns(`<image>${long}`, 'A cat.'), images: [picture] };
            await refused(() => model.score(row), 'ERR_MARTLET_USAGE', /623 tokens .*the model takes 96/);
            const question = { messages: row.messages.slice(0, 1), images: row.images };
            const error = await refused(() => model.generate(question), 'ERR_MARTLET_USAGE', /the model takes 96/);
            assert.equal(error.details.maxPositions, 96);
          });
          const dir = folder();
          const dataset = join(dir, 'rows.json');
          const rows = [
            { messages: turns('<image>What?', 'A cat.'), images: [picture] },
            { id: 'long', messages: turns(`<image>${long}`, 'A cat.'), images: [picture] },
          ];
          writeFileSync(dataset, JSON.stringify(rows));
          const { result } = await train({ ...config(form, dir), dataset, max_steps: 1 });
          assert.deepEqual(
            result.skipped.map(({ row, code }) => [row, code]),
            [[1, 'ERR_MARTLET_DATASET']],
          );
          assert.match(result.skipped[0]?.message ?? '', /tokens, the model has 96 positions/);
          const raised = { ...config(form, folder()), dataset, truncation_strategy: 'raise' };
          await refused(() => trainLoRA(raised), 'ERR_MARTLET_DATASET', /rows\.json row 1: .*96 positions/);
        });
      } else {
        test('T5 has no limit of positions', async () => {
          await withModel(blip2Dir(form, 'model-new'), async (model) => {
            const messages = turns(`<image>${'many words '.repeat(600)}`, 'A cat.');
            const { inputIds, loss } = await model.score({ messages, images: [picture] });
            assert.ok(inputIds.length > 1200 && Number.isFinite(loss));
          });
        });
      }
    });
  });
}

for (const [name, form] of [
  ['blip2_opt_lora', 'opt'],
  ['blip2_t5_lora', 't5'],
  ['blip2_stage', 'opt'],
] as const) {
  test(`examples/configs/${name}.yaml trains a tiny model`, async () => {
    const { model, dataset, output_dir } = config(form, folder());
    const few = { max_steps: 2, gradient_accumulation_steps: 1, logging_steps: 1, report_to: 'none' };
    const overrides = { model, dataset, output_dir, device: 'cpu', max_length: 96, ...few };
    const { events, result } = await collect(
      trainLoRA(join(projectRoot, 'examples/configs', `${name}.yaml`), { overrides }),
    );
    assert.ok(losses(events).length === 2 && losses(events).every((loss) => loss > 0));
    const weights = name === 'blip2_stage' ? 'model.safetensors' : 'adapter_model.safetensors';
    assert.ok(existsSync(join(result.outputDir, weights)));
  });
}

test('T5: a row whose last answer is not trained is found before training, and can be skipped', async () => {
  const dir = folder();
  const dataset = join(dir, 'rows.json');
  const messages = turns('<image>What?', 'A cat.', 'Where?', 'There.');
  const good = { messages, images: [picture] };
  const bad = { id: 'bad', messages: messages.map((m, i) => (i === 3 ? { ...m, loss: false } : m)), images: [picture] };
  writeFileSync(dataset, JSON.stringify([good, bad]));
  await assert.rejects(
    async () => await trainLoRA({ ...config('t5', dir), dataset }),
    (error: MartletError) => {
      assert.equal(error.code, 'ERR_MARTLET_DATASET');
      assert.match(error.message, /row 1, id bad: No token of the row is trained: its last answer/);
      return true;
    },
  );
  const { result } = await train({ ...config('t5', folder()), dataset, on_bad_row: 'skip', max_steps: 1 });
  assert.deepEqual(
    result.skipped.map(({ row }) => row),
    [1],
  );
  // OPT trains the earlier one
  assert.deepEqual((await train({ ...config('opt', folder()), dataset, max_steps: 1 })).result.skipped, []);
});

test('T5: a row is not split, for its question and its answer are read apart', async () => {
  const dir = folder();
  await assert.rejects(
    async () => await trainLoRA(config('t5', dir, { max_length: 44, truncation_strategy: 'split' })),
    (error: MartletError) => {
      assert.equal(error.code, 'ERR_MARTLET_DATASET');
      assert.match(error.message, /truncation_strategy: split cannot part a question from its answer/);
      return true;
    },
  );
});

test('dropout where a model has none is an error, 0 is not', async () => {
  await train(smallConfig(folder(), { dropout: 0, max_steps: 1 }));
  await assert.rejects(async () => await trainLoRA(smallConfig(folder(), { dropout: 0.1, max_steps: 1 })), {
    code: 'ERR_MARTLET_CONFIG',
    message: /no dropout of its own/,
  });
});

/** Ids of a question about one picture. */
function promptIds(form: Blip2Form, content: string): Promise<Int32Array> {
  return withModel(blip2Dir(form, 'model-new'), async (model) => {
    const { inputIds } = await model.prepare({ messages: [{ role: 'user', content }], images: [picture] });
    return inputIds;
  });
}
