import type { Sharp } from 'sharp';
import type { ImagePlan } from '../native/binding.js';

/** OpenAI's content parts, and the shorter `{ type: 'image' }` of Hugging Face templates. */
export type ContentPart =
  | { type: 'text'; text: string }
  | { type: 'image'; image?: ImageSource }
  | { type: 'image_url'; image_url: string | { url: string } };

export interface ChatMessage {
  role: 'system' | 'user' | 'assistant';
  /** `<image>` marks each picture in order; or content parts. */
  content: string | ContentPart[];
  /** false = an assistant message that is not trained. Defaults to true. */
  loss?: boolean;
}

/** A path, an http(s) URL, a `file:` or `data:` URI, the bytes of a picture file, or a sharp instance. */
export type ImageSource = string | URL | Uint8Array | Sharp;

/** A decoded picture and what native code does to it. */
export interface RgbImage {
  /** height × width × 3, uint8 */
  data: Uint8Array;
  width: number;
  height: number;
  plan: ImagePlan;
}

export interface EncodedSample {
  /** Image tokens expanded. */
  inputIds: Int32Array;
  /** −100 = not trained. */
  labels?: Int32Array;
  images: RgbImage[];
  /** Where the tokens of each of `images` begin and end. */
  mediaSpans?: [number, number][];
  id?: string;
}

export interface ProcessorInput {
  messages: ChatMessage[];
  images: ImageSource[];
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
  readonly stopTokenIds: number[];
  readonly generationDefaults: GenerationDefaults;
  encode(input: ProcessorInput, options: EncodeOptions): Promise<EncodedSample>;
  /** Tokens of a training row, image tokens counted, without decoding a picture. */
  countTokens(input: { messages: ChatMessage[]; imageSizes: { width: number; height: number }[] }): number;
  decode(ids: ArrayLike<number>, options?: { skipSpecialTokens?: boolean }): string;
  createStreamDecoder(): StreamDecoder;
}

export interface ProcessorOptions {
  /** `default` = the checkpoint's own chat template; `ms-swift` = its registered one. Defaults to `default`. */
  template?: 'default' | 'ms-swift';
  /** Used when the messages have no system message. */
  system?: string;
  /** Defaults to true. */
  exifOrientation?: boolean;
  /** Largest picture that is decoded, in pixels. Defaults to 268 million (16384²). */
  maxImagePixels?: number;
}
