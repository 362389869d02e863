/** Refused input: the error that comes, and what it has to say. */
import assert from 'node:assert/strict';
import { MartletError } from '../../lib/index.js';

/** The MartletError that `attempt` ends with. */
export async function refusal(attempt: () => PromiseLike<unknown>): Promise<MartletError> {
  try {
    await attempt();
  } catch (error) {
    assert.ok(error instanceof MartletError, `not a MartletError: ${(error as Error).stack}`);
    if (process.env.SHOW) console.log(error.code, error.message, JSON.stringify(error.details).slice(0, 300));
    return error;
  }
  return assert.fail('was not refused');
}

export interface Wanted {
  code: string;
  /** All of them are found in the message: the place, the remedy. */
  says: RegExp[];
  details?: Record<string, unknown>;
}

export function check(
  error: Pick<MartletError, 'code' | 'message' | 'details'>,
  { code, says, details = {} }: Wanted,
): void {
  assert.equal(error.code, code, error.message);
  for (const pattern of says) assert.match(error.message, pattern);
  for (const [key, value] of Object.entries(details)) assert.deepEqual(error.details[key], value, `details.${key}`);
}
