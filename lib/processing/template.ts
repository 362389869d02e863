/**
 * Messages → pieces of text with a loss weight (anchors: ms-swift's `_encode`): what is trained is tokenised apart from what is not, so that the
 * prompt's tokens are those of inference.
 */
import { Template } from '@huggingface/jinja';
import { MartletError } from '../errors.js';
import type { Tokenizer } from './tokenizer.js';
import type { ChatMessage, ContentPart } from './types.js';

/** Marks a picture in text. */
export const IMAGE_MARK = '<image>';
/** Marks a video in text, where the family takes videos. */
export const VIDEO_MARK = '<video>';

/** What the model reads where a picture or a video is. */
export interface MediaText {
  image: string;
  /** Absent: the family takes no videos. */
  video?: string;
}

export interface Segment {
  text: string;
  trained: boolean;
  /** Makes ids of this text alone, which is not joined with its neighbours then. */
  encode?: (text: string) => number[];
}

export interface RenderOptions {
  /** Leaves the last answer to the model. */
  forGeneration: boolean;
}

/** How one template turns messages into segments. */
export type SegmentRenderer = (messages: ChatMessage[], options: RenderOptions) => Segment[];

const ROLES = ['system', 'user', 'assistant'];
const PART_TYPES = ['text', 'image', 'image_url', 'video'];

/**
 * What TypeScript's types say, for callers without them: a role that no template knows would be left out of the prompt.
 *
 * @throws ERR_MARTLET_USAGE with `details.field`
 */
export function checkMessages(messages: ChatMessage[]): void {
  const refuse = (field: string, what: string) => {
    throw new MartletError('ERR_MARTLET_USAGE', `${field} ${what}.`, { field });
  };
  const shown = (value: unknown) => JSON.stringify(value) ?? 'absent';
  if (!Array.isArray(messages) || messages.length === 0) refuse('messages', 'must be a list of at least one message');
  for (const [i, message] of messages.entries()) {
    const field = `messages.${i}`;
    if (typeof message !== 'object' || message === null) refuse(field, 'must be { role, content }');
    const { role, content } = message;
    if (!ROLES.includes(role)) refuse(`${field}.role`, `is ${shown(role)}; known are ${ROLES.join(', ')}`);
    if (typeof content === 'string') continue;
    if (!Array.isArray(content)) refuse(`${field}.content`, `must be text or a list of parts, not ${shown(content)}`);
    for (const [j, part] of (content as (ContentPart | null | undefined)[]).entries()) {
      const type = part?.type;
      if (!PART_TYPES.includes(type as string))
        refuse(`${field}.content.${j}.type`, `is ${shown(type)}; known are ${PART_TYPES.join(', ')}`);
      if (part?.type === 'text' && typeof part.text !== 'string')
        refuse(`${field}.content.${j}.text`, `must be text, not ${shown(part.text)}`);
      if (part?.type === 'image_url' && !part.image_url)
        refuse(`${field}.content.${j}.image_url`, 'is absent: a URL, or { url }');
    }
  }
}

/** Content as parts in order; a mark in a string is a part of its own. */
export function contentParts(content: ChatMessage['content'], videos: boolean): ContentPart[] {
  if (typeof content !== 'string') return content;
  return content
    .split(videos ? /(<image>|<video>)/ : /(<image>)/)
    .filter((piece) => piece !== '')
    .map((piece) =>
      piece === IMAGE_MARK
        ? { type: 'image' }
        : videos && piece === VIDEO_MARK
          ? { type: 'video' }
          : { type: 'text', text: piece },
    );
}

/** Content as one string, with the model's own text for pictures and videos. */
export function contentText(content: ChatMessage['content'], media: MediaText): string {
  return contentParts(content, media.video !== undefined)
    .map((part) => (part.type === 'text' ? part.text : part.type === 'video' ? (media.video ?? '') : media.image))
    .join('');
}

/** Adds the default system message where there is none. */
export function withSystem(messages: ChatMessage[], system: string | undefined): ChatMessage[] {
  return system === undefined || messages[0]?.role === 'system'
    ? messages
    : [{ role: 'system', content: system }, ...messages];
}

// Private-use characters: they stand for answers while the template is rendered, so that an answer is found even where a template trims or moves it.
const OPEN = '\uE0F0';
const CLOSE = '\uE0F1';

export interface JinjaOptions {
  /** What the template takes a message's content for: a list of parts, or plain text. Defaults to parts. */
  content?: 'parts' | 'text';
  /** What else the template is told. */
  variables?: Record<string, unknown>;
}

/**
 * The checkpoint's own template. Each answer ends with `endToken`, also where the template forgets it; white space that the template puts between an
 * answer and the next message is then dropped.
 */
export function jinjaRenderer(
  source: string,
  tokenizer: Tokenizer,
  endToken: string,
  media: MediaText,
  path: string,
  { content = 'parts', variables = {} }: JinjaOptions = {},
): SegmentRenderer {
  const videos = media.video !== undefined;
  let template: Template;
  try {
    template = new Template(source);
  } catch (cause) {
    throw new MartletError(
      'ERR_MARTLET_TEMPLATE',
      `The chat template of ${path} cannot be parsed: ${(cause as Error).message}. ` +
        'Download its tokenizer and processor files again, or use template: ms-swift.',
      { path },
      { cause },
    );
  }
  const render = (messages: { role: string; content: unknown }[], generation: boolean): string => {
    try {
      return template.render({ ...tokenizer.special, ...variables, messages, add_generation_prompt: generation });
    } catch (cause) {
      throw new MartletError(
        'ERR_MARTLET_TEMPLATE',
        `The checkpoint's chat template refused the messages: ${(cause as Error).message}. Check the roles and their order.`,
        { path },
        { cause },
      );
    }
  };
  const writesNewline =
    content === 'parts' &&
    render([{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: 'x' }] }], false).includes(
      `${media.image}\n`,
    );
  const textContent = (text: string) => (content === 'text' ? text : [{ type: 'text', text }]);

  return (messages, { forGeneration }) => {
    const answers: string[] = [];
    const marked = messages.map((message) => {
      const { role } = message;
      if (role === 'assistant') {
        answers.push(contentText(message.content, media));
        return { role, content: textContent(`${OPEN}${answers.length - 1}${CLOSE}`) };
      }
      if (content === 'text') return { role, content: contentText(message.content, media) };
      return { role, content: templateParts(message.content, videos, writesNewline) };
    });
    const whole = render(marked, forGeneration);
    const segments: Segment[] = [];
    let position = 0;
    let answer = 0;
    messages.forEach((message, i) => {
      if (message.role !== 'assistant') return;
      const mark = `${OPEN}${answer}${CLOSE}`;
      const at = whole.indexOf(mark, position);
      if (at < 0) {
        throw new MartletError(
          'ERR_MARTLET_TEMPLATE',
          "The checkpoint's chat template leaves an assistant message out, so it cannot be trained.",
          { path },
        );
      }
      // What the model is given before it answers ends where the generation prompt ends; a space after it is the tokenizer's own.
      const prompt = render(marked.slice(0, i), true);
      const boundary =
        whole.startsWith(prompt) && prompt.length >= position && prompt.length <= at ? prompt.length : at;
      const between = whole.slice(boundary, at);
      const kept = tokenizer.prependsSpace && between.trim() === '' ? '' : between;
      segments.push({ text: whole.slice(position, boundary) + kept, trained: false });
      segments.push({ text: answers[answer] + endToken, trained: message.loss !== false });
      const rest = whole.slice(at + mark.length);
      position =
        at + mark.length + (rest.startsWith(endToken) ? endToken.length : rest.length - rest.trimStart().length);
      answer++;
    });
    const tail = whole.slice(position);
    if (forGeneration) segments.push({ text: tail, trained: false });
    return segments;
  };
}

/** Parts for the template; where it writes a newline beside the image itself, one that the row has there is dropped. */
function templateParts(
  content: ChatMessage['content'],
  videos: boolean,
  writesNewline: boolean,
): { type: string; text?: string }[] {
  const parts = contentParts(content, videos);
  const out: { type: string; text?: string }[] = [];
  parts.forEach((part, i) => {
    if (part.type !== 'text') {
      out.push({ type: part.type === 'video' ? 'video' : 'image' });
      return;
    }
    let { text } = part;
    if (writesNewline && typeof content === 'string') {
      if (parts[i - 1] !== undefined && text.startsWith('\n')) text = text.slice(1);
      else if (parts[i + 1] !== undefined && text.endsWith('\n')) text = text.slice(0, -1);
    }
    if (text !== '') out.push({ type: 'text', text });
  });
  return out;
}

export interface EncodedText {
  inputIds: Int32Array;
  /** −100 = not trained. */
  labels: Int32Array;
  /** Present: `labels` are a decoder's, of their own length and not shifted; `inputIds` are the encoder's. */
  decoderLabels?: true;
  /** Where the tokens of each picture and video are, [from, to), in order. */
  mediaSpans: [number, number][];
}

/**
 * Ids and labels of segments; neighbours of equal weight are joined first. `expansions`: for each token that marks a picture or a video, the ids that
 * take its place, in order; they are never trained.
 *
 * @throws ERR_MARTLET_IMAGE when the text has more or fewer such tokens, which only text that spells them out can cause
 */
export function encodeSegments(
  segments: Segment[],
  tokenizer: Tokenizer,
  expansions: Map<number, number[][]>,
): EncodedText {
  const joined: Segment[] = [];
  for (const segment of segments) {
    const last = joined.at(-1);
    if (last && last.trained === segment.trained && !last.encode && !segment.encode) last.text += segment.text;
    else joined.push({ ...segment });
  }
  const ids: number[] = [];
  const labels: number[] = [];
  const used = new Map<number, number>();
  const mediaSpans: [number, number][] = [];
  const bos = tokenizer.special.bos_token;
  if (!(bos !== undefined && joined[0]?.text.startsWith(bos))) {
    for (const id of tokenizer.prefixIds) {
      ids.push(id);
      labels.push(-100);
    }
  }
  for (const { text, trained, encode } of joined) {
    for (const id of encode ? encode(text) : tokenizer.encode(text)) {
      const expanded = expansions.get(id);
      if (expanded === undefined) {
        ids.push(id);
        labels.push(trained ? id : -100);
        continue;
      }
      const place = used.get(id) ?? 0;
      used.set(id, place + 1);
      const begin = ids.length;
      for (const inner of expanded[place] ?? []) {
        ids.push(inner);
        labels.push(-100);
      }
      mediaSpans.push([begin, ids.length]);
    }
  }
  for (const [id, { length }] of expansions) {
    const found = used.get(id) ?? 0;
    if (found === length) continue;
    const token = tokenizer.decode([id], false);
    throw new MartletError(
      'ERR_MARTLET_IMAGE',
      `The text holds ${token} ${found} time(s) where ${length} come(s) from pictures and videos: mark them with <image> and <video>, and keep ${token} itself out of the text.`,
      { token, found, expected: length },
    );
  }
  if (labels.length > 0) labels[0] = -100;
  return { inputIds: Int32Array.from(ids), labels: Int32Array.from(labels), mediaSpans };
}
