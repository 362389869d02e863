/**
 * MiniCPM-V 2.6 and 4.5: a whole view of each picture and, for large ones, slices of it, with a fixed number of image tokens each. Placeholders as
 * image_processing_minicpmv.py writes them; the checkpoint's chat template, or ms-swift's `minicpmv2_6`.
 */
import { join } from 'node:path';
import { MartletError } from '../errors.js';
import type { ImagePlan } from '../native/binding.js';
import { createProcessor, type MediaPlan, type MediaSize } from './base.js';
import { readJsonFile, requireImageProcessor } from './json.js';
import { type SliceOptions, type Slicing, slicePicture } from './slicing.js';
import {
  contentText,
  encodeSegments,
  IMAGE_MARK,
  jinjaRenderer,
  type Segment,
  type SegmentRenderer,
} from './template.js';
import { requireChatTemplate, Tokenizer } from './tokenizer.js';
import type { Processor, ProcessorOptions, VisionOptions } from './types.js';
import {
  checkVisionOptions,
  familyVisionOptions,
  layerVisionOptions,
  refuseVisionOptions,
  SLICE_OPTIONS,
} from './vision-options.js';

type Json = Record<string, unknown>;
type Triple = [number, number, number];

const FAMILY = 'minicpm_v';
const END = '<|im_end|>';
const DEFAULT_SYSTEM = 'You are a helpful assistant.';
const THINK = '<think>';
const THINK_END = '</think>';
const NO_THOUGHT = '<think>\n\n</think>\n\n';
/** A picture's mark in text is one token, which its placeholder's ids then replace; a line end follows it. */
const MEDIA = { image: `${IMAGE_MARK}\n` };

interface Settings extends SliceOptions {
  useImageId: boolean;
  /** Of one view. */
  imageTokens: number;
  mean: Triple;
  std: Triple;
  tokens: {
    start: string;
    end: string;
    sliceStart: string;
    sliceEnd: string;
    unknown: string;
    idStart: string;
    idEnd: string;
  };
}

interface SlicedPlan extends MediaPlan {
  slicing: Slicing;
  useImageId: boolean;
}

export async function createMiniCpmVProcessor(
  modelDir: string,
  config: Json,
  options: ProcessorOptions,
): Promise<Processor> {
  const version = checkVersion(modelDir, config);
  const tokenizer = await Tokenizer.load(modelDir);
  const settings = await sliceSettings(modelDir, config);
  const tokenId = (token: string): number => {
    const id = tokenizer.tokenId(token);
    if (id !== undefined) return id;
    throw new MartletError(
      'ERR_MARTLET_TOKENIZER',
      `tokenizer.json of ${modelDir} has no ${token}, which places pictures: its files are not of one model.`,
      { path: modelDir, token },
    );
  };
  const imageTokenId = tokenId(settings.tokens.unknown);
  const markId = tokenId(settings.tokens.start);
  for (const token of Object.values(settings.tokens)) tokenId(token);
  const vision = familyVisionOptions(FAMILY, SLICE_OPTIONS, options);
  return createProcessor<SlicedPlan>(
    modelDir,
    {
      family: FAMILY,
      tokenizer,
      imageTokenId,
      endToken: END,
      renderer:
        options.template === 'ms-swift'
          ? swiftRenderer(tokenizer, version === '4.5')
          : templateRenderer(
              jinjaRenderer(await requireChatTemplate(modelDir, tokenizer), tokenizer, END, MEDIA, modelDir, {
                content: 'text',
                variables: { enable_thinking: false },
              }),
            ),
      vision,
      planMedia: (size, row) => {
        refuseVisionOptions(FAMILY, row, SLICE_OPTIONS);
        return planPicture(size, settings, layerVisionOptions(checkVisionOptions(row), vision));
      },
      encode: (segments, media) =>
        encodeSegments(
          segments,
          tokenizer,
          new Map([
            [markId, media.map((plan, i) => tokenizer.encode(placeholder(plan, i, settings)))],
            [imageTokenId, []], // typed into the text it would be taken for a picture's place
          ]),
        ),
    },
    options,
  );
}

/**
 * The row's own line end after a mark is the template's. An answer that begins with a thought of its own takes the place of the empty one that the
 * template of 4.5 writes before an answer.
 */
function templateRenderer(render: SegmentRenderer): SegmentRenderer {
  return (messages, options) => {
    const segments = render(
      messages.map((message) => ({
        ...message,
        content:
          typeof message.content === 'string'
            ? message.content.replaceAll(`${IMAGE_MARK}\n`, IMAGE_MARK)
            : message.content,
      })),
      options,
    );
    return segments.map(({ text, ...rest }, i) => {
      const thinks = segments[i + 1]?.text.startsWith(THINK) && text.endsWith(NO_THOUGHT);
      return { ...rest, text: thinks ? text.slice(0, -NO_THOUGHT.length) : text };
    });
  };
}

/**
 * ms-swift's ChatML: the mark and the line end after it are made into ids apart from the text around them. 4.5 (its `Qwen3MixedTemplateMeta`): no
 * default system message, an empty thought before every answer that is trained and before the one that is generated, none in the history.
 */
function swiftRenderer(tokenizer: Tokenizer, thinking: boolean): SegmentRenderer {
  const encode = (text: string) => tokenizer.encode(text);
  const answerText = (text: string, forGeneration: boolean) => {
    if (!thinking) return text;
    if (forGeneration) return (text.split(THINK_END).at(-1) as string).trim();
    return text.startsWith(THINK) ? text : NO_THOUGHT + text;
  };
  return (messages, { forGeneration }) => {
    const segments: Segment[] = [];
    const prompt = (text: string) => {
      for (const [i, piece] of text.split(MEDIA.image).entries()) {
        if (i > 0) segments.push({ text: IMAGE_MARK, trained: false, encode }, { text: '\n', trained: false, encode });
        segments.push({ text: piece, trained: false });
      }
    };
    const given = messages[0]?.role === 'system' ? contentText(messages[0].content, MEDIA) : undefined;
    const system = given ?? (thinking ? '' : DEFAULT_SYSTEM);
    if (system !== '') prompt(`<|im_start|>system\n${system}${END}\n`);
    for (const [i, { role, content, loss }] of messages.entries()) {
      const text = contentText(content, MEDIA);
      if (role === 'user') {
        prompt(`<|im_start|>user\n${text}${END}\n`);
        if (forGeneration || i + 1 < messages.length) prompt('<|im_start|>assistant\n');
      } else if (role === 'assistant') {
        segments.push({ text: `${answerText(text, forGeneration)}${END}\n`, trained: loss !== false });
      }
    }
    if (forGeneration && thinking) prompt(NO_THOUGHT);
    return segments;
  };
}

function planPicture({ width, height }: MediaSize, settings: Settings, vision: VisionOptions): SlicedPlan {
  const { maxSliceNums = settings.maxSliceNums, useImageId = settings.useImageId } = vision;
  const slicing = slicePicture({ width, height }, { ...settings, maxSliceNums });
  const { mean, std, patchSize } = settings;
  const view = (size: { width: number; height: number }, crop?: ImagePlan['crop']): ImagePlan => ({
    resize: { ...size, backend: 'pillow' },
    ...(crop && { crop }),
    rescale: 1 / 255,
    mean,
    std,
    patches: { size: patchSize, temporal: 1, merge: 1, sideBySide: true },
  });
  const { grid, source, refine } = slicing;
  const slices: ImagePlan[] = [];
  if (grid && refine) {
    const size = { width: refine.width / grid.columns, height: refine.height / grid.rows };
    for (let row = 0; row < grid.rows; row++) {
      for (let column = 0; column < grid.columns; column++)
        slices.push(view(refine, { top: row * size.height, left: column * size.width, ...size }));
    }
  }
  return { plan: view(source), slices, slicing, useImageId };
}

/** What stands in the text for the picture of this number. */
function placeholder({ slicing: { grid }, useImageId }: SlicedPlan, index: number, settings: Settings): string {
  const { tokens } = settings;
  const places = tokens.unknown.repeat(settings.imageTokens);
  const whole = tokens.start + places + tokens.end;
  const row = grid ? (tokens.sliceStart + places + tokens.sliceEnd).repeat(grid.columns) : '';
  const rows = grid ? new Array<string>(grid.rows).fill(row).join('\n') : '';
  return (useImageId ? `${tokens.idStart}${index}${tokens.idEnd}` : '') + whole + rows;
}

const SUPPORTED = ['2.6', '4.5'];

/** `model_type` is one for all versions; some files say no `version`. */
function checkVersion(modelDir: string, config: Json): string {
  const version = miniCpmVersion(config);
  if (SUPPORTED.includes(version)) return version;
  throw new MartletError(
    'ERR_MARTLET_UNSUPPORTED_MODEL',
    `${join(modelDir, 'config.json')} is of MiniCPM-V ${version}, which is not supported. Supported: ${SUPPORTED.join(' and ')}.`,
    { path: modelDir, version, supported: SUPPORTED },
  );
}

function miniCpmVersion(config: Json): string {
  if (config.model_type === 'minicpmv4_6') return '4.6';
  const { version } = config;
  if (version !== undefined && version !== null) {
    const number = typeof version === 'boolean' || version === '' ? Number.NaN : Number(version);
    return Number.isFinite(number) ? number.toFixed(1) : JSON.stringify(version);
  }
  if (typeof config.vision_encoder === 'string') return '2.0';
  if (config.query_num === 96) return '2.5';
  return config.head_dim === undefined ? '2.6' : '4.5';
}

async function sliceSettings(modelDir: string, config: Json): Promise<Settings> {
  const file = await readJsonFile(
    join(modelDir, 'preprocessor_config.json'),
    'ERR_MARTLET_MODEL_NOT_FOUND',
    'Download it with the checkpoint.',
    { optional: true },
  );
  requireImageProcessor(modelDir, file);
  const slices = (config.slice_config ?? {}) as Json;
  const refuse = (key: string, message: string) =>
    new MartletError('ERR_MARTLET_UNSUPPORTED_MODEL', `The preprocessor configuration of ${modelDir}: ${message}.`, {
      path: modelDir,
      key,
    });
  if (file.slice_mode === false) throw refuse('slice_mode', 'slice_mode: false is not supported');
  const whole = (key: string, fallback: unknown): number => {
    const value = file[key] ?? fallback;
    if (Number.isSafeInteger(value) && (value as number) > 0) return value as number;
    throw refuse(key, `${key} is ${JSON.stringify(value)}, not a whole number above 0`);
  };
  const triple = (key: string): Triple => {
    const value = file[key] ?? [0.5, 0.5, 0.5];
    if (Array.isArray(value) && value.length === 3 && value.every((n) => Number.isFinite(n))) return value as Triple;
    throw refuse(key, `${key} is ${JSON.stringify(value)}, not three numbers`);
  };
  const token = (key: string, fallback: string) => (typeof file[key] === 'string' ? file[key] : fallback);
  const imageTokens = whole('image_feature_size', config.query_num ?? 64);
  if (config.query_num !== undefined && config.query_num !== imageTokens) {
    throw refuse(
      'image_feature_size',
      `image_feature_size is ${imageTokens}, but config.json's query_num is ${String(config.query_num)}: the files are not of one model`,
    );
  }
  return {
    maxSliceNums: whole('max_slice_nums', slices.max_slice_nums ?? 9),
    scaleResolution: whole('scale_resolution', slices.scale_resolution ?? 448),
    patchSize: whole('patch_size', slices.patch_size ?? 14),
    useImageId: (file.use_image_id ?? config.use_image_id ?? true) === true,
    imageTokens,
    mean: triple('norm_mean'),
    std: triple('norm_std'),
    tokens: {
      start: token('im_start', '<image>'),
      end: token('im_end', '</image>'),
      sliceStart: token('slice_start', '<slice>'),
      sliceEnd: token('slice_end', '</slice>'),
      unknown: token('unk', '<unk>'),
      idStart: token('im_id_start', '<image_id>'),
      idEnd: token('im_id_end', '</image_id>'),
    },
  };
}
