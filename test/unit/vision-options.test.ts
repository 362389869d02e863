/** Pixel limits and the like: names, levels, the environment. */
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { resolveTrainConfig } from '../../lib/config/index.js';
import { MartletError } from '../../lib/index.js';
import { checkVisionOptions, layerVisionOptions, visionOptionsFromEnv } from '../../lib/processing/vision-options.js';

function refusal(attempt: () => unknown): MartletError {
  try {
    attempt();
  } catch (error) {
    assert.ok(error instanceof MartletError, String(error));
    return error;
  }
  return assert.fail('was not refused');
}

describe("ms-swift's environment variables", () => {
  test('each sets its option', () => {
    const env = {
      MAX_PIXELS: '1003520',
      MIN_PIXELS: '3136',
      VIDEO_MAX_PIXELS: '50176',
      VIDEO_MIN_TOKEN_NUM: '16',
      VIDEO_TOTAL_PIXELS: '19267584',
      FPS: '1.5',
      QWENVL_BBOX_FORMAT: 'new',
      HOME: '/root',
    };
    assert.deepEqual(visionOptionsFromEnv(env), {
      maxPixels: 1003520,
      minPixels: 3136,
      videoMaxPixels: 50176,
      videoMinTokenNum: 16,
      videoTotalPixels: 19267584,
      fps: 1.5,
      bboxFormat: 'new',
    });
    assert.deepEqual(
      visionOptionsFromEnv({ IMAGE_MAX_TOKEN_NUM: '1024', IMAGE_MIN_TOKEN_NUM: '4', VIDEO_MAX_TOKEN_NUM: '128' }),
      {
        imageMaxTokenNum: 1024,
        imageMinTokenNum: 4,
        videoMaxTokenNum: 128,
      },
    );
    assert.deepEqual(visionOptionsFromEnv({ MAX_PIXELS: '' }), {});
  });

  for (const [name, meant] of [
    ['MAX_PIXEL', 'MAX_PIXELS'],
    ['MAX_PIXLES', 'MAX_PIXELS'],
    ['max_pixels', 'MAX_PIXELS'],
    ['MAXPIXELS', 'MAX_PIXELS'],
    ['IMAGAE_MAX_PIXELS', 'MAX_PIXELS'],
    ['IMAGE_MAX_PIXELS', 'MAX_PIXELS'],
    ['MAX_IMAGE_PIXELS', 'MAX_PIXELS'],
    ['MIN_PIXEL', 'MIN_PIXELS'],
    ['VIDEO_MAX_PIXEL', 'VIDEO_MAX_PIXELS'],
    ['VIDEO_TOTAL_PIXEL', 'VIDEO_TOTAL_PIXELS'],
    ['IMAGE_MAX_TOKENS_NUM', 'IMAGE_MAX_TOKEN_NUM'],
    ['IMAGE_MAX_TOKEN', 'IMAGE_MAX_TOKEN_NUM'],
    ['VIDEO_MAX_TOKENS', 'VIDEO_MAX_TOKEN_NUM'],
    ['MAX_VIDEO_TOKENS', 'VIDEO_MAX_TOKEN_NUM'],
    ['MIN_IMAGE_TOKENS', 'IMAGE_MIN_TOKEN_NUM'],
    ['TOTAL_PIXELS', 'VIDEO_TOTAL_PIXELS'],
    ['MAX_TOTAL_PIXELS', 'VIDEO_TOTAL_PIXELS'],
    ['VIDEO_TOTAL_TOKENS', 'VIDEO_TOTAL_PIXELS'],
    ['FPS_MAX_FRAME', 'FPS_MAX_FRAMES'],
    ['QWENVL_BOX_FORMAT', 'QWENVL_BBOX_FORMAT'],
  ] as const) {
    test(`${name} is refused: did you mean ${meant}?`, () => {
      const error = refusal(() => visionOptionsFromEnv({ [name]: '1003520' }));
      assert.equal(error.code, 'ERR_MARTLET_CONFIG');
      assert.deepEqual(error.details, { variable: name, didYouMean: meant });
      assert.match(error.message, new RegExp(`${name}.*did you mean ${meant}\\?.*unset`));
    });
  }

  test('names of other programs are left alone, and so are variables without effect', () => {
    const env = {
      OPENCV_IO_MAX_IMAGE_PIXELS: '1',
      MAX_JOBS: '2',
      PS1: '$',
      GPS: '1',
      MAX_TOKENS: '5',
      TOTAL_MEMORY: '5',
      MAX_VIDEO_BITRATE: '5',
      VIDEO_DRIVER: 'x',
      IMAGEMAGICK_HOME: '/',
      MAX_WORKERS: '3',
      FPS_MAX_FRAMES: '12',
      FRAME_FACTOR: '2',
      IMAGE_FACTOR: '28',
    };
    assert.deepEqual(visionOptionsFromEnv(env), {});
  });

  for (const [name, value] of [
    ['MAX_PIXELS', 'many'],
    ['MAX_PIXELS', '-5'],
    ['MAX_PIXELS', '0'],
    ['MAX_PIXELS', '100.5'],
    ['FPS', '0'],
    ['QWENVL_BBOX_FORMAT', 'old'],
    ['IMAGE_FACTOR', '56'],
    ['MAX_RATIO', '300'],
  ] as const) {
    test(`${name}=${value} is refused`, () => {
      const error = refusal(() => visionOptionsFromEnv({ [name]: value }));
      assert.equal(error.code, 'ERR_MARTLET_CONFIG');
      assert.deepEqual(error.details, { variable: name, value });
    });
  }

  test('one limit said twice is refused', () => {
    const error = refusal(() => visionOptionsFromEnv({ MAX_PIXELS: '1003520', IMAGE_MAX_TOKEN_NUM: '1280' }));
    assert.match(error.message, /MAX_PIXELS and IMAGE_MAX_TOKEN_NUM set the same limit/);
  });
});

describe('levels', () => {
  test('the first with a say wins; pixels and tokens are one limit', () => {
    assert.deepEqual(layerVisionOptions({ maxPixels: 5 }, { maxPixels: 6, minPixels: 2 }, { minPixels: 3, fps: 1 }), {
      maxPixels: 5,
      minPixels: 2,
      fps: 1,
    });
    assert.deepEqual(layerVisionOptions({ imageMaxTokenNum: 8 }, { maxPixels: 6 }), { imageMaxTokenNum: 8 });
    assert.deepEqual(layerVisionOptions({}, undefined, { videoMaxPixels: 9 }), { videoMaxPixels: 9 });
  });

  test('values are checked, with the name as it was written', () => {
    assert.deepEqual(checkVisionOptions({ maxPixels: 100, fps: 0.5, normBbox: 'none' }), {
      maxPixels: 100,
      fps: 0.5,
      normBbox: 'none',
    });
    for (const [options, field] of [
      [{ maxPixels: 1.5 }, 'maxPixels'],
      [{ fps: Number.NaN }, 'fps'],
      [{ normBbox: 'norm100' as 'none' }, 'normBbox'],
      [{ maxPixels: 100, imageMaxTokenNum: 5 }, 'imageMaxTokenNum'],
    ] as const) {
      const error = refusal(() => checkVisionOptions(options));
      assert.equal(error.code, 'ERR_MARTLET_USAGE');
      assert.equal(error.details.field, field);
    }
  });
});

describe('config', () => {
  const base = { model: 'm', dataset: 'd.json' };

  test('keys, and the sections that ms-swift has for variables', () => {
    const { config } = resolveTrainConfig({ ...base, max_pixels: 1003520, fps: 1, norm_bbox: 'norm1000' });
    assert.deepEqual(
      [config.max_pixels, config.fps, config.norm_bbox, config.min_pixels],
      [1003520, 1, 'norm1000', null],
    );
    const swift = resolveTrainConfig({
      ...base,
      model_kwargs: '{"MAX_PIXELS": 602112, "fps": "2"}',
      ENV: { VIDEO_MAX_TOKEN_NUM: '128', FPS_MAX_FRAMES: '12', QWENVL_BBOX_FORMAT: 'new' },
    });
    const { max_pixels, fps, video_max_token_num, bbox_format } = swift.config;
    assert.deepEqual([max_pixels, fps, video_max_token_num, bbox_format], [602112, 2, 128, 'new']);
    assert.match(swift.warnings.join(), /ENV\.FPS_MAX_FRAMES has no effect/);
  });

  for (const [changes, path, says] of [
    [{ max_pixel: 5 }, 'max_pixel', /did you mean max_pixels\?/],
    [{ max_pixels: 'big' }, 'max_pixels', /max_pixels is the text "big"/],
    [{ max_pixels: 0 }, 'max_pixels', /max_pixels is 0/],
    [{ norm_bbox: 'norm1' }, 'norm_bbox', /norm1000/],
    [{ model_kwargs: { MAX_PIXEL: 5 } }, 'model_kwargs.MAX_PIXEL', /did you mean MAX_PIXELS\?/],
    [{ ENV: { CUDA_VISIBLE_DEVICES: '0' } }, 'ENV.CUDA_VISIBLE_DEVICES', /shell/],
    [{ model_kwargs: 'MAX_PIXELS=5' }, 'model_kwargs', /section/],
    [{ max_pixels: 5, model_kwargs: { MAX_PIXELS: 6 } }, 'model_kwargs.MAX_PIXELS', /contradicts max_pixels/],
  ] as const) {
    test(`${JSON.stringify(changes)} is refused`, () => {
      const error = refusal(() => resolveTrainConfig({ ...base, ...changes }));
      assert.equal(error.code, 'ERR_MARTLET_CONFIG');
      assert.equal(error.details.path, path);
      assert.match(error.message, says);
    });
  }
});
