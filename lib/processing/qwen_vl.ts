/**
 * Qwen-VL-Chat and Qwen-VL (2023): pictures of one size, 256 image tokens each, a tiktoken vocabulary, ChatML. Text and tokens as its own code makes
 * them (qwen_generation_utils.py, tokenization_qwen.py), or as ms-swift's `qwen_vl`.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { MartletError } from '../errors.js';
import type { ImagePlan } from '../native/binding.js';
import { createProcessor } from './base.js';
import type { GroundingForm } from './grounding.js';
import { readJsonFile } from './json.js';
import { CLIP_MEAN, CLIP_STD } from './qwen_vl_common.js';
import { contentParts, encodeSegments, type Segment, type SegmentRenderer } from './template.js';
import { type AddedForm, readRanks, tiktokenDefinition } from './tiktoken.js';
import { Tokenizer } from './tokenizer.js';
import type { Processor, ProcessorOptions } from './types.js';
import { familyVisionOptions, refuseVisionOptions } from './vision-options.js';

type Json = Record<string, unknown>;

const FAMILY = 'qwen_vl';
const RANKS_FILE = 'qwen.tiktoken';
const PATTERN = String.raw`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`;

const END_OF_TEXT = '<|endoftext|>';
const START = '<|im_start|>';
const END = '<|im_end|>';
/** The template's own tokens; typed by a user they are plain text. */
const CONTROL = [END_OF_TEXT, START, END, ...Array.from({ length: 205 }, (_, i) => `<|extra_${i}|>`)];
const IMAGE_START = '<img>';
const IMAGE_END = '</img>';
const IMAGE_PAD = '<imgpad>';
/** They say what a box and a name are, so decoded text keeps them, as the original's chat does. */
const GROUNDING = ['<ref>', '</ref>', '<box>', '</box>', '<quad>', '</quad>'];
const DEFAULT_SYSTEM = 'You are a helpful assistant.';

/** Boxes in thousandths of the picture's sides. */
export const QWEN_VL_GROUNDING: GroundingForm = {
  normBbox: 'norm1000',
  ref: (name) => `<ref>${name}</ref>`,
  box: ([x1, y1, ...second]) => `<box>(${x1},${y1})${second.length > 0 ? `,(${second.join(',')})` : ''}</box>`,
};

export async function createQwenVlChatProcessor(
  modelDir: string,
  config: Json,
  options: ProcessorOptions,
): Promise<Processor> {
  const visual = config.visual as Json | undefined;
  if (typeof visual !== 'object' || visual === null) {
    throw new MartletError(
      'ERR_MARTLET_UNSUPPORTED_MODEL',
      `${join(modelDir, 'config.json')} has model_type "qwen" and no "visual": it is Qwen without eyes. Qwen-VL and Qwen-VL-Chat are supported.`,
      { path: modelDir, modelType: 'qwen' },
    );
  }
  const { tokenizer, encodeTyped } = await loadTokenizer(modelDir);
  const imageTokenId = tokenizer.tokenId(IMAGE_PAD) as number;
  if (visual.image_start_id !== undefined && visual.image_start_id !== tokenizer.tokenId(IMAGE_START)) {
    throw new MartletError(
      'ERR_MARTLET_TOKENIZER',
      `config.json says that ${IMAGE_START} is id ${String(visual.image_start_id)}, but in ${RANKS_FILE} it is ${tokenizer.tokenId(IMAGE_START)}: the files of ${modelDir} are not of one model.`,
      { path: modelDir, imageStartId: visual.image_start_id },
    );
  }
  const vision = familyVisionOptions(FAMILY, [], options);
  const side = Number(visual.image_size ?? 448);
  const plan: ImagePlan = {
    resize: { height: side, width: side, backend: 'pillow' },
    rescale: 1 / 255,
    mean: CLIP_MEAN,
    std: CLIP_STD,
  };
  const places = new Array<number>(Number(visual.n_queries ?? 256)).fill(imageTokenId);
  const swift = options.template === 'ms-swift';
  return createProcessor(
    modelDir,
    {
      family: FAMILY,
      tokenizer,
      imageTokenId,
      endToken: END,
      stopTokens: [START, END_OF_TEXT],
      renderer: chatml(swift ? undefined : encodeTyped, options.labels === 'official'),
      vision,
      planMedia: (_, row) => {
        refuseVisionOptions(FAMILY, row);
        return { plan };
      },
      grounding: QWEN_VL_GROUNDING,
      encode: (segments, media) =>
        encodeSegments(
          segments.map(({ text, ...rest }) => ({ ...rest, text: text.normalize('NFC') })),
          tokenizer,
          new Map([[imageTokenId, media.map(() => places)]]),
        ),
    },
    options,
  );
}

interface QwenTokenizer {
  /** Knows every form of a token. */
  tokenizer: Tokenizer;
  /** Ids of what a user or the model wrote: only the tags of pictures, names and boxes are tokens there. */
  encodeTyped: (text: string) => number[];
}

async function loadTokenizer(modelDir: string): Promise<QwenTokenizer> {
  const path = join(modelDir, RANKS_FILE);
  const config = await readJsonFile(
    join(modelDir, 'tokenizer_config.json'),
    'ERR_MARTLET_TOKENIZER',
    'Download it with the checkpoint.',
    { optional: true },
  );
  let bytes: Uint8Array;
  try {
    bytes = await readFile(path);
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
    throw new MartletError(
      'ERR_MARTLET_TOKENIZER',
      `${path} ${missing ? 'is missing' : `cannot be read: ${(cause as Error).message}`}. Download it with the checkpoint.`,
      { path },
      { cause },
    );
  }
  const ranks = readRanks(bytes, path);
  const forms: AddedForm[] = [...CONTROL, ...GROUNDING, IMAGE_START, IMAGE_END, IMAGE_PAD].map((content, i) => ({
    id: ranks.length + i,
    content,
    special: !GROUNDING.includes(content),
  }));
  const build = (added: AddedForm[]) =>
    Tokenizer.fromDefinition(
      tiktokenDefinition(ranks, PATTERN, added),
      { eos_token: END_OF_TEXT, pad_token: END_OF_TEXT, ...config },
      path,
    );
  const tokenizer = build(forms);
  let plain: Tokenizer | undefined; // made when the first text spells a control token
  return {
    tokenizer,
    encodeTyped(text) {
      if (!/<\|(endoftext|im_start|im_end|extra_\d+)\|>/.test(text)) return tokenizer.encode(text);
      plain ??= build(forms.slice(CONTROL.length));
      return plain.encode(text);
    },
  };
}

/**
 * ChatML with `Picture N: <img>…</img>` before each picture's place. `encodeTyped`: contents are made into ids apart from the marks around them, as the
 * original does; absent: marks and contents as one text, as ms-swift does. Official labels train the marks and line ends of every turn as well.
 */
function chatml(encodeTyped: ((text: string) => number[]) | undefined, official: boolean): SegmentRenderer {
  return (messages, { forGeneration }) => {
    const segments: Segment[] = [];
    const add = (text: string, trained: boolean) => segments.push({ text, trained });
    let picture = 0;
    const turn = (role: string, text: string, trained: boolean) => {
      add(START, official);
      add(`${role}\n`, false);
      segments.push({ text, trained, ...(encodeTyped && { encode: encodeTyped }) });
      add(`${END}\n`, official || trained);
    };
    if (messages[0]?.role !== 'system') turn('system', DEFAULT_SYSTEM, false);
    for (const { role, content, loss } of messages) {
      const parts = contentParts(content, false);
      const text = parts
        .map((part, i) => {
          if (part.type !== 'text') return `Picture ${++picture}: ${IMAGE_START}${IMAGE_PAD}${IMAGE_END}\n`;
          const written = checkedText(part.text);
          // The line end after a picture is the template's; ms-swift keeps the row's own as well.
          const twice = encodeTyped && typeof content === 'string' && i > 0 && written.startsWith('\n');
          return twice ? written.slice(1) : written;
        })
        .join('');
      turn(role, text, role === 'assistant' && loss !== false);
    }
    if (forGeneration && messages.at(-1)?.role !== 'assistant') add(`${START}assistant\n`, false);
    return segments;
  };
}

/** The original opens whatever file stands between the tags. */
function checkedText(text: string): string {
  if (!text.includes(IMAGE_START)) return text;
  throw new MartletError(
    'ERR_MARTLET_IMAGE',
    `The text holds ${IMAGE_START}, with which this model marks a picture itself: write <image> where the picture belongs and list its path in images.`,
    { token: IMAGE_START },
  );
}
