import { extname } from 'node:path';
import sharp, { type FormatEnum } from 'sharp';
import { MartletError } from '../errors.js';
import { writeFileAtomic } from '../files.js';
import { parseBoxes } from '../processing/grounding.js';
import { DEFAULT_MAX_IMAGE_PIXELS, decodeImage } from '../processing/image.js';
import type { ParsedBox } from '../processing/index.js';
import type { ImageSource } from '../processing/types.js';
import { checkOptions } from './options.js';

export interface DrawBoxesOptions {
  /** File to write as well; its ending says the format: .png, .jpg, .jpeg or .webp. */
  output?: string;
  /** Turn the picture as its EXIF orientation says, as it was when the model saw it. Defaults to true. */
  exifOrientation?: boolean;
  signal?: AbortSignal;
}

const FORMATS: Record<string, keyof FormatEnum> = { '.png': 'png', '.jpg': 'jpeg', '.jpeg': 'jpeg', '.webp': 'webp' };
/** matplotlib's "tableau" colours, one for each name. */
const COLOURS = ['#1f77b4', '#ff7f0e', '#2ca02c', '#d62728', '#9467bd', '#8c564b', '#e377c2', '#bcbd22', '#17becf'];

/**
 * Draws an answer's boxes, quadrangles and points with their names onto its picture. A text's coordinates are thousandths of the picture's sides
 * (Qwen-VL, Qwen2-VL, Qwen3-VL); for Qwen2.5-VL, whose are pixels of the resized picture, give the boxes of `model.parseBoxes`. Resolves to the
 * encoded picture, PNG unless `output` says otherwise. Names are drawn in a font of the system; one without fonts draws none.
 *
 * Rejects with `ERR_MARTLET_USAGE` (a box begins and is none, an output of another format), `_IMAGE` or `_IO`.
 */
export async function drawBoxes(
  image: ImageSource,
  answer: string | ParsedBox[],
  options: DrawBoxesOptions = {},
): Promise<Buffer> {
  checkOptions('drawBoxes', options);
  if (typeof answer !== 'string' && !Array.isArray(answer)) {
    throw new MartletError(
      'ERR_MARTLET_USAGE',
      `drawBoxes takes the text of an answer or a list of boxes, not ${typeof answer}.`,
      { field: 'answer' },
    );
  }
  const { output, exifOrientation = true, signal } = options;
  const format = output === undefined ? 'png' : FORMATS[extname(output).toLowerCase()];
  if (format === undefined) {
    throw new MartletError(
      'ERR_MARTLET_USAGE',
      `output ${output} does not end with ${Object.keys(FORMATS).join(', ')}: which format is meant?`,
      { field: 'output', value: output },
    );
  }
  const { data, width, height } = await decodeImage(image, {
    exifOrientation,
    maxPixels: DEFAULT_MAX_IMAGE_PIXELS,
    ...(signal && { signal }),
  });
  const size = { width, height };
  const boxes =
    typeof answer === 'string' ? parseBoxes(answer, { ...size, resized: size, normBbox: 'norm1000' }) : answer;
  const picture = await sharp(data, { raw: { ...size, channels: 3 }, limitInputPixels: false })
    .composite([{ input: Buffer.from(overlay(boxes, size)), limitInputPixels: false }])
    .removeAlpha()
    .toFormat(format)
    .toBuffer();
  if (output !== undefined) await writeFileAtomic(output, picture);
  return picture;
}

/** Line widths and letters grow with the picture, as in Qwen-VL's own drawing. */
function overlay(boxes: ParsedBox[], { width, height }: { width: number; height: number }): string {
  const letters = Math.max(Math.floor(Math.sqrt(width * height) / 30), 15);
  const line = Math.max(letters / 4, 1);
  const colours = new Map<string | undefined, string>();
  const shapes = boxes.map(({ label, bbox, quad }) => {
    const colour = colours.get(label) ?? (COLOURS[colours.size % COLOURS.length] as string);
    colours.set(label, colour);
    const [x1 = 0, y1 = 0, x2, y2] = bbox;
    const pen = `fill="none" stroke="${colour}" stroke-width="${line}"`;
    const shape =
      quad !== undefined
        ? `<polygon points="${quad.join(' ')}" ${pen}/>`
        : x2 === undefined || y2 === undefined
          ? `<circle cx="${x1}" cy="${y1}" r="${2 * line}" fill="${colour}"/>`
          : `<rect x="${x1}" y="${y1}" width="${x2 - x1}" height="${y2 - y1}" ${pen}/>`;
    if (label === undefined) return shape;
    // dark edges keep a name readable on any ground
    const place = `x="${x1 + line}" y="${Math.min(y1 + letters, height - line)}" font-size="${letters}"`;
    const ink = `fill="white" stroke="black" stroke-width="${letters / 5}" paint-order="stroke"`;
    return `${shape}<text ${place} font-family="sans-serif" ${ink}>${escapeXml(label)}</text>`;
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}">${shapes.join('')}</svg>`;
}

/** Text of a model, harmless inside XML; characters that XML cannot hold become U+FFFD. */
function escapeXml(text: string): string {
  return text
    .replace(/[^\t\n\r\u{20}-\u{D7FF}\u{E000}-\u{FFFD}\u{10000}-\u{10FFFF}]/gu, '\uFFFD')
    .replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}
