/** What every family's processor does alike: segments → ids, pictures and videos → RGB, generation_config.json, decoding. */
import { createHash } from 'node:crypto';
import { join } from 'node:path';
import { MartletError } from '../errors.js';
import type { ImagePlan } from '../native/binding.js';
import { fillObjects, type GroundingForm, type GroundingPicture, parseBoxes } from './grounding.js';
import { DEFAULT_MAX_IMAGE_PIXELS, type DecodedImage, decodeImage, imageLabel, imageSize } from './image.js';
import { readJsonFile } from './json.js';
import {
  checkMessages,
  contentParts,
  type EncodedText,
  type Segment,
  type SegmentRenderer,
  withSystem,
} from './template.js';
import type { Tokenizer } from './tokenizer.js';
import type {
  EncodedSample,
  GenerationDefaults,
  ImageSource,
  Processor,
  ProcessorInput,
  ProcessorOptions,
  StreamDecoder,
  VideoSource,
  VisionOptions,
} from './types.js';

/** A picture, or a video's frames. */
export interface MediaSize {
  /** Present = a video. */
  video?: { frames: number; fps?: number };
  width: number;
  height: number;
  /** Names it in messages. */
  label: string;
}

/** What becomes of one picture or video. Families add what their tokens depend on. */
export interface MediaPlan {
  plan: ImagePlan;
  /** Further views of the same picture, after `plan`'s. */
  slices?: ImagePlan[];
  secondsPerGrid?: number;
}

/** The part that differs by family. */
export interface FamilyProcessing<P extends MediaPlan> {
  family: string;
  tokenizer: Tokenizer;
  imageTokenId: number;
  /** Absent: the family takes no videos. */
  videoTokenId?: number;
  /** Ends an answer, as the tokenizer's own end token does; given by its id, it alone ends one. */
  endToken: string | number;
  /** Others that end one. */
  stopTokens?: string[];
  /** What the template writes before an answer and trains with it (OPT: a space). Not a part of the answer's text. */
  answerStart?: string;
  renderer: SegmentRenderer;
  /** The options in force. */
  vision: VisionOptions;
  /** What native code does to a picture or video; `vision` are the row's own options. */
  planMedia(media: MediaSize, vision: VisionOptions): P;
  /** Absent: the family has no form for boxes. */
  grounding?: GroundingForm;
  /** `media` in the order of their marks. */
  encode(segments: Segment[], media: P[]): EncodedText;
}

export async function createProcessor<P extends MediaPlan>(
  modelDir: string,
  family: FamilyProcessing<P>,
  options: ProcessorOptions,
): Promise<Processor> {
  const { tokenizer, imageTokenId, videoTokenId, grounding, answerStart = '' } = family;
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

  /** Ids of a row whose pictures have these sizes. */
  const encodeRow = (input: ProcessorInput, sizes: MediaSize[], forGeneration: boolean) => {
    const media = sizes.map((size) => ({ size, ...family.planMedia(size, input.vision ?? {}) }));
    let { messages } = input;
    if (input.objects) {
      if (!grounding) {
        throw new MartletError(
          'ERR_MARTLET_DATASET',
          `${family.family} has no form for boxes, so objects cannot be filled in: write them into the text yourself.`,
          { field: 'objects', family: family.family },
        );
      }
      const pictures = media.filter(({ size }) => size.video === undefined).map(groundingPicture);
      messages = fillObjects(messages, input.objects, pictures, grounding);
    }
    const segments = family.renderer(withSystem(messages, options.system), { forGeneration });
    return { ...family.encode(segments, media), media };
  };

  return {
    family: family.family,
    imageTokenId,
    ...(videoTokenId !== undefined && { videoTokenId }),
    vision: family.vision,
    stopTokenIds: stopTokens(generation, family),
    generationDefaults: generationDefaults(generation),

    async encode(input, { for: purpose, signal }): Promise<EncodedSample> {
      const sources = mediaSources(input, family);
      const decoded = await Promise.all(sources.map((source) => decodeMedia(source, { ...decode, signal })));
      const { inputIds, labels, decoderLabels, mediaSpans, media } = encodeRow(
        input,
        decoded.map(({ size }) => size),
        purpose === 'generate',
      );
      return {
        inputIds,
        ...(purpose === 'train' && { labels }),
        ...(decoderLabels && { decoderLabels }),
        images: decoded.flatMap(({ data, size: { width, height, video } }, i) => {
          const { plan, slices = [], secondsPerGrid } = media[i] as MediaPlan;
          const pixels = createHash('sha256').update(data).digest();
          const keyOf = (view: ImagePlan) =>
            createHash('sha256')
              .update(pixels)
              .update(JSON.stringify([width, height, video?.frames, view]))
              .digest('hex');
          return [plan, ...slices].map((view) => ({
            data,
            width,
            height,
            ...(video && { frames: video.frames }),
            ...(secondsPerGrid !== undefined && { secondsPerGrid }),
            plan: view,
            key: keyOf(view),
          }));
        }),
        // one for each view: a picture's slices stand and fall with it
        mediaSpans: mediaSpans.flatMap((span, i) => [span, ...(media[i]?.slices ?? []).map(() => span)]),
        ...(input.id !== undefined && { id: input.id }),
      };
    },

    async countTokens(input, { signal } = {}) {
      const sources = mediaSources(input, family);
      const sizes = await Promise.all(sources.map((source) => mediaSize(source, { ...decode, signal })));
      const { inputIds, labels, decoderLabels } = encodeRow(input, sizes, false);
      if (labels.every((label) => label === -100)) throw untrained(decoderLabels);
      return inputIds.length + (decoderLabels ? labels.length : 0);
    },

    decode: (ids, { skipSpecialTokens = true } = {}) => {
      const text = tokenizer.decode(ids, skipSpecialTokens);
      return skipSpecialTokens && text.startsWith(answerStart) ? text.slice(answerStart.length) : text;
    },
    createStreamDecoder: ({ skipSpecialTokens = true } = {}) => {
      const stream = tokenizer.createStreamDecoder(skipSpecialTokens);
      return skipSpecialTokens ? withoutStart(stream, answerStart) : stream;
    },

    parseBoxes(text, { width, height, vision = {} }) {
      if (!grounding) {
        throw new MartletError('ERR_MARTLET_USAGE', `${family.family} has no form for boxes.`, {
          family: family.family,
        });
      }
      const size = { width, height, label: 'given' };
      const { resized } = groundingPicture({ size, ...family.planMedia(size, vision) });
      return parseBoxes(text, { width, height, normBbox: grounding.normBbox, resized });
    },
  };
}

/** Found before training starts, not at the row's turn. */
function untrained(decoderLabels: true | undefined): MartletError {
  return new MartletError(
    'ERR_MARTLET_DATASET',
    `No token of the row is trained: ${decoderLabels ? 'its last answer, the only one that an encoder-decoder trains, has loss: false. Make a row of the earlier one' : 'it needs an answer of the assistant'}.`,
    { field: 'messages' },
  );
}

function groundingPicture({ size: { width, height }, plan }: { size: MediaSize; plan: ImagePlan }): GroundingPicture {
  return { width, height, resized: plan.resize ?? { width, height } };
}

type MediaSource = { image: ImageSource } | { frames: ImageSource[]; fps?: number };

/** Pictures and videos in the order of their marks: those inside content parts, and those listed beside the messages. */
function mediaSources(
  { messages, images, videos = [], id }: ProcessorInput,
  { family, videoTokenId }: Pick<FamilyProcessing<MediaPlan>, 'family' | 'videoTokenId'>,
): MediaSource[] {
  checkMessages(messages);
  for (const [field, list] of Object.entries({ images, videos })) {
    if (Array.isArray(list)) continue;
    throw new MartletError('ERR_MARTLET_USAGE', `${field} must be a list, not ${typeof list}.`, { field });
  }
  const where = id === undefined ? '' : ` (${id})`;
  const takesVideos = videoTokenId !== undefined;
  const parts = messages
    .flatMap(({ content }) => contentParts(content, takesVideos))
    .filter((part) => part.type !== 'text');
  if (!takesVideos && (videos.length > 0 || parts.some(({ type }) => type === 'video'))) {
    throw new MartletError(
      'ERR_MARTLET_DATASET',
      `${family} takes no videos${where}: give some of the frames as images.`,
      { field: 'videos', family, id },
    );
  }
  const listed = { image: [...images], video: [...videos] };
  const sources = parts.map((part): MediaSource | undefined => {
    if (part.type === 'video') {
      const source = part.video ?? listed.video.shift();
      if (source === undefined) return undefined;
      const video = videoFrames(source, where);
      const fps = part.fps ?? video.fps;
      return { frames: video.frames, ...(fps !== undefined && { fps }) };
    }
    const own =
      part.type === 'image_url'
        ? typeof part.image_url === 'string'
          ? part.image_url
          : part.image_url.url
        : part.image;
    const image = own ?? listed.image.shift();
    return image === undefined ? undefined : { image };
  });
  for (const [kind, given, word] of [
    ['image', images.length, 'picture'],
    ['video', videos.length, 'video'],
  ] as const) {
    const marks = parts.filter(({ type }) => (type === 'video') === (kind === 'video')).length;
    const missing = sources.some(
      (source, i) => source === undefined && (parts[i]?.type === 'video') === (kind === 'video'),
    );
    if (!missing && listed[kind].length === 0) continue;
    throw new MartletError(
      'ERR_MARTLET_IMAGE',
      missing
        ? `The messages mark ${marks} ${word}(s), but ${given} were given${where}. Each <${kind}> needs one ${word}.`
        : `${given} ${word}(s) were given, but the messages mark ${marks}${where}. Put one <${kind}> into the text for each.`,
      { marks, [`${kind}s`]: given, id },
    );
  }
  return sources as MediaSource[];
}

function videoFrames(source: VideoSource, where: string): { frames: ImageSource[]; fps?: number } {
  const { frames, fps }: { frames: unknown; fps?: number } = Array.isArray(source)
    ? { frames: source }
    : (source ?? {});
  if (!Array.isArray(frames) || frames.length === 0) {
    throw new MartletError(
      'ERR_MARTLET_DATASET',
      `A video is a list of at least one frame (pictures of one size)${where}, not ${typeof source === 'string' ? `the file ${source}: video files are not decoded. Extract frames, for example with ffmpeg -i video.mp4 -vf fps=2 frames/%04d.png` : 'an empty one'}.`,
      { field: 'videos' },
    );
  }
  if (fps !== undefined && !(Number.isFinite(fps) && fps > 0)) {
    throw new MartletError('ERR_MARTLET_DATASET', `fps of a video must be a number above 0${where}, not ${fps}.`, {
      field: 'videos',
      value: fps,
    });
  }
  return { frames, ...(fps !== undefined && { fps }) };
}

type DecodeMedia = Parameters<typeof decodeImage>[1];

async function decodeMedia(source: MediaSource, options: DecodeMedia): Promise<{ data: Uint8Array; size: MediaSize }> {
  if ('image' in source) {
    const { data, width, height } = await decodeImage(source.image, options);
    return { data, size: { width, height, label: imageLabel(source.image) } };
  }
  const frames: DecodedImage[] = await Promise.all(source.frames.map((frame) => decodeImage(frame, options)));
  return { data: Buffer.concat(frames.map(({ data }) => data)), size: videoSize(source, frames) };
}

async function mediaSize(source: MediaSource, options: DecodeMedia): Promise<MediaSize> {
  if ('image' in source) return { ...(await imageSize(source.image, options)), label: imageLabel(source.image) };
  return videoSize(source, await Promise.all(source.frames.map((frame) => imageSize(frame, options))));
}

function videoSize(
  { frames, fps }: { frames: ImageSource[]; fps?: number },
  sizes: { width: number; height: number }[],
): MediaSize {
  const [{ width, height }] = sizes as [(typeof sizes)[0]];
  const other = sizes.findIndex((size) => size.width !== width || size.height !== height);
  if (other > 0) {
    const label = imageLabel(frames[other] as ImageSource);
    throw new MartletError(
      'ERR_MARTLET_IMAGE',
      `The frames of a video must have one size: ${imageLabel(frames[0] as ImageSource)} is ${width}×${height}, ${label} is ${sizes[other]?.width}×${sizes[other]?.height}.`,
      { path: label, frame: other },
    );
  }
  return {
    width,
    height,
    video: { frames: frames.length, ...(fps !== undefined && { fps }) },
    label: `video of ${frames.length} frames from ${imageLabel(frames[0] as ImageSource)}`,
  };
}

/** Leaves `start` out of the first text, which no token ends within. */
function withoutStart(stream: StreamDecoder, start: string): StreamDecoder {
  let begun = start === '';
  const cut = (text: string) => {
    if (begun || text === '') return text;
    begun = true;
    return text.startsWith(start) ? text.slice(start.length) : text;
  };
  return { push: (id) => cut(stream.push(id)), flush: () => cut(stream.flush()) };
}

function stopTokens(
  generation: Record<string, unknown>,
  { tokenizer, endToken, stopTokens = [] }: Pick<FamilyProcessing<MediaPlan>, 'tokenizer' | 'endToken' | 'stopTokens'>,
): number[] {
  const listed = generation.eos_token_id;
  const ids = (Array.isArray(listed) ? listed : [listed]).filter((id) => Number.isInteger(id)) as number[];
  if (typeof endToken === 'number') ids.push(endToken);
  else {
    const tokens = [tokenizer.special.eos_token, endToken, ...stopTokens];
    ids.push(...tokens.flatMap((token) => tokenizer.tokenId(token ?? '') ?? []));
  }
  return [...new Set(ids)];
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
