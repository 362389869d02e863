/** What every family's processor does alike: segments → ids, pictures → RGB, generation_config.json, decoding. */
import { join } from 'node:path';
import { MartletError } from '../errors.js';
import type { ImagePlan } from '../native/binding.js';
import { DEFAULT_MAX_IMAGE_PIXELS, decodeImage } from './image.js';
import { readJsonFile } from './json.js';
import { contentParts, countImages, encodeSegments, type SegmentRenderer, withSystem } from './template.js';
import type { Tokenizer } from './tokenizer.js';
import type {
  ChatMessage,
  EncodedSample,
  GenerationDefaults,
  ImageSource,
  Processor,
  ProcessorInput,
  ProcessorOptions,
  RgbImage,
} from './types.js';

/** The part that differs by family. */
export interface FamilyProcessing {
  family: string;
  tokenizer: Tokenizer;
  imageTokenId: number;
  renderer: SegmentRenderer;
  /** What native code does to a picture of this size. */
  planImage(width: number, height: number): ImagePlan;
  /** Tokens that a picture of this size takes in the text. */
  imageTokens(width: number, height: number): number;
}

export async function createProcessor(
  modelDir: string,
  family: FamilyProcessing,
  options: ProcessorOptions,
): Promise<Processor> {
  const { tokenizer, imageTokenId } = family;
  const generation = await readJsonFile(
    join(modelDir, 'generation_config.json'),
    'ERR_MARTLET_MODEL_NOT_FOUND',
    'Download it again.',
    { optional: true },
  );
  const decode = {
    exifOrientation: options.exifOrientation ?? true,
    maxPixels: options.maxImagePixels ?? DEFAULT_MAX_IMAGE_PIXELS,
  };
  const segmentsOf = (messages: ChatMessage[], forGeneration: boolean) =>
    family.renderer(withSystem(messages, options.system), { forGeneration });

  return {
    family: family.family,
    imageTokenId,
    stopTokenIds: stopTokens(generation, tokenizer),
    generationDefaults: generationDefaults(generation),

    async encode(input, { for: purpose, signal }): Promise<EncodedSample> {
      const sources = imageSources(input);
      const decoded = await Promise.all(sources.map((source) => decodeImage(source, { ...decode, signal })));
      const images: RgbImage[] = decoded.map((image) => ({
        ...image,
        plan: family.planImage(image.width, image.height),
      }));
      const { inputIds, labels, mediaSpans } = encodeSegments(
        segmentsOf(input.messages, purpose === 'generate'),
        tokenizer,
        imageTokenId,
        images.map(({ width, height }) => family.imageTokens(width, height)),
      );
      return {
        inputIds,
        ...(purpose === 'train' && { labels }),
        images,
        mediaSpans,
        ...(input.id !== undefined && { id: input.id }),
      };
    },

    countTokens({ messages, imageSizes }) {
      const lengths = imageSizes.map(({ width, height }) => family.imageTokens(width, height));
      return encodeSegments(segmentsOf(messages, false), tokenizer, imageTokenId, lengths).inputIds.length;
    },

    decode: (ids, { skipSpecialTokens = true } = {}) => tokenizer.decode(ids, skipSpecialTokens),
    createStreamDecoder: () => tokenizer.createStreamDecoder(),
  };
}

/** Pictures in the order of their marks: those inside content parts, and those listed beside the messages. */
function imageSources({ messages, images, id }: ProcessorInput): ImageSource[] {
  const listed = [...images];
  const sources: ImageSource[] = [];
  const where = id === undefined ? '' : ` (${id})`;
  for (const { content } of messages) {
    for (const part of contentParts(content)) {
      if (part.type === 'text') continue;
      const own =
        part.type === 'image_url'
          ? typeof part.image_url === 'string'
            ? part.image_url
            : part.image_url.url
          : part.image;
      const source = own ?? listed.shift();
      if (source === undefined) {
        throw new MartletError(
          'ERR_MARTLET_IMAGE',
          `The messages mark ${countImages(messages)} picture(s), but ${images.length} were given${where}. Each <image> needs one picture.`,
          { marks: countImages(messages), images: images.length, id },
        );
      }
      sources.push(source);
    }
  }
  if (listed.length > 0) {
    throw new MartletError(
      'ERR_MARTLET_IMAGE',
      `${images.length} picture(s) were given, but the messages mark ${countImages(messages)}${where}. Put one <image> into the text for each.`,
      { marks: countImages(messages), images: images.length, id },
    );
  }
  return sources;
}

function stopTokens(generation: Record<string, unknown>, tokenizer: Tokenizer): number[] {
  const ids = new Set<number>();
  const listed = generation.eos_token_id;
  for (const id of Array.isArray(listed) ? listed : [listed]) if (Number.isInteger(id)) ids.add(id as number);
  const eos = tokenizer.special.eos_token === undefined ? undefined : tokenizer.tokenId(tokenizer.special.eos_token);
  if (eos !== undefined) ids.add(eos);
  return [...ids];
}

function generationDefaults(generation: Record<string, unknown>): GenerationDefaults {
  const number = (key: string, fallback: number) =>
    typeof generation[key] === 'number' ? (generation[key] as number) : fallback;
  // transformers: without do_sample the sampling fields mean nothing; top_k is 50 when sampling.
  const samples = generation.do_sample === true;
  const maxNewTokens = generation.max_new_tokens;
  return {
    temperature: samples ? number('temperature', 1) : 0,
    topP: samples ? number('top_p', 1) : 1,
    topK: samples ? number('top_k', 50) : 0,
    repetitionPenalty: number('repetition_penalty', 1),
    ...(typeof maxNewTokens === 'number' && { maxNewTokens }),
  };
}
