/** The documents agree with the code: what is generated is current, what is listed is complete, what is linked is there. */
import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { ERROR_CODES } from '../../lib/errors.js';
import { projectRoot } from '../support/fixtures.js';

const generator: {
  generatedFiles(): Map<string, string>;
  markdownFiles(): string[];
} = await import(pathToFileURL(join(projectRoot, 'scripts/generate-docs.mjs')).href);
const read = (path: string) => readFileSync(join(projectRoot, path), 'utf8');

test('generated parts of the documents and the JSON Schema are current', () => {
  for (const [path, text] of generator.generatedFiles())
    assert.equal(read(path), text, `${path} is stale: npm run docs`);
});

/** As GitHub makes them of headings. */
const anchorsOf = (path: string) =>
  new Set(
    [...read(path).matchAll(/^#+ (.*)$/gm)].map(([, title]) =>
      (title as string)
        .toLowerCase()
        .replaceAll(/[^\w\- ]/g, '')
        .replaceAll(' ', '-'),
    ),
  );

test('links lead to files and headings that are there', () => {
  let links = 0;
  for (const path of generator.markdownFiles()) {
    for (const [, target] of read(path).matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^https?:/.test(target as string)) continue;
      links++;
      const [file, anchor] = (target as string).split('#');
      const linked = file === '' ? path : join(dirname(path), file as string);
      assert.ok(existsSync(join(projectRoot, linked)), `${path} links to ${target}, which is not there`);
      if (anchor) assert.ok(anchorsOf(linked).has(anchor), `${path} links to ${target}: there is no such heading`);
    }
  }
  assert.ok(links > 40, `only ${links} links were found`);
});

test('docs/api.md has a heading for every export', () => {
  const headings = anchorsOf('docs/api.md');
  const names = [...read('lib/index.ts').matchAll(/^export (?:type )?\{([^}]*)\}/gm)].flatMap(([, list]) =>
    (list as string)
      .split(',')
      .map((name) => name.trim().replace(/^type /, ''))
      .filter((name) => name !== ''),
  );
  assert.ok(names.length > 20);
  for (const name of names) {
    const [own, alias] = name.split(' as ') as [string, string | undefined];
    assert.ok(headings.has(own.toLowerCase()), `docs/api.md has no heading for ${own}`);
    if (alias) assert.match(read('docs/api.md'), new RegExp(`\`${alias}\``), `docs/api.md does not name ${alias}`);
  }
});

/** All source text of the library: TypeScript and C++. */
const sources = ['lib', 'native/core', 'native/addon']
  .flatMap((dir) =>
    readdirSync(join(projectRoot, dir), { recursive: true, encoding: 'utf8' }).map((name) => `${dir}/${name}`),
  )
  .filter((path) => /\.(ts|cpp|h|cu)$/.test(path))
  .map(read);

test('no code outside lib/errors.ts, and each is raised somewhere', () => {
  const used = new Set(sources.flatMap((text) => text.match(/\bERR_MARTLET_[A-Z_]*[A-Z]\b/g) ?? []));
  assert.deepEqual([...used].sort(), [...ERROR_CODES].sort());
  for (const code of ERROR_CODES) {
    const native = new RegExp(`(k\\w+) = "${code}"`).exec(sources.join('\n'))?.[1];
    const raises = (text: string) =>
      new RegExp(`'${code}',|"${code}",`).test(text.replace(/ERROR_CODES = \[[\s\S]*?\]/, '')) ||
      (native !== undefined && text.includes(`code::${native}`));
    assert.ok(sources.some(raises), `${code} is never raised`);
  }
});

test('docs/errors.md has every code, with when, details and remedy; the details are keys of the sources', () => {
  const sections = read('docs/errors.md').split(/^## /m).slice(1);
  assert.deepEqual(
    sections.map((section) => section.split('\n')[0]),
    [...ERROR_CODES],
    'the headings are the codes, in the order of lib/errors.ts',
  );
  for (const section of sections) {
    const [code] = section.split('\n');
    for (const part of ['When', 'Details', 'Remedy'])
      assert.match(section, new RegExp(`^- \\*\\*${part}\\*\\*: \\S`, 'm'), `${code}: ${part}`);
    const [, details] = /\*\*Details\*\*: (.*)$/m.exec(section) as RegExpExecArray;
    for (const [, key] of (details as string).matchAll(/`(\w+)`/g)) {
      const isKey = new RegExp(`\\b${key}\\??: |[{,] ?${key}[,}: ]|\\{"${key}",`);
      assert.ok(
        sources.some((text) => isKey.test(text)),
        `${code}: no source sets details.${key}`,
      );
    }
  }
});

test('docs/models.md names every family, and each has its page', () => {
  const families = [...read('lib/processing/registry.ts').matchAll(/^ {2}'?([\w-]+)'?: create\w+,$/gm)].map(
    ([, name]) => name,
  );
  assert.ok(families.length > 0);
  for (const family of families) {
    assert.match(read('docs/models.md'), new RegExp(`\`${family}\``), `docs/models.md does not name ${family}`);
    assert.match(read('README.md'), new RegExp(`\`${family}\``), `README.md does not name ${family}`);
  }
});
