import type { Sharp } from 'sharp';
import type { ImagePlan } from '../native/binding.js';
import type { VisionOptions } from './vision-options.js';

export type { VisionOptions } from './vision-options.js';

/** OpenAI's content parts, and the shorter `{ type: 'image' }` of Hugging Face templates. */
export type ContentPart =
  | { type: 'text'; text: string }
  | { type: 'image'; image?: ImageSource }
  | { type: 'image_url'; image_url: string | { url: string } }
  | { type: 'video'; video?: VideoSource; fps?: number };

export interface ChatMessage {
  role: 'system' | 'user' | 'assistant';
  /** `<image>` marks each picture in order, `<video>` each video where the family takes videos; or content parts. */
  content: string | ContentPart[];
  /** false = an assistant message that is not trained. Defaults to true. */
  loss?: boolean;
}

/** A path, an http(s) URL, a `file:` or `data:` URI, the bytes of a picture file, or a sharp instance. */
export type ImageSource = string | URL | Uint8Array | Sharp;

/** A video as its frames in order, all of one size, at `fps` frames a second. Video files are not decoded. */
export type VideoSource = ImageSource[] | { frames: ImageSource[]; fps?: number };

/** A decoded picture or video and what native code does to it. Several views of one picture share `data`. */
export interface RgbImage {
  /** frames × height × width × 3, uint8 */
  data: Uint8Array;
  width: number;
  height: number;
  /** Present = a video. */
  frames?: number;
  /** Seconds from one temporal patch to the next, where the family's positions use it. */
  secondsPerGrid?: number;
  plan: ImagePlan;
  /** SHA-256 of pixels and plan. */
  key?: string;
}

/** ms-swift's `objects`: names and boxes that take the places of `<ref-object>` and `<bbox>` in the messages, each kind in its own order. */
export interface GroundingObjects {
  ref?: string[];
  /** `[x1, y1, x2, y2]`, corners in any order, or a point `[x, y]`. */
  bbox?: number[][];
  /** `real`: pixels of the picture as it is; `norm1`: shares of its sides, 0 to 1. Defaults to `real`. */
  bboxType?: 'real' | 'norm1';
  /** The picture of each box, from 0. Defaults to 0. */
  imageId?: number[];
}

export interface EncodedSample {
  /** Image tokens expanded. */
  inputIds: Int32Array;
  /** −100 = not trained. */
  labels?: Int32Array;
  /** Present (T5): `labels` are the decoder's, of their own length and not shifted; `inputIds` are the encoder's. */
  decoderLabels?: true;
  images: RgbImage[];
  /** Where the tokens of each of `images` begin and end. */
  mediaSpans?: [number, number][];
  id?: string;
}

export interface ProcessorInput {
  messages: ChatMessage[];
  images: ImageSource[];
  videos?: VideoSource[];
  objects?: GroundingObjects;
  /** Win over the processor's own. */
  vision?: VisionOptions;
  /** Names the row in messages. */
  id?: string;
}

export interface EncodeOptions {
  /** `train`: labels for every assistant message. `generate`: the prompt of the next one. */
  for: 'train' | 'generate';
  signal?: AbortSignal;
}

/** Incremental detokenisation: never gives half a character. */
export interface StreamDecoder {
  push(id: number): string;
  flush(): string;
}

export interface GenerationDefaults {
  /** 0 = greedy */
  temperature: number;
  topP: number;
  /** 0 = off */
  topK: number;
  repetitionPenalty: number;
  maxNewTokens?: number;
}

export interface Processor {
  readonly family: string;
  readonly imageTokenId: number;
  /** Absent: the family takes no videos, and `<video>` is text like any other. */
  readonly videoTokenId?: number;
  /** The options in force, those from the environment and from an adapter's `args.yaml` included. */
  readonly vision: VisionOptions;
  readonly stopTokenIds: number[];
  readonly generationDefaults: GenerationDefaults;
  encode(input: ProcessorInput, options: EncodeOptions): Promise<EncodedSample>;
  /** Tokens of a training row, image and video tokens and a decoder's counted, from the pictures' headers alone. @throws ERR_MARTLET_DATASET when none is trained */
  countTokens(input: ProcessorInput, options?: { signal?: AbortSignal }): Promise<number>;
  /** Text of an answer, without what the template puts in front of it; with special tokens: everything as it is. */
  decode(ids: ArrayLike<number>, options?: { skipSpecialTokens?: boolean }): string;
  createStreamDecoder(options?: { skipSpecialTokens?: boolean }): StreamDecoder;
  /** Boxes of an answer about a picture, in its own pixels. @throws ERR_MARTLET_USAGE */
  parseBoxes(text: string, picture: { width: number; height: number; vision?: VisionOptions }): ParsedBox[];
}

/** One box of an answer. */
export interface ParsedBox {
  /** The name that the answer gives it. */
  label?: string;
  /** `[x1, y1, x2, y2]`, corners in order, or a point `[x, y]`: pixels of the picture as it was given. */
  bbox: number[];
  /** Qwen-VL's quadrangles: four corners, `[x1, y1, …, x4, y4]`; `bbox` is the upright box around them. */
  quad?: number[];
}

export interface ProcessorOptions {
  /** `default` = the checkpoint's own chat template; `ms-swift` = its registered one. Defaults to `default`. */
  template?: 'default' | 'ms-swift';
  /** Used when the messages have no system message. */
  system?: string;
  /** What is trained: `default` = the answers with their end; `official` = as the model's authors did it, where that differs. Defaults to `default`. */
  labels?: 'default' | 'official';
  /** Defaults to true. */
  exifOrientation?: boolean;
  /** Largest picture that is decoded, in pixels. Defaults to 268 million (16384²). */
  maxImagePixels?: number;
  /** Win over the environment, which wins over `savedVision`. Families without such options refuse them. */
  vision?: VisionOptions;
  /** What an adapter was trained with. */
  savedVision?: VisionOptions;
}
