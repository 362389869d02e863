/** Rows of examples/quickstart as the engine takes them. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { JobBuffers } from '../../lib/api/samples.js';
import type { SampleArg } from '../../lib/native/binding.js';
import { loadProcessor } from '../../lib/processing/index.js';
import { projectRoot } from './fixtures.js';
import { QUICKSTART_MODEL } from './process.js';

const DATA = join(projectRoot, 'examples/quickstart/data');
interface Row {
  id: string;
  image: string;
  conversations: { from: 'human' | 'gpt'; value: string }[];
}

/** The first `count` training rows as one micro-batch. */
export async function quickstartBatch(
  count: number,
): Promise<{ microBatches: SampleArg[][]; buffers: ArrayBufferView[] }> {
  const processor = await loadProcessor(QUICKSTART_MODEL, {
    template: 'default',
    exifOrientation: true,
    maxImagePixels: 2 ** 24,
  });
  const rows = JSON.parse(readFileSync(join(DATA, 'train.json'), 'utf8')) as Row[];
  const job = new JobBuffers();
  const batch: SampleArg[] = [];
  for (const { id, image, conversations } of rows.slice(0, count)) {
    const messages = conversations.map(({ from, value }) => ({
      role: from === 'human' ? ('user' as const) : ('assistant' as const),
      content: value,
    }));
    const row = { messages, images: [join(DATA, 'images', image)], id };
    batch.push(job.sample(await processor.encode(row, { for: 'train' }), id));
  }
  return { microBatches: [batch], buffers: job.buffers };
}
