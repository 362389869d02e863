/** Paths and readers of test/fixtures/qwen2_vl, qwen2_5_vl and qwen3_vl (made by test/reference/make_qwen_vl.py). */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { ProcessorInput } from '../../lib/processing/index.js';
import type { ChatMessage, VideoSource } from '../../lib/processing/types.js';
import { projectRoot } from './fixtures.js';

export const QWEN_FAMILIES = ['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl'] as const;
export type QwenFamily = (typeof QWEN_FAMILIES)[number];

const fixtures = join(projectRoot, 'test/fixtures');
export const qwenImages = join(fixtures, 'qwen_vl/images');
export const qwenDir = (family: QwenFamily, name = '') => join(fixtures, family, name);
export const qwenImage = (name: string) => join(qwenImages, name);

export interface QwenCase {
  name: string;
  images: string[];
  videos?: string[][];
  videoFps?: number[];
  objects?: { ref: string[]; bbox: number[][]; bbox_type?: 'real' | 'norm1'; image_id?: number[] };
  messages: ChatMessage[];
  objectText?: string[];
  imageGrids: number[][];
  videoGrids: number[][];
  secondPerGrid?: number[];
  default: { inputIds: number[]; labels: number[]; promptIds: number[] };
  'ms-swift': { inputIds: number[]; labels: number[]; promptIds: number[] };
}

export function qwenCases(family: QwenFamily): {
  imageToken: number;
  videoToken: number;
  grids: Record<string, number[]>;
  cases: QwenCase[];
} {
  return JSON.parse(readFileSync(qwenDir(family, 'cases.json'), 'utf8'));
}

export function qwenCase(family: QwenFamily, name: string): QwenCase {
  const found = qwenCases(family).cases.find((row) => row.name === name);
  if (!found) throw new Error(`no case ${name}`);
  return found;
}

/** A case's pictures and objects as the API takes them. */
export function caseInput(row: QwenCase): Omit<ProcessorInput, 'messages'> {
  const videos = row.videos?.map((frames, i): VideoSource => {
    const fps = row.videoFps?.[i];
    const paths = frames.map(qwenImage);
    return fps === undefined ? paths : { frames: paths, fps };
  });
  const { ref, bbox, bbox_type: bboxType, image_id: imageId } = row.objects ?? {};
  return {
    images: row.images.map(qwenImage),
    ...(videos && { videos }),
    ...(row.objects && {
      objects: { ref, bbox, ...(bboxType && { bboxType }), ...(imageId && { imageId }) },
    }),
  };
}

/** A case as a row of a data file. */
export function caseRow(row: QwenCase): Record<string, unknown> {
  const { videos } = caseInput(row);
  return {
    id: row.name,
    messages: row.messages,
    images: row.images.map(qwenImage),
    ...(videos && { videos }),
    ...(row.objects && { objects: row.objects }),
  };
}
