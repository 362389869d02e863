/** Trains as its config says and prints every event; ends with 3 and the error as JSON when the run fails. */
import { writeSync } from 'node:fs';
import { MartletError, trainLoRA } from '../../../lib/index.js';
import { childArgs } from '../../support/process.js';

async function main(): Promise<void> {
  try {
    for await (const event of trainLoRA(childArgs<Record<string, unknown>>())) {
      writeSync(1, `${JSON.stringify({ ...event, config: undefined })}\n`);
    }
  } catch (error) {
    writeSync(1, `${JSON.stringify(error instanceof MartletError ? error : { message: String(error) })}\n`);
    process.exitCode = 3;
  }
}

void main();
