/** Stable error codes. A code never changes its meaning between releases. */
export const ERROR_CODES = [
  'ERR_MARTLET_CONFIG',
  'ERR_MARTLET_USAGE',
  'ERR_MARTLET_DATASET',
  'ERR_MARTLET_IMAGE',
  'ERR_MARTLET_MODEL_NOT_FOUND',
  'ERR_MARTLET_UNSUPPORTED_MODEL',
  'ERR_MARTLET_WEIGHTS',
  'ERR_MARTLET_ADAPTER',
  'ERR_MARTLET_TOKENIZER',
  'ERR_MARTLET_TEMPLATE',
  'ERR_MARTLET_LIBTORCH_NOT_FOUND',
  'ERR_MARTLET_LIBTORCH_MISMATCH',
  'ERR_MARTLET_CUDA_UNAVAILABLE',
  'ERR_MARTLET_OUT_OF_MEMORY',
  'ERR_MARTLET_NON_FINITE',
  'ERR_MARTLET_DISPOSED',
  'ERR_MARTLET_ABORTED',
  'ERR_MARTLET_IO',
  'ERR_MARTLET_HUB',
  'ERR_MARTLET_INTERNAL',
] as const;

export type ErrorCode = (typeof ERROR_CODES)[number];

/** Facts about the failure that a program can act on: `file`, `row` (from 0), `line` (from 1), `field`, `path`, `missing`, … */
export type ErrorDetails = Record<string, unknown>;

/** Every error martlet throws or rejects with. `message` names the place and the remedy; `code` is stable. */
export class MartletError extends Error {
  readonly code: ErrorCode;
  readonly details: ErrorDetails;

  constructor(code: ErrorCode, message: string, details: ErrorDetails = {}, options?: { cause?: unknown }) {
    super(message, options);
    this.name = 'MartletError';
    this.code = code;
    this.details = details;
  }

  /** The shape that `--json` prints on standard error. */
  toJSON(): { code: ErrorCode; message: string; details: ErrorDetails } {
    return { code: this.code, message: this.message, details: this.details };
  }
}

/** A path or a name, which a program without types may leave out. */
export function requireText(value: unknown, field: string): void {
  if (typeof value === 'string' && value !== '') return;
  throw new MartletError(
    'ERR_MARTLET_USAGE',
    `${field} must be a text that is not empty, not ${JSON.stringify(value)}.`,
    {
      field,
    },
  );
}
