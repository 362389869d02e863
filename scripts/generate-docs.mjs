/**
 * Writes what is generated: the blocks between `<!-- generated: … -->` and `<!-- /generated -->` in README.md and docs/, and the JSON Schema of the
 * config for editors. `npm run docs`; a test fails when a file is stale. Reads the compiled library: run `npm run build:ts` first.
 */
import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { SECTIONS } from '../dist/lib/config/dialects.js';
import { ALIASES, datasetSpecSchema, IGNORED, trainConfigSchema, UNSUPPORTED } from '../dist/lib/config/schema.js';

const root = fileURLToPath(new URL('..', import.meta.url));
const read = (path) => readFileSync(join(root, path), 'utf8');

// ---- JSON Schema

const jsonSchema = (schema) => {
  const { $schema, ...rest } = z.toJSONSchema(schema, { io: 'input' });
  return rest;
};
const { properties: KEYS } = jsonSchema(trainConfigSchema);
const orMore = (schema, ...others) => {
  const { description, default: fallback, ...rest } = schema;
  return { description, ...(fallback !== undefined && { default: fallback }), anyOf: [rest, ...others] };
};

/** Values that the dialects take beside those of the resolved config. */
function written(key, schema) {
  switch (key) {
    case 'torch_dtype':
      return orMore(schema, { enum: ['fp16', 'half', 'bf16', 'fp32', 'float', 'int8', 'int4', 'nf4', null] });
    case 'lora_dtype':
      return orMore(schema, { enum: ['fp16', 'half', 'bf16', 'fp32', 'float'] });
    case 'quant_bits':
      return orMore(schema, { const: 0 });
    case 'optim':
      return orMore(schema, { type: 'null' });
    case 'lr_scheduler_kwargs':
      return orMore(schema, { type: 'string' });
    case 'modules_to_save':
    case 'trainable_parameters':
    case 'freeze_parameters':
      return orMore(schema, { type: ['string', 'null'] });
    case 'device':
      return orMore(schema, { enum: ['gpu', null] });
    case 'template':
      return orMore(schema, { type: ['string', 'null'] });
    case 'eval_strategy':
    case 'save_strategy':
      return orMore(schema, { const: false });
    case 'adapters':
    case 'report_to':
      return orMore(schema, { type: ['string', 'null'] });
    case 'dataset':
      return {
        description: schema.description,
        anyOf: [
          { $ref: '#/$defs/files' },
          {
            type: 'object',
            properties: { train: { $ref: '#/$defs/files' }, eval: { $ref: '#/$defs/files' } },
            additionalProperties: false,
          },
        ],
      };
    case 'val_dataset':
      return { description: schema.description, $ref: '#/$defs/files' };
    default:
      return schema;
  }
}

/** Of config files in both dialects, in snake_case. Nothing is required: a key may come from the command line. */
export function editorSchema() {
  const file = jsonSchema(datasetSpecSchema).properties;
  const text = { type: ['string', 'null'] };
  const keys = Object.fromEntries(Object.entries(KEYS).map(([key, schema]) => [key, written(key, schema)]));
  const flat = {
    ...Object.fromEntries(Object.keys(keys).map((key) => [key, { $ref: `#/$defs/${key}` }])),
    ...Object.fromEntries(
      Object.entries(ALIASES).map(([alias, key]) => [
        alias,
        { description: `Same as ${key}.`, $ref: `#/$defs/${key}` },
      ]),
    ),
    fp16: { description: 'true = torch_dtype: float16.', type: 'boolean' },
    bf16: { description: 'true = torch_dtype: bfloat16.', type: 'boolean' },
    strict: { description: 'true = on_bad_row: error; false = on_bad_row: skip.', type: 'boolean' },
    ...Object.fromEntries(
      Object.entries(UNSUPPORTED).map(([key, values]) => [
        key,
        {
          description: 'Not supported; only the value that changes nothing is accepted.',
          anyOf: values.map((value) => ({ const: value })),
        },
      ]),
    ),
    ...Object.fromEntries(
      Object.entries(IGNORED).map(([key, why]) => [key, { description: `Has no effect: ${why}.` }]),
    ),
  };
  return {
    $schema: 'https://json-schema.org/draft/2020-12/schema',
    title: 'martlet training config',
    type: 'object',
    properties: {
      ...flat,
      ...Object.fromEntries([...SECTIONS].map((name) => [name, { $ref: '#/$defs/section' }])),
    },
    additionalProperties: false,
    $defs: {
      ...keys,
      section: { type: ['object', 'null'], properties: flat, additionalProperties: false },
      file: {
        type: 'object',
        properties: {
          ...file,
          file_name: { ...text, description: 'Data file below dataset_root.' },
          type: text,
          name: text,
        },
        additionalProperties: false,
      },
      files: {
        anyOf: [
          { type: ['string', 'null'] },
          { $ref: '#/$defs/file' },
          { type: 'array', items: { anyOf: [{ type: 'string' }, { $ref: '#/$defs/file' }] } },
        ],
      },
    },
  };
}

// ---- tables of docs/configuration.md

const cell = (text) => String(text).replaceAll('|', '\\|').replaceAll('\n', ' ');
const table = (head, rows) =>
  [head, head.map(() => '---'), ...rows].map((row) => `| ${row.map(cell).join(' | ')} |`).join('\n');
const code = (value) => `\`${value}\``;

function typeOf(schema) {
  if (schema.const !== undefined) return code(schema.const);
  if (schema.enum) return schema.enum.map((value) => code(value)).join(', ');
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(' or ');
  if (Array.isArray(schema.type)) return schema.type.map((type) => typeOf({ ...schema, type })).join(' or ');
  if (schema.type === 'array')
    return `list of ${schema.items.type === 'object' ? 'files' : `${typeOf(schema.items)}s`}`;
  if (schema.type === 'string') return 'text';
  if (schema.type === 'boolean') return '`true` or `false`';
  if (schema.type !== 'integer' && schema.type !== 'number') return code(schema.type);
  const bounds = [
    schema.exclusiveMinimum !== undefined && `> ${schema.exclusiveMinimum}`,
    schema.minimum > Number.MIN_SAFE_INTEGER && `≥ ${schema.minimum}`,
    schema.exclusiveMaximum !== undefined && `< ${schema.exclusiveMaximum}`,
    schema.maximum < Number.MAX_SAFE_INTEGER && `≤ ${schema.maximum}`,
  ].filter(Boolean);
  return `${schema.type === 'integer' ? 'whole number' : 'number'}${bounds.length > 0 ? ` ${bounds.join(', ')}` : ''}`;
}

const defaultOf = (schema) => (schema.default === undefined ? 'none: required' : code(JSON.stringify(schema.default)));

/** The keys below each `// ---- section` of the schema's source. */
function configSections() {
  const source = read('lib/config/schema.ts');
  const body = source.slice(source.indexOf('export const trainConfigSchema'), source.indexOf('/** A resolved config'));
  const sections = [];
  for (const line of body.split('\n')) {
    const title = /^ {2}\/\/ ---- (.+)$/.exec(line)?.[1];
    const key = /^ {2}(\w+): /.exec(line)?.[1];
    if (title) sections.push({ title, keys: [] });
    else if (key) sections.at(-1).keys.push(key);
  }
  const found = sections.flatMap(({ keys }) => keys);
  if (found.join() !== Object.keys(KEYS).join())
    throw new Error('lib/config/schema.ts: every key stands below a // ---- section');
  return sections;
}

function configKeys() {
  return configSections()
    .map(({ title, keys }) => {
      const rows = keys.map((key) => [code(key), typeOf(KEYS[key]), defaultOf(KEYS[key]), KEYS[key].description]);
      const name = title === 'LoRA' ? title : title[0].toUpperCase() + title.slice(1);
      return `### ${name}\n\n${table(['Key', 'Value', 'Default', 'Meaning'], rows)}`;
    })
    .join('\n\n');
}

function fileKeys() {
  const { properties } = jsonSchema(datasetSpecSchema);
  return table(
    ['Key', 'Value', 'Meaning'],
    [
      ...Object.entries(properties).map(([key, schema]) => [code(key), typeOf(schema), schema.description]),
      [code('file_name'), 'text', 'As `path`, but below `dataset_root`.'],
      [`${code('type')}, ${code('name')}`, 'anything', 'No effect: the form of the rows is recognised.'],
    ],
  );
}

function aliases() {
  const names = new Map();
  for (const [alias, key] of Object.entries(ALIASES)) names.set(key, [...(names.get(key) ?? []), code(alias)]);
  return table(
    ['Key', 'Other names'],
    [...names].map(([key, others]) => [code(key), others.join(', ')]),
  );
}

const unsupported = () =>
  table(
    ['Key', 'Accepted value'],
    Object.entries(UNSUPPORTED).map(([key, values]) => [
      code(key),
      values.map((value) => code(JSON.stringify(value))).join(', '),
    ]),
  );
const ignored = () =>
  table(
    ['Key', 'Why'],
    Object.entries(IGNORED).map(([key, why]) => [code(key), why]),
  );

// ---- declarations of docs/api.md

const TYPE_SOURCES = [
  'lib/api/types.ts',
  'lib/api/plan.ts',
  'lib/processing/types.ts',
  'lib/processing/vision-options.ts',
  'lib/api/boxes.ts',
  'lib/api/draw-boxes.ts',
  'lib/errors.ts',
  'lib/config/schema.ts',
  'lib/native/binding.ts',
  'lib/api/system-info.ts',
  'lib/api/draw-boxes.ts',
  'lib/report/progress.ts',
];
const FUNCTION_SOURCES = [
  'api/model',
  'api/train',
  'api/boxes',
  'api/convert',
  'api/draw-boxes',
  'api/infer',
  'api/merge',
  'api/quantize',
  'api/plan',
  'api/convert',
  'api/draw-boxes',
  'api/system-info',
  'report/progress',
].map((name) => `dist/lib/${name}.d.ts`);

/** The declaration of `name` with the comment above it, as in the source. */
function declaration(name, sources, start) {
  for (const path of sources) {
    const lines = read(path).split('\n');
    const at = lines.findIndex(
      (line) => start.test(line) && new RegExp(`\\b${name}\\b`).test(line.replace(/[=({:].*/, '')),
    );
    if (at < 0) continue;
    let from = at;
    if (lines[at - 1]?.trimEnd().endsWith('*/')) while (!lines[--from].startsWith('/**'));
    let to = at;
    // an interface or class ends at the first brace in column 0, a type or function at the first line that ends with a semicolon outside braces
    const block = /\b(interface|class)\b/.test(lines[at]);
    const done = () => (block ? /^}/.test(lines[to]) : /;$/.test(lines[to]) && depth(lines.slice(at, to + 1)) === 0);
    while (!done()) to++;
    // overloads of a function
    while (!block && new RegExp(`function ${name}\\b`).test(lines[to + 1] ?? ''))
      for (to++; !/;$/.test(lines[to]); ) to++;
    return `\`\`\`ts\n${lines
      .slice(from, to + 1)
      .join('\n')
      .replaceAll('export ', '')
      .replaceAll('declare ', '')}\n\`\`\``;
  }
  throw new Error(`no declaration of ${name} in ${sources.join(', ')}`);
}

function depth(lines) {
  const text = lines
    .join('\n')
    .replaceAll(/\/\*[\s\S]*?\*\/|\/\/.*$/gm, '')
    .replaceAll('=>', '');
  return text.split(/[{(<]/).length - text.split(/[})>]/).length;
}

// ---- blocks

const help = (...verb) =>
  `\`\`\`text\n${execFileSync(process.execPath, [join(root, 'dist/lib/cli/main.js'), ...verb, '--help'], { encoding: 'utf8' }).trimEnd()}\n\`\`\``;

const BLOCKS = {
  help,
  'config-keys': configKeys,
  'config-file-keys': fileKeys,
  'config-aliases': aliases,
  'config-unsupported': unsupported,
  'config-ignored': ignored,
  type: (name) => declaration(name, TYPE_SOURCES, /^export (interface|type|class) /),
  function: (name) => declaration(name, FUNCTION_SOURCES, /^export declare function /),
};

/** `text` with every generated block made anew. */
export function withBlocks(text, path) {
  return text.replaceAll(/<!-- generated: (.*?) -->\n[\s\S]*?<!-- \/generated -->/g, (_, name) => {
    const [kind, ...args] = name.split(' ');
    if (!Object.hasOwn(BLOCKS, kind)) throw new Error(`${path}: no generator ${kind}`);
    return `<!-- generated: ${name} -->\n${BLOCKS[kind](...args)}\n<!-- /generated -->`;
  });
}

export function markdownFiles() {
  const docs = readdirSync(join(root, 'docs'), { recursive: true }).filter((name) => name.endsWith('.md'));
  return ['README.md', 'CHANGELOG.md', ...docs.map((name) => `docs/${name}`)];
}

/** Path → what it should hold. */
export function generatedFiles() {
  return new Map([
    ['schema/train-config.schema.json', `${JSON.stringify(editorSchema(), null, 2)}\n`],
    ...markdownFiles().map((path) => [path, withBlocks(read(path), path)]),
  ]);
}

if (process.argv[1] !== undefined && resolve(process.argv[1]) === fileURLToPath(import.meta.url)) {
  for (const [path, text] of generatedFiles()) {
    let now;
    try {
      now = read(path);
    } catch {
      now = undefined;
    }
    if (now === text) continue;
    writeFileSync(join(root, path), text);
    console.log(`wrote ${relative(process.cwd(), join(root, dirname(path)))}/${path.split('/').at(-1)}`);
  }
}
