/** Boxes in text: ms-swift's `objects` into messages, and answers back into boxes. */
import { MartletError } from '../errors.js';
import { roundHalfEven, type Size } from './smart-resize.js';
import type { ChatMessage, GroundingObjects, ParsedBox } from './types.js';

/** How a family writes names and boxes. */
export interface GroundingForm {
  /** Coordinates: thousandths of the picture's sides, or pixels of the resized picture. */
  normBbox: 'norm1000' | 'none';
  ref(name: string): string;
  box(coordinates: number[]): string;
}

/** A picture as it was given, and as the network sees it. */
export interface GroundingPicture extends Size {
  resized: Size;
}

/** ms-swift's `QWENVL_BBOX_FORMAT`. */
export const BOX_FORMATS: Record<'legacy' | 'new', Pick<GroundingForm, 'ref' | 'box'>> = {
  legacy: {
    ref: (name) => `<|object_ref_start|>${name}<|object_ref_end|>`,
    box: ([x1, y1, ...second]) =>
      `<|box_start|>(${x1},${y1})${second.length > 0 ? `,(${second.join(',')})` : ''}<|box_end|>`,
  },
  new: { ref: (name) => name, box: (coordinates) => `[${coordinates.join(', ')}]` },
};

const PLACES = { ref: '<ref-object>', bbox: '<bbox>' } as const;

function bad(message: string, field: string): MartletError {
  return new MartletError('ERR_MARTLET_DATASET', `${field}: ${message}.`, { field });
}

/**
 * Puts names and boxes into their places, each kind in its own order over all messages.
 *
 * @throws ERR_MARTLET_DATASET with `details.field`
 */
export function fillObjects(
  messages: ChatMessage[],
  objects: GroundingObjects,
  pictures: GroundingPicture[],
  form: GroundingForm,
): ChatMessage[] {
  const { ref = [], bbox = [], bboxType = 'real', imageId = [] } = objects;
  if (!Array.isArray(ref) || !ref.every((name) => typeof name === 'string'))
    throw bad('must be a list of names', 'objects.ref');
  if (!Array.isArray(bbox)) throw bad('must be a list of boxes', 'objects.bbox');
  if (!['real', 'norm1'].includes(bboxType)) {
    throw bad(`is ${JSON.stringify(bboxType)}; known are real (pixels) and norm1 (0 to 1)`, 'objects.bbox_type');
  }
  if (!Array.isArray(imageId) || imageId.length > bbox.length)
    throw bad(`must be a list with one picture's number for each of the ${bbox.length} boxes`, 'objects.image_id');
  const filled = {
    ref: ref.map((name) => form.ref(name)),
    bbox: bbox.map((box, i) => {
      const image = imageId[i] ?? 0;
      const picture = Number.isInteger(image) ? pictures[image] : undefined;
      if (!picture) {
        throw bad(
          `box ${i} lies in picture ${JSON.stringify(image)}, but the row has ${pictures.length} (counted from 0)`,
          'objects.image_id',
        );
      }
      return form.box(coordinates(box, i, bboxType, picture, form.normBbox));
    }),
  };
  const used = { ref: 0, bbox: 0 };
  const fill = (text: string) =>
    text.replaceAll(/<ref-object>|<bbox>/g, (mark) => {
      const kind = mark === PLACES.ref ? 'ref' : 'bbox';
      return filled[kind][used[kind]++] ?? mark;
    });
  const out = messages.map((message) => ({
    ...message,
    content:
      typeof message.content === 'string'
        ? fill(message.content)
        : message.content.map((part) => (part.type === 'text' ? { ...part, text: fill(part.text) } : part)),
  }));
  for (const kind of ['ref', 'bbox'] as const) {
    const given = filled[kind].length;
    if (used[kind] !== given)
      throw bad(`${used[kind]} ${PLACES[kind]} in the messages but ${given} given: each needs one`, `objects.${kind}`);
  }
  return out;
}

/** A box as the family counts. One pixel outside the picture is put down to rounding. */
function coordinates(
  box: unknown,
  index: number,
  type: 'real' | 'norm1',
  { width, height, resized }: GroundingPicture,
  normBbox: GroundingForm['normBbox'],
): number[] {
  const field = `objects.bbox.${index}`;
  if (!Array.isArray(box) || ![2, 4].includes(box.length) || !box.every((value) => Number.isFinite(value)))
    throw bad(`is ${JSON.stringify(box)}; a box is [x1, y1, x2, y2], a point [x, y], all numbers`, field);
  const from = type === 'norm1' ? { width: 1, height: 1 } : { width, height };
  const slack = type === 'norm1' ? { width: 1 / width, height: 1 / height } : { width: 1, height: 1 };
  const to = normBbox === 'norm1000' ? { width: 1000, height: 1000 } : resized;
  const scaled = (box as number[]).map((value, i) => {
    const side = i % 2 === 0 ? 'width' : 'height';
    if (value < -slack[side] || value > from[side] + slack[side]) {
      throw bad(
        `${value} lies outside the picture (${side} ${from[side]}${type === 'norm1' ? ', bbox_type norm1' : ''})`,
        field,
      );
    }
    return roundHalfEven((Math.min(Math.max(value, 0), from[side]) / from[side]) * to[side]);
  });
  return inOrder(scaled);
}

/** Upper left corner first. */
function inOrder(box: number[]): number[] {
  if (box.length === 2) return box;
  const [x1, y1, x2, y2] = box as [number, number, number, number];
  return [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];
}

export interface BoxScale extends GroundingPicture {
  normBbox: 'norm1000' | 'none';
}

/**
 * The boxes of an answer in pixels of the picture as it was given, cut off at its edges. Read are Qwen's tags (`<|box_start|>(x1,y1),(x2,y2)<|box_end|>`
 * with `<|object_ref_start|>…<|object_ref_end|>` before it; Qwen-VL's `<ref>`, `<box>` and `<quad>`), JSON (`[{"bbox_2d": [x1, y1, x2, y2], "label": "…"}]`, `point_2d` for points, also in a
 * fence of three backquotes), and without either the pairs `(x1,y1),(x2,y2)` and lists `[x1, y1, x2, y2]` of the text. No box: an empty list.
 *
 * @throws ERR_MARTLET_USAGE when a box begins and is none
 */
export function parseBoxes(text: string, scale: BoxScale): ParsedBox[] {
  const { width, height, resized, normBbox } = scale;
  const from = normBbox === 'norm1000' ? { width: 1000, height: 1000 } : resized;
  const scaled = (corners: number[]) =>
    corners.map((value, i) => {
      const [unit, side] = i % 2 === 0 ? [from.width, width] : [from.height, height];
      return Math.min(Math.max((value * side) / unit, 0), side);
    });
  return (jsonBoxes(text) ?? taggedBoxes(text) ?? plainBoxes(text)).map(({ bbox, quad, ...rest }) => ({
    ...rest,
    bbox: inOrder(scaled(bbox)),
    ...(quad && { quad: scaled(quad) }),
  }));
}

function malformed(what: string, found: string): MartletError {
  const shown = found.length > 60 ? `${found.slice(0, 60)}…` : found;
  return new MartletError(
    'ERR_MARTLET_USAGE',
    `The answer's boxes cannot be read: ${what}: ${shown}. Was it cut off (maxNewTokens), or is it of another family or format?`,
    { found },
  );
}

/** The boxes of every JSON value in the text; undefined when none is spoken of. */
function jsonBoxes(text: string): ParsedBox[] | undefined {
  if (!BOX_KEYS.test(text)) return undefined;
  const boxes = jsonValues(text)
    .filter((json) => BOX_KEYS.test(json))
    .flatMap((json) => {
      let value: unknown;
      try {
        value = JSON.parse(json);
      } catch (error) {
        throw malformed(`not valid JSON (${(error as Error).message})`, json);
      }
      return (Array.isArray(value) ? value : [value]).map(jsonBox);
    });
  if (boxes.length === 0) throw malformed('bbox_2d or point_2d without JSON around it', text);
  return boxes;
}

function jsonBox(entry: Record<string, unknown> | null): ParsedBox {
  const bbox = entry?.bbox_2d ?? entry?.point_2d;
  const length = entry?.bbox_2d === undefined ? 2 : 4;
  if (!Array.isArray(bbox) || bbox.length !== length || !bbox.every((number) => Number.isFinite(number)))
    throw malformed('an entry has no bbox_2d of four numbers or point_2d of two', JSON.stringify(entry));
  return { ...(typeof entry?.label === 'string' && { label: entry.label }), bbox };
}

const BOX_KEYS = /"(bbox_2d|point_2d)"/;

/** What stands between outermost brackets: lists, objects, and brackets of the text itself. One that does not close ends with the text. */
function jsonValues(text: string): string[] {
  const values: string[] = [];
  let begin = 0;
  let depth = 0;
  // within brackets a string is skipped whole; between them a quote is the text's own
  const next = { outside: /[[{]/g, inside: /"(?:[^"\\]|\\.)*"|[[{\]}]/gs };
  for (let at = 0; ; ) {
    const pattern = depth === 0 ? next.outside : next.inside;
    pattern.lastIndex = at;
    const match = pattern.exec(text);
    if (match === null) break;
    at = pattern.lastIndex;
    if (match[0] === '[' || match[0] === '{') {
      if (depth++ === 0) begin = match.index;
    } else if (match[0].length === 1 && --depth === 0) {
      values.push(text.slice(begin, at));
    }
  }
  if (depth > 0) values.push(text.slice(begin));
  return values;
}

const NUMBER = String.raw`\s*(-?\d+(?:\.\d+)?)\s*`;
const POINT = String.raw`\(${NUMBER},${NUMBER}\)`;
const PLAIN = new RegExp(String.raw`${POINT}\s*,\s*${POINT}|\[${NUMBER},${NUMBER},${NUMBER},${NUMBER}\]`, 'g');

const numbers = (match: RegExpMatchArray) =>
  match
    .slice(1)
    .filter((group) => group !== undefined)
    .map(Number);

const TAGGED = new RegExp(String.raw`^\s*${POINT}(?:\s*,\s*${POINT})?\s*$`);
const QUAD = new RegExp(String.raw`^\s*${POINT}\s*,\s*${POINT}\s*,\s*${POINT}\s*,\s*${POINT}\s*$`);
/** Qwen2-VL's tags and Qwen-VL's; an opening or closing one alone is a box that was cut off. */
const TAGS =
  /<\|object_ref_start\|>([\s\S]*?)<\|object_ref_end\|>|<ref>([\s\S]*?)<\/ref>|<\|box_start\|>([\s\S]*?)<\|box_end\|>|<box>([\s\S]*?)<\/box>|<quad>([\s\S]*?)<\/quad>|<\|box_(?:start|end)\|>|<\/?(?:box|quad)>/g;

function taggedBoxes(text: string): ParsedBox[] | undefined {
  if (!/<\|box_(start|end)\|>|<\/?(box|quad)>/.test(text)) return undefined;
  const boxes: ParsedBox[] = [];
  let label: string | undefined;
  for (const match of text.matchAll(TAGS)) {
    const [, newName, oldName, newBox, oldBox, quad] = match;
    const name = newName ?? oldName?.trim();
    if (name !== undefined) {
      label = name;
      continue;
    }
    const inside = newBox ?? oldBox;
    const box = quad !== undefined ? QUAD.exec(quad) : inside === undefined ? null : TAGGED.exec(inside);
    if (!box) {
      const tags = text[match.index + 1] === '|' ? '<|box_start|> and <|box_end|>' : 'the tags';
      throw malformed(`expected (x1,y1),(x2,y2) between ${tags}`, text.slice(match.index));
    }
    const corners = numbers(box);
    boxes.push({
      ...(label !== undefined && { label }),
      ...(quad === undefined ? { bbox: corners } : { bbox: hull(corners), quad: corners }),
    });
  }
  return boxes;
}

/** The upright box around four corners. */
function hull(corners: number[]): number[] {
  const xs = corners.filter((_, i) => i % 2 === 0);
  const ys = corners.filter((_, i) => i % 2 === 1);
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

function plainBoxes(text: string): ParsedBox[] {
  return [...text.matchAll(PLAIN)].map((match) => ({ bbox: numbers(match) }));
}
