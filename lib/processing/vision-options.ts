/** Options of families that take pictures at their own size (Qwen2-VL and later): limits, frame rate, boxes. Each has a YAML key and ms-swift's name in the environment. */
import { MartletError } from '../errors.js';
import { nearest } from '../suggest.js';

export interface VisionOptions {
  /** Most pixels of a picture after resizing. Defaults to the checkpoint's. Not together with `imageMaxTokenNum`. */
  maxPixels?: number;
  /** Fewest pixels of a picture after resizing. Defaults to the checkpoint's. Not together with `imageMinTokenNum`. */
  minPixels?: number;
  /** Most image tokens of a picture: another way to say `maxPixels` (28² pixels a token in Qwen2-VL and Qwen2.5-VL, 32² in Qwen3-VL). */
  imageMaxTokenNum?: number;
  /** Fewest image tokens of a picture. */
  imageMinTokenNum?: number;
  /** Most pixels of one video frame after resizing. Defaults to the checkpoint's. Not together with `videoMaxTokenNum`. */
  videoMaxPixels?: number;
  /** Fewest pixels of one video frame after resizing. Defaults to the checkpoint's. Not together with `videoMinTokenNum`. */
  videoMinPixels?: number;
  /** Most pixels of all temporal patches of a video: lowers the frames' limit for long videos. Defaults to none. */
  videoTotalPixels?: number;
  /** Most tokens of one video frame: another way to say `videoMaxPixels`. */
  videoMaxTokenNum?: number;
  /** Fewest tokens of one video frame. */
  videoMinTokenNum?: number;
  /** Frames a second of videos that do not say. Defaults to 2. */
  fps?: number;
  /** Coordinates of boxes: thousandths of the picture (`norm1000`), or pixels of the resized picture (`none`). Defaults to the family's. */
  normBbox?: 'norm1000' | 'none';
  /** Text of boxes and names: `legacy` with `<|box_start|>` and `<|object_ref_start|>`, `new` = `[x1, y1, x2, y2]` and the plain name. Defaults to `legacy`. */
  bboxFormat?: 'legacy' | 'new';
  /** MiniCPM-V: most slices that a picture is cut into, the whole view not counted. Defaults to the checkpoint's (9). */
  maxSliceNums?: number;
  /** MiniCPM-V: write each picture's number before it. Defaults to the checkpoint's (yes). */
  useImageId?: boolean;
}

export type VisionOptionName = keyof VisionOptions;

interface OptionSpec {
  /** Key in YAML. */
  key: string;
  /** ms-swift's environment variable. */
  env?: string;
  kind: 'count' | 'rate' | 'flag' | readonly string[];
}

const count = (key: string): OptionSpec => ({ key, env: key.toUpperCase(), kind: 'count' });

export const VISION_OPTIONS: Record<VisionOptionName, OptionSpec> = {
  maxPixels: count('max_pixels'),
  minPixels: count('min_pixels'),
  imageMaxTokenNum: count('image_max_token_num'),
  imageMinTokenNum: count('image_min_token_num'),
  videoMaxPixels: count('video_max_pixels'),
  videoMinPixels: count('video_min_pixels'),
  videoTotalPixels: count('video_total_pixels'),
  videoMaxTokenNum: count('video_max_token_num'),
  videoMinTokenNum: count('video_min_token_num'),
  fps: { key: 'fps', env: 'FPS', kind: 'rate' },
  normBbox: { key: 'norm_bbox', kind: ['norm1000', 'none'] },
  bboxFormat: { key: 'bbox_format', env: 'QWENVL_BBOX_FORMAT', kind: ['legacy', 'new'] },
  maxSliceNums: count('max_slice_nums'),
  useImageId: { key: 'use_image_id', kind: 'flag' },
};

/** Options of families that cut pictures into slices (MiniCPM-V). */
export const SLICE_OPTIONS: readonly VisionOptionName[] = ['maxSliceNums', 'useImageId'];

export const VISION_OPTION_NAMES = Object.keys(VISION_OPTIONS) as VisionOptionName[];
/** Options of families that take pictures at their own size (Qwen2-VL and later). */
export const PIXEL_OPTIONS: readonly VisionOptionName[] = VISION_OPTION_NAMES.filter(
  (name) => !SLICE_OPTIONS.includes(name),
);

/** Two ways to say one limit: pixels and tokens. */
const SAME_LIMIT: [VisionOptionName, VisionOptionName][] = [
  ['maxPixels', 'imageMaxTokenNum'],
  ['minPixels', 'imageMinTokenNum'],
  ['videoMaxPixels', 'videoMaxTokenNum'],
  ['videoMinPixels', 'videoMinTokenNum'],
];

/** Constants of ms-swift's vision code that a variable can change there; here they are what the networks were trained with. */
const FIXED: Record<string, readonly string[]> = {
  IMAGE_FACTOR: ['28', '32'],
  MAX_RATIO: ['200'],
  FRAME_FACTOR: ['2'],
  SPATIAL_MERGE_SIZE: ['2'],
};
/** They govern how many frames are taken from a video file; a list of frames is taken as it is. */
export const WITHOUT_EFFECT = ['FPS_MIN_FRAMES', 'FPS_MAX_FRAMES'];

const ENV_NAMES = VISION_OPTION_NAMES.flatMap((name) => VISION_OPTIONS[name].env ?? []);

/** What a value has to be, if it is not that. */
function fault(kind: OptionSpec['kind'], value: unknown): string | undefined {
  if (kind === 'count') {
    return Number.isSafeInteger(value) && (value as number) > 0 ? undefined : 'a whole number above 0';
  }
  if (kind === 'rate') {
    return typeof value === 'number' && Number.isFinite(value) && value > 0 ? undefined : 'a number above 0';
  }
  if (kind === 'flag') return typeof value === 'boolean' ? undefined : 'true or false';
  return kind.includes(value as string) ? undefined : kind.join(' or ');
}

/**
 * The vision options among `values` (other keys are left alone), checked.
 *
 * @throws ERR_MARTLET_USAGE with `details.field`
 */
export function checkVisionOptions(
  values: VisionOptions,
  spelling: 'camelCase' | 'snake_case' = 'camelCase',
): VisionOptions {
  const shown = (name: VisionOptionName) => (spelling === 'camelCase' ? name : VISION_OPTIONS[name].key);
  const out: Record<string, unknown> = {};
  for (const name of VISION_OPTION_NAMES) {
    const value = values[name];
    if (value === undefined || value === null) continue;
    const expected = fault(VISION_OPTIONS[name].kind, value);
    if (expected !== undefined) {
      throw new MartletError('ERR_MARTLET_USAGE', `${shown(name)} must be ${expected}, not ${String(value)}.`, {
        field: shown(name),
        key: VISION_OPTIONS[name].key,
        value,
      });
    }
    out[name] = value;
  }
  for (const [pixels, tokens] of SAME_LIMIT) {
    if (out[pixels] === undefined || out[tokens] === undefined) continue;
    throw new MartletError(
      'ERR_MARTLET_USAGE',
      `${shown(pixels)} and ${shown(tokens)} set the same limit: keep one of them.`,
      { field: shown(tokens), key: VISION_OPTIONS[tokens].key },
    );
  }
  return out as VisionOptions;
}

/** The vision options among `values`, which may hold others. */
export function pickVisionOptions(values: VisionOptions): VisionOptions {
  return Object.fromEntries(
    VISION_OPTION_NAMES.filter((name) => values[name] !== undefined).map((name) => [name, values[name]]),
  );
}

/** From YAML's keys; null is absent. Other keys are left alone. */
export function visionOptionsFromKeys(values: Record<string, unknown>): VisionOptions {
  return Object.fromEntries(
    VISION_OPTION_NAMES.map((name) => [name, values[VISION_OPTIONS[name].key]]).filter(
      ([, value]) => value !== undefined && value !== null,
    ),
  );
}

/** As YAML's keys. */
export function visionOptionsToKeys(options: VisionOptions): Record<string, unknown> {
  return Object.fromEntries(
    VISION_OPTION_NAMES.filter((name) => options[name] !== undefined).map((name) => [
      VISION_OPTIONS[name].key,
      options[name],
    ]),
  );
}

/** One set of options from several, the first with a say wins; a limit in pixels also wins over one in tokens, and the other way round. */
export function layerVisionOptions(...levels: (VisionOptions | undefined)[]): VisionOptions {
  const out: Record<string, unknown> = {};
  for (const level of levels) {
    const taken = new Set(Object.keys(out));
    for (const pair of SAME_LIMIT) if (pair.some((name) => taken.has(name))) for (const name of pair) taken.add(name);
    for (const name of VISION_OPTION_NAMES) {
      const value = level?.[name];
      if (value !== undefined && !taken.has(name)) out[name] = value;
    }
  }
  return out as VisionOptions;
}

/**
 * ms-swift's variables (`MAX_PIXELS`, `VIDEO_MAX_TOKEN_NUM`, …).
 *
 * @throws ERR_MARTLET_CONFIG with `details.variable` for a value that is none, a constant that cannot be changed, and a name that is nearly one of
 * these (`details.didYouMean`): a limit that is misspelt would be no limit.
 */
export function visionOptionsFromEnv(env: Record<string, string | undefined> = process.env): VisionOptions {
  for (const variable of Object.keys(env)) {
    const meant = misspelt(variable);
    if (meant === undefined) continue;
    throw new MartletError(
      'ERR_MARTLET_CONFIG',
      `The environment has ${variable}, which is no option: did you mean ${meant}? Correct its name or unset it.`,
      { variable, didYouMean: meant },
    );
  }
  const refuse = (variable: string, expected: string) =>
    new MartletError(
      'ERR_MARTLET_CONFIG',
      `The environment variable ${variable} is ${JSON.stringify(env[variable])}; it must be ${expected}. Correct it or unset it.`,
      { variable, value: env[variable] },
    );
  for (const [variable, values] of Object.entries(FIXED)) {
    const value = env[variable];
    if (value !== undefined && value !== '' && !values.includes(value))
      throw refuse(variable, `${values.join(' or ')}, which the models were trained with`);
  }
  const out: Record<string, unknown> = {};
  for (const name of VISION_OPTION_NAMES) {
    const { env: variable, kind } = VISION_OPTIONS[name];
    const text = variable === undefined ? undefined : env[variable];
    if (variable === undefined || text === undefined || text === '') continue;
    const value = typeof kind === 'string' ? Number(text) : text;
    const expected = fault(kind, value);
    if (expected !== undefined) throw refuse(variable, expected);
    out[name] = value;
  }
  for (const [pixels, tokens] of SAME_LIMIT) {
    if (out[pixels] === undefined || out[tokens] === undefined) continue;
    const variables = [VISION_OPTIONS[pixels].env, VISION_OPTIONS[tokens].env];
    throw new MartletError(
      'ERR_MARTLET_CONFIG',
      `The environment variables ${variables.join(' and ')} set the same limit: unset one of them.`,
      { variable: variables[1] },
    );
  }
  return out as VisionOptions;
}

/** The option that a variable's name is nearly, if it is nearly one. Short names and names of other programs are left alone. */
function misspelt(variable: string): string | undefined {
  const known = [...ENV_NAMES, ...WITHOUT_EFFECT, ...Object.keys(FIXED)];
  if (known.includes(variable)) return undefined;
  const long = [...ENV_NAMES, ...WITHOUT_EFFECT].filter((name) => name.length >= 8);
  const near = nearest(variable, long, 2);
  if (near !== undefined) return near;
  // IMAGE_MAX_PIXELS, MAX_IMAGE_PIXELS, IMAGAE_MAX_PIXELS, MAX_VIDEO_TOKENS, TOTAL_PIXELS: too far for a distance, too close for another meaning
  if (!/^(IMAG|VID|MAX_|MIN_|TOTAL_)/i.test(variable) || !/(MAX|MIN|TOTAL)/i.test(variable)) return undefined;
  const side = /MIN/i.test(variable) ? 'MIN' : 'MAX';
  const video = /VID/i.test(variable);
  if (/TOTAL/i.test(variable) && (video || /PIXE?L|PIXLE/i.test(variable))) return 'VIDEO_TOTAL_PIXELS';
  if (/PIXE?L|PIXLE/i.test(variable)) return `${video ? 'VIDEO_' : ''}${side}_PIXELS`;
  if (/(IMAG|VID)/i.test(variable) && /TOKEN/i.test(variable)) return `${video ? 'VIDEO' : 'IMAGE'}_${side}_TOKEN_NUM`;
  return undefined;
}

/**
 * The options in force, of those that the family knows: given ones, else the environment's, else what an adapter was trained with.
 *
 * @throws ERR_MARTLET_USAGE for a given one that the family does not know: a limit without effect would not be noticed
 */
export function familyVisionOptions(
  family: string,
  known: readonly VisionOptionName[],
  { vision, savedVision }: { vision?: VisionOptions | undefined; savedVision?: VisionOptions | undefined },
): VisionOptions {
  refuseVisionOptions(family, vision, known);
  const all = layerVisionOptions(checkVisionOptions(vision ?? {}), visionOptionsFromEnv(), savedVision);
  return Object.fromEntries(known.flatMap((name) => (all[name] === undefined ? [] : [[name, all[name]]])));
}

/** @throws ERR_MARTLET_USAGE for an option that the family does not know */
export function refuseVisionOptions(
  family: string,
  options: VisionOptions | undefined,
  known: readonly VisionOptionName[] = [],
): void {
  const given = VISION_OPTION_NAMES.find((name) => options?.[name] !== undefined && !known.includes(name));
  if (given === undefined) return;
  const why = known.length === 0 ? ', whose pictures all become one size' : '';
  throw new MartletError(
    'ERR_MARTLET_USAGE',
    `${VISION_OPTIONS[given].key} has no meaning for ${family}${why}: leave it out.`,
    { field: given, key: VISION_OPTIONS[given].key, family },
  );
}
