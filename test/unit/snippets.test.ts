/** README and docs are true: every block marked `run` works, in order, as it is printed. */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { resolveTrainConfig } from '../../lib/config/index.js';
import { parseYaml } from '../../lib/config/yaml.js';
import { parseRow } from '../../lib/data/rows.js';
import { projectRoot } from '../support/fixtures.js';
import { addTutorialFiles, runIn, type Snippet, snippetsOf, workspace } from '../support/snippets.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

const documents = [
  'README.md',
  ...readdirSync(join(projectRoot, 'docs'), { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.md'))
    .map((name) => `docs/${name}`),
];

async function check(dir: string, { language, text, line, file: saved }: Snippet): Promise<void> {
  if (saved !== undefined) writeFileSync(join(dir, saved), text);
  switch (language) {
    case 'yaml': {
      const { value, positions } = parseYaml(text);
      const { warnings } = resolveTrainConfig(value, { file: `line ${line}`, positions });
      assert.deepEqual(
        warnings.filter((warning) => !warning.startsWith('framework ')), // a key of the tutorial's
        [],
      );
      return;
    }
    case 'json':
      for (const row of JSON.parse(text)) parseRow(row, { takesVideos: true });
      return;
    case 'jsonl':
      for (const row of text.trimEnd().split('\n')) parseRow(JSON.parse(row), { takesVideos: true });
      return;
    case 'js':
    case 'sh': {
      if (language === 'js' && saved !== undefined) return; // a later block runs it
      const file = join(dir, language === 'js' ? `line-${line}.mjs` : `line-${line}.sh`);
      writeFileSync(file, text);
      const [command, args] = language === 'js' ? [process.execPath, [file]] : ['bash', ['-e', file]];
      const { code, stdout, stderr } = await runIn(dir, command, args);
      assert.equal(code, 0, `line ${line}:\n${stdout}\n${stderr}`);
      if (language === 'sh' || text.includes('console.log')) assert.notEqual(`${stdout}${stderr}`, '');
      return;
    }
    default:
      assert.fail(`line ${line}: ${language} cannot be run`);
  }
}

test('README, the guide and every page with code have blocks that are run', () => {
  const withBlocks = documents.filter((path) => snippetsOf(path).length > 0);
  for (const name of ['README', 'docs/getting-started', 'docs/api', 'docs/cli', 'docs/configuration', 'docs/data'])
    assert.ok(withBlocks.includes(`${name}.md`), name);
});

// Two at once: a document's own blocks build on one another, documents do not.
describe('snippets', { concurrency: 2 }, () => {
  for (const path of documents) {
    const snippets = snippetsOf(path);
    if (snippets.length === 0) continue;
    test(path, async () => {
      const dir = workspace(root);
      if (path.startsWith('docs/tutorial')) await addTutorialFiles(dir);
      for (const snippet of snippets) await check(dir, snippet);
    });
  }
});

test("the tutorial has the given files' own YAML and data, and the same blocks in both languages", () => {
  const [english, chinese] = ['docs/tutorial.md', 'docs/tutorial.zh-CN.md'].map((path) =>
    snippetsOf(path).map(({ language, text, file }) => ({ language, text, file })),
  );
  assert.deepEqual(chinese, english);
  const given = (name: string) => readFileSync(join(projectRoot, 'test/fixtures/tutorial', name), 'utf8');
  const block = (name: string) => english?.find(({ file }) => file?.endsWith(name))?.text ?? assert.fail(name);
  assert.deepEqual(JSON.parse(block('data.json')), JSON.parse(given('data.json')));
  assert.deepEqual(parseYaml(block('qwen_vl_lora.yaml')).value, parseYaml(given('qwen_vl_lora.yaml')).value);
});
