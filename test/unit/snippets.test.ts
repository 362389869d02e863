/** README and docs are true: every block marked `run` works, in order, as it is printed. */
import assert from 'node:assert/strict';
import { readdirSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { resolveTrainConfig } from '../../lib/config/index.js';
import { parseYaml } from '../../lib/config/yaml.js';
import { parseRow } from '../../lib/data/rows.js';
import { projectRoot } from '../support/fixtures.js';
import { runIn, type Snippet, snippetsOf, workspace } from '../support/snippets.js';

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

async function check(dir: string, { language, text, line }: Snippet): Promise<void> {
  switch (language) {
    case 'yaml': {
      const { value, positions } = parseYaml(text);
      assert.deepEqual(resolveTrainConfig(value, { file: `line ${line}`, positions }).warnings, []);
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
      for (const snippet of snippets) await check(dir, snippet);
    });
  }
});
