/** Loads, asks and disposes of a model again and again; prints the resident set after each round, in MB. */
import { writeSync } from 'node:fs';
import { loadModel } from '../../../lib/index.js';
import { childArgs } from '../../support/process.js';

const { model, rounds, image } = childArgs<{ model: string; rounds: number; image: string }>();

async function main(): Promise<void> {
  const resident: number[] = [];
  for (let round = 0; round < rounds; round++) {
    const loaded = await loadModel(model, { device: 'cpu', dtype: 'float32' });
    const messages = [{ role: 'user' as const, content: '<image>What is it?' }];
    await loaded.generate({ messages, images: [image], maxNewTokens: 2 });
    await loaded.dispose();
    globalThis.gc?.();
    resident.push(process.memoryUsage.rss() / 2 ** 20);
  }
  writeSync(1, `${JSON.stringify(resident)}\n`);
}

void main();
