/** What loading takes at its peak, by a ceiling on CPU tensors (MARTLET_CPU_MEMORY_LIMIT): the model as it will be, and one tensor's temporaries. */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import type { LoadResult } from '../../lib/native/binding.js';
import { projectRoot } from '../support/fixtures.js';
import { runChild } from '../support/process.js';
import { readSafetensors } from '../support/safetensors.js';

const FIXTURE = join(projectRoot, 'test/fixtures/llava/model-4x');
const MIB = 2 ** 20;
const HIDDEN = 512;
const MLP = 1408;
const LAYERS = 10;
const SHARDS = 4;

let model: string;
let size: { all: number; shard: number };
before(async () => {
  model = await mkdtemp(join(tmpdir(), 'martlet-'));
  size = writeModel(model);
});
after(() => rm(model, { recursive: true }));

/** Names and shapes of the fixture's LLaVA with a language model of 32 million parameters. */
function shapes(): Map<string, number[]> {
  const all = new Map<string, number[]>();
  for (const file of readdirSync(FIXTURE).filter((name) => name.endsWith('.safetensors'))) {
    for (const [name, { shape }] of readSafetensors(join(FIXTURE, file))) {
      if (!name.startsWith('language_model.')) all.set(name, shape);
    }
  }
  all.set('multi_modal_projector.linear_1.weight', [HIDDEN, 64]);
  all.set('multi_modal_projector.linear_1.bias', [HIDDEN]);
  all.set('multi_modal_projector.linear_2.weight', [HIDDEN, HIDDEN]);
  all.set('multi_modal_projector.linear_2.bias', [HIDDEN]);
  all.set('language_model.model.embed_tokens.weight', [496, HIDDEN]);
  for (let i = 0; i < LAYERS; i++) {
    const layer = `language_model.model.layers.${i}`;
    for (const name of ['q_proj', 'k_proj', 'v_proj', 'o_proj'])
      all.set(`${layer}.self_attn.${name}.weight`, [HIDDEN, HIDDEN]);
    for (const name of ['gate_proj', 'up_proj']) all.set(`${layer}.mlp.${name}.weight`, [MLP, HIDDEN]);
    all.set(`${layer}.mlp.down_proj.weight`, [HIDDEN, MLP]);
    for (const name of ['input_layernorm', 'post_attention_layernorm']) all.set(`${layer}.${name}.weight`, [HIDDEN]);
  }
  all.set('language_model.model.norm.weight', [HIDDEN]);
  all.set('language_model.lm_head.weight', [496, HIDDEN]);
  return all;
}

/** Random bfloat16 weights in shards; gives the bytes of all and of the largest shard. */
function writeModel(dir: string): { all: number; shard: number } {
  const config = JSON.parse(readFileSync(join(FIXTURE, 'config.json'), 'utf8'));
  Object.assign(config.text_config, { hidden_size: HIDDEN, intermediate_size: MLP, num_hidden_layers: LAYERS });
  writeFileSync(join(dir, 'config.json'), JSON.stringify(config));
  const named = [...shapes()];
  const weight_map: Record<string, string> = {};
  const bytes: number[] = [];
  let state = 1;
  for (let shard = 0; shard < SHARDS; shard++) {
    const file = `model-${shard}.safetensors`;
    const header: Record<string, unknown> = {};
    const parts: Buffer[] = [];
    let offset = 0;
    for (const [name, shape] of named.filter((_, i) => Math.floor((i * SHARDS) / named.length) === shard)) {
      const words = new Uint16Array(shape.reduce((a, b) => a * b, 1));
      for (let i = 0; i < words.length; i++) {
        state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
        words[i] = 0x3c00 | ((state >>> 16) & 0x81ff); // ±2^-7 to 2^-3
      }
      header[name] = { dtype: 'BF16', shape, data_offsets: [offset, offset + words.byteLength] };
      offset += words.byteLength;
      parts.push(Buffer.from(words.buffer));
      weight_map[name] = file;
    }
    const text = Buffer.from(JSON.stringify(header));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(text.length));
    writeFileSync(join(dir, file), Buffer.concat([length, text, ...parts]));
    bytes.push(offset);
  }
  const total_size = bytes.reduce((a, b) => a + b);
  writeFileSync(join(dir, 'model.safetensors.index.json'), JSON.stringify({ metadata: { total_size }, weight_map }));
  return { all: total_size, shard: Math.max(...bytes) };
}

async function load(
  limit: number,
  options: object,
): Promise<{ code: number | null; result: LoadResult & { code?: string } }> {
  const args = { modelDir: model, device: 'cpu', dtype: 'bfloat16', ...options };
  const { code, stdout } = await runChild('load', args, {
    env: { MARTLET_CPU_MEMORY_LIMIT: String(Math.round(limit)) },
  });
  return { code, result: JSON.parse(stdout) };
}

// native/core/quant: three float32 temporaries of a part of the tensor
const TEMPORARIES = 12 * HIDDEN * MLP;
for (const [quantization, temporaries] of [
  ['nf4', TEMPORARIES],
  ['int8', TEMPORARIES],
  ['none', 0],
] as const) {
  test(`${quantization}: loading stays below the model as loaded and one tensor's temporaries`, async () => {
    const { code, result } = await load(1e12, { quantization });
    assert.equal(code, 0, JSON.stringify(result));
    const share = result.weightBytes / size.all;
    const expected = { nf4: 0.29, int8: 0.52, none: 1 }[quantization];
    assert.ok(Math.abs(share - expected) < 0.03, `${share}`);

    const limit = result.weightBytes + temporaries + 2 * MIB;
    assert.ok(quantization === 'none' || limit < size.all, 'the whole model in 16 bits would not fit');
    assert.ok(temporaries < size.shard, 'nor would a shard beside the model');
    const within = await load(limit, { quantization });
    assert.equal(within.code, 0, `${limit} ${JSON.stringify(within.result)}`);
    // the ceiling counts what loading takes
    const below = await load(0.95 * result.weightBytes, { quantization });
    assert.deepEqual([below.code, below.result.code], [3, 'ERR_MARTLET_OUT_OF_MEMORY']);
  });
}
