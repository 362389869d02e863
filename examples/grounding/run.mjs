/**
 * Grounding from end to end: draws pictures with a coloured square each, writes them as ms-swift's rows with `objects`, trains, asks about pictures
 * that training did not see, and prints the boxes in pixels of the picture. Half a minute on a CPU.
 *
 *   npm run bootstrap && node examples/grounding/run.mjs
 */
import { mkdir, rm, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import sharp from 'sharp';
import { loadModel, trainLoRA } from '../../dist/lib/index.js';

const here = fileURLToPath(new URL('.', import.meta.url));
process.chdir(resolve(here, '../..'));
const out = resolve('output/grounding');
process.env.MARTLET_NUM_THREADS ??= '1'; // tensors this small are faster on one thread
const began = performance.now();

const [WIDTH, HEIGHT, SIDE] = [96, 64, 32];
const COLOURS = { red: '#d02020', green: '#20a040', blue: '#3050e0' };

/** The same numbers in every run. */
function generator(seed) {
  let state = seed;
  return (below) => {
    state = (state * 1103515245 + 12345) % 2 ** 31;
    return Math.floor((state / 2 ** 31) * below);
  };
}

/** Every colour at every eighth pixel, in random order. */
function squares(random) {
  const all = [];
  for (const colour of Object.keys(COLOURS))
    for (let x = 0; x <= WIDTH - SIDE; x += 8) for (let y = 0; y <= HEIGHT - SIDE; y += 8) all.push({ colour, x, y });
  for (let i = all.length - 1; i > 0; i--) {
    const j = random(i + 1);
    [all[i], all[j]] = [all[j], all[i]];
  }
  return all;
}

/** A picture on disk with the place of its square. */
async function draw({ colour, x, y }) {
  const image = join(out, 'images', `${colour}-${x}-${y}.png`);
  const square = { create: { width: SIDE, height: SIDE, channels: 3, background: COLOURS[colour] } };
  await sharp({ create: { width: WIDTH, height: HEIGHT, channels: 3, background: '#f0f0e8' } })
    .composite([{ input: await sharp(square).png().toBuffer(), left: x, top: y }])
    .png()
    .toFile(image);
  return { image, colour, box: [x, y, x + SIDE, y + SIDE] };
}

const question = '<image>Find the <ref-object>.';

await rm(out, { recursive: true, force: true });
await mkdir(join(out, 'images'), { recursive: true });
const all = squares(generator(7));
const unseen = all.splice(0, 15);
const rows = [];
for (const drawing of all) {
  const { image, colour, box } = await draw(drawing);
  rows.push({
    messages: [
      { role: 'user', content: question },
      { role: 'assistant', content: '<ref-object><bbox>' },
    ],
    images: [image],
    objects: { ref: [`${colour} square`, `${colour} square`], bbox: [box] },
  });
}
await writeFile(join(out, 'train.jsonl'), rows.map((row) => `${JSON.stringify(row)}\n`).join(''));

for await (const event of trainLoRA(join(here, 'grounding.yaml'))) {
  if (event.type === 'start') console.log(`A row as the model reads it, [[ ]] = trained:\n${event.sample}\n`);
  if (event.type === 'step') console.log(`step ${event.step}: loss ${event.loss.toFixed(3)}`);
}

const overlap = (a, b) => {
  const inside =
    Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return inside / (area(a) + area(b) - inside);
};

const model = await loadModel(join(out, 'run'), { device: 'cpu' });
let sum = 0;
console.log('\nSquares at places where training saw none of their colour:');
for (const drawing of unseen) {
  const { image, colour, box } = await draw(drawing);
  const { tokenIds } = await model.generate({
    messages: [{ role: 'user', content: question }],
    images: [image],
    objects: { ref: [`${colour} square`] },
    temperature: 0,
    maxNewTokens: 40,
  });
  let found;
  try {
    found = model.parseBoxes(tokenIds, { width: WIDTH, height: HEIGHT })[0];
  } catch (error) {
    console.log(`  ${error.message}`); // an answer whose box is none counts as no box
  }
  const share = found ? overlap(found.bbox, box) : 0;
  sum += share;
  console.log(
    `  ${colour} square at ${box.join(', ')}   answered: ${found?.label ?? '–'} at ${found?.bbox.map(Math.round).join(', ') ?? '–'}`,
  );
}
await model.dispose();
const seconds = (performance.now() - began) / 1000;
console.log(
  `\nmean overlap (intersection over union) of ${unseen.length} boxes: ${(sum / unseen.length).toFixed(2)}; ${seconds.toFixed(0)} s in all`,
);
