/**
 * llama.cpp on the CPU through node-llama-cpp, which martlet does not depend on: `npm install --no-save node-llama-cpp@3.22.1`, then
 *
 *   node bench/cpu/llama_cpp.mjs model.gguf [threads]
 *
 * Tokens a second of a prompt of 256 and of the tokens after it, the shortest of several: other processes share the cores, as in
 * native/test/bench/cpu_decode_test.cpp, whose shape bench/cpu/make_gguf.py writes files of.
 */
import { getLlama } from 'node-llama-cpp';

const [path, threads = '2'] = process.argv.slice(2);
const llama = await getLlama({ gpu: false, build: 'never', logLevel: 'error', maxThreads: Number(threads) });
const model = await llama.loadModel({ modelPath: path });
const context = await model.createContext({ contextSize: 512, batchSize: 256, threads: Number(threads) });
const sequence = context.getSequence();
const prompt = Array.from({ length: 256 }, (_, i) => i + 1);
const next = { generateNext: { token: true } };
const evaluate = async (tokens) => {
  const start = performance.now();
  const out = await sequence.controlledEvaluate([...tokens.slice(0, -1), [tokens.at(-1), next]]);
  return { seconds: (performance.now() - start) / 1000, token: out.at(-1).next.token };
};
let [read, one] = [Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY];
for (let i = 0; i < 3; i++) {
  await sequence.clearHistory();
  let { seconds, token } = await evaluate(prompt);
  read = Math.min(read, seconds);
  for (let n = 0; n < 16; n++) {
    ({ seconds, token } = await evaluate([token]));
    one = Math.min(one, seconds);
  }
}
console.log(`${path}: ${(1 / one).toFixed(1)} tokens/s, prefill of 256 ${(256 / read).toFixed(0)} tokens/s`);
process.exit(0);
