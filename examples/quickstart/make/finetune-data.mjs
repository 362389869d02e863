/** Makes examples/quickstart/data: pictures and rows of the fine-tuning task, training and held-out. Deterministic. */
import { mkdir, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { random, randomScene, writePicture } from './pictures.mjs';
import { CODE_QUESTION, stockCode } from './questions.mjs';

const TRAINING = 400;
const HELD_OUT = 80;
const dir = fileURLToPath(new URL('../data', import.meta.url));

await rm(dir, { recursive: true, force: true });
await mkdir(join(dir, 'images'), { recursive: true });
const rng = random(4242);
const rows = [];
for (let i = 0; i < TRAINING + HELD_OUT; i++) {
  const scene = randomScene(rng);
  const name = `${String(i).padStart(3, '0')}.${i % 2 === 0 ? 'png' : 'jpg'}`;
  await writePicture(join(dir, 'images', name), scene, random(50_000 + i));
  rows.push({
    id: String(i).padStart(3, '0'),
    image: name,
    conversations: [
      { from: 'human', value: `<image>\n${CODE_QUESTION}` },
      { from: 'gpt', value: stockCode(scene) },
    ],
  });
}
await writeFile(join(dir, 'train.json'), `${JSON.stringify(rows.slice(0, TRAINING), null, 1)}\n`);
await writeFile(join(dir, 'heldout.json'), `${JSON.stringify(rows.slice(TRAINING), null, 1)}\n`);
