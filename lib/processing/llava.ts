/** LLaVA-1.5: CLIP's resize, crop and normalise; one image token per patch; the hub's chat template or ms-swift's `llava1_5_hf`. */
import { join } from 'node:path';
import { MartletError } from '../errors.js';
import type { ImagePlan } from '../native/binding.js';
import { createProcessor } from './base.js';
import { readJsonFile, requireImageProcessor } from './json.js';
import { contentText, encodeSegments, IMAGE_MARK, jinjaRenderer, type SegmentRenderer } from './template.js';
import { requireChatTemplate, Tokenizer } from './tokenizer.js';
import type { Processor, ProcessorOptions } from './types.js';
import { refuseVisionOptions } from './vision-options.js';

type Json = Record<string, unknown>;
type Triple = [number, number, number];

/** The image token is spelt as the mark is. */
const MEDIA = { image: IMAGE_MARK };

const CLIP_MEAN: Triple = [0.48145466, 0.4578275, 0.40821073];
const CLIP_STD: Triple = [0.26862954, 0.26130258, 0.27577711];

export async function createLlavaProcessor(
  modelDir: string,
  config: Json,
  options: ProcessorOptions,
): Promise<Processor> {
  const tokenizer = await Tokenizer.load(modelDir);
  const imageTokenId = Number(config.image_token_index ?? config.image_token_id ?? 32000);
  if (tokenizer.tokenId(IMAGE_MARK) !== imageTokenId) {
    throw new MartletError(
      'ERR_MARTLET_TOKENIZER',
      `config.json says that the image token is id ${imageTokenId}, but in tokenizer.json ${IMAGE_MARK} is ${tokenizer.tokenId(IMAGE_MARK) ?? 'absent'}: the files of ${modelDir} are not of one model.`,
      { path: modelDir, imageTokenId },
    );
  }
  refuseVisionOptions('llava', options.vision);
  const endToken = tokenizer.special.eos_token ?? '</s>';
  const renderer =
    options.template === 'ms-swift'
      ? swiftRenderer(endToken)
      : jinjaRenderer(await requireChatTemplate(modelDir, tokenizer), tokenizer, endToken, MEDIA, modelDir);
  const images = await imageSettings(modelDir, config);
  const imageIds = new Array<number>(images.tokens).fill(imageTokenId);
  return createProcessor(
    modelDir,
    {
      family: 'llava',
      tokenizer,
      imageTokenId,
      endToken,
      renderer,
      vision: {},
      planMedia: ({ width, height }, vision) => {
        refuseVisionOptions('llava', vision);
        return { plan: planImage(images, width, height) };
      },
      encode: (segments, media) =>
        encodeSegments(segments, tokenizer, new Map([[imageTokenId, media.map(() => imageIds)]])),
    },
    options,
  );
}

/** ms-swift's `llava1_5_hf`: `USER: {query}\nASSISTANT:` with `<image>\n`, answers ended by `</s>`. */
function swiftRenderer(endToken: string): SegmentRenderer {
  return (messages, { forGeneration }) => {
    const segments = [];
    let prompt = '';
    for (const { role, content, loss } of messages) {
      const text = contentText(content, MEDIA);
      if (role === 'assistant') {
        segments.push({ text: prompt, trained: false }, { text: text + endToken, trained: loss !== false });
        prompt = '';
      } else {
        const marked = text.replaceAll(IMAGE_MARK, `${IMAGE_MARK}\n`);
        prompt += role === 'system' ? `${marked}\n` : `USER: ${marked}\nASSISTANT:`;
      }
    }
    if (forGeneration) segments.push({ text: prompt, trained: false });
    return segments;
  };
}

interface ImageSettings {
  /** Shortest edge after resizing; undefined = no resizing. */
  shortestEdge: number | undefined;
  exact: { height: number; width: number } | undefined;
  crop: { height: number; width: number } | undefined;
  backend: 'torchvision' | 'pillow';
  rescale: number;
  mean: Triple;
  std: Triple;
  /** Image tokens of one picture. */
  tokens: number;
}

/** preprocessor_config.json (or the image part of processor_config.json), with CLIPImageProcessor's defaults; old ones lack the patch size. */
async function imageSettings(modelDir: string, config: Json): Promise<ImageSettings> {
  const optional = { optional: true };
  const remedy = 'Download it again.';
  const processor = await readJsonFile(
    join(modelDir, 'processor_config.json'),
    'ERR_MARTLET_MODEL_NOT_FOUND',
    remedy,
    optional,
  );
  const own = await readJsonFile(
    join(modelDir, 'preprocessor_config.json'),
    'ERR_MARTLET_MODEL_NOT_FOUND',
    remedy,
    optional,
  );
  const preprocessor = Object.keys(own).length > 0 ? own : ((processor.image_processor as Json | undefined) ?? {});
  requireImageProcessor(modelDir, preprocessor);
  const vision = (config.vision_config ?? {}) as Json;
  const size = (preprocessor.size ?? 224) as number | { shortest_edge?: number; height?: number; width?: number };
  const crop = (preprocessor.crop_size ?? 224) as number | { height: number; width: number };
  const resizes = preprocessor.do_resize !== false;
  const crops = preprocessor.do_center_crop !== false;
  const exact =
    resizes &&
    typeof size === 'object' &&
    size.shortest_edge === undefined &&
    size.height !== undefined &&
    size.width !== undefined
      ? { height: size.height, width: size.width }
      : undefined;
  const shortestEdge = typeof size === 'number' ? size : size.shortest_edge;
  const patch = Number(processor.patch_size ?? vision.patch_size ?? 32);
  const cropSize = typeof crop === 'number' ? { height: crop, width: crop } : crop;
  const target = crops ? cropSize : (exact ?? { height: shortestEdge ?? 224, width: shortestEdge ?? 224 });
  const extra = Number(processor.num_additional_image_tokens ?? 1);
  const dropsClassToken =
    (processor.vision_feature_select_strategy ?? config.vision_feature_select_strategy ?? 'default') === 'default';
  const grid = Math.floor(target.height / patch) * Math.floor(target.width / patch);
  return {
    shortestEdge: resizes && !exact ? shortestEdge : undefined,
    exact,
    crop: crops ? cropSize : undefined,
    // transformers 5 runs CLIP's processor on torchvision unless the checkpoint asks for the slow one.
    backend: preprocessor.use_fast === false ? 'pillow' : 'torchvision',
    rescale: Number(preprocessor.rescale_factor ?? 1 / 255),
    mean: (preprocessor.image_mean as Triple | undefined) ?? CLIP_MEAN,
    std: (preprocessor.image_std as Triple | undefined) ?? CLIP_STD,
    tokens: grid + extra - (dropsClassToken ? 1 : 0),
  };
}

function planImage(settings: ImageSettings, width: number, height: number): ImagePlan {
  const { shortestEdge, exact, crop, backend, rescale, mean, std } = settings;
  let to = exact ?? { height, width };
  if (shortestEdge !== undefined) {
    // transformers' get_resize_output_image_size: the long edge is cut to an integer.
    to =
      width <= height
        ? { width: shortestEdge, height: Math.trunc((shortestEdge * height) / width) }
        : { width: Math.trunc((shortestEdge * width) / height), height: shortestEdge };
  }
  return {
    ...(exact || shortestEdge !== undefined ? { resize: { ...to, backend } } : {}),
    ...(crop && {
      crop: { top: Math.trunc((to.height - crop.height) / 2), left: Math.trunc((to.width - crop.width) / 2), ...crop },
    }),
    rescale,
    mean,
    std,
  };
}
