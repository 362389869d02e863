import assert from 'node:assert/strict';
import { test } from 'node:test';
import { type OptionSpecs, Options, parseCommandLine } from '../../lib/cli/args.js';

const SPECS: OptionSpecs = {
  model: { kind: 'value', aliases: ['model_id'] },
  max_new_tokens: { kind: 'value' },
  image: { kind: 'value', multiple: true },
  stream: { kind: 'flag' },
  json: { kind: 'flag' },
  fp16: { kind: 'config' },
  target_modules: { kind: 'config' },
  max_steps: { kind: 'config' },
};
const parse = (...argv: string[]) => {
  const parsed = parseCommandLine(argv, SPECS);
  return { ...Object.fromEntries(parsed.options.map(({ name, value }) => [name, value])), _: parsed.positionals };
};
const refuses = (argv: string[], message: RegExp) =>
  assert.throws(() => parseCommandLine(argv, SPECS), { code: 'ERR_MARTLET_USAGE', message });

test('snake_case, kebab-case and aliases mean the same', () => {
  for (const argv of [['--max_new_tokens', '5'], ['--max-new-tokens', '5'], ['--max-new-tokens=5']]) {
    assert.deepEqual(parse(...argv), { max_new_tokens: '5', _: [] });
  }
  assert.deepEqual(parse('--model-id', 'x', 'file.yaml'), { model: 'x', _: ['file.yaml'] });
});

test('flags take no value, or true/false in any case', () => {
  assert.deepEqual(parse('--stream', 'file'), { stream: 'true', _: ['file'] });
  assert.deepEqual(parse('--stream', 'False', '--json', 'True'), { stream: 'false', json: 'true', _: [] });
  refuses(['--stream=maybe'], /true or false/);
});

test('config keys take negative numbers, lists, or nothing', () => {
  assert.deepEqual(parse('--max_steps', '-1', '--fp16', '--target_modules', 'q_proj', 'v_proj'), {
    max_steps: '-1',
    fp16: 'true',
    target_modules: '["q_proj","v_proj"]',
    _: [],
  });
});

test('values may hold anything, an equals sign and spaces too', () => {
  assert.deepEqual(parse('--model=a=b c'), { model: 'a=b c', _: [] });
  assert.deepEqual(parse('--', '--model'), { _: ['--model'] });
});

test('mistakes are named, with what was meant', () => {
  refuses(['--max_new_token', '5'], /unknown option --max_new_token\. Did you mean --max_new_tokens\?/);
  refuses(['--modle', 'x'], /Did you mean --model\?/);
  refuses(['--zzzzzzz'], /^unknown option --zzzzzzz\. --help/);
  refuses(['-j'], /unknown option -j/);
  refuses(['--model'], /--model needs a value/);
  refuses(['--model', '--json'], /--model needs a value/);
  refuses(['--model', 'a', '--model_id', 'b'], /twice/);
});

test('typed access', () => {
  const options = new Options(
    parseCommandLine(['--image', 'a', '--image', 'b', '--max_new_tokens', '1e2', '--json'], SPECS),
  );
  assert.deepEqual(options.strings('image'), ['a', 'b']);
  assert.equal(options.number('max_new_tokens'), 100);
  assert.equal(options.flag('json'), true);
  assert.equal(options.flag('stream'), false);
  assert.equal(options.number('model'), undefined);
  const bad = new Options(parseCommandLine(['--max_new_tokens', 'many', '--model', 'x'], SPECS));
  assert.throws(() => bad.number('max_new_tokens'), { code: 'ERR_MARTLET_USAGE' });
  assert.throws(() => bad.choice('model', ['a', 'b'] as const), { message: /one of a, b/ });
});
