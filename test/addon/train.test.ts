import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { cp } from 'node:fs/promises';
import { join } from 'node:path';
import { test } from 'node:test';
import { infer, loadModel, mergeAdapter, type TrainEvent, train as trainAlias, trainLoRA } from '../../lib/index.js';
import { cases, getCase, llava } from '../support/fixtures.js';
import { temporaryFolders } from '../support/folders.js';
import { collect, digest, losses, MODEL, smallConfig, steps, train, writeData } from '../support/train.js';

const folder = temporaryFolders();
const adapterOf = (dir: string) => digest(join(dir, 'adapter_model.safetensors'));
/** Names that unfinished writes would leave, and the lock. */
const leftovers = (dir: string) => readdirSync(dir).filter((name) => name.startsWith('.'));

test('a run learns, tells its steps, and leaves an adapter, checkpoints, logs and its config', async () => {
  const dir = await folder();
  const config = smallConfig(dir, { max_steps: 12, save_steps: 5, report_to: ['tensorboard'], warmup_steps: 2 });
  const { events, result } = await train(config);
  const out = join(dir, 'out');

  const [start] = events;
  assert.equal(start?.type, 'start');
  if (start?.type !== 'start') return;
  assert.deepEqual([start.steps, start.rows, start.epochs, start.targets], [12, cases.size, 4, 21]);
  assert.deepEqual([start.parts.vision, start.parts.projector, start.parts.language], [0, 0, start.trainableParams]);
  assert.equal(
    start.sample,
    '<s> USER: <image × 16>\nWhat is in the picture? ASSISTANT:[[A red circle and two blue squares.</s>]]',
  );
  assert.equal(start.config.lora_alpha, 32);

  const logged = steps(events);
  assert.deepEqual(
    logged.map(({ step }) => step),
    Array.from({ length: 12 }, (_, i) => i + 1),
  );
  assert.deepEqual(
    logged.map(({ epoch }) => epoch).slice(0, 4),
    [2 / 5, 4 / 5, 1, 1 + 2 / 5],
    '9 rows: the third step is a short one',
  );
  assert.ok((logged[11] as { loss: number }).loss < (logged[0] as { loss: number }).loss - 1, String(losses(events)));
  assert.deepEqual([logged[0]?.learningRate, logged[1]?.learningRate, logged[2]?.learningRate], [0, 2.5e-3, 5e-3]);
  for (const [i, step] of logged.entries()) {
    assert.ok(step.gradNorm > 0 && step.tokenAccuracy >= 0 && step.tokenAccuracy <= 1 && step.memory > 0);
    assert.ok(step.tokensPerSecond > 0 && step.elapsed > 0 && step.remaining >= 0);
    assert.ok(i === 0 || step.tokens > (logged[i - 1] as { tokens: number }).tokens);
  }
  assert.equal(logged[11]?.remaining, 0);
  assert.ok(events.some((event) => event.type === 'warning' && /only 9 rows/.test(event.message)));
  assert.deepEqual(events.at(-1), { type: 'done', ...result });
  assert.deepEqual(
    [result.outputDir, result.adapterDir, result.steps, result.stopped, result.skipped],
    [out, out, 12, false, []],
  );
  assert.equal(result.finalLoss, logged[11]?.loss);
  assert.equal(result.bestCheckpoint, undefined);
  assert.ok(result.trainableParams / result.totalParams < 0.2);

  assert.deepEqual(readdirSync(out).sort(), [
    'adapter_config.json',
    'adapter_model.safetensors',
    'args.yaml',
    'checkpoint-10',
    'checkpoint-5',
    'images',
    'logging.jsonl',
    'logs',
    'runs',
  ]);
  assert.deepEqual(readdirSync(join(out, 'checkpoint-5')).sort(), [
    'adapter_config.json',
    'adapter_model.safetensors',
    'args.yaml',
    'optimizer.safetensors',
    'trainer_state.json',
  ]);
  assert.equal(JSON.parse(readFileSync(join(out, 'adapter_config.json'), 'utf8')).base_model_name_or_path, MODEL);
  const state = JSON.parse(readFileSync(join(out, 'checkpoint-10', 'trainer_state.json'), 'utf8'));
  assert.deepEqual([state.global_step, state.max_steps, state.log_history.length], [10, 12, 10]);
  const lines = readFileSync(join(out, 'logging.jsonl'), 'utf8')
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line));
  assert.equal(lines[0]['global_step/max_steps'], '1/12');
  assert.equal(lines[12].last_model_checkpoint, join(out, 'checkpoint-10'));
  assert.match(readFileSync(join(out, 'logs', 'train.log'), 'utf8'), /12 steps in .*waited .* for rows/);

  // the adapter alone is enough to ask and to merge
  const image = join(llava, 'images', 'landscape.png');
  const text = 'What is in the picture?';
  const greedy = { device: 'cpu', temperature: 0, maxNewTokens: 12 } as const;
  const answer = await infer({ model: MODEL, adapter: out, image, text, ...greedy });
  const base = await infer({ model: MODEL, image, text, ...greedy });
  assert.notEqual(answer.text, base.text);
  const merged = await mergeAdapter({ adapter: out, outputDir: join(dir, 'merged') });
  assert.match(
    readFileSync(join(merged.outputDir, 'args.yaml'), 'utf8'),
    /^template: default$/m,
    'the merged model is asked in the same way',
  );
  assert.equal(merged.mergedTensors, 21);
  assert.equal((await infer({ model: merged.outputDir, image, text, ...greedy })).text, answer.text);
});

test('two runs with one seed give the same bits; another seed others; logging does not change the run', async () => {
  const runs = await Promise.all(
    [{}, { logging_steps: 4, save_strategy: 'no', report_to: 'tensorboard' }, { seed: 7 }].map(async (changes) => {
      const dir = await folder();
      const { events } = await train(smallConfig(dir, changes));
      return { losses: losses(events), adapter: adapterOf(join(dir, 'out')), dir, events };
    }),
  );
  assert.equal(runs[1]?.adapter, runs[0]?.adapter);
  assert.notEqual(runs[2]?.adapter, runs[0]?.adapter);
  // first step, then every fourth: the mean since the line before
  const all = runs[0]?.losses as number[];
  assert.deepEqual(
    steps(runs[1]?.events as TrainEvent[]).map(({ step }) => step),
    [1, 4],
  );
  const mean = ((all[1] as number) + (all[2] as number) + (all[3] as number)) / 3;
  assert.ok(Math.abs((runs[1]?.losses[1] as number) - mean) < 1e-12);
  assert.ok(!existsSync(join(runs[1]?.dir as string, 'out', 'checkpoint-3')));
});

for (const sftType of ['lora', 'full']) {
  test(`${sftType}: a run that is continued from a checkpoint gives the same bits as one that was not interrupted`, async () => {
    const changes = {
      sft_type: sftType,
      max_steps: 8,
      save_steps: 3,
      logging_steps: 2,
      ...(sftType === 'full' && { learning_rate: 1e-3 }),
    };
    const weights = (dir: string) =>
      digest(join(dir, 'out', sftType === 'full' ? 'model.safetensors' : 'adapter_model.safetensors'));
    const whole = await folder();
    const { events } = await train(smallConfig(whole, changes));

    const cut = await folder();
    const run = trainLoRA(smallConfig(cut, changes));
    for await (const event of run) if (event.type === 'checkpoint' && event.step === 6) break;
    rmSync(join(cut, 'out', 'checkpoint-6'), { recursive: true });
    const again = await train(smallConfig(cut, { ...changes, resume_from_checkpoint: true }));
    assert.equal(weights(cut), weights(whole));
    assert.deepEqual(
      losses(again.events),
      losses(events).slice(-3),
      'steps 4, 6 and 8; the third counts in the mean of 4',
    );
    assert.equal(again.result.steps, 8);
    const history = (dir: string) =>
      JSON.parse(readFileSync(join(dir, 'out', 'checkpoint-6', 'trainer_state.json'), 'utf8')).log_history;
    assert.deepEqual(history(cut), history(whole));
    assert.deepEqual(leftovers(join(cut, 'out')), []);
  });
}

test('stop() finishes the step, saves, resolves; the run can be continued to the same bits', async () => {
  const whole = await folder();
  await train(smallConfig(whole, { max_steps: 6, save_strategy: 'no' }));
  const dir = await folder();
  const config = smallConfig(dir, { max_steps: 6, save_strategy: 'no' });
  const run = trainLoRA(config);
  for await (const event of run) if (event.type === 'step' && event.step === 2) run.stop();
  const result = await run;
  assert.equal(result.stopped, true);
  assert.ok(result.steps >= 2 && result.steps < 6);
  assert.ok(existsSync(join(dir, 'out', `checkpoint-${result.steps}`, 'optimizer.safetensors')));
  assert.equal(adapterOf(join(dir, 'out')), adapterOf(join(dir, 'out', `checkpoint-${result.steps}`)));
  const again = await train({ ...config, resume_from_checkpoint: true });
  assert.deepEqual([again.result.steps, again.result.stopped], [6, false]);
  assert.equal(adapterOf(join(dir, 'out')), adapterOf(join(whole, 'out')));
});

for (const predict_with_generate of [false, true]) {
  test(`stop() in an evaluation leaves it and saves${predict_with_generate ? ', also while answers are generated' : ''}`, async () => {
    const dir = await folder();
    const config = smallConfig(dir, {
      max_steps: 6,
      save_strategy: 'no',
      eval_strategy: 'steps',
      eval_steps: 2,
      per_device_eval_batch_size: 1,
      predict_with_generate,
      max_new_tokens: 300,
    });
    const rows = JSON.parse(readFileSync(config.dataset as string, 'utf8'));
    const val_dataset = join(dir, 'val.json');
    writeFileSync(val_dataset, JSON.stringify(predict_with_generate ? rows : new Array(50).fill(rows).flat()));
    const run = trainLoRA({ ...config, val_dataset });
    const events: TrainEvent[] = [];
    for await (const event of run) {
      events.push(event);
      // in the middle of the answers, which take seconds; before them the evaluation is left all the same
      if (event.type === 'step' && event.step === 2) setTimeout(() => run.stop(), predict_with_generate ? 500 : 20);
    }
    const { stopped, steps } = await run;
    assert.deepEqual([stopped, steps], [true, 2]);
    assert.deepEqual(
      events.filter(({ type }) => type === 'eval'),
      [],
    );
    assert.ok(events.some((event) => event.type === 'warning' && /evaluation at step 2: left/.test(event.message)));
    assert.ok(existsSync(join(dir, 'out', 'checkpoint-2', 'optimizer.safetensors')));
    assert.ok(!existsSync(join(dir, 'out', 'predict.jsonl')));
    assert.equal(adapterOf(join(dir, 'out')), adapterOf(join(dir, 'out', 'checkpoint-2')));
  });
}

test('an abort rejects with its reason, ends at once, leaves nothing half-written, and keeps the checkpoints', async () => {
  const dir = await folder();
  const abort = new AbortController();
  const reason = new Error('enough');
  const run = trainLoRA(smallConfig(dir, { max_steps: 5000, save_steps: 2 }), { signal: abort.signal });
  const events: TrainEvent[] = [];
  await assert.rejects(
    async () => {
      for await (const event of run) {
        events.push(event);
        if (event.type === 'step' && event.step === 5) abort.abort(reason);
      }
    },
    { code: 'ERR_MARTLET_ABORTED', cause: reason },
  );
  await assert.rejects(run.result, { code: 'ERR_MARTLET_ABORTED' });
  assert.ok(!existsSync(join(dir, 'out', 'adapter_model.safetensors')));
  assert.ok(existsSync(join(dir, 'out', 'checkpoint-4', 'trainer_state.json')));
  assert.deepEqual(leftovers(join(dir, 'out')), []);
  await assert.rejects(
    async () => void (await trainLoRA(smallConfig(await folder()), { signal: AbortSignal.abort(reason) })),
    {
      code: 'ERR_MARTLET_ABORTED',
      cause: reason,
    },
  );
});

test('evaluation: rows set aside or of their own, best checkpoint, as many checkpoints as asked for', async () => {
  const dir = await folder();
  const config = smallConfig(dir, {
    split_dataset_ratio: 0.3,
    max_steps: 8,
    save_steps: 2,
    eval_steps: 2,
    save_total_limit: 2,
  });
  const { events, result } = await train(config);
  const evals = events.filter((event) => event.type === 'eval');
  assert.deepEqual(
    evals.map(({ step }) => step),
    [2, 4, 6, 8],
  );
  const best = evals.reduce((a, b) => (b.loss < a.loss ? b : a));
  assert.equal(result.bestCheckpoint, join(dir, 'out', `checkpoint-${best.step}`));
  const kept = readdirSync(join(dir, 'out')).filter((name) => name.startsWith('checkpoint-'));
  assert.deepEqual(
    kept.sort(),
    [...new Set([`checkpoint-${best.step}`, best.step === 8 ? 'checkpoint-6' : 'checkpoint-8'])].sort(),
  );
  assert.equal(events[0]?.type === 'start' && events[0].rows, 6);

  // the loss that eval reports is the loss that score gives
  const own = await folder();
  const rows = [getCase('single'), getCase('text-only')].map(({ messages, images }) => ({
    messages,
    images: images.map((image) => join(llava, 'images', image)),
  }));
  writeFileSync(join(own, 'val.json'), JSON.stringify(rows));
  const trained = await train(
    smallConfig(own, {
      val_dataset: join(own, 'val.json'),
      eval_strategy: 'epoch',
      max_steps: 3,
      per_device_eval_batch_size: 2,
    }),
  );
  const [event] = trained.events.filter((e) => e.type === 'eval');
  const model = await loadModel(MODEL, { device: 'cpu', adapters: { a: join(own, 'out') } });
  let sum = 0;
  let count = 0;
  for (const row of rows) {
    const { logprobs } = await model.score(row);
    sum -= logprobs.reduce((a, b) => a + b, 0);
    count += logprobs.length;
  }
  await model.dispose();
  assert.ok(Math.abs((event?.loss as number) - sum / count) < 1e-4, `${event?.loss} and ${sum / count}`);
});

test('full training gives a model folder: other files byte for byte, weights that answer otherwise', async () => {
  const dir = await folder();
  const { result, events } = await train(
    smallConfig(dir, {
      sft_type: 'full',
      learning_rate: 1e-3,
      freeze_vit: false,
      freeze_aligner: false,
      max_shard_size: '100KB',
    }),
  );
  const start = events[0] as Extract<TrainEvent, { type: 'start' }>;
  assert.equal(start.targets, 0);
  assert.ok(start.parts.vision > 0 && start.parts.projector > 0 && start.parts.language > 0);
  for (const name of readdirSync(MODEL).filter((file) => !/safetensors/.test(file))) {
    assert.equal(digest(join(result.outputDir, name)), digest(join(MODEL, name)), name);
  }
  assert.ok(existsSync(join(result.outputDir, 'model.safetensors.index.json')));
  const { messages, images } = getCase('single');
  const row = { messages, images: images.map((image) => join(llava, 'images', image)) };
  const [before, trained] = await Promise.all(
    [MODEL, result.outputDir].map(async (model) => {
      const loaded = await loadModel(model, { device: 'cpu' });
      const { loss } = await loaded.score(row);
      await loaded.dispose();
      return loss;
    }),
  );
  assert.ok((trained as number) < (before as number) - 1);
});

test('an output folder in use is refused; overwrite_output_dir replaces the run in it', async () => {
  const dir = await folder();
  const config = smallConfig(dir, { max_steps: 2, save_steps: 1 });
  const first = trainLoRA(config);
  const second = trainLoRA(config);
  const [a, b] = await Promise.allSettled([first.result, second.result]);
  assert.deepEqual([a.status, b.status].sort(), ['fulfilled', 'rejected']);
  const refused = (a.status === 'rejected' ? a.reason : (b as PromiseRejectedResult).reason) as { code: string };
  assert.equal(refused.code, 'ERR_MARTLET_IO');
  await assert.rejects(train(config), {
    code: 'ERR_MARTLET_IO',
    message: /resume_from_checkpoint.*overwrite_output_dir/,
  });
  await train({ ...config, max_steps: 1, overwrite_output_dir: true });
  assert.deepEqual(
    readdirSync(join(dir, 'out')).filter((name) => name.startsWith('checkpoint')),
    ['checkpoint-1'],
  );
  // a config that cannot start must not cost the run that is there
  await assert.rejects(train({ ...config, overwrite_output_dir: true, target_modules: ['no_such_module'] }));
  assert.ok(existsSync(join(dir, 'out', 'adapter_model.safetensors')));
  await assert.rejects(train({ ...config, output_dir: MODEL, overwrite_output_dir: true }), { code: 'ERR_MARTLET_IO' });
});

test('resuming is refused without a checkpoint, with other rows, with other batches', async () => {
  const dir = await folder();
  const config = smallConfig(dir, { max_steps: 2, save_steps: 1 });
  await assert.rejects(train({ ...config, resume_from_checkpoint: true }), {
    code: 'ERR_MARTLET_IO',
    message: /no checkpoint/,
  });
  await train(config);
  const resume = { ...config, resume_from_checkpoint: true, max_steps: 4 };
  await assert.rejects(train({ ...resume, gradient_accumulation_steps: 1 }), {
    code: 'ERR_MARTLET_CONFIG',
    message: /accumulation was 2 and is 1/,
  });
  const data = JSON.parse(readFileSync(config.dataset as string, 'utf8'));
  writeFileSync(join(dir, 'other.json'), JSON.stringify([...data.slice(1), data[0]]));
  await assert.rejects(train({ ...resume, dataset: join(dir, 'other.json') }), {
    code: 'ERR_MARTLET_CONFIG',
    message: /rows have changed/,
  });
  await cp(join(dir, 'out', 'checkpoint-1'), join(dir, 'moved'), { recursive: true });
  const { result } = await train({ ...resume, resume_from_checkpoint: join(dir, 'moved') });
  assert.equal(result.steps, 4, 'a run may go on for longer than it was meant to');
});

test('a run may start from an adapter', async () => {
  const dir = await folder();
  const adapter = join(llava, 'adapter-peft');
  const config = smallConfig(dir, {
    adapters: adapter,
    lora_rank: 4,
    lora_alpha: 8,
    max_steps: 1,
    learning_rate: 0,
    save_strategy: 'no',
  });
  const { result } = await train(config);
  const { messages, images } = getCase('single');
  const row = { messages, images: images.map((image) => join(llava, 'images', image)) };
  const model = await loadModel(MODEL, { device: 'cpu', adapters: { before: adapter, after: result.adapterDir } });
  const [a, b] = [await model.score({ ...row, adapter: 'before' }), await model.score({ ...row, adapter: 'after' })];
  await model.dispose();
  assert.ok(Math.abs(a.loss - b.loss) < 1e-6, `${a.loss} and ${b.loss}`);
});

test('a loss that is not finite ends the run, names step and rows, and keeps the weights saved before', async () => {
  const dir = await folder();
  const run = trainLoRA(smallConfig(dir, { learning_rate: 1e30, max_grad_norm: 0, max_steps: 6, save_steps: 1 }));
  await assert.rejects(run.result, (error: Error & { code: string; details: { step: number; samples: string[] } }) => {
    assert.equal(error.code, 'ERR_MARTLET_NON_FINITE');
    assert.ok(error.details.step >= 2);
    assert.ok(error.details.samples.length >= 1 && error.details.samples.length <= 4);
    for (const sample of error.details.samples) {
      assert.match(sample, /^data\.json row \d+ \(id .+\)$/);
      assert.ok(error.message.includes(sample));
    }
    return true;
  });
  assert.ok(existsSync(join(dir, 'out', 'checkpoint-1')));
});

test('bad rows stop a run before it starts, or are left out and listed', async () => {
  const dir = await folder();
  const data = JSON.parse(readFileSync(writeData(dir), 'utf8'));
  writeFileSync(join(dir, 'empty.png'), '');
  data[1].images = [join(dir, 'empty.png')];
  data.push({ id: 'mute', messages: [{ role: 'user', content: 'hello' }] });
  const dataset = join(dir, 'bad.json');
  writeFileSync(dataset, JSON.stringify(data));
  await assert.rejects(
    train(smallConfig(dir, { dataset })),
    (error: Error & { code: string; details: { problems: { row: number }[] } }) => {
      assert.equal(error.code, 'ERR_MARTLET_DATASET');
      assert.deepEqual(
        error.details.problems.map(({ row }) => row),
        [1, 9],
      );
      return true;
    },
  );
  const { result, events } = await train(
    smallConfig(dir, { dataset, on_bad_row: 'skip', max_length: 60, max_steps: 1 }),
  );
  assert.deepEqual(result.skipped.map(({ row }) => row).sort(), [1, 6, 9], 'row 6 has 72 tokens');
  assert.ok(events.some((event) => event.type === 'warning' && /3 row\(s\) are left out/.test(event.message)));
});

test('a picture that goes away during the run ends it by name, or is left out', async () => {
  for (const policy of ['error', 'skip']) {
    const dir = await folder();
    const image = join(dir, 'gone.png');
    await cp(join(llava, 'images', 'exact.png'), image);
    const { messages } = getCase('single');
    const rows = Array.from({ length: 40 }, (_, i) =>
      i === 39 ? { id: 'last', messages, images: [image] } : { messages: getCase('text-only').messages, images: [] },
    );
    writeFileSync(join(dir, 'rows.json'), JSON.stringify(rows));
    const run = trainLoRA(
      smallConfig(dir, {
        dataset: join(dir, 'rows.json'),
        dataset_shuffle: false,
        train_dataloader_shuffle: false,
        max_steps: 10,
        save_strategy: 'no',
        on_bad_row: policy,
      }),
    );
    const seen = (async () => {
      for await (const event of run) if (event.type === 'start') rmSync(image);
    })();
    if (policy === 'error') {
      await assert.rejects(seen, { code: 'ERR_MARTLET_IMAGE', message: /rows\.json row 39 \(id last\)/ });
    } else {
      await seen;
      assert.deepEqual(
        (await run).skipped.map(({ row }) => row),
        [39],
      );
    }
  }
});

test('a config file, overrides, the alias', async () => {
  const dir = await folder();
  const file = join(dir, 'config.yaml');
  writeData(dir);
  writeFileSync(
    file,
    `model_id: ${MODEL}
sft_type: lora
dataset:
  train:
    - type: custom_multi_modal
      dataset_root: ${dir}
      file_name: data.json
  eval: null
lora_args: { r: 8, target_modules: [q_proj, v_proj] }
train_args: { learning_rate: 1e-4, output_dir: ${join(dir, 'out')}, logging_steps: 1, per_device_train_batch_size: 9 }
evaluation_strategy: no
`,
  );
  const { events, result } = await collect(trainAlias(file, { overrides: ['max_steps=1', 'lora_args.r=2'] }));
  const start = events[0] as Extract<TrainEvent, { type: 'start' }>;
  assert.deepEqual([start.config.lora_rank, start.config.max_steps, start.targets], [2, 1, 6]);
  assert.equal(result.steps, 1);
  const named = { max_steps: 1, overwrite_output_dir: true, output_dir: join(dir, 'out') };
  await train(smallConfig(dir, { ...named, model_type: 'llava1_5_hf' }));
  await assert.rejects(train(smallConfig(dir, { ...named, model_type: 'qwen-vl-chat' })), {
    code: 'ERR_MARTLET_CONFIG',
    message: /is a llava/,
  });
  await assert.rejects(train({ model: MODEL, dataste: 'x' }), {
    code: 'ERR_MARTLET_CONFIG',
    message: /did you mean dataset/,
  });
});
