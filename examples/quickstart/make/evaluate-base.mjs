/** Accuracy of a base model by kind of question, on pictures it was not trained on: `node evaluate-base.mjs [model folder] [pictures]`. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { loadModel } from '../../../dist/lib/index.js';
import { random, randomScene, writePicture } from './pictures.mjs';

const [dir = fileURLToPath(new URL('../model', import.meta.url)), pictures = '100'] = process.argv.slice(2);
const QUESTIONS = {
  colour: ['What colour is it?', (scene) => scene.colour],
  shape: ['What shape is it?', (scene) => scene.shape],
  count: ['How many shapes are there?', (scene) => String(scene.count)],
  place: ['Where is it?', (scene) => scene.place],
};
const right = Object.fromEntries(Object.keys(QUESTIONS).map((kind) => [kind, 0]));
const work = await mkdtemp(join(tmpdir(), 'martlet-base-'));
const model = await loadModel(dir, { dtype: 'float32' });
const rng = random(99);
for (let i = 0; i < Number(pictures); i++) {
  const scene = randomScene(rng);
  const picture = join(work, 'picture.png');
  await writePicture(picture, scene, random(500_000 + i));
  for (const [kind, [question, expected]] of Object.entries(QUESTIONS)) {
    const messages = [{ role: 'user', content: `<image>\n${question}` }];
    const { text } = await model.generate({ messages, images: [picture], temperature: 0, maxNewTokens: 12 });
    if (text.toLowerCase().includes(expected(scene))) right[kind]++;
  }
}
await model.dispose();
await rm(work, { recursive: true });
for (const [kind, count] of Object.entries(right)) console.log(`${kind}: ${count} of ${pictures}`);
