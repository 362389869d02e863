/** Model folders of the fixtures' shapes with random weights, for tests that compare nothing with a reference. */
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot } from './fixtures.js';

export type RandomFamily = 'qwen_vl_chat' | 'minicpm_v';

/** Fills `dir` with the family's files and a model.safetensors of float32. The same seed gives the same weights. */
export function writeRandomModel(family: RandomFamily, dir: string, seed = 1): void {
  const fixture = join(projectRoot, 'test/fixtures', family);
  cpSync(join(fixture, 'model'), dir, { recursive: true });
  const { rows } = JSON.parse(readFileSync(join(fixture, 'shapes.json'), 'utf8')) as {
    rows: { name: string; shape: number[] }[];
  };
  const header: Record<string, unknown> = {};
  const parts: Float32Array[] = [];
  let offset = 0;
  let state = seed;
  // An even spread is random enough here, and quick.
  const next = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  };
  for (const { name, shape } of rows) {
    const data = new Float32Array(shape.reduce((a, b) => a * b, 1));
    const norm = /(^|\.)(ln_\w+|\w*norm\w*)\.weight$/.test(name);
    for (let i = 0; i < data.length; i++) data[i] = norm ? 1 + 0.1 * next() : 0.1 * next();
    header[name] = { dtype: 'F32', shape, data_offsets: [offset, offset + data.byteLength] };
    offset += data.byteLength;
    parts.push(data);
  }
  const text = Buffer.from(JSON.stringify(header));
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(
    join(dir, 'model.safetensors'),
    Buffer.concat([size, text, ...parts.map((part) => Buffer.from(part.buffer))]),
  );
}
