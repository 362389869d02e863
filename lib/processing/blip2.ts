/**
 * BLIP-2 with OPT or flan-T5: pictures of one size, whose query tokens stand in front of all text, and the prompt of its papers, `Question: … Answer:`.
 * Rules for ids and labels: test/fixtures/blip2/README.md.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { MartletError } from '../errors.js';
import type { ImagePlan } from '../native/binding.js';
import { createProcessor, type MediaPlan } from './base.js';
import { gpt2Definition } from './gpt2.js';
import { readJsonFile, requireImageProcessor } from './json.js';
import { CLIP_MEAN, CLIP_STD } from './qwen_vl_common.js';
import { readSentencePiece, t5Definition } from './sentencepiece.js';
import { type EncodedText, IMAGE_MARK, type Segment, type SegmentRenderer } from './template.js';
import { Tokenizer } from './tokenizer.js';
import type { ChatMessage, Processor, ProcessorOptions } from './types.js';
import { familyVisionOptions, refuseVisionOptions } from './vision-options.js';

type Json = Record<string, unknown>;
type Triple = [number, number, number];

const FAMILY = 'blip2';
const START_OR_END = '</s>';
/** Parts OPT's answer from its prompt. */
const ANSWER_START = ' ';
/** T5's sentinels, for a tokenizer that does not say how many. */
const EXTRA_IDS = 100;

/** What config.json says, with transformers' defaults for what it leaves out. */
interface Settings {
  decoderOnly: boolean;
  /** Rows of the embedding. */
  vocabulary: number;
  queryTokens: number;
  /** In the old layout, which has none, the first id without an embedding. */
  imageTokenId: number;
  /** OPT's, in front of the text. */
  startId: number;
  endId: number;
  imageSize: number;
}

export async function createBlip2Processor(
  modelDir: string,
  config: Json,
  options: ProcessorOptions,
): Promise<Processor> {
  if (options.template === 'ms-swift') {
    throw new MartletError(
      'ERR_MARTLET_TEMPLATE',
      'ms-swift has no template for BLIP-2: leave template out, or write template: default.',
      { template: 'ms-swift' },
    );
  }
  const settings = readSettings(modelDir, config);
  const tokenizer = await loadTokenizer(modelDir, settings);
  const vision = familyVisionOptions(FAMILY, [], options);
  const plan = await imagePlan(modelDir, settings);
  const ended = (text: string) => [...tokenizer.encode(text), settings.endId];
  return createProcessor<MediaPlan>(
    modelDir,
    {
      family: FAMILY,
      tokenizer,
      imageTokenId: settings.imageTokenId,
      endToken: settings.endId,
      ...(settings.decoderOnly && { answerStart: ANSWER_START }),
      renderer: (settings.decoderOnly ? optRenderer : t5Renderer)(ended),
      vision,
      planMedia: (_, row) => {
        refuseVisionOptions(FAMILY, row);
        return { plan };
      },
      encode: (segments, media) => encodeRow(segments, media.length, tokenizer, settings),
    },
    options,
  );
}

function readSettings(modelDir: string, config: Json): Settings {
  const path = join(modelDir, 'config.json');
  const text = (config.text_config ?? {}) as Json;
  const kind = text.model_type ?? 'opt';
  const refuse = (what: string, details: Json) =>
    new MartletError('ERR_MARTLET_UNSUPPORTED_MODEL', `${path} ${what}.`, { path, ...details });
  if (kind !== 'opt' && kind !== 't5') {
    throw refuse(`is BLIP-2 with the language model ${JSON.stringify(kind)}; opt and t5 (flan-T5) are supported`, {
      modelType: kind,
    });
  }
  const architectures = Array.isArray(config.architectures) ? config.architectures : [];
  if (architectures.length > 0 && !architectures.includes('Blip2ForConditionalGeneration')) {
    throw refuse(
      `is of a ${String(architectures[0])}, which writes no text; Blip2ForConditionalGeneration is supported`,
      { architectures },
    );
  }
  const whole = (section: Json, key: string, fallback: number): number => {
    const value = section[key] ?? fallback;
    if (Number.isSafeInteger(value) && (value as number) >= 0) return value as number;
    throw refuse(`has ${key} ${JSON.stringify(value)}, not a whole number`, { key });
  };
  const decoderOnly = kind === 'opt';
  const vocabulary = whole(text, 'vocab_size', decoderOnly ? 50272 : 32128);
  const old = (config.image_token_index ?? config.image_token_id ?? null) === null;
  const imageTokenId = old
    ? vocabulary
    : whole(config, config.image_token_index == null ? 'image_token_id' : 'image_token_index', 0);
  if (!old && imageTokenId >= vocabulary) {
    throw refuse(`has image_token_index ${imageTokenId}, but an embedding of vocab_size ${vocabulary}`, {
      key: 'image_token_index',
    });
  }
  return {
    decoderOnly,
    vocabulary,
    queryTokens: whole(config, 'num_query_tokens', 32),
    imageTokenId,
    startId: whole(text, 'bos_token_id', 2),
    endId: whole(text, 'eos_token_id', decoderOnly ? 2 : 1),
    imageSize: whole((config.vision_config ?? {}) as Json, 'image_size', 224),
  };
}

/** tokenizer.json, or what it was made of: vocab.json with merges.txt (OPT), spiece.model (T5). It knows `<image>` in the old layout too. */
async function loadTokenizer(modelDir: string, settings: Settings): Promise<Tokenizer> {
  const json = (name: string, optional = true) =>
    readJsonFile(join(modelDir, name), 'ERR_MARTLET_TOKENIZER', 'Download it with the checkpoint.', { optional });
  const config = { ...(await json('special_tokens_map.json')), ...(await json('tokenizer_config.json')) };
  let path = join(modelDir, 'tokenizer.json');
  let definition = await json('tokenizer.json');
  if (Object.keys(definition).length === 0) {
    if (settings.decoderOnly) {
      path = join(modelDir, 'vocab.json');
      const paths = { vocab: path, merges: join(modelDir, 'merges.txt') };
      const roles = { bos_token: START_OR_END, eos_token: START_OR_END, pad_token: '<pad>', unk_token: START_OR_END };
      for (const [role, token] of Object.entries(roles)) config[role] ??= token;
      const special = Object.keys(roles).map((role) => contentOf(config[role]));
      const merges = (await tokenizerFile(paths.merges)).toString('utf8');
      definition = gpt2Definition(await json('vocab.json', false), merges, { special, prefix: START_OR_END }, paths);
    } else {
      path = join(modelDir, 'spiece.model');
      const extra = Number.isSafeInteger(config.extra_ids) ? (config.extra_ids as number) : EXTRA_IDS;
      definition = t5Definition(readSentencePiece(await tokenizerFile(path), path), extra, path);
      for (const [role, token] of Object.entries({ eos_token: START_OR_END, pad_token: '<pad>', unk_token: '<unk>' })) {
        config[role] ??= token;
      }
    }
  }
  return checkedTokenizer(definition, config, path, settings);
}

function contentOf(token: unknown): string {
  return typeof token === 'string' ? token : String((token as { content?: unknown } | undefined)?.content);
}

async function tokenizerFile(path: string): Promise<Buffer> {
  try {
    return await readFile(path);
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
    throw new MartletError(
      'ERR_MARTLET_TOKENIZER',
      missing
        ? `There is neither a tokenizer.json nor ${path}. Download the tokenizer with the checkpoint.`
        : `${path} cannot be read: ${(cause as Error).message}.`,
      { path },
      { cause },
    );
  }
}

/** @throws ERR_MARTLET_TOKENIZER where its ids are not those of config.json */
function checkedTokenizer(definition: Json, config: Json, path: string, settings: Settings): Tokenizer {
  const { decoderOnly, vocabulary, imageTokenId, startId, endId } = settings;
  const refuse = (what: string, details: Json) =>
    new MartletError('ERR_MARTLET_TOKENIZER', `${path} and config.json are not of one model: ${what}.`, {
      path,
      ...details,
    });
  const added = (Array.isArray(definition.added_tokens) ? definition.added_tokens : []) as {
    id: number;
    content: string;
  }[];
  const own = added.find(({ content }) => content === IMAGE_MARK)?.id;
  const old = imageTokenId === vocabulary;
  const places = {
    content: IMAGE_MARK,
    special: true,
    normalized: false,
    single_word: false,
    lstrip: false,
    rstrip: false,
  };
  const others = added.filter(({ content }) => content !== IMAGE_MARK);
  const tokenizer = Tokenizer.fromDefinition(
    { ...definition, added_tokens: [...others, { ...places, id: imageTokenId }] },
    config,
    path,
  );
  const model = (definition.model ?? {}) as { vocab?: Json | unknown[] };
  const listed = Array.isArray(model.vocab) ? [model.vocab.length - 1] : Object.values(model.vocab ?? {});
  let largest = -1;
  for (const id of [...(listed as number[]), ...others.map(({ id }) => id)]) largest = Math.max(largest, id);
  if (largest >= vocabulary) {
    throw refuse(`its ids go up to ${largest}, but the embedding (text_config.vocab_size) has ${vocabulary} rows`, {
      largestId: largest,
      vocabSize: vocabulary,
    });
  }
  if (!old && (own === undefined ? imageTokenId <= largest : own !== imageTokenId)) {
    throw refuse(`${IMAGE_MARK} is id ${own ?? 'of none'} there and image_token_index ${imageTokenId} here`, {
      imageTokenId,
    });
  }
  const [role, id] = decoderOnly ? ['bos_token_id', startId] : ['eos_token_id', endId];
  if (tokenizer.tokenId(START_OR_END) !== id) {
    throw refuse(
      `${START_OR_END} is id ${tokenizer.tokenId(START_OR_END) ?? 'of none'} there, and ${role} is ${id} here`,
      { key: role },
    );
  }
  if (endId > largest) throw refuse(`eos_token_id ${endId} is no token of it`, { key: 'eos_token_id' });
  return tokenizer;
}

/** BlipImageProcessor's numbers, from preprocessor_config.json or the image part of processor_config.json. */
async function imagePlan(modelDir: string, { queryTokens, imageSize }: Settings): Promise<ImagePlan> {
  const optional = (name: string) =>
    readJsonFile(join(modelDir, name), 'ERR_MARTLET_MODEL_NOT_FOUND', 'Download it again.', { optional: true });
  const processor = await optional('processor_config.json');
  const own = await optional('preprocessor_config.json');
  const file = Object.keys(own).length > 0 ? own : ((processor.image_processor ?? {}) as Json);
  requireImageProcessor(modelDir, file);
  const refuse = (what: string, key: string) =>
    new MartletError('ERR_MARTLET_UNSUPPORTED_MODEL', `The processor configuration of ${modelDir}: ${what}.`, {
      path: modelDir,
      key,
    });
  if (typeof processor.num_query_tokens === 'number' && processor.num_query_tokens !== queryTokens) {
    throw refuse(
      `num_query_tokens is ${processor.num_query_tokens}, but ${queryTokens} in config.json: a picture would have more or fewer image tokens than features`,
      'num_query_tokens',
    );
  }
  for (const key of ['do_resize', 'do_rescale', 'do_normalize'])
    if (file[key] === false) throw refuse(`${key}: false is not supported`, key);
  if (file.resample !== undefined && file.resample !== null && file.resample !== 3)
    throw refuse(`resample is ${String(file.resample)}; 3 (bicubic) is supported`, 'resample');
  const size = file.size ?? imageSize;
  const { height, width } = (typeof size === 'number' ? { height: size, width: size } : size) as Json;
  if (height !== imageSize || width !== imageSize) {
    throw refuse(
      `pictures become ${JSON.stringify(size)}, but the vision tower takes ${imageSize} × ${imageSize} pixels`,
      'size',
    );
  }
  const triple = (key: string, fallback: Triple): Triple => {
    const value = file[key] ?? fallback;
    if (Array.isArray(value) && value.length === 3 && value.every((n) => Number.isFinite(n))) return value as Triple;
    throw refuse(`${key} is ${JSON.stringify(value)}, not three numbers`, key);
  };
  return {
    // transformers 5 runs BLIP's processor on torchvision unless the checkpoint asks for the slow one.
    resize: { height: imageSize, width: imageSize, backend: file.use_fast === false ? 'pillow' : 'torchvision' },
    rescale: Number(file.rescale_factor ?? 1 / 255),
    mean: triple('image_mean', CLIP_MEAN),
    std: triple('image_std', CLIP_STD),
  };
}

/** Without the pictures, which stand in front of all text; one line end beside a mark goes with it: to OPT it is the end token. */
function textOf({ content }: ChatMessage): string {
  if (typeof content === 'string') return content.replaceAll(/<image>\n|\n<image>|<image>/g, '');
  return content.map((part) => (part.type === 'text' ? part.text : '')).join('');
}

/** A message in the prompt: the papers' form once, nothing for a caption. */
function promptPiece(message: ChatMessage): string {
  const text = textOf(message);
  if (message.role !== 'user') return text;
  const plain = text.trim();
  if (plain === '') return '';
  return plain.startsWith('Question:') && plain.endsWith('Answer:') ? text : `Question: ${text} Answer:`;
}

const joinedPrompt = (messages: ChatMessage[]) =>
  messages
    .map(promptPiece)
    .filter((piece) => piece !== '')
    .join(' ');

/**
 * OPT: prompts and answers in turn, each made into ids on its own. A space parts an answer from its prompt, so a caption has none. The end token, a
 * line end, parts it from the next question.
 */
function optRenderer(ended: (text: string) => number[]): SegmentRenderer {
  return (messages) => {
    const segments: Segment[] = [];
    let from = 0;
    messages.forEach((message, i) => {
      if (message.role !== 'assistant') return;
      const prompt = joinedPrompt(messages.slice(from, i));
      segments.push({ text: prompt, trained: false });
      const text = (prompt === '' ? '' : ANSWER_START) + textOf(message);
      segments.push({ text, trained: message.loss !== false, encode: ended });
      from = i + 1;
    });
    segments.push({ text: joinedPrompt(messages.slice(from)), trained: false });
    return segments;
  };
}

/** T5: the encoder's text, and the decoder's, which is the last answer. */
function t5Renderer(ended: (text: string) => number[]): SegmentRenderer {
  return (messages, { forGeneration }) => {
    const last = messages.at(-1);
    const answer = !forGeneration && last?.role === 'assistant' ? last : undefined;
    const prompt = joinedPrompt(answer ? messages.slice(0, -1) : messages);
    return [
      { text: prompt, trained: false, encode: ended },
      ...(answer ? [{ text: textOf(answer), trained: answer.loss !== false, encode: ended }] : []),
    ];
  };
}

/** Pictures' places first, then the segments; T5's second one is the decoder's. */
function encodeRow(segments: Segment[], pictures: number, tokenizer: Tokenizer, settings: Settings): EncodedText {
  const { decoderOnly, imageTokenId, queryTokens, startId } = settings;
  const pieces = segments.map(({ text, trained, encode }) => ({
    ids: encode ? encode(text) : tokenizer.encode(text),
    trained,
  }));
  const spelt = pieces.flatMap(({ ids }) => ids).filter((id) => id === imageTokenId).length;
  if (spelt > 0) {
    const expected = pictures * queryTokens;
    throw new MartletError(
      'ERR_MARTLET_IMAGE',
      `The row has ${expected + spelt} image tokens, but its ${pictures} picture(s) have ${expected} features (${queryTokens} each): the text itself spells ${IMAGE_MARK} ${spelt} time(s). Leave it out of text parts; in a string it marks a picture.`,
      { token: IMAGE_MARK, found: expected + spelt, expected },
    );
  }
  const places = new Array<number>(pictures * queryTokens).fill(imageTokenId);
  const labelsOf = ({ ids, trained }: (typeof pieces)[number]) => (trained ? ids : ids.map(() => -100));
  const mediaSpans = Array.from({ length: pictures }, (_, i): [number, number] => [
    i * queryTokens,
    (i + 1) * queryTokens,
  ]);
  if (decoderOnly) {
    const before = [...places, startId];
    return {
      inputIds: Int32Array.from([...before, ...pieces.flatMap(({ ids }) => ids)]),
      labels: Int32Array.from([...before.map(() => -100), ...pieces.flatMap(labelsOf)]),
      mediaSpans,
    };
  }
  const [encoder, decoder] = pieces as [(typeof pieces)[number], (typeof pieces)[number]?];
  return {
    inputIds: Int32Array.from([...places, ...encoder.ids]),
    labels: Int32Array.from(decoder ? labelsOf(decoder) : []),
    decoderLabels: true,
    mediaSpans,
  };
}
