/** The forms in which rows bring videos, boxes and limits. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { parseRow, RowError } from '../../lib/data/rows.js';

const answer = { role: 'assistant', content: 'It falls.' };
const ask = (content: unknown) => [{ role: 'user', content }, answer];
const parse = (row: object) => parseRow(row, { takesVideos: true });
const CLIP = ['1.png', '2.png'];

test('videos: lists of frames, with a rate, one alone, frames as objects', () => {
  const messages = ask('<video>What?');
  for (const [fields, videos] of [
    [{ videos: [CLIP] }, [CLIP]],
    [{ video: CLIP }, [CLIP]],
    [{ video: [CLIP] }, [CLIP]],
    [{ videos: [{ frames: CLIP, fps: 4 }] }, [{ frames: CLIP, fps: 4 }]],
    [{ video: { frames: CLIP, fps: 0.5 } }, [{ frames: CLIP, fps: 0.5 }]],
    [{ videos: [[{ path: '1.png' }, { url: 'https://example.org/2.png' }]] }, [['1.png', 'https://example.org/2.png']]],
  ] as const) {
    const row = parse({ messages, ...fields });
    assert.deepEqual(row.videos, videos);
    assert.deepEqual(row.messages, messages);
  }
});

test('videos without a mark go before the first question, behind them its pictures', () => {
  const row = parse({ messages: ask('What?'), videos: [CLIP, CLIP], images: ['a.png'] });
  assert.equal(row.messages[0]?.content, '<video>\n<video>\n<image>\nWhat?');
  const parts = parse({ messages: ask([{ type: 'text', text: 'What?' }]), videos: [CLIP] });
  assert.deepEqual(parts.messages[0]?.content, [{ type: 'video' }, { type: 'text', text: 'What?' }]);
});

test('a video inside a content part', () => {
  const { messages, videos } = parse({ messages: ask([{ type: 'video', video: CLIP, fps: 1 }]) });
  assert.deepEqual(messages[0]?.content, [{ type: 'video', video: { frames: CLIP, fps: 1 } }]);
  assert.deepEqual(videos, []);
});

test('for a family without videos <video> is text', () => {
  const row = { messages: ask('What does <video> mean in HTML?') };
  assert.deepEqual(parseRow(row, { takesVideos: false }).messages, row.messages);
  assert.throws(() => parse(row), RowError);
});

test('objects: as they are and as JSON in text; limits of a row', () => {
  const objects = { ref: ['cat'], bbox: [[1, 2, 3, 4]], bbox_type: 'real', image_id: [0] };
  const wanted = { ref: ['cat'], bbox: [[1, 2, 3, 4]], bboxType: 'real', imageId: [0] };
  const messages = ask('<image>Find the <ref-object>: <bbox>');
  assert.deepEqual(parse({ messages, images: ['a.png'], objects }).objects, wanted);
  assert.deepEqual(parse({ messages, images: ['a.png'], objects: JSON.stringify(objects) }).objects, wanted);
  for (const none of [null, undefined, []])
    assert.equal(parse({ messages: ask('Hi'), objects: none }).objects, undefined);

  const { vision } = parse({
    messages: ask('Hi'),
    chat_template_kwargs: { max_pixels: 1000, total_pixels: 5000, fps: 0.5, min_pixels: null },
  });
  assert.deepEqual(vision, { maxPixels: 1000, videoMaxPixels: 1000, videoTotalPixels: 5000, fps: 0.5 });
});

test("Qwen-VL's own form of pictures in the text", () => {
  const messages = [
    { role: 'user', content: 'Picture 1: <img>a.jpg</img>\nPicture 2: <img>https://example.org/b c.jpg</img>\nWhich?' },
    { role: 'assistant', content: 'The second.' },
    { role: 'user', content: 'And <img>c.jpg</img>\nthis?' },
    { role: 'assistant', content: 'No.' },
  ];
  const row = parse({ messages });
  assert.deepEqual(row.images, ['a.jpg', 'https://example.org/b c.jpg', 'c.jpg']);
  assert.equal(row.messages[0]?.content, '<image><image>Which?');
  assert.equal(row.messages[2]?.content, 'And <image>\nthis?');
  const listed = parse({ messages: ask('<img>a.jpg</img><image>What?'), images: ['b.jpg'] });
  assert.equal(
    listed.messages[0]?.content,
    '<img>a.jpg</img><image>What?',
    'a row that lists its pictures is left alone',
  );
});
