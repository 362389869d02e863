import assert from 'node:assert/strict';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import sharp from 'sharp';
import { drawBoxes } from '../../lib/index.js';

let root: string;
before(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
});
after(() => rm(root, { recursive: true }));

const WIDTH = 200;
const HEIGHT = 100;
const grey = () =>
  sharp({ create: { width: WIDTH, height: HEIGHT, channels: 3, background: { r: 128, g: 128, b: 128 } } })
    .png()
    .toBuffer();

/** Whether the picture differs from grey at a place. */
async function drawn(picture: Buffer): Promise<(x: number, y: number) => boolean> {
  const { data, info } = await sharp(picture).raw().toBuffer({ resolveWithObject: true });
  assert.deepEqual([info.width, info.height, info.channels], [WIDTH, HEIGHT, 3]);
  return (x, y) => {
    const at = (y * WIDTH + x) * 3;
    return [0, 1, 2].some((c) => Math.abs((data[at + c] as number) - 128) > 30);
  };
}

test('an answer of Qwen-VL: the box stands where its thousandths say', async () => {
  const at = await drawn(await drawBoxes(await grey(), '<ref>a</ref><box>(250,200),(750,800)</box> and more'));
  // edges at x 50 and 150, y 20 and 80
  assert.ok(at(50, 60) && at(150, 60) && at(120, 20) && at(120, 80));
  assert.ok(!at(100, 60) && !at(10, 60) && !at(180, 60) && !at(120, 95));
});

test('quadrangles, points, and boxes in pixels', async () => {
  const quad = await drawn(await drawBoxes(await grey(), '<quad>(100,100),(900,100),(900,900),(100,900)</quad>'));
  assert.ok(quad(20, 50) && quad(180, 50) && !quad(100, 50));
  const point = await drawn(await drawBoxes(await grey(), '<box>(500,500)</box>'));
  assert.ok(point(100, 50) && !point(130, 50));
  const pixels = await drawn(await drawBoxes(await grey(), [{ bbox: [10, 10, 60, 60] }]));
  assert.ok(pixels(10, 40) && pixels(60, 40) && !pixels(100, 40));
});

test('an answer without a box leaves the picture as it is', async () => {
  const at = await drawn(await drawBoxes(await grey(), 'There is none.'));
  for (let x = 0; x < WIDTH; x++) assert.ok(!at(x, 50));
});

test('names are text, whatever is in them', async () => {
  const names = [
    '</text><rect width="200" height="100" fill="red"/>',
    '<image href="file:///etc/passwd"/>',
    '&xxe; ]]> <!ENTITY',
    'a\u0000b\u0007c\uD800d\uFFFF',
    '猫 "quoted" \'single\' 🙂',
    'x'.repeat(5000),
  ];
  for (const name of names) {
    const at = await drawn(await drawBoxes(await grey(), [{ label: name, bbox: [10, 10, 60, 60] }]));
    assert.ok(at(10, 40), name);
    assert.ok(!at(150, 90), `nothing but the box and its name is drawn: ${name}`);
  }
});

test('the EXIF orientation counts, as it does for the model', async () => {
  const turned = await sharp({ create: { width: HEIGHT, height: WIDTH, channels: 3, background: '#808080' } })
    .jpeg()
    .withMetadata({ orientation: 6 })
    .toBuffer();
  const at = await drawn(await drawBoxes(turned, '<box>(250,200),(750,800)</box>'));
  assert.ok(at(50, 50) && !at(100, 50));
  const { info } = await sharp(await drawBoxes(turned, 'none', { exifOrientation: false }))
    .raw()
    .toBuffer({ resolveWithObject: true });
  assert.deepEqual([info.width, info.height], [HEIGHT, WIDTH]);
});

describe('output', () => {
  test('the file is the picture that is returned, of the format that its ending says', async () => {
    for (const [name, format] of [
      ['a.png', 'png'],
      ['b.JPG', 'jpeg'],
      ['c.webp', 'webp'],
    ] as const) {
      const output = join(root, name);
      const picture = await drawBoxes(await grey(), '<box>(1,1),(500,500)</box>', { output });
      assert.deepEqual(await readFile(output), picture);
      assert.equal((await sharp(output).metadata()).format, format);
    }
    assert.deepEqual((await readdir(root)).sort(), ['a.png', 'b.JPG', 'c.webp']);
  });

  test('what cannot be drawn writes nothing', async () => {
    const output = join(root, 'none.png');
    await assert.rejects(drawBoxes(await grey(), '<box>(1,2),(3', { output }), { code: 'ERR_MARTLET_USAGE' });
    await assert.rejects(drawBoxes(join(root, 'absent.png'), 'x', { output }), { code: 'ERR_MARTLET_IMAGE' });
    await assert.rejects(drawBoxes(await grey(), 'x', { output: join(root, 'a.gif') }), { code: 'ERR_MARTLET_USAGE' });
    await assert.rejects(drawBoxes(await grey(), 'x', { output: join(root, 'absent', 'a.png') }), {
      code: 'ERR_MARTLET_IO',
    });
    assert.ok(!(await readdir(root)).includes('none.png'));
  });
});
