/** Reads the tensors of a trusted fixture file as float32 (whole numbers below 2^24 stay exact). */
import { readFileSync, writeFileSync } from 'node:fs';

export interface FixtureTensor {
  shape: number[];
  data: Float32Array;
}

interface TensorHeader {
  dtype: string;
  shape: number[];
  /** bytes from the end of the header */
  data_offsets: [number, number];
}

function parseHeader(bytes: Buffer): { header: Map<string, TensorHeader>; begin: number } {
  const begin = 8 + Number(bytes.readBigUInt64LE(0));
  const { __metadata__, ...tensors } = JSON.parse(bytes.subarray(8, begin).toString()) as Record<string, TensorHeader>;
  return { header: new Map(Object.entries(tensors)), begin };
}

export const safetensorsHeader = (path: string): Map<string, TensorHeader> => parseHeader(readFileSync(path)).header;

export function readSafetensors(path: string): Map<string, FixtureTensor> {
  const bytes = readFileSync(path);
  const { header, begin } = parseHeader(bytes);
  const out = new Map<string, FixtureTensor>();
  for (const [name, info] of header) {
    const raw = bytes.subarray(begin + info.data_offsets[0], begin + info.data_offsets[1]);
    out.set(name, { shape: info.shape, data: toFloat32(info.dtype, raw, name) });
  }
  return out;
}

function toFloat32(dtype: string, raw: Buffer, name: string): Float32Array {
  if (dtype === 'U8') return Float32Array.from(raw);
  if (dtype === 'F32') return new Float32Array(Uint8Array.from(raw).buffer);
  if (dtype === 'BF16') {
    const halves = new Uint16Array(Uint8Array.from(raw).buffer);
    const words = new Uint32Array(halves.length);
    for (let i = 0; i < halves.length; i++) words[i] = (halves[i] as number) << 16;
    return new Float32Array(words.buffer);
  }
  if (dtype === 'I64') return Float32Array.from(new BigInt64Array(Uint8Array.from(raw).buffer), Number);
  throw new Error(`${name}: the fixture reader does not know ${dtype}`);
}

/** Changes a float32 tensor in a file, in place. */
export function patchTensor(path: string, name: string, change: (data: Float32Array, shape: number[]) => void): void {
  const bytes = readFileSync(path);
  const { header, begin: start } = parseHeader(bytes);
  const info = header.get(name);
  if (info?.dtype !== 'F32') throw new Error(`${path} holds no float32 ${name}`);
  const [begin, end] = info.data_offsets.map((offset) => start + offset) as [number, number];
  const data = new Float32Array(Uint8Array.from(bytes.subarray(begin, end)).buffer);
  change(data, info.shape);
  bytes.set(new Uint8Array(data.buffer), begin);
  writeFileSync(path, bytes);
}
