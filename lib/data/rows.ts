/** The forms of a row that LLaVA, ShareGPT, ms-swift, OpenAI and Alpaca data come in → messages and picture sources. */
import type { ChatMessage, ContentPart, GroundingObjects, VideoSource, VisionOptions } from '../processing/types.js';
import { nearest } from '../suggest.js';

/** A row that is not of a known form. */
export class RowError extends Error {
  constructor(
    message: string,
    readonly field?: string,
  ) {
    super(message);
  }
}

export interface ParsedRow {
  messages: ChatMessage[];
  images: string[];
  videos: VideoSource[];
  objects?: GroundingObjects;
  vision?: VisionOptions;
}

type Json = Record<string, unknown>;

const ROLES: Record<string, ChatMessage['role']> = {
  user: 'user',
  human: 'user',
  assistant: 'assistant',
  gpt: 'assistant',
  bot: 'assistant',
  system: 'system',
};
const QUERY_KEYS = ['query', 'prompt', 'question', 'problem'];
const RESPONSE_KEYS = ['response', 'answer', 'output', 'target', 'solution', 'completion'];
const UNSUPPORTED = ['audios', 'audio', 'tools', 'rejected_response', 'rejected_images', 'label'];

const isObject = (value: unknown): value is Json =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

/** `takesVideos`: `<video>` is a mark; else it is text like any other. */
export function parseRow(value: unknown, { takesVideos }: { takesVideos: boolean }): ParsedRow {
  if (!isObject(value))
    throw new RowError(
      `the row is ${value === null ? 'null' : Array.isArray(value) ? 'a list' : `a ${typeof value}`}, not an object`,
    );
  for (const key of UNSUPPORTED) {
    const content = value[key];
    if (content === undefined || content === null || (Array.isArray(content) && content.length === 0)) continue;
    throw new RowError(`${key} is not supported yet`, key);
  }
  const messages = parseMessages(value);
  if (typeof value.system === 'string' && value.system !== '' && messages[0]?.role !== 'system') {
    messages.unshift({ role: 'system', content: value.system });
  }
  checkOrder(messages);
  const images = parseImages(value);
  if (images.length === 0) takeTaggedImages(messages, images);
  const videos = parseVideos(value);
  const objects = parseObjects(value.objects);
  const vision = parseVision(value.chat_template_kwargs);
  const placed = placeMedia(messages, 'image', images.length);
  return {
    messages: takesVideos ? placeMedia(placed, 'video', videos.length) : placed,
    images,
    videos,
    ...(objects && { objects }),
    ...(vision && { vision }),
  };
}

/** The id that the row gives itself, whatever else is wrong with it. */
export function rowId(value: unknown): string | undefined {
  const id = isObject(value) ? value.id : undefined;
  return typeof id === 'string' || typeof id === 'number' ? String(id) : undefined;
}

function parseMessages(row: Json): ChatMessage[] {
  for (const field of ['messages', 'conversations', 'conversation']) {
    if (row[field] === undefined || row[field] === null) continue;
    const list = row[field];
    if (!Array.isArray(list) || list.length === 0) throw new RowError(`${field} must be a list with messages`, field);
    return list.flatMap((entry, i) => parseMessage(entry, `${field}.${i}`));
  }
  if (row.instruction !== undefined) {
    const input =
      row.input === undefined || row.input === null || row.input === '' ? '' : `\n${text(row.input, 'input')}`;
    return withHistory(row, text(row.instruction, 'instruction') + input);
  }
  const query = QUERY_KEYS.find((key) => row[key] !== undefined && row[key] !== null);
  if (query === undefined) {
    throw new RowError(
      `no messages: expected conversations, messages, query/response or instruction/output, found ${Object.keys(row).join(', ') || 'nothing'}`,
    );
  }
  return withHistory(row, text(row[query], query));
}

function withHistory(row: Json, query: string): ChatMessage[] {
  const response = RESPONSE_KEYS.find((key) => row[key] !== undefined && row[key] !== null);
  if (response === undefined) throw new RowError('no answer: expected response or output', 'response');
  const messages: ChatMessage[] = [];
  if (row.history !== undefined && row.history !== null) {
    if (!Array.isArray(row.history))
      throw new RowError('history must be a list of [question, answer] pairs', 'history');
    row.history.forEach((turn: unknown, i) => {
      if (!Array.isArray(turn) || turn.length !== 2)
        throw new RowError('history must be a list of [question, answer] pairs', `history.${i}`);
      messages.push(
        { role: 'user', content: text(turn[0], `history.${i}.0`) },
        { role: 'assistant', content: text(turn[1], `history.${i}.1`) },
      );
    });
  }
  messages.push({ role: 'user', content: query }, { role: 'assistant', content: text(row[response], response) });
  return messages;
}

export function parseMessage(entry: unknown, field: string): ChatMessage[] {
  if (!isObject(entry)) throw new RowError('a message must be an object', field);
  // {"human": "…", "assistant": "…"}: one turn
  if (
    entry.role === undefined &&
    entry.from === undefined &&
    entry.human !== undefined &&
    entry.assistant !== undefined
  ) {
    return [
      { role: 'user', content: text(entry.human, `${field}.human`) },
      { role: 'assistant', content: text(entry.assistant, `${field}.assistant`) },
    ];
  }
  const roleKey = entry.role === undefined ? 'from' : 'role';
  const name = entry[roleKey];
  const role = typeof name === 'string' && Object.hasOwn(ROLES, name) ? ROLES[name] : undefined;
  if (role === undefined) {
    throw new RowError(
      `unknown role ${JSON.stringify(name ?? null)}: known are ${Object.keys(ROLES).join(', ')}`,
      `${field}.${roleKey}`,
    );
  }
  const contentKey = entry.content === undefined ? 'value' : 'content';
  const content = entry[contentKey];
  const message: ChatMessage = {
    role,
    content: Array.isArray(content)
      ? content.map((part, i) => parsePart(part, `${field}.${contentKey}.${i}`))
      : text(content, `${field}.${contentKey}`),
  };
  if (entry.loss === false || entry.loss === 0) message.loss = false;
  if (entry.loss_scale !== undefined && entry.loss_scale !== 1 && entry.loss_scale !== 0)
    throw new RowError('loss_scale other than 0 and 1 is not supported yet', `${field}.loss_scale`);
  if (entry.loss_scale === 0) message.loss = false;
  return [message];
}

function parsePart(part: unknown, field: string): ContentPart {
  if (!isObject(part)) throw new RowError('a content part must be an object', field);
  if (part.type === 'text') return { type: 'text', text: text(part.text, `${field}.text`) };
  if (part.type === 'image_url') {
    const url = isObject(part.image_url) ? part.image_url.url : part.image_url;
    return { type: 'image', image: text(url, `${field}.image_url`) };
  }
  if (part.type === 'image') {
    if (part.image === undefined && part.source === undefined && part.url === undefined && part.path === undefined)
      return { type: 'image' };
    if (isObject(part.source))
      return {
        type: 'image',
        image: `data:${text(part.source.media_type, `${field}.source.media_type`)};base64,${text(part.source.data, `${field}.source.data`)}`,
      };
    return { type: 'image', image: text(part.image ?? part.url ?? part.path, `${field}.image`) };
  }
  if (part.type === 'video') {
    if (part.video === undefined) return { type: 'video' };
    return { type: 'video', video: parseVideo(part.video, `${field}.video`, part.fps) };
  }
  throw new RowError(
    `unknown content part ${JSON.stringify(part.type ?? null)}: known are text, image, image_url, video`,
    `${field}.type`,
  );
}

function text(value: unknown, field: string): string {
  if (typeof value !== 'string')
    throw new RowError(`${field} must be text, not ${value === null ? 'null' : typeof value}`, field);
  return value;
}

function checkOrder(messages: ChatMessage[]): void {
  let expected: ChatMessage['role'] = 'user';
  messages.forEach((message, i) => {
    if (message.role === 'system') {
      if (i > 0) throw new RowError('a system message must come first', `messages.${i}`);
      return;
    }
    if (message.role !== expected)
      throw new RowError(
        `messages must alternate: expected ${expected} at place ${i}, found ${message.role}`,
        `messages.${i}`,
      );
    expected = expected === 'user' ? 'assistant' : 'user';
  });
  if (!messages.some(({ role }) => role === 'assistant'))
    throw new RowError('no assistant turn: there is nothing to learn from');
  if (messages.at(-1)?.role !== 'assistant') throw new RowError("the last message must be the assistant's");
  if (!messages.some(({ role, content, loss }) => role === 'assistant' && loss !== false && content.length > 0))
    throw new RowError('every answer is empty or has loss: false');
}

export function parseImages(row: Json): string[] {
  const images: string[] = [];
  for (const field of ['image', 'images']) {
    const value = row[field];
    if (value === undefined || value === null || value === '') continue;
    for (const [i, entry] of (Array.isArray(value) ? value : [value]).entries()) {
      const at = Array.isArray(value) ? `${field}.${i}` : field;
      const source = isObject(entry)
        ? (entry.path ??
          entry.url ??
          (typeof entry.bytes === 'string' ? `data:image/unknown;base64,${entry.bytes}` : undefined))
        : entry;
      images.push(text(source, at));
    }
  }
  return images;
}

/**
 * Qwen-VL's own form of a picture, `Picture 1: <img>PATH</img>` and a line end, becomes a mark and an entry of `images`; a bare `<img>PATH</img>` too, as
 * in ms-swift. Only in rows that list no pictures.
 */
function takeTaggedImages(messages: ChatMessage[], images: string[]): void {
  for (const message of messages) {
    if (typeof message.content !== 'string') continue;
    message.content = message.content.replaceAll(/(?:Picture \d+: ?)?<img>(.+?)<\/img>\n?/g, (form, path: string) => {
      images.push(path);
      return `<image>${!form.startsWith('Picture') && form.endsWith('\n') ? '\n' : ''}`;
    });
  }
}

/** `videos`: one list of frames each; `video`: one list of frames. */
export function parseVideos(row: Json): VideoSource[] {
  const videos: VideoSource[] = [];
  for (const field of ['video', 'videos']) {
    const value = row[field];
    if (value === undefined || value === null || value === '') continue;
    const single = field === 'video' && !(Array.isArray(value) && value.some(Array.isArray));
    for (const [i, entry] of (single || !Array.isArray(value) ? [value] : value).entries())
      videos.push(parseVideo(entry, single ? field : `${field}.${i}`));
  }
  return videos;
}

function parseVideo(value: unknown, field: string, rate?: unknown): VideoSource {
  const frames = isObject(value) ? value.frames : value;
  const fps = isObject(value) ? (value.fps ?? rate) : rate;
  if (typeof frames === 'string') {
    throw new RowError(
      `${frames.slice(0, 100)} is a video file, and video files are not decoded: extract its frames (for example ffmpeg -i video.mp4 -vf fps=2 frames/%04d.png) and list them, as in "videos": [["frames/0001.png", "frames/0002.png"]]`,
      field,
    );
  }
  if (!Array.isArray(frames) || frames.length === 0)
    throw new RowError('a video must be a list of at least one frame', field);
  if (fps !== undefined && !(typeof fps === 'number' && Number.isFinite(fps) && fps > 0))
    throw new RowError(`fps must be a number above 0, not ${JSON.stringify(fps)}`, `${field}.fps`);
  const paths = frames.map((frame, i) => text(isObject(frame) ? (frame.path ?? frame.url) : frame, `${field}.${i}`));
  return fps === undefined ? paths : { frames: paths, fps };
}

/** ms-swift's grounding; also as JSON in a string, which keeps the columns of a table of one type. */
export function parseObjects(given: unknown): GroundingObjects | undefined {
  let value = given;
  if (typeof value === 'string') {
    try {
      value = JSON.parse(value);
    } catch (error) {
      throw new RowError(`objects is text, but not JSON: ${(error as Error).message}`, 'objects');
    }
  }
  if (value === undefined || value === null || (Array.isArray(value) && value.length === 0)) return undefined;
  if (!isObject(value)) throw new RowError('objects must hold ref, bbox, bbox_type or image_id', 'objects');
  const { ref, bbox, bbox_type, image_id, ...rest } = value;
  refuseUnknown(Object.keys(rest), 'objects', ['ref', 'bbox', 'bbox_type', 'image_id']);
  const present = { ref, bbox, bboxType: bbox_type, imageId: image_id };
  // What the lists hold is checked where they are filled in.
  return Object.fromEntries(
    Object.entries(present).filter(([, entry]) => entry !== undefined && entry !== null),
  ) as GroundingObjects;
}

/** qwen_vl_utils' names in a row; its pixel limits are those of pictures and of video frames. */
export function parseVision(value: unknown): VisionOptions | undefined {
  if (value === undefined || value === null) return undefined;
  const field = 'chat_template_kwargs';
  if (!isObject(value)) throw new RowError(`${field} must be an object`, field);
  const known = ['max_pixels', 'min_pixels', 'total_pixels', 'fps'];
  const given = Object.fromEntries(Object.entries(value).filter(([, entry]) => entry !== null));
  refuseUnknown(
    Object.keys(given).filter((key) => !known.includes(key)),
    field,
    known,
  );
  for (const [key, entry] of Object.entries(given)) {
    const right = key === 'fps' ? Number.isFinite(entry) : Number.isSafeInteger(entry);
    if (!right || (entry as number) <= 0)
      throw new RowError(
        `${key} must be a ${key === 'fps' ? '' : 'whole '}number above 0, not ${JSON.stringify(entry)}`,
        `${field}.${key}`,
      );
  }
  const { max_pixels: max, min_pixels: min, total_pixels: total, fps } = given as Record<string, number>;
  return {
    ...(max !== undefined && { maxPixels: max, videoMaxPixels: max }),
    ...(min !== undefined && { minPixels: min, videoMinPixels: min }),
    ...(total !== undefined && { videoTotalPixels: total }),
    ...(fps !== undefined && { fps }),
  };
}

function refuseUnknown([key]: string[], field: string, known: string[]): void {
  if (key === undefined) return;
  const meant = nearest(key, known);
  throw new RowError(
    `${field}.${key} is not known${meant ? `: did you mean ${meant}?` : `: known are ${known.join(', ')}`}`,
    `${field}.${key}`,
  );
}

/** As ms-swift: pictures without any mark go before the first question; any other mismatch is an error. Literal marks count. */
function placeMedia(messages: ChatMessage[], kind: 'image' | 'video', given: number): ChatMessage[] {
  const open = openMarks(messages, kind);
  if (open === given || open === 0) return placeUnmarked(messages, kind, given);
  throw new RowError(`${open} <${kind}> mark(s) but ${given} ${kind}(s): each mark needs one ${kind}`, `${kind}s`);
}

/** Marks and content parts that wait for a listed picture or video. */
function openMarks(messages: ChatMessage[], kind: 'image' | 'video'): number {
  const open = ({ content }: ChatMessage): number =>
    typeof content === 'string'
      ? content.split(`<${kind}>`).length - 1
      : content.filter((part) => part.type === kind && (part as Record<string, unknown>)[kind] === undefined).length;
  return messages.reduce((sum, message) => sum + open(message), 0);
}

/** Pictures (or videos) that no message marks go before the first question; messages with marks stay as they are. */
export function placeUnmarked(messages: ChatMessage[], kind: 'image' | 'video', given: number): ChatMessage[] {
  if (given === 0 || openMarks(messages, kind) > 0) return messages;
  const first = messages.findIndex(({ role }) => role === 'user');
  return messages.map((message, i) => {
    if (i !== first) return message;
    const content =
      typeof message.content === 'string'
        ? `<${kind}>\n`.repeat(given) + message.content
        : [...Array.from({ length: given }, () => ({ type: kind })), ...message.content];
    return { ...message, content };
  });
}
