import type { ChatMessage, GroundingObjects, VideoSource, VisionOptions } from '../processing/types.js';

export type { DatasetSpec } from '../config/index.js';

/** One training or evaluation row, checked. */
export interface Row {
  messages: ChatMessage[];
  /** Absolute paths, or URLs and data URIs as written. */
  images: string[];
  /** Frames as `images`. */
  videos?: VideoSource[];
  objects?: GroundingObjects;
  /** Pixel limits and the like of this row alone (`chat_template_kwargs`). */
  vision?: VisionOptions;
  id?: string;
  source: RowSource;
  /** Of a row longer than max_length: which of its pieces this is, from 0. */
  piece?: number;
}

export interface RowSource {
  file: string;
  /** From 0. */
  row: number;
  /** From 1; JSONL only. */
  line?: number;
}

/** Why a row cannot be used. */
export interface RowProblem extends RowSource {
  code: string;
  message: string;
  id?: string;
  /** e.g. `conversations.1.from` */
  field?: string;
}
