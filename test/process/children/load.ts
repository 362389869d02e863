/** Loads weights as its arguments say; prints the result, or ends with 3 and the error as JSON. */
import { writeSync } from 'node:fs';
import { MartletError } from '../../../lib/index.js';
import type { LoadArgs } from '../../../lib/native/binding.js';
import { Engine } from '../../../lib/native/engine.js';
import { childArgs } from '../../support/process.js';

async function main(): Promise<void> {
  const engine = new Engine();
  try {
    writeSync(1, JSON.stringify((await engine.call('load', childArgs<LoadArgs>())).result));
  } catch (error) {
    writeSync(1, JSON.stringify(error instanceof MartletError ? error : { message: String(error) }));
    process.exitCode = 3;
  } finally {
    await engine.close();
  }
}

void main();
