/** Paths and readers of test/fixtures/blip2_opt and blip2_t5 (made by test/reference/make_blip2.py; rules in test/fixtures/blip2/README.md). */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { ChatMessage } from '../../lib/processing/types.js';
import { llava, projectRoot } from './fixtures.js';

export const BLIP2_FORMS = ['opt', 't5'] as const;
export type Blip2Form = (typeof BLIP2_FORMS)[number];

export const blip2Dir = (form: Blip2Form, name = '') => join(projectRoot, 'test/fixtures', `blip2_${form}`, name);
export const blip2Image = (name: string) => join(llava, 'images', name);

interface Blip2Ids {
  inputIds: number[];
  labels: number[];
  promptIds: number[];
}

export interface Blip2Case {
  name: string;
  images: string[];
  messages: ChatMessage[];
  default: Blip2Ids;
  /** Of the old layout, without the pictures' places. */
  old: Blip2Ids;
}

export interface Blip2Cases {
  imageToken: number;
  imageTokens: number;
  endToken: number;
  startToken: number;
  cases: Blip2Case[];
  tokenizer: { text: string; ids: number[]; decoded: string }[];
}

export function blip2Cases(form: Blip2Form): Blip2Cases {
  return JSON.parse(readFileSync(blip2Dir(form, 'cases.json'), 'utf8')) as Blip2Cases;
}

export function blip2Case(form: Blip2Form, name: string): Blip2Case {
  const found = blip2Cases(form).cases.find((row) => row.name === name);
  if (!found) throw new Error(`no case ${name}`);
  return found;
}
