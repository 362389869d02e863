/** Device memory: what a model holds comes back, and a job that asks for too much leaves the model as it was. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { loadModel } from '../../lib/index.js';
import type { SampleArg, SystemInfo } from '../../lib/native/binding.js';
import { Engine } from '../../lib/native/engine.js';
import { loadAddon } from '../../lib/native/load.js';
import { device } from '../support/device.js';
import { llava } from '../support/fixtures.js';
import { lora } from '../support/llava-parity.js';
import { LONG_QUESTION, QUICKSTART_MODEL } from '../support/process.js';
import { MODEL } from '../support/train.js';

assert.ok(device.startsWith('cuda'), 'these tests ask for more memory than there is: on a GPU only');

const MB = 2 ** 20;
/** Free memory of the device, in bytes. */
function free(): number {
  const { devices } = JSON.parse(loadAddon().addon.systemInfo()) as SystemInfo;
  const found = devices.find(({ name }) => name.startsWith(device));
  assert.ok(found && found.totalMemory > 0);
  return found.freeMemory;
}

/** `count` rows of 300 tokens without pictures, half of each labelled. They share their buffers. */
function manyRows(count: number): { microBatches: SampleArg[][]; buffers: Int32Array[] } {
  const inputIds = Int32Array.from({ length: 300 }, (_, i) => (i * 7) % 400);
  const labels = inputIds.map((id, i) => (i < 150 ? -100 : id));
  const row = { inputIds: 0, labels: 1, images: [] };
  return { microBatches: [Array.from({ length: count }, () => row)], buffers: [inputIds, labels] };
}

const { adapterDir: _, ...fresh } = lora;
const begin = { ...fresh, learningRate: 0, schedule: { type: 'constant', warmupSteps: 0, totalSteps: 10 } } as const;

async function openTraining(): Promise<Engine> {
  const engine = new Engine();
  await engine.call('load', { modelDir: QUICKSTART_MODEL, device, dtype: 'bfloat16' });
  await engine.call('train.begin', begin);
  return engine;
}

test('out of memory: the code, what was asked for and what was free; the model goes on as before', async () => {
  const engine = await openTraining();
  const small = manyRows(8);
  const step = async () =>
    (await engine.call('train.step', { microBatches: small.microBatches }, { buffers: small.buffers })).result;
  const before = await step();
  const { microBatches, buffers } = manyRows(50_000); // 15 million tokens: some 500 GB
  await assert.rejects(engine.call('train.step', { microBatches }, { buffers }), (error: unknown) => {
    const { code, message, details } = error as { code: string; message: string; details: Record<string, number> };
    assert.equal(code, 'ERR_MARTLET_OUT_OF_MEMORY', message);
    assert.match(message, /smaller batch.*gradient_checkpointing/);
    assert.ok((details.requested as number) > 100 * MB, JSON.stringify(details));
    assert.ok((details.free as number) < (details.requested as number), JSON.stringify(details));
    return true;
  });
  const { result: stats } = await engine.call('stats', {});
  assert.ok(stats.reserved < 2000 * MB, `${stats.reserved} bytes are still held`);
  // A learning rate of 0 leaves the weights as they are, so the loss is the same.
  const later = await step();
  assert.equal(later.step, before.step + 1, 'the failed step was not counted');
  assert.ok(Math.abs(later.loss / before.loss - 1) < 1e-3, `${later.loss} ${before.loss}`);
  await engine.close();
});

test('dispose gives the device memory back', async () => {
  const round = async () => {
    const engine = await openTraining();
    const { microBatches, buffers } = manyRows(400);
    const { result } = await engine.call('train.step', { microBatches }, { buffers });
    const held = free();
    await engine.close();
    return { held, after: free(), peak: result.memory.peakAllocated };
  };
  const first = await round(); // the context and the libraries' workspaces come with it and stay
  assert.ok(first.peak > 500 * MB, `the step takes memory worth looking for: ${first.peak}`);
  assert.ok(first.after - first.held > 300 * MB, JSON.stringify(first));
  for (let i = 0; i < 5; i++) {
    const { after } = await round();
    assert.ok(Math.abs(after - first.after) < 64 * MB, `round ${i}: ${after} free, ${first.after} after the first`);
  }
  const model = await loadModel(QUICKSTART_MODEL, { device: device as 'cuda' });
  await model.generate({ ...LONG_QUESTION, maxNewTokens: 20 });
  await model.dispose();
  await model.dispose();
  assert.ok(Math.abs(free() - first.after) < 64 * MB);
});

test('a job of a model on the GPU that fails while it loads leaves nothing there', async () => {
  const warm = await loadModel(MODEL, { device: device as 'cuda' });
  await warm.dispose();
  const before = free();
  await assert.rejects(loadModel(`${llava}/adapter-peft`, { device: device as 'cuda' }));
  const abort = new AbortController();
  await assert.rejects(
    loadModel(QUICKSTART_MODEL, {
      device: device as 'cuda',
      signal: abort.signal,
      onProgress: () => abort.abort(),
    }),
    { code: 'ERR_MARTLET_ABORTED' },
  );
  assert.ok(Math.abs(free() - before) < 32 * MB);
});
