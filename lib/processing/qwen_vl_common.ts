/** What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: pictures at their own size cut into patches, ChatML, videos as lists of frames. */
import { join } from 'node:path';
import { MartletError } from '../errors.js';
import type { ImagePlan } from '../native/binding.js';
import { createProcessor, type MediaPlan, type MediaSize } from './base.js';
import { BOX_FORMATS } from './grounding.js';
import { readJsonFile, requireImageProcessor } from './json.js';
import { type PixelLimits, type Size, smartResize } from './smart-resize.js';
import {
  contentText,
  type EncodedText,
  encodeSegments,
  jinjaRenderer,
  type MediaText,
  type Segment,
  type SegmentRenderer,
} from './template.js';
import { requireChatTemplate, Tokenizer } from './tokenizer.js';
import type { Processor, ProcessorOptions, VisionOptions } from './types.js';
import {
  checkVisionOptions,
  familyVisionOptions,
  layerVisionOptions,
  PIXEL_OPTIONS,
  refuseVisionOptions,
} from './vision-options.js';

type Json = Record<string, unknown>;
type Triple = [number, number, number];

const END_TOKEN = '<|im_end|>';
const IMAGE_PAD = '<|image_pad|>';
const VIDEO_PAD = '<|video_pad|>';
const IMAGE_TEXT = `<|vision_start|>${IMAGE_PAD}<|vision_end|>`;
const VIDEO_TEXT = `<|vision_start|>${VIDEO_PAD}<|vision_end|>`;
const MEDIA: MediaText = { image: IMAGE_TEXT, video: VIDEO_TEXT };
/** ms-swift's and qwen_vl_utils' rate of a list of frames. */
const DEFAULT_FPS = 2;

export const CLIP_MEAN: Triple = [0.48145466, 0.4578275, 0.40821073];
export const CLIP_STD: Triple = [0.26862954, 0.26130258, 0.27577711];

/** Defaults of a transformers processor class, for what a checkpoint's file leaves out. */
export interface ProcessorDefaults {
  patch: number;
  limits: PixelLimits;
  mean: Triple;
  std: Triple;
  /** `max_video_tokens`; of videos only. */
  maxTokens?: number;
}

/** Limits on a video's pixels. */
export interface VideoLimits {
  /** The checkpoint's. */
  size: PixelLimits;
  /** The options' limits on one frame. */
  frame: Partial<PixelLimits>;
  /** The option's limit on all temporal patches. */
  total: number | undefined;
  /** `max_video_tokens` where the checkpoint says `cap_pixels_per_frame`. */
  capTokens: number | undefined;
}

/** What differs between the families. */
export interface QwenVlTraits {
  family: string;
  /** Of ms-swift's template. */
  defaultSystem: string | undefined;
  /** Coordinates of boxes that the family was trained on. */
  normBbox: 'norm1000' | 'none';
  image: ProcessorDefaults;
  video: ProcessorDefaults;
  /** Size of a video's frames. */
  videoSize(size: Size, frames: number, factor: number, limits: VideoLimits, label: string): Size;
  /** How the network learns of time: positions from the seconds of a temporal patch, the time written before each, or not at all. */
  time: 'positions' | 'text' | 'none';
}

interface VisionSettings {
  patch: number;
  temporal: number;
  merge: number;
  backend: 'torchvision' | 'pillow';
  rescale: number;
  mean: Triple;
  std: Triple;
  limits: PixelLimits;
  capTokens: number | undefined;
}

interface QwenPlan extends MediaPlan {
  video: boolean;
  /** Temporal patches, and merged tokens of each. */
  steps: number;
  stepTokens: number;
  /** What the text says in place of `VIDEO_PAD`, in which each `VIDEO_PAD` stands for one temporal patch's tokens. Absent: all tokens, nothing else. */
  text?: string;
}

export async function createQwenVlProcessor(
  modelDir: string,
  config: Json,
  options: ProcessorOptions,
  traits: QwenVlTraits,
): Promise<Processor> {
  const tokenizer = await Tokenizer.load(modelDir);
  const imageTokenId = tokenOf(tokenizer, config, 'image_token_id', IMAGE_PAD, modelDir);
  const videoTokenId = tokenOf(tokenizer, config, 'video_token_id', VIDEO_PAD, modelDir);
  const swift = options.template === 'ms-swift';
  const renderer = swift
    ? swiftRenderer(traits)
    : jinjaRenderer(await requireChatTemplate(modelDir, tokenizer), tokenizer, END_TOKEN, MEDIA, modelDir);
  const { image, video } = await visionSettings(modelDir, config, traits);
  const vision = familyVisionOptions(traits.family, PIXEL_OPTIONS, options);
  imageLimits(image, vision); // limits that contradict each other show before any picture
  const form = BOX_FORMATS[vision.bboxFormat ?? 'legacy'];

  const planMedia = (size: MediaSize, row: VisionOptions): QwenPlan => {
    refuseVisionOptions(traits.family, row, PIXEL_OPTIONS);
    const inForce = layerVisionOptions(checkVisionOptions(row), vision);
    return size.video
      ? planVideo({ ...size, video: size.video }, video, inForce, traits, swift)
      : planImage(size, image, imageLimits(image, inForce));
  };
  return createProcessor<QwenPlan>(
    modelDir,
    {
      family: traits.family,
      tokenizer,
      imageTokenId,
      videoTokenId,
      endToken: END_TOKEN,
      renderer,
      vision,
      planMedia,
      grounding: { normBbox: vision.normBbox ?? traits.normBbox, ...form },
      encode: (segments, media) => encode(segments, media, { tokenizer, imageTokenId, videoTokenId }),
    },
    options,
  );
}

function tokenOf(tokenizer: Tokenizer, config: Json, key: string, token: string, modelDir: string): number {
  const id = tokenizer.tokenId(token);
  if (id !== undefined && (config[key] === undefined || config[key] === id)) return id;
  throw new MartletError(
    'ERR_MARTLET_TOKENIZER',
    `config.json says that ${key} is ${String(config[key])}, but in tokenizer.json ${token} is ${id ?? 'absent'}: the files of ${modelDir} are not of one model.`,
    { path: modelDir, [key]: config[key] },
  );
}

/** ms-swift's ChatML: a system block only for a system message with text, `<|im_end|>\n` trained behind every answer. */
function swiftRenderer({ defaultSystem }: QwenVlTraits): SegmentRenderer {
  return (messages, { forGeneration }) => {
    const segments: Segment[] = [];
    const system = messages[0]?.role === 'system' ? contentText(messages[0].content, MEDIA) : defaultSystem;
    let prompt = system ? `<|im_start|>system\n${system}${END_TOKEN}\n` : '';
    for (const { role, content, loss } of messages) {
      const text = contentText(content, MEDIA);
      if (role === 'user') prompt += `<|im_start|>user\n${text}${END_TOKEN}\n<|im_start|>assistant\n`;
      if (role !== 'assistant') continue;
      segments.push({ text: prompt, trained: false }, { text: `${text}${END_TOKEN}\n`, trained: loss !== false });
      prompt = '';
    }
    if (forGeneration) segments.push({ text: prompt, trained: false });
    return segments;
  };
}

/** Each `<|image_pad|>` and `<|video_pad|>` becomes as many as there are merged patches; times are written into the text before it is tokenised. */
function encode(
  segments: Segment[],
  media: QwenPlan[],
  { tokenizer, imageTokenId, videoTokenId }: { tokenizer: Tokenizer; imageTokenId: number; videoTokenId: number },
): EncodedText {
  const run = (id: number, length: number) => new Array<number>(length).fill(id);
  const images = media.filter(({ video }) => !video);
  const videos = media.filter(({ video }) => video);
  let place = 0;
  const timed = segments.map(({ text, trained }) => ({
    text: text.replaceAll(VIDEO_PAD, () => videos[place++]?.text ?? VIDEO_PAD),
    trained,
  }));
  const videoIds = videos.flatMap(({ text, steps, stepTokens }) =>
    text === undefined
      ? [run(videoTokenId, steps * stepTokens)]
      : new Array<number[]>(steps).fill(run(videoTokenId, stepTokens)),
  );
  return encodeSegments(
    timed,
    tokenizer,
    new Map([
      [imageTokenId, images.map(({ stepTokens }) => run(imageTokenId, stepTokens))],
      [videoTokenId, videoIds],
    ]),
  );
}

function planImage({ width, height, label }: MediaSize, settings: VisionSettings, limits: PixelLimits): QwenPlan {
  const size = smartResize({ width, height }, settings.patch * settings.merge, limits, { label });
  return { video: false, ...patchPlan(size, 1, settings) };
}

function planVideo(
  { video: { frames, fps: own }, width, height, label }: MediaSize & { video: { frames: number; fps?: number } },
  settings: VisionSettings,
  vision: VisionOptions,
  traits: QwenVlTraits,
  swift: boolean,
): QwenPlan {
  const { patch, merge, temporal, limits, capTokens } = settings;
  const factor = patch * merge;
  const fps = own ?? vision.fps ?? DEFAULT_FPS;
  const size = traits.videoSize(
    { width, height },
    frames,
    factor,
    {
      size: limits,
      frame: {
        ...pixels('min', vision.videoMinPixels, vision.videoMinTokenNum, factor),
        ...pixels('max', vision.videoMaxPixels, vision.videoMaxTokenNum, factor),
      },
      total: vision.videoTotalPixels,
      capTokens,
    },
    label,
  );
  const steps = Math.ceil(frames / temporal);
  return {
    video: true,
    ...patchPlan(size, steps, settings),
    ...(traits.time === 'positions' && { secondsPerGrid: temporal / fps }),
    ...(traits.time === 'text' && { text: timedText(frames, fps, temporal, swift) }),
  };
}

/**
 * Every temporal patch behind its time, in vision marks of its own; those around the whole video stay (transformers from 5.10 on). The time is the mean
 * of the patch's first and last frame's; a frame that fills up the last patch has the time of the frame that it repeats, in
 * ms-swift (whose qwen_vl_utils fills up first) that of a frame more.
 */
function timedText(frames: number, fps: number, temporal: number, swift: boolean): string {
  const time = (frame: number) => (swift ? frame : Math.min(frame, frames - 1)) / fps;
  let text = '';
  for (let first = 0; first < frames; first += temporal)
    text += `<${oneDecimal((time(first) + time(first + temporal - 1)) / 2)} seconds>${VIDEO_TEXT}`;
  return text;
}

/** Python's `f'{value:.1f}'`. JavaScript rounds a half up, Python to the even digit; only quarters are halves of a tenth. */
function oneDecimal(value: number): string {
  return (value * 4) % 4 === 1 ? `${Math.floor(value)}.2` : value.toFixed(1);
}

function patchPlan(size: Size, steps: number, settings: VisionSettings): Omit<QwenPlan, 'video'> {
  const { patch, temporal, merge, backend, rescale, mean, std } = settings;
  const plan: ImagePlan = {
    resize: { ...size, backend },
    rescale,
    mean,
    std,
    patches: { size: patch, temporal, merge },
  };
  return { plan, steps, stepTokens: (size.width * size.height) / (patch * merge) ** 2 };
}

function pixels<K extends 'min' | 'max'>(
  side: K,
  given: number | undefined,
  tokens: number | undefined,
  factor: number,
): Partial<Record<K, number>> {
  const value = given ?? (tokens === undefined ? undefined : tokens * factor * factor);
  return value === undefined ? {} : ({ [side]: value } as Record<K, number>);
}

/** A picture's limits: the options', else the checkpoint's. */
function imageLimits({ limits, patch, merge }: VisionSettings, vision: VisionOptions): PixelLimits {
  const factor = patch * merge;
  const out = {
    ...limits,
    ...pixels('min', vision.minPixels, vision.imageMinTokenNum, factor),
    ...pixels('max', vision.maxPixels, vision.imageMaxTokenNum, factor),
  };
  checkLimits(out, 'maxPixels');
  return out;
}

/** @throws ERR_MARTLET_USAGE when no size can satisfy both */
export function checkLimits({ min, max }: PixelLimits, field: 'maxPixels' | 'videoMaxPixels'): void {
  if (min <= max) return;
  const video = field === 'videoMaxPixels' ? 'video_' : '';
  throw new MartletError(
    'ERR_MARTLET_USAGE',
    `${video}max_pixels ${max} is below ${video}min_pixels ${min} (what is not set comes from the checkpoint): set both.`,
    { field, key: `${video}max_pixels`, min, max },
  );
}

/** processor_config.json's parts, else preprocessor_config.json and video_preprocessor_config.json: transformers' order. */
async function visionSettings(
  modelDir: string,
  config: Json,
  traits: QwenVlTraits,
): Promise<{ image: VisionSettings; video: VisionSettings }> {
  const read = (name: string) =>
    readJsonFile(join(modelDir, name), 'ERR_MARTLET_MODEL_NOT_FOUND', 'Download it again.', { optional: true });
  const [processor, image, video] = await Promise.all(
    ['processor_config.json', 'preprocessor_config.json', 'video_preprocessor_config.json'].map(read),
  );
  const present = (...files: unknown[]) =>
    files.find((file) => file && Object.keys(file).length > 0) as Json | undefined;
  const imageFile = present(processor?.image_processor, image);
  requireImageProcessor(modelDir, imageFile ?? {});
  const videoFile = present(processor?.video_processor, video, image);
  const visionConfig = (config.vision_config ?? {}) as Json;
  const settings = (file: Json, defaults: ProcessorDefaults) => partSettings(file, defaults, visionConfig, modelDir);
  return { image: settings(imageFile ?? {}, traits.image), video: settings(videoFile ?? {}, traits.video) };
}

function partSettings(file: Json, defaults: ProcessorDefaults, visionConfig: Json, modelDir: string): VisionSettings {
  const refuse = (message: string, key: string) =>
    new MartletError('ERR_MARTLET_UNSUPPORTED_MODEL', `The preprocessor configuration of ${modelDir}: ${message}.`, {
      path: modelDir,
      key,
    });
  for (const key of ['do_resize', 'do_rescale', 'do_normalize'])
    if (file[key] === false) throw refuse(`${key}: false is not supported`, key);
  const whole = (key: string, fallback: number): number => {
    const value = file[key] ?? fallback;
    if (Number.isSafeInteger(value) && (value as number) > 0) return value as number;
    throw refuse(`${key} is ${JSON.stringify(value)}, not a whole number above 0`, key);
  };
  const size = (file.size ?? {}) as Json;
  const limit = (keys: [unknown, unknown, unknown], fallback: number, key: string): number => {
    const value = keys.find((candidate) => candidate !== undefined && candidate !== null) ?? fallback;
    if (typeof value === 'number' && Number.isFinite(value) && value > 0) return value;
    throw refuse(`${key} is ${JSON.stringify(value)}, not a number of pixels`, key);
  };
  const triple = (key: string, fallback: Triple): Triple => {
    const value = file[key] ?? fallback;
    if (Array.isArray(value) && value.length === 3 && value.every((n) => Number.isFinite(n))) return value as Triple;
    throw refuse(`${key} is ${JSON.stringify(value)}, not three numbers`, key);
  };
  const out: VisionSettings = {
    patch: whole('patch_size', defaults.patch),
    temporal: whole('temporal_patch_size', 2),
    merge: whole('merge_size', 2),
    // transformers 5 runs these processors on torchvision unless the checkpoint asks for the slow one.
    backend: file.use_fast === false ? 'pillow' : 'torchvision',
    rescale: Number(file.rescale_factor ?? 1 / 255),
    mean: triple('image_mean', defaults.mean),
    std: triple('image_std', defaults.std),
    limits: {
      min: limit([file.min_pixels, size.shortest_edge, size.min_pixels], defaults.limits.min, 'min_pixels'),
      max: limit([file.max_pixels, size.longest_edge, size.max_pixels], defaults.limits.max, 'max_pixels'),
    },
    capTokens:
      file.cap_pixels_per_frame === true && defaults.maxTokens !== undefined
        ? whole('max_video_tokens', defaults.maxTokens)
        : undefined,
  };
  for (const [own, theirs] of [
    ['patch', 'patch_size'],
    ['temporal', 'temporal_patch_size'],
    ['merge', 'spatial_merge_size'],
  ] as const) {
    const value = visionConfig[theirs];
    if (value !== undefined && value !== out[own])
      throw refuse(`it cuts patches with ${theirs} ${out[own]}, but config.json says ${String(value)}`, theirs);
  }
  return out;
}
