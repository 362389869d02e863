import assert from 'node:assert/strict';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { convertCheckpoint, infer, loadModel, type Model, mergeAdapter, quantizeModel } from '../../lib/index.js';
import { expectedJson, expectedPixels, getCase, llava, maxDifference } from '../support/fixtures.js';

const MODEL = join(llava, 'model-4x');
const ADAPTER = join(llava, 'adapter-peft');

let model: Model;
before(async () => {
  model = await loadModel(MODEL, { device: 'cpu', adapters: { tuned: ADAPTER } });
});
after(() => model.dispose());

/** A case of the fixture as the public API takes it, without its last answer. */
function question(name: string) {
  const { messages, images } = getCase(name);
  return { messages: messages.slice(0, -1), images: images.map((image) => join(llava, 'images', image)) };
}
const whole = (name: string) => ({ ...question(name), messages: getCase(name).messages });
const greedy = { temperature: 0, maxNewTokens: 24, adapter: null };

test('says what was loaded', () => {
  assert.deepEqual(
    [model.modelType, model.device, model.dtype, model.adapters, model.disposed],
    ['llava', 'cpu', 'float32', ['tuned'], false],
  );
  assert.ok(model.parameters > 100_000);
});

test('greedy answers are those of transformers, token for token', async () => {
  for (const [name, tokens] of Object.entries(expectedJson.greedy)) {
    const out = await model.generate({ ...question(name), ...greedy });
    assert.deepEqual([...out.tokenIds], tokens, name);
    assert.equal(out.promptTokens, getCase(name).default.promptIds.length, 'image tokens count');
    assert.equal(out.finishReason, 'length');
    assert.deepEqual(out.usage, {
      promptTokens: out.promptTokens,
      completionTokens: tokens.length,
      totalTokens: out.promptTokens + tokens.length,
    });
    const { preprocess, vision, prefill, decode, total } = out.timings;
    assert.ok([preprocess, vision, prefill, decode].every((ms) => ms >= 0) && total >= prefill + decode);
  }
});

test('a single adapter answers by default, null means the base model, adapters come and go by name', async () => {
  const ask = async (adapter?: string | null) => [
    ...(await model.generate({ ...question('single'), temperature: 0, maxNewTokens: 24, adapter })).tokenIds,
  ];
  const { greedy: base, adapterGreedy } = expectedJson;
  assert.deepEqual(await ask(), adapterGreedy.single);
  assert.deepEqual(await ask('tuned'), adapterGreedy.single);
  assert.deepEqual(await ask(null), base.single);
  await assert.rejects(ask('other'), { code: 'ERR_MARTLET_ADAPTER', message: /'other'.*loaded: tuned/ });
  await model.loadAdapter('second', join(llava, 'adapter-old'));
  await assert.rejects(model.loadAdapter('second', ADAPTER), { code: 'ERR_MARTLET_ADAPTER' });
  assert.deepEqual(model.adapters, ['tuned', 'second']);
  assert.deepEqual(await ask('second'), adapterGreedy.single, 'the same adapter under the old key names');
  await model.unloadAdapter('second');
  await assert.rejects(ask('second'), { code: 'ERR_MARTLET_ADAPTER' });
  await assert.rejects(model.loadAdapter('x', MODEL), { code: 'ERR_MARTLET_ADAPTER', message: /adapter_config\.json/ });
  await assert.rejects(model.loadAdapter('x', '/no/such'), { code: 'ERR_MARTLET_ADAPTER' });
});

test('streamed chunks joined are the answer', async () => {
  for (const name of Object.keys(expectedJson.greedy)) {
    const out = await model.generate({ ...question(name), ...greedy });
    let text = '';
    const ids: number[] = [];
    for await (const chunk of model.stream({ ...question(name), ...greedy })) {
      text += chunk.text;
      ids.push(chunk.tokenId);
    }
    assert.equal(text, out.text, name);
    assert.deepEqual(ids, [...out.tokenIds], name);
  }
});

test('an answer ends before a stop string, in text and tokens, streamed or not', async () => {
  const full = await model.generate({ ...question('single'), ...greedy });
  const at = Math.floor(full.text.length / 2);
  const stop = full.text.slice(at, at + 3);
  const cut = full.text.slice(0, full.text.indexOf(stop));
  const out = await model.generate({ ...question('single'), ...greedy, stop: ['\u0001never', stop] });
  assert.equal(out.text, cut);
  assert.equal(out.finishReason, 'stop');
  assert.ok(out.tokenIds.length < full.tokenIds.length);
  assert.deepEqual([...out.tokenIds], [...full.tokenIds.slice(0, out.tokenIds.length)]);
  assert.equal(out.usage.completionTokens, out.tokenIds.length);
  let text = '';
  for await (const chunk of model.stream({ ...question('single'), ...greedy, stop })) {
    text += chunk.text;
    assert.ok(cut.startsWith(text), 'no part of the stop string gets out');
  }
  assert.equal(text, cut);
  const unmatched = await model.generate({ ...question('single'), ...greedy, stop: '\u0001never' });
  assert.equal(unmatched.text, full.text);
  assert.deepEqual(unmatched.tokenIds, full.tokenIds);
  assert.equal(unmatched.finishReason, 'length');
});

test('a batch gives each request what it gives alone: prompts of several lengths, limits, stop strings, sampling, chunks by row', async () => {
  const names = Object.keys(expectedJson.greedy);
  const alone = await Promise.all(names.map((name) => model.generate({ ...question(name), ...greedy })));
  const stop = (alone[0] as (typeof alone)[0]).text.slice(6, 9);
  const requests = [
    ...names.map((name) => ({ ...question(name), temperature: 0, maxNewTokens: 24 })),
    ...names.map((name, i) => ({ ...question(name), temperature: 0, maxNewTokens: i + 1 })),
    { ...question(names[0] as string), temperature: 0, maxNewTokens: 200, stop },
    { ...question(names[1] as string), temperature: 1, topP: 0.95, topK: 50, maxNewTokens: 16, seed: 7 },
    { ...question(names[1] as string), temperature: 0, repetitionPenalty: 1.3, maxNewTokens: 16, seed: 7 },
  ];
  const expected = [];
  for (const request of requests) expected.push(await model.generate({ ...request, adapter: null }));
  const heard = requests.map(() => '');
  for (const onChunk of [
    undefined,
    (row: number, { text }: { text: string }) => {
      heard[row] += text;
    },
  ]) {
    const out = await model.generateBatch(requests, { adapter: null, ...(onChunk && { onChunk }) });
    const told = ({ text, tokenIds, finishReason, usage }: (typeof out)[0]) => ({
      text,
      tokenIds: [...tokenIds],
      finishReason,
      usage,
    });
    assert.deepEqual(out.map(told), expected.map(told));
  }
  assert.deepEqual(
    heard,
    expected.map(({ text }) => text),
  );
  const { adapterGreedy } = expectedJson;
  const tuned = await model.generateBatch(
    Object.keys(adapterGreedy).map((name) => ({ ...question(name), temperature: 0, maxNewTokens: 24 })),
    { adapter: 'tuned' },
  );
  assert.deepEqual(
    tuned.map(({ tokenIds }) => [...tokenIds]),
    Object.values(adapterGreedy),
  );
  assert.deepEqual(await model.generateBatch([]), []);
});

test('infer answers several questions, two at once, as it answers each', async () => {
  const image = question('single').images[0] as string;
  const shared = { model: MODEL, device: 'cpu', temperature: 0, maxNewTokens: 12 } as const;
  const questions = [{ image, text: 'What is this?' }, { text: 'Say a word.' }, { image: [image], text: 'And this?' }];
  const answers = await infer({ ...shared, questions, batchSize: 2 });
  const alone = [];
  for (const one of questions) alone.push(await infer({ ...shared, ...one }));
  assert.deepEqual(
    answers.map(({ tokenIds, text }) => [[...tokenIds], text]),
    alone.map(({ tokenIds, text }) => [[...tokenIds], text]),
  );
  await assert.rejects(infer({ ...shared, questions, batchSize: 0 }), { code: 'ERR_MARTLET_USAGE' });
});

test('a batch that fails or is left frees the model: a bad request, a listener that throws, an abort', async () => {
  const good = { ...question('single'), temperature: 0, maxNewTokens: 24 };
  await assert.rejects(model.generateBatch([good, { ...good, temperature: -1 }]), { code: 'ERR_MARTLET_USAGE' });
  await assert.rejects(model.generateBatch([good, { ...good, images: ['/no/such.png'] }]), {
    code: 'ERR_MARTLET_IMAGE',
  });
  const thrown = new Error('enough');
  const onChunk = () => {
    throw thrown;
  };
  await assert.rejects(model.generateBatch([good, good], { onChunk }), thrown);
  const control = new AbortController();
  const running = model.generateBatch([good, { ...good, maxNewTokens: 400 }], {
    signal: control.signal,
    onChunk: (row) => row === 1 && control.abort(),
  });
  await assert.rejects(running, { code: 'ERR_MARTLET_ABORTED' });
  const [again] = await model.generateBatch([good], { adapter: null });
  assert.deepEqual([...(again as NonNullable<typeof again>).tokenIds], expectedJson.greedy.single);
});

test('leaving a stream cancels its job: the model is free at once', async () => {
  const long = { ...question('text-only'), ...greedy, maxNewTokens: 400 };
  const whole = await model.generate(long);
  let seen = 0;
  for await (const _ of model.stream(long)) if (++seen === 3) break;
  assert.equal(seen, 3);
  const started = performance.now();
  await model.memory();
  assert.ok(performance.now() - started < whole.timings.total / 2);
});

test('a seed makes sampling repeatable', async () => {
  const sample = async (seed: number) =>
    (await model.generate({ ...question('single'), temperature: 1, topP: 0.95, topK: 50, maxNewTokens: 16, seed }))
      .text;
  assert.equal(await sample(7), await sample(7));
  assert.notEqual(await sample(7), await sample(8));
});

test('score gives the loss of transformers and one log-probability for each labelled token', async () => {
  for (const [name, { loss, labelled }] of Object.entries(expectedJson.losses)) {
    const out = await model.score({ ...whole(name), adapter: null, logits: name === 'single' });
    assert.ok(Math.abs(out.loss - loss) < 1e-4, `${name}: ${out.loss} and ${loss}`);
    assert.equal(out.logprobs.length, labelled);
    assert.equal(out.labels.filter((label) => label !== -100).length, labelled);
    const mean = -out.logprobs.reduce((sum, value) => sum + value, 0) / labelled;
    assert.ok(Math.abs(mean - out.loss) < 1e-5);
    if (name === 'single') assert.deepEqual(out.logits?.shape, [labelled, 496]);
    else assert.equal(out.logits, undefined);
  }
});

test('prepare gives exactly what the network is fed', async () => {
  const { inputIds, labels, promptIds } = getCase('single').default;
  const train = await model.prepare({ ...whole('single'), for: 'train' });
  assert.deepEqual([...train.inputIds], inputIds);
  assert.deepEqual([...(train.labels as Int32Array)], labels);
  assert.deepEqual(train.pixels.pixel_values?.shape, [1, 3, 56, 56]);
  const wanted = expectedPixels.get('landscape.png') ?? assert.fail('no pixels');
  assert.ok(maxDifference(train.pixels.pixel_values?.data ?? [], wanted.data) < 1e-6);
  assert.deepEqual((await model.prepare(question('two-images'))).pixels.pixel_values?.shape, [2, 3, 56, 56]);
  const prompt = await model.prepare(question('single'));
  assert.deepEqual([...prompt.inputIds], promptIds);
  assert.equal(prompt.labels, undefined);
  assert.deepEqual((await model.prepare(question('text-only'))).pixels, {});
});

test('wrong settings are refused by name', async () => {
  for (const [field, value] of Object.entries({
    maxNewTokens: 0,
    temperature: -1,
    topP: 1.5,
    topK: 0.5,
    repetitionPenalty: 0,
    seed: -1,
    stop: '',
  })) {
    await assert.rejects(model.generate({ ...question('text-only'), [field]: value }), {
      code: 'ERR_MARTLET_USAGE',
      message: new RegExp(`^${field} must be`),
    });
  }
});

test('a missing image and a wrong number of images are named, and the model goes on', async () => {
  const { messages } = question('single');
  await assert.rejects(model.generate({ messages, images: ['/no/such.png'] }), { code: 'ERR_MARTLET_IMAGE' });
  await assert.rejects(model.generate({ messages, images: [] }), (error: Error & { code: string }) =>
    error.code.startsWith('ERR_MARTLET_'),
  );
  assert.deepEqual(
    [...(await model.generate({ ...question('single'), ...greedy })).tokenIds],
    expectedJson.greedy.single,
  );
});

test('messages that are none are refused by name, as programs without types give them', async () => {
  const ask = (messages: unknown) => model.generate({ messages } as Parameters<typeof model.generate>[0]);
  for (const [messages, field] of [
    [undefined, 'messages'],
    [[], 'messages'],
    ['hello', 'messages'],
    [[null], 'messages.0'],
    [[{ role: 'bot', content: 'x' }], 'messages.0.role'],
    [[{ role: 'user', content: 'x' }, { role: 'assistant' }], 'messages.1.content'],
  ] as const) {
    await assert.rejects(ask(messages), (error: Error & { code: string; details: { field: string } }) => {
      assert.deepEqual([error.code, error.details.field], ['ERR_MARTLET_USAGE', field]);
      return true;
    });
  }
});

test('paths that are left out are refused by name', async () => {
  const nothing = {} as never;
  for (const [work, field] of [
    [() => loadModel(undefined as never), 'model'],
    [() => loadModel(MODEL, { adapters: 'out' as never }), 'adapters'],
    [() => mergeAdapter(nothing), 'adapter'],
    [() => mergeAdapter({ adapter: 'out' } as never), 'outputDir'],
    [() => convertCheckpoint(nothing), 'outputDir'],
    [() => quantizeModel(nothing), 'outputDir'],
  ] as const) {
    await assert.rejects(work, (error: Error & { code: string; details: { field: string } }) => {
      assert.deepEqual([error.code, error.details.field], ['ERR_MARTLET_USAGE', field]);
      return true;
    });
  }
});

test('a prompt that fills the model is refused; a long answer ends where the positions end', async () => {
  const content = 'a story '.repeat(400);
  await assert.rejects(model.generate({ messages: [{ role: 'user', content }] }), {
    code: 'ERR_MARTLET_USAGE',
    message: /512/,
  });
  const out = await model.generate({ ...question('text-only'), ...greedy, maxNewTokens: 100_000 });
  assert.ok(out.usage.totalTokens <= 512);
});

test('an aborted signal rejects with its reason as the cause, before and during the work', async () => {
  const reason = new Error('changed my mind');
  await assert.rejects(model.generate({ ...question('single'), signal: AbortSignal.abort(reason) }), {
    code: 'ERR_MARTLET_ABORTED',
    cause: reason,
  });
  for (const stop of [undefined, '\u0001never']) {
    const abort = new AbortController();
    const running = model.generate({
      ...question('text-only'),
      ...greedy,
      maxNewTokens: 450,
      stop,
      signal: abort.signal,
    });
    setTimeout(() => abort.abort(reason), 20);
    await assert.rejects(running, { code: 'ERR_MARTLET_ABORTED', cause: reason });
  }
  const abort = new AbortController();
  await assert.rejects(
    async () => {
      for await (const _ of model.stream({
        ...question('text-only'),
        ...greedy,
        maxNewTokens: 450,
        signal: abort.signal,
      })) {
        abort.abort(reason);
      }
    },
    { code: 'ERR_MARTLET_ABORTED', cause: reason },
  );
});

test('dispose cancels what runs, waits, may be called again; nothing works afterwards', async () => {
  const own = await loadModel(MODEL, { device: 'cpu' });
  const running = own.generate({ ...question('text-only'), ...greedy, maxNewTokens: 450 });
  await own.memory;
  const rejected = assert.rejects(running, { code: 'ERR_MARTLET_DISPOSED' });
  setTimeout(() => own.dispose(), 20);
  await rejected;
  await own.dispose();
  await own[Symbol.asyncDispose]();
  assert.equal(own.disposed, true);
  await assert.rejects(own.generate(question('single')), { code: 'ERR_MARTLET_DISPOSED' });
  await assert.rejects(own.stream(question('single')).next(), { code: 'ERR_MARTLET_DISPOSED' });
  await assert.rejects(own.score(whole('single')), { code: 'ERR_MARTLET_DISPOSED' });
  await assert.rejects(own.prepare(question('single')), { code: 'ERR_MARTLET_DISPOSED' });
  await assert.rejects(own.memory(), { code: 'ERR_MARTLET_DISPOSED' });
  await assert.rejects(own.loadAdapter('x', ADAPTER), { code: 'ERR_MARTLET_DISPOSED' });
  await assert.rejects(own.unloadAdapter('x'), { code: 'ERR_MARTLET_DISPOSED' });
});

test('loading reports progress, and fails by name', async () => {
  const progress: { done: number; total: number }[] = [];
  const own = await loadModel(MODEL, { device: 'cpu', onProgress: (p) => progress.push(p) });
  await own.dispose();
  assert.ok(progress.length > 0);
  assert.equal(progress.at(-1)?.done, progress.at(-1)?.total);
  await assert.rejects(loadModel('/no/such/model'), { code: 'ERR_MARTLET_MODEL_NOT_FOUND' });
  await assert.rejects(loadModel(MODEL, { adapters: { a: '/no/such' } }), { code: 'ERR_MARTLET_ADAPTER' });
  await assert.rejects(loadModel(MODEL, { quantization: 'fp4' as never }), { code: 'ERR_MARTLET_USAGE' });
  await assert.rejects(loadModel(MODEL, { signal: AbortSignal.abort() }), { code: 'ERR_MARTLET_ABORTED' });
});
