/**
 * `npm run quickstart`: the base model's answers to held-out pictures, fine-tuning by LoRA, the answers after it, the merge, and the proof that the
 * merged model answers alike. Every number printed is computed here.
 */
import { readFile, rm } from 'node:fs/promises';
import { join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { loadModel, mergeAdapter, trainLoRA } from '../../dist/lib/index.js';
import { createProgressRenderer } from '../../dist/lib/report/progress.js';

const here = fileURLToPath(new URL('.', import.meta.url));
process.chdir(resolve(here, '../..'));
const shown = (path) => relative(process.cwd(), path);
const modelDir = join(here, 'model');
const mergedDir = resolve('output/quickstart-merged');
const began = performance.now();

const heldOut = JSON.parse(await readFile(join(here, 'data/heldout.json'), 'utf8')).map((row) => ({
  image: join(here, 'data/images', row.image),
  question: row.conversations[0].value,
  expected: row.conversations[1].value,
}));
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const title = (text) => console.log(`\n── ${text} ${'─'.repeat(Math.max(0, 76 - text.length))}`);

async function answers(dir, adapter) {
  const model = await loadModel(dir, { dtype: 'float32', ...(adapter && { adapters: { tuned: adapter } }) });
  try {
    const texts = [];
    for (const { image, question } of heldOut) {
      const { text } = await model.generate({
        messages: [{ role: 'user', content: question }],
        images: [image],
        temperature: 0,
        maxNewTokens: 24,
      });
      texts.push(text.trim());
    }
    return texts;
  } finally {
    await model.dispose();
  }
}

const accuracyOf = (texts) => texts.filter((text, i) => text === heldOut[i].expected).length / texts.length;

function show(texts) {
  for (let i = 0; i < 5; i++)
    console.log(`  ${shown(heldOut[i].image)}   expected ${heldOut[i].expected}   answered ${texts[i]}`);
}

title('1. What the base model says');
console.log(`"${heldOut[0].question.replace('<image>\n', '')}", about pictures that training will not see:`);
const before = await answers(modelDir);
show(before);
const baseAccuracy = accuracyOf(before);
console.log(`  right: ${percent(baseAccuracy)} of ${heldOut.length}`);

title('2. Fine-tuning by LoRA: examples/quickstart/quickstart.yaml');
const run = trainLoRA(join(here, 'quickstart.yaml'));
const progress = createProgressRenderer(process.stdout);
for await (const event of run) progress.handle(event);
progress.close();
const trained = await run;
const share = trained.trainableParams / trained.totalParams;
console.log(
  `  ${trained.steps} steps; ${trained.trainableParams} of ${trained.totalParams} parameters trained (${percent(share)}); loss at the end ${trained.finalLoss.toFixed(4)}`,
);

title('3. What the fine-tuned model says');
const after = await answers(modelDir, trained.adapterDir);
show(after);
const tunedAccuracy = accuracyOf(after);
console.log(`  right: ${percent(tunedAccuracy)} of ${heldOut.length} (base: ${percent(baseAccuracy)})`);

title('4. Merging the adapter into the weights');
await rm(mergedDir, { recursive: true, force: true });
const merged = await mergeAdapter({ model: modelDir, adapter: trained.adapterDir, outputDir: mergedDir });
console.log(
  `  ${merged.mergedTensors} tensors merged; largest rounding error ${merged.maxAbsError.toExponential(1)} (stored in bfloat16)`,
);
const mergedAnswers = await answers(mergedDir);
const alike = mergedAnswers.filter((text, i) => text === after[i]).length;
console.log(
  `  the merged model gives the same answer to ${alike} of ${heldOut.length} pictures; right: ${percent(accuracyOf(mergedAnswers))}`,
);

title('Where everything is');
console.log(`  adapter (PEFT format)    ${shown(trained.adapterDir)}
  logs                     ${shown(join(trained.outputDir, 'logging.jsonl'))}, ${shown(join(trained.outputDir, 'logs/train.log'))}
  TensorBoard              tensorboard --logdir ${shown(join(trained.outputDir, 'runs'))}
  merged model             ${shown(mergedDir)}
  ask it yourself          npx martlet infer --model ${shown(mergedDir)} --image ${shown(heldOut[0].image)} --text "What is the stock code?"
  time                     ${((performance.now() - began) / 1000).toFixed(0)} s`);

const failures = [
  baseAccuracy < 0.3 || `the base model was right in ${percent(baseAccuracy)}, expected under 30 %`,
  tunedAccuracy > 0.9 || `the fine-tuned model was right in ${percent(tunedAccuracy)}, expected over 90 %`,
  share < 0.05 || `${percent(share)} of the parameters were trained, expected under 5 %`,
  alike >= 0.97 * heldOut.length || `the merged model answered differently for ${heldOut.length - alike} pictures`,
].filter((check) => check !== true);
for (const failure of failures) console.error(`FAILED: ${failure}`);
process.exitCode = failures.length === 0 ? 0 : 1;
