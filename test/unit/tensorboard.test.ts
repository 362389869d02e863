import assert from 'node:assert/strict';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { crc32c, TensorBoardWriter } from '../../lib/report/tensorboard.js';

/** Bit by bit, apart from the table in the writer. */
function slowCrc(data: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of data) {
    for (let bit = 0; bit < 8; bit++) {
      const mix = ((crc ^ (byte >> bit)) & 1) !== 0;
      crc = (crc >>> 1) ^ (mix ? 0x82f63b78 : 0);
    }
  }
  return ~crc >>> 0;
}

/** A protocol-buffer reader that knows nothing of the event format: field number → raw values. */
function decode(data: Buffer): Map<number, (Buffer | bigint)[]> {
  const fields = new Map<number, (Buffer | bigint)[]>();
  let at = 0;
  const varint = () => {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = BigInt(data[at++] as number);
      value |= (byte & 0x7fn) << shift;
      if (byte < 0x80n) return value;
    }
  };
  while (at < data.length) {
    const key = Number(varint());
    let value: Buffer | bigint;
    if ((key & 7) === 0) value = varint();
    else {
      const length = (key & 7) === 1 ? 8 : (key & 7) === 5 ? 4 : Number(varint());
      value = data.subarray(at, at + length);
      at += length;
    }
    fields.set(key >> 3, [...(fields.get(key >> 3) ?? []), value]);
  }
  return fields;
}

function records(file: Buffer): Buffer[] {
  const out: Buffer[] = [];
  const unmask = (masked: number) => {
    const rotated = (masked - 0xa282ead8) >>> 0;
    return ((rotated << 15) | (rotated >>> 17)) >>> 0;
  };
  for (let at = 0; at < file.length; ) {
    const length = Number(file.readBigUInt64LE(at));
    assert.equal(unmask(file.readUInt32LE(at + 8)), slowCrc(file.subarray(at, at + 8)), 'checksum of the length');
    const data = file.subarray(at + 12, at + 12 + length);
    assert.equal(unmask(file.readUInt32LE(at + 12 + length)), slowCrc(data), 'checksum of the data');
    out.push(data);
    at += 16 + length;
  }
  return out;
}

test('crc32c has the check value of the standard', () => {
  assert.equal(crc32c(Buffer.from('123456789')), 0xe3069283);
});

test('an event file reads back with the same scalars', async () => {
  const dir = await mkdtemp(join(tmpdir(), 'martlet-'));
  try {
    const writer = await TensorBoardWriter.create(join(dir, 'runs'));
    await writer.scalars(1, { 'train/loss': 2.5, 'train/learning_rate': 1e-4 });
    await writer.scalars(300, { 'eval/loss': 0.25 });
    await writer.close();
    const [version, first, second, ...rest] = records(await readFile(writer.path)).map(decode);
    assert.equal(rest.length, 0);
    assert.equal(String(version?.get(3)?.[0]), 'brain.Event:2');
    type Message = Map<number, (Buffer | bigint)[]>;
    const bytesOf = (message: Message | undefined, field: number): Buffer => {
      const value = message?.get(field)?.[0];
      assert.ok(Buffer.isBuffer(value), `field ${field}`);
      return value;
    };
    const scalars = (event: Message | undefined) =>
      decode(bytesOf(event, 5))
        .get(1)
        ?.map((value) => {
          const fields = decode(value as Buffer);
          return [String(fields.get(1)?.[0]), bytesOf(fields, 2).readFloatLE()];
        });
    assert.equal(first?.get(2)?.[0], 1n);
    assert.deepEqual(scalars(first), [
      ['train/loss', 2.5],
      ['train/learning_rate', Math.fround(1e-4)],
    ]);
    assert.equal(second?.get(2)?.[0], 300n);
    assert.deepEqual(scalars(second), [['eval/loss', 0.25]]);
    const age = Date.now() / 1000 - bytesOf(second, 1).readDoubleLE();
    assert.ok(age >= 0 && age < 60, 'wall time is now');
  } finally {
    await rm(dir, { recursive: true });
  }
});

test('two writers in one second do not share a file', async () => {
  const dir = await mkdtemp(join(tmpdir(), 'martlet-'));
  try {
    const [a, b] = await Promise.all([TensorBoardWriter.create(dir), TensorBoardWriter.create(dir)]);
    assert.notEqual(a.path, b.path);
    await Promise.all([a.close(), b.close()]);
  } finally {
    await rm(dir, { recursive: true });
  }
});
