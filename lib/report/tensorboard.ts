/** Writes scalars as TensorBoard event files: TFRecord framing around `tensorflow.Event` messages. */
import { type FileHandle, open } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { ioError, makeDir } from '../files.js';

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? (c >>> 1) ^ 0x82f63b78 : c >>> 1;
  return c >>> 0;
});

/** CRC-32C (Castagnoli). */
export function crc32c(data: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of data) crc = (CRC_TABLE[(crc ^ byte) & 0xff] as number) ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/** TFRecord stores checksums rotated and offset, so that a checksum of data holding checksums stays meaningful. */
function maskedCrc(data: Uint8Array): number {
  const crc = crc32c(data);
  return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0;
}

function record(data: Uint8Array): Buffer {
  const out = Buffer.alloc(12 + data.length + 4);
  out.writeBigUInt64LE(BigInt(data.length), 0);
  out.writeUInt32LE(maskedCrc(out.subarray(0, 8)), 8);
  out.set(data, 12);
  out.writeUInt32LE(maskedCrc(data), 12 + data.length);
  return out;
}

// Protocol-buffer wire format, the four kinds of field needed here.
function varint(value: number): Buffer {
  const bytes: number[] = [];
  let rest = value;
  while (rest >= 0x80) {
    bytes.push((rest % 0x80) | 0x80);
    rest = Math.floor(rest / 0x80);
  }
  bytes.push(rest);
  return Buffer.from(bytes);
}
function doubleField(field: number, value: number): Buffer {
  const out = Buffer.alloc(9);
  out[0] = (field << 3) | 1;
  out.writeDoubleLE(value, 1);
  return out;
}
function floatField(field: number, value: number): Buffer {
  const out = Buffer.alloc(5);
  out[0] = (field << 3) | 5;
  out.writeFloatLE(value, 1);
  return out;
}
function intField(field: number, value: number): Buffer {
  return Buffer.concat([Buffer.from([field << 3]), varint(value)]);
}
function bytesField(field: number, value: Uint8Array): Buffer {
  return Buffer.concat([Buffer.from([(field << 3) | 2]), varint(value.length), value]);
}

const EVENT = { wallTime: 1, step: 2, fileVersion: 3, summary: 5 };
const SUMMARY_VALUE = 1;
const VALUE = { tag: 1, simpleValue: 2 };

export class TensorBoardWriter {
  readonly path: string;
  readonly #handle: FileHandle;

  private constructor(path: string, handle: FileHandle) {
    this.path = path;
    this.#handle = handle;
  }

  /** Starts a new event file in `dir`; a resumed run adds a second file, which TensorBoard joins with the first. */
  static async create(dir: string): Promise<TensorBoardWriter> {
    const seconds = Math.floor(Date.now() / 1000);
    try {
      await makeDir(dir);
      for (let n = 0; ; n++) {
        const path = join(dir, `events.out.tfevents.${seconds}.${hostname()}.${process.pid}.${n}`);
        try {
          const writer = new TensorBoardWriter(path, await open(path, 'wx'));
          await writer.#write([
            doubleField(EVENT.wallTime, Date.now() / 1000),
            bytesField(EVENT.fileVersion, Buffer.from('brain.Event:2')),
          ]);
          return writer;
        } catch (error) {
          if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
        }
      }
    } catch (error) {
      throw ioError(error, 'write event files to', dir);
    }
  }

  /** One event with all scalars of one step. */
  async scalars(step: number, values: Record<string, number>): Promise<void> {
    const summary = Object.entries(values).map(([tag, value]) =>
      bytesField(
        SUMMARY_VALUE,
        Buffer.concat([bytesField(VALUE.tag, Buffer.from(tag)), floatField(VALUE.simpleValue, value)]),
      ),
    );
    await this.#write([
      doubleField(EVENT.wallTime, Date.now() / 1000),
      intField(EVENT.step, step),
      bytesField(EVENT.summary, Buffer.concat(summary)),
    ]);
  }

  async #write(fields: Buffer[]): Promise<void> {
    try {
      await this.#handle.appendFile(record(Buffer.concat(fields)));
    } catch (error) {
      throw ioError(error, 'write', this.path);
    }
  }

  async close(): Promise<void> {
    await this.#handle.close();
  }
}
