/** What the benchmark reads and writes of safetensors: int32, uint8 and float32 tensors, whole files at a time. */
import { readFileSync, writeFileSync } from 'node:fs';

const TYPES = { I32: Int32Array, U8: Uint8Array, F32: Float32Array };

/** Name → { shape, data }. */
export function readSafetensors(path) {
  const bytes = readFileSync(path);
  const size = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, 8 + size).toString());
  const out = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    if (name === '__metadata__') continue;
    const [start, end] = data_offsets.map((offset) => 8 + size + offset);
    out[name] = { shape, data: new TYPES[dtype](Uint8Array.from(bytes.subarray(start, end)).buffer) };
  }
  return out;
}

export function writeFloat32(path, tensors) {
  const header = {};
  let end = 0;
  for (const { name, shape, data } of tensors) {
    header[name] = { dtype: 'F32', shape, data_offsets: [end, end + data.byteLength] };
    end += data.byteLength;
  }
  let text = JSON.stringify(header);
  text += ' '.repeat((8 - (text.length % 8)) % 8);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  const parts = tensors.map(({ data }) => Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  writeFileSync(path, Buffer.concat([length, Buffer.from(text), ...parts]));
}

/** Cosine and ratio of norms of two files of gradients, all tensors as one vector; and the tensor that is furthest off. */
export function compareGradients(ownPath, referencePath) {
  const [own, reference] = [readSafetensors(ownPath), readSafetensors(referencePath)];
  const names = Object.keys(reference);
  const other = Object.keys(own).filter((name) => !(name in reference));
  if (names.length === 0 || other.length > 0 || names.length !== Object.keys(own).length)
    throw new Error(`the gradients are of other tensors: ${other.slice(0, 3)} beside ${names.slice(0, 3)}`);
  const sums = [0, 0, 0];
  let worstTensor = { name: '', cosine: 1 };
  for (const name of names) {
    const [a, b] = [own[name].data, reference[name].data];
    if (a.length !== b.length) throw new Error(`${name}: ${own[name].shape} beside ${reference[name].shape}`);
    let [dot, aa, bb] = [0, 0, 0];
    for (let i = 0; i < a.length; i++) {
      dot += a[i] * b[i];
      aa += a[i] * a[i];
      bb += b[i] * b[i];
    }
    [dot, aa, bb].forEach((sum, i) => {
      sums[i] += sum;
    });
    const cosine = dot / Math.sqrt(aa * bb);
    if (!(cosine >= worstTensor.cosine)) worstTensor = { name, cosine };
  }
  return {
    cosine: sums[0] / Math.sqrt(sums[1] * sums[2]),
    normRatio: Math.sqrt(sums[1] / sums[2]),
    worstTensor,
    tensors: names.length,
  };
}
