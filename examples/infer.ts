/**
 * Asks a model about a picture in the three ways there are: a whole answer, a stream, and the score of a given answer.
 *
 *   node dist/examples/infer.js [MODEL] [IMAGE] [QUESTION]
 */
import { loadModel } from 'martlet';

const [
  modelDir = 'examples/quickstart/model',
  image = 'examples/quickstart/data/images/000.png',
  question = 'What shape is it?',
] = process.argv.slice(2);

const model = await loadModel(modelDir, { device: 'auto' });
try {
  // <image> marks where the picture goes.
  const prompt = { messages: [{ role: 'user' as const, content: `<image>\n${question}` }], images: [image] };

  // A whole answer. temperature 0 takes the likeliest token each time.
  const answer = await model.generate({ ...prompt, temperature: 0, maxNewTokens: 32 });
  console.log(`answer: ${answer.text} (${answer.usage.completionTokens} tokens, ${answer.finishReason})`);

  // The same as it comes. Leaving the loop cancels the rest.
  process.stdout.write('stream: ');
  for await (const { text } of model.stream({ ...prompt, temperature: 0, maxNewTokens: 32 }))
    process.stdout.write(text);
  process.stdout.write('\n');

  // How likely the model finds an answer: one log-probability for each of its tokens.
  const { loss, logprobs } = await model.score({
    messages: [...prompt.messages, { role: 'assistant', content: answer.text }],
    images: prompt.images,
  });
  console.log(`score: loss ${loss.toFixed(4)} over ${logprobs.length} tokens`);
} finally {
  // Frees the weights and ends the model's thread.
  await model.dispose();
}
