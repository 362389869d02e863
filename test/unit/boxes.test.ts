/** Boxes: ms-swift's `objects` into text, answers into boxes. */
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { MartletError, type ParsedBox, parseBoxes } from '../../lib/index.js';
import { BOX_FORMATS, fillObjects, type GroundingPicture } from '../../lib/processing/grounding.js';
import type { GroundingObjects } from '../../lib/processing/index.js';

const LEGACY = '<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|>';
const DOG: ParsedBox[] = [{ label: 'a dog', bbox: [64, 120, 320, 360] }];

describe('parseBoxes', () => {
  const size = { family: 'qwen2_vl', width: 640, height: 480 } as const;
  for (const [title, text, boxes] of [
    ['tags', LEGACY, DOG],
    [
      'several boxes of one name, spaces, decimals',
      `${LEGACY} and <|box_start|>( 0, 0 ) , (500.5,1000)<|box_end|>.`,
      [...DOG, { label: 'a dog', bbox: [0, 0, 320.32, 480] }],
    ],
    ['a box without a name', 'There: <|box_start|>(100,250),(500,750)<|box_end|>', [{ bbox: [64, 120, 320, 360] }]],
    ['a point', 'click <|box_start|>(500,500)<|box_end|>', [{ bbox: [320, 240] }]],
    ['corners in the other order', '<|box_start|>(500,750),(100,250)<|box_end|>', [{ bbox: [64, 120, 320, 360] }]],
    ['outside the picture', '<|box_start|>(-20,0),(1200,1000)<|box_end|>', [{ bbox: [0, 0, 640, 480] }]],
    ['JSON', '[\n\t{"bbox_2d": [100, 250, 500, 750], "label": "a dog"}\n]', DOG],
    [
      'JSON in a fence, after text',
      'Here it is:\n```json\n[{"bbox_2d": [100, 250, 500, 750], "label": "a dog"}]\n```',
      DOG,
    ],
    ['JSON between text', 'Here: [{"bbox_2d": [100, 250, 500, 750], "label": "a dog"}], as asked.', DOG],
    [
      'several blocks of JSON, brackets and quotes in the text',
      '6" [1]:\n```json\n[{"bbox_2d": [100, 250, 500, 750], "label": "a dog"}]\n```\nand\n```json\n{"bbox_2d": [0, 0, 500, 1000], "label": "a ] {"}\n```\nas in [2].',
      [...DOG, { label: 'a ] {', bbox: [0, 0, 320, 480] }],
    ],
    [
      'an object a line',
      '{"bbox_2d": [100, 250, 500, 750], "label": "a dog"}\n{"point_2d": [500, 500]}',
      [...DOG, { bbox: [320, 240] }],
    ],
    ['JSON, one object with a point', '{"point_2d": [500, 500], "label": "eye"}', [{ label: 'eye', bbox: [320, 240] }]],
    ['tags left out of the text', 'a dog(100,250),(500,750)', [{ bbox: [64, 120, 320, 360] }]],
    ['a plain list', 'It is at [100, 250, 500, 750].', [{ bbox: [64, 120, 320, 360] }]],
    ['no box', 'I see no dog (2 cats).', []],
    ['an empty answer', '', []],
  ] as [string, string, ParsedBox[]][]) {
    test(title, () => assert.deepEqual(parseBoxes(text, size), boxes));
  }

  test('Qwen2.5-VL: pixels of the resized picture, by its own limits or by a given size', () => {
    const text = '[{"bbox_2d": [28, 56, 280, 224], "label": "a dog"}]';
    // 640×480 becomes 644×476
    const scaled = parseBoxes(text, { family: 'qwen2_5_vl', width: 640, height: 480 });
    assert.deepEqual(scaled, [
      { label: 'a dog', bbox: [(28 * 640) / 644, (56 * 480) / 476, (280 * 640) / 644, (224 * 480) / 476] },
    ]);
    // within 200704 pixels it becomes 504×364
    const small = parseBoxes(text, { family: 'qwen2_5_vl', width: 640, height: 480, maxPixels: 200704 });
    assert.deepEqual(small[0]?.bbox.slice(0, 2), [(28 * 640) / 504, (56 * 480) / 364]);
    const resized = { width: 280, height: 224 };
    const given = parseBoxes(text, { normBbox: 'none', width: 560, height: 448, resized });
    assert.deepEqual(given[0]?.bbox, [56, 112, 560, 448]);
    // Qwen3-VL counts in thousandths again
    assert.deepEqual(parseBoxes(text, { family: 'qwen3_vl', width: 1000, height: 1000 })[0]?.bbox, [28, 56, 280, 224]);
  });

  for (const [title, text] of [
    ['an answer cut off inside a box', '<|box_start|>(100,250),(50'],
    ['a box that does not begin', '(100,250)<|box_end|>'],
    ['words for numbers', '<|box_start|>(left,top),(500,750)<|box_end|>'],
    ['three numbers', '<|box_start|>(100,250),(500)<|box_end|>'],
    ['JSON cut off', '[{"bbox_2d": [100, 250, 5'],
    ['JSON without an end, after a whole one', '[{"bbox_2d": [1, 2, 3, 4]}] [{"bbox_2d": [1, 2'],
    ['a key without JSON', '"bbox_2d": [100, 250, 5'],
    ['JSON with three numbers', '[{"bbox_2d": [100, 250, 500], "label": "a dog"}]'],
    ['JSON with words', '[{"bbox_2d": ["100", "250", "500", "750"]}]'],
  ] as const) {
    test(`${title} is refused`, () => {
      assert.throws(
        () => parseBoxes(text, size),
        (error: unknown) => {
          assert.ok(error instanceof MartletError);
          assert.equal(error.code, 'ERR_MARTLET_USAGE');
          assert.match(error.message, /boxes cannot be read/);
          return true;
        },
      );
    });
  }

  for (const options of [
    { width: 640, height: 480 },
    { family: 'llava', width: 640, height: 480 },
    { family: 'qwen2_vl', width: 0, height: 480 },
    { family: 'qwen2_vl', width: 640, height: Number.NaN },
    { normBbox: 'norm100', width: 640, height: 480 },
    { family: 'qwen2_5_vl', width: 640, height: 480, maxPixels: 'many' },
    { family: 'qwen2_5_vl', width: 640, height: 480, resized: { width: 0, height: 476 } },
  ]) {
    test(`options ${JSON.stringify(options)} are refused`, () => {
      assert.throws(
        () => parseBoxes(LEGACY, options as typeof size),
        (error: MartletError) => error.code === 'ERR_MARTLET_USAGE' && typeof error.details.field === 'string',
      );
    });
  }

  test('what is not text is refused', () => {
    assert.throws(
      () => parseBoxes([1, 2] as unknown as string, size),
      (error: MartletError) => error.code === 'ERR_MARTLET_USAGE' && error.details.field === 'text',
    );
  });
});

describe('objects', () => {
  const pictures: GroundingPicture[] = [
    { width: 640, height: 480, resized: { width: 644, height: 476 } },
    { width: 100, height: 200, resized: { width: 112, height: 196 } },
  ];
  const fill = (
    content: string,
    objects: GroundingObjects,
    form: 'norm1000' | 'none' = 'norm1000',
    format: 'legacy' | 'new' = 'legacy',
  ) =>
    fillObjects([{ role: 'user', content }], objects, pictures, { normBbox: form, ...BOX_FORMATS[format] })[0]?.content;

  test('names and boxes take their places, each in its own order', () => {
    const objects: GroundingObjects = {
      ref: ['a', 'b'],
      bbox: [
        [320, 240, 64, 120],
        [640, 480],
      ],
    };
    assert.equal(
      fill('<bbox><ref-object>, <ref-object> <bbox>', objects),
      '<|box_start|>(100,250),(500,500)<|box_end|><|object_ref_start|>a<|object_ref_end|>, <|object_ref_start|>b<|object_ref_end|> <|box_start|>(1000,1000)<|box_end|>',
    );
    assert.equal(fill('<bbox>', { bbox: [[64, 120, 320, 240]] }, 'none'), '<|box_start|>(64,119),(322,238)<|box_end|>');
    assert.equal(
      fill(
        '{"bbox_2d": <bbox>, "label": "<ref-object>"}',
        { ref: ['a'], bbox: [[64, 120, 320, 240]] },
        'norm1000',
        'new',
      ),
      '{"bbox_2d": [100, 250, 500, 500], "label": "a"}',
    );
  });

  test('shares of the sides, the picture of each box, halves to even', () => {
    const box = (objects: GroundingObjects, form?: 'none') => fill('<bbox>', objects, form);
    assert.equal(
      box({ bbox: [[0.1, 0.5, 0.25, 1]], bboxType: 'norm1' }),
      '<|box_start|>(100,500),(250,1000)<|box_end|>',
    );
    assert.equal(
      box({ bbox: [[50, 100, 100, 200]], imageId: [1] }, 'none'),
      '<|box_start|>(56,98),(112,196)<|box_end|>',
    );
    assert.equal(box({ bbox: [[0.0005, 0.0015]], bboxType: 'norm1' }), '<|box_start|>(0,2)<|box_end|>');
  });

  test('content parts are filled too, and one pixel beyond the edge is put down to rounding', () => {
    const form = { normBbox: 'norm1000', ...BOX_FORMATS.legacy } as const;
    const [message] = fillObjects(
      [{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: 'at <bbox>' }] }],
      { bbox: [[-0.5, 0, 640.9, 481]] },
      pictures,
      form,
    );
    assert.deepEqual(message?.content, [
      { type: 'image' },
      { type: 'text', text: 'at <|box_start|>(0,0),(1000,1000)<|box_end|>' },
    ]);
  });

  for (const [title, content, objects, field] of [
    ['more marks than boxes', '<bbox><bbox>', { bbox: [[1, 2, 3, 4]] }, 'objects.bbox'],
    [
      'more boxes than marks',
      '<bbox>',
      {
        bbox: [
          [1, 2, 3, 4],
          [1, 2, 3, 4],
        ],
      },
      'objects.bbox',
    ],
    ['more marks than names', '<ref-object><bbox>', { bbox: [[1, 2, 3, 4]] }, 'objects.ref'],
    ['a name that is none', '<ref-object>', { ref: [5] }, 'objects.ref'],
    ['three numbers', '<bbox>', { bbox: [[1, 2, 3]] }, 'objects.bbox.0'],
    ['a word among the numbers', '<bbox>', { bbox: [[1, 2, 3, 'x']] }, 'objects.bbox.0'],
    ['a box outside the picture', '<bbox>', { bbox: [[1, 2, 3, 700]] }, 'objects.bbox.0'],
    ['pixels under norm1', '<bbox>', { bbox: [[10, 20, 30, 40]], bboxType: 'norm1' }, 'objects.bbox.0'],
    ['a type that is not known', '<bbox>', { bbox: [[1, 2, 3, 4]], bboxType: 'norm1000' }, 'objects.bbox_type'],
    ['a picture that is not there', '<bbox>', { bbox: [[1, 2, 3, 4]], imageId: [2] }, 'objects.image_id'],
    ['more pictures than boxes', '<bbox>', { bbox: [[1, 2, 3, 4]], imageId: [0, 1] }, 'objects.image_id'],
    ['a box that is no list', '<bbox>', { bbox: 'all' }, 'objects.bbox'],
  ] as [string, string, unknown, string][]) {
    test(`${title} is refused`, () => {
      assert.throws(
        () => fill(content, objects as GroundingObjects),
        (error: unknown) => {
          assert.ok(error instanceof MartletError);
          assert.equal(error.code, 'ERR_MARTLET_DATASET');
          assert.equal(error.details.field, field);
          return true;
        },
      );
    });
  }
});
