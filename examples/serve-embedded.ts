/**
 * A model inside a plain node:http server: answers are streamed, and a client that goes away stops its answer.
 *
 *   PORT=8080 node dist/examples/serve-embedded.js [MODEL]
 *   curl -N localhost:8080/answer -d '{"image": "examples/quickstart/data/images/000.png", "text": "What shape is it?"}'
 *
 * The image is a path on this machine, a URL or a data URI: put your own check of what a client may ask for in front of it.
 */
import { createServer, type IncomingMessage } from 'node:http';
import type { AddressInfo } from 'node:net';
import { json } from 'node:stream/consumers';
import { loadModel, MartletError } from 'martlet';

const model = await loadModel(process.argv[2] ?? 'examples/quickstart/model');

async function readQuestion(request: IncomingMessage): Promise<{ image: string; text: string }> {
  const { image, text } = (await json(request)) as { image?: unknown; text?: unknown };
  if (typeof image !== 'string' || typeof text !== 'string') throw new SyntaxError('image and text must be strings');
  return { image, text };
}

const server = createServer(async (request, response) => {
  if (request.method !== 'POST' || request.url !== '/answer') {
    response.writeHead(404).end('POST /answer\n');
    return;
  }
  // Aborted when the connection closes; after a finished answer that changes nothing.
  const client = new AbortController();
  response.on('close', () => client.abort());
  try {
    const { image, text } = await readQuestion(request);
    // Questions wait in the model's queue; generating runs on the model's own thread, so the server keeps accepting.
    const answer = model.stream({
      messages: [{ role: 'user', content: `<image>\n${text}` }],
      images: [image],
      maxNewTokens: 256,
      signal: client.signal,
    });
    for await (const { text } of answer) response.write(text);
    response.end('\n');
  } catch (error) {
    if (client.signal.aborted) console.log('the client left; its answer was stopped');
    else if (response.headersSent) response.destroy();
    else if (error instanceof MartletError) response.writeHead(422).end(`${JSON.stringify(error)}\n`);
    else response.writeHead(400).end(`${(error as Error).message}\n`);
  }
});

server.listen(Number(process.env.PORT ?? 8080), () => {
  console.log(`listening on port ${(server.address() as AddressInfo).port}`);
});

// Ctrl-C: take no more questions, let those that run end, free the model.
process.once('SIGINT', () => {
  server.close(() => model.dispose());
});
