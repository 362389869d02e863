/** Wrong arguments from programs without types: no TypeError, no option that is silently without effect. */
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import {
  convertCheckpoint,
  drawBoxes,
  infer,
  loadModel,
  type Model,
  mergeAdapter,
  parseBoxes,
  planTraining,
  quantizeModel,
  trainLoRA,
} from '../../lib/index.js';
import { getCase, llava } from '../support/fixtures.js';
import { check, refusal } from '../support/refusal.js';
import { MODEL, smallConfig } from '../support/train.js';

const IMAGE = join(llava, 'images', 'landscape.png');
const ADAPTER = join(llava, 'adapter-peft');

let root: string;
let model: Model;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
  model = await loadModel(MODEL, { device: 'cpu' });
});
after(async () => {
  await model.dispose();
  await rm(root, { recursive: true });
});

// biome-ignore lint/suspicious/noExplicitAny: what a program without types may hand over
type Loose = any;
const ask = { messages: [{ role: 'user', content: 'What is it?' }], temperature: 0, maxNewTokens: 2 };
const told = { messages: [...ask.messages, { role: 'assistant', content: 'A circle.' }] };
const out = () => join(root, 'out');

/** Each function with options that are right but for what `more` adds. */
const calls: [string, (more: object) => PromiseLike<unknown>, string, string][] = [
  ['loadModel', (more) => loadModel(MODEL, { device: 'cpu', ...more } as Loose), 'dtpye', 'dtype'],
  ['generate', (more) => model.generate({ ...ask, ...more } as Loose), 'temprature', 'temperature'],
  ['stream', (more) => model.stream({ ...ask, ...more } as Loose).next(), 'max_new_tokens', 'maxNewTokens'],
  ['score', (more) => model.score({ ...told, ...more } as Loose), 'logit', 'logits'],
  ['prepare', (more) => model.prepare({ ...told, ...more } as Loose), 'image', 'images'],
  ['generateBatch', (more) => model.generateBatch([ask as Loose], more), 'adaptor', 'adapter'],
  ['a request of generateBatch', (more) => model.generateBatch([{ ...ask, ...more } as Loose]), 'seeed', 'seed'],
  [
    'infer',
    (more) => infer({ model: MODEL, device: 'cpu', text: 'Hi', maxNewTokens: 1, ...more } as Loose),
    'images',
    'image',
  ],
  [
    'infer with questions',
    (more) => infer({ model: MODEL, device: 'cpu', maxNewTokens: 1, questions: [{ text: 'Hi' }], ...more } as Loose),
    'batchsize',
    'batchSize',
  ],
  [
    'a question of infer',
    (more) => infer({ model: MODEL, device: 'cpu', questions: [{ text: 'Hi', ...more }] } as Loose),
    'images',
    'image',
  ],
  ['trainLoRA', (more) => trainLoRA(smallConfig(root, { max_steps: 1 }), more as Loose), 'override', 'overrides'],
  ['planTraining', (more) => planTraining(smallConfig(root), more as Loose), 'gpus', 'gpu'],
  [
    'mergeAdapter',
    (more) => mergeAdapter({ model: MODEL, adapter: ADAPTER, outputDir: out(), ...more } as Loose),
    'max_shard_size',
    'maxShardSize',
  ],
  [
    'quantizeModel',
    (more) => quantizeModel({ model: MODEL, outputDir: out(), quantization: 'nf4', ...more } as Loose),
    'overwrit',
    'overwrite',
  ],
  [
    'convertCheckpoint',
    (more) => convertCheckpoint({ model: MODEL, outputDir: out(), ...more } as Loose),
    'dtyp',
    'dtype',
  ],
  ['drawBoxes', (more) => drawBoxes(IMAGE, 'none', more as Loose), 'ouput', 'output'],
  [
    'parseBoxes',
    async (more) => parseBoxes('(1,2),(3,4)', { normBbox: 'norm1000', width: 9, height: 9, ...more } as Loose),
    'heigth',
    'height',
  ],
  [
    'model.parseBoxes',
    async (more) => model.parseBoxes('none', { width: 9, height: 9, ...more } as Loose),
    'adaptor',
    'adapter',
  ],
];

for (const [name, call, wrong, meant] of calls) {
  test(`${name}: an option that it does not have is refused, with the one that was meant`, async () => {
    check(await refusal(() => call({ [wrong]: 1 })), {
      code: 'ERR_MARTLET_USAGE',
      says: [new RegExp(`${name} has no option ${wrong}: did you mean ${meant}\\?`)],
      details: { field: wrong, didYouMean: meant },
    });
    const far = await refusal(() => call({ qqqqqqqqqq: 1 }));
    check(far, { code: 'ERR_MARTLET_USAGE', says: [/qqqqqqqqqq; it has /, new RegExp(meant)] });
    assert.ok(!('didYouMean' in far.details));
  });
}

test('an option with the value undefined is absent; prepare and score take what generate was asked', async () => {
  await model.generate({ ...ask, temprature: undefined } as Loose);
  await model.prepare(ask as Loose);
  await model.score({ ...ask, ...told } as Loose);
});

test('no argument, null, a text or a list: an error with a code, not a TypeError', async () => {
  const options: Record<string, (given: Loose) => PromiseLike<unknown>> = {
    loadModel: (given) => loadModel(given),
    'loadModel, options': (given) => loadModel(MODEL, given),
    generate: (given) => model.generate(given),
    'stream, score, prepare': (given) => model.stream(given).next(),
    score: (given) => model.score(given),
    prepare: (given) => model.prepare(given),
    generateBatch: (given) => model.generateBatch(given),
    'generateBatch, a request': (given) => model.generateBatch([given]),
    infer: (given) => infer(given),
    'infer, questions': (given) => infer({ model: MODEL, questions: given }),
    'infer, a question': (given) => infer({ model: MODEL, questions: [given] }),
    mergeAdapter: (given) => mergeAdapter(given),
    quantizeModel: (given) => quantizeModel(given),
    convertCheckpoint: (given) => convertCheckpoint(given),
    'trainLoRA, options': (given) => trainLoRA(smallConfig(root, { max_steps: 1 }), given),
    'planTraining, options': (given) => planTraining(smallConfig(root), given),
    drawBoxes: (given) => drawBoxes(IMAGE, given),
    'drawBoxes, options': (given) => drawBoxes(IMAGE, 'none', given),
    parseBoxes: async (given) => parseBoxes('none', given),
    'model.parseBoxes': async (given) => model.parseBoxes('none', given),
  };
  const optional = /options/;
  for (const [name, call] of Object.entries(options)) {
    for (const given of [undefined, null, 5, ...(/^drawBoxes$|^loadModel$/.test(name) ? [] : ['', []])]) {
      // a list of questions, or of requests, may be empty
      const right = Array.isArray(given) && /^(generateBatch|infer, questions)$/.test(name);
      if (right || (given === undefined && optional.test(name))) continue;
      const { code, message } = await refusal(() => call(given));
      assert.equal(code, 'ERR_MARTLET_USAGE', `${name} of ${JSON.stringify(given)}: ${message}`);
    }
  }
  for (const given of [undefined, null, 5, []] as Loose[]) {
    for (const call of [() => trainLoRA(given), () => planTraining(given)]) {
      assert.equal((await refusal(call)).code, 'ERR_MARTLET_CONFIG', JSON.stringify(given));
    }
  }
});

test('score and generate say the same of the same mistake', async () => {
  const { messages } = getCase('text-only');
  const long = `${'many words '.repeat(3000)}?`;
  const tooLong = { messages: [{ role: 'user', content: long }, messages[1]] } as Loose;
  const says = [/the model takes \d+/];
  check(await refusal(() => model.generate({ messages: tooLong.messages.slice(0, 1) })), {
    code: 'ERR_MARTLET_USAGE',
    says,
  });
  const error = await refusal(() => model.score(tooLong));
  check(error, { code: 'ERR_MARTLET_USAGE', says });
  assert.ok((error.details.promptTokens as number) > (error.details.maxPositions as number));
  check(await refusal(() => model.score(ask.messages && ({ messages: ask.messages } as Loose))), {
    code: 'ERR_MARTLET_USAGE',
    says: [/assistant message/],
  });
  for (const bad of [{ device: 'gpu' }, { dtype: 'float8' }]) {
    assert.equal((await refusal(() => loadModel(MODEL, bad as Loose))).code, 'ERR_MARTLET_USAGE', JSON.stringify(bad));
  }
});
