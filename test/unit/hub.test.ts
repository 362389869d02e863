import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { lstat, mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { createServer, type IncomingMessage, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, beforeEach, test } from 'node:test';
import { resolveModel } from '../../lib/hub/index.js';

const FILES: Record<string, Buffer> = {
  'config.json': Buffer.from('{"model_type":"llava"}'),
  'model.safetensors': Buffer.alloc(300_000, 7),
  'pytorch_model.bin': Buffer.from('not wanted beside safetensors'),
  'nested/extra.json': Buffer.from('{}'),
  'picture.png': Buffer.from('not wanted'),
};
const SHA = 'a'.repeat(40);
const sha256 = (data: Buffer) => createHash('sha256').update(data).digest('hex');

let server: Server;
let root: string;
const kept = { ...process.env };
/** What the server saw, and how it misbehaves. */
let seen: { url: string; range: string | undefined; auth: string | undefined }[];
let cutAfter: number | undefined;
let status: number | undefined;
let failures: number;
let damage: boolean;
let badName: string | undefined;

function siblings() {
  const list = Object.entries(FILES).map(([rfilename, data]) => ({
    rfilename,
    size: data.length,
    blobId: createHash('sha1').update(data).digest('hex'),
    ...(rfilename.endsWith('.safetensors') && { lfs: { sha256: sha256(data), size: data.length } }),
  }));
  return badName === undefined ? list : [...list, { rfilename: badName, size: 1, blobId: '0'.repeat(40) }];
}

before(async () => {
  server = createServer((request: IncomingMessage, response) => {
    const url = request.url as string;
    seen.push({ url, range: request.headers.range, auth: request.headers.authorization });
    if (status !== undefined) return void response.writeHead(status).end('{}');
    if (failures > 0) {
      failures--;
      return void response.writeHead(503).end();
    }
    if (url.startsWith('/api/models/org/model'))
      return void response.end(JSON.stringify({ sha: SHA, siblings: siblings() }));
    const name = url.slice(`/org/model/resolve/${SHA}/`.length);
    const data = damage && name === 'model.safetensors' ? Buffer.alloc(300_000, 8) : FILES[name];
    if (!data) return void response.writeHead(404).end();
    const from = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? '')?.[1] ?? 0);
    response.writeHead(from > 0 ? 206 : 200, { 'content-length': data.length - from });
    if (cutAfter !== undefined && name === 'model.safetensors') {
      response.write(data.subarray(from, from + cutAfter), () => response.destroy());
      cutAfter = undefined;
    } else response.end(data.subarray(from));
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
});
after(() => {
  server.closeAllConnections();
  server.close();
});
beforeEach(async () => {
  root = await mkdtemp(join(tmpdir(), 'martlet-'));
  seen = [];
  cutAfter = status = badName = undefined;
  failures = 0;
  damage = false;
  for (const name of ['HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'HF_TOKEN']) delete process.env[name];
  process.env.HF_HOME = join(root, 'hf');
  process.env.MODELSCOPE_CACHE = join(root, 'ms');
  process.env.HF_ENDPOINT = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});
afterEach(async () => {
  process.env = { ...kept };
  await rm(root, { recursive: true });
});

test('a folder is taken as it is; without config.json it is refused; an adapter is named as such', async () => {
  const dir = join(root, 'model');
  await mkdir(dir);
  await assert.rejects(resolveModel(dir), { code: 'ERR_MARTLET_MODEL_NOT_FOUND', message: /no config\.json/ });
  await writeFile(join(dir, 'adapter_config.json'), '{}');
  await assert.rejects(resolveModel(dir), { message: /It is an adapter/ });
  await writeFile(join(dir, 'config.json'), '{}');
  assert.equal(await resolveModel(dir), dir);
  await assert.rejects(resolveModel('./no/such/dir'), { code: 'ERR_MARTLET_MODEL_NOT_FOUND', message: /no folder/ });
  assert.equal(seen.length, 0);
});

test('a download has the layout of the hub cache, only the files needed, and serves the next time without the network', async () => {
  process.env.HF_TOKEN = 'secret';
  const progress: number[] = [];
  const dir = await resolveModel('org/model', { onProgress: ({ bytes }) => progress.push(bytes) });
  const repository = join(root, 'hf', 'hub', 'models--org--model');
  assert.equal(dir, join(repository, 'snapshots', SHA));
  assert.equal(await readFile(join(repository, 'refs', 'main'), 'utf8'), SHA);
  assert.deepEqual((await readdir(dir)).sort(), ['config.json', 'model.safetensors', 'nested']);
  assert.ok((await lstat(join(dir, 'model.safetensors'))).isSymbolicLink());
  for (const name of ['config.json', 'model.safetensors', 'nested/extra.json']) {
    assert.ok((await readFile(join(dir, name))).equals(FILES[name] as Buffer), name);
  }
  assert.ok((await stat(join(repository, 'blobs', sha256(FILES['model.safetensors'] as Buffer)))).isFile());
  assert.ok(seen.every(({ auth }) => auth === 'Bearer secret'));
  assert.deepEqual(
    progress,
    [...progress].sort((a, b) => a - b),
  );
  seen = [];
  process.env.HF_HUB_OFFLINE = '1';
  assert.equal(await resolveModel('org/model'), dir);
  assert.equal(seen.length, 0);
});

test('a broken connection continues where it ended; a busy hub is asked again', async () => {
  cutAfter = 100_000;
  failures = 1;
  const dir = await resolveModel('org/model');
  assert.ok((await readFile(join(dir, 'model.safetensors'))).equals(FILES['model.safetensors'] as Buffer));
  const ranges = seen.filter(({ url }) => url.endsWith('/model.safetensors')).map(({ range }) => range);
  assert.equal(ranges.length, 2);
  assert.match(ranges[1] as string, /^bytes=[1-9]\d*-$/);
});

test('a damaged download is refused and removed', async () => {
  damage = true;
  await assert.rejects(resolveModel('org/model'), { code: 'ERR_MARTLET_HUB', message: /checksum/ });
  const blobs = await readdir(join(root, 'hf', 'hub', 'models--org--model', 'blobs'));
  assert.ok(!blobs.some((name) => name.startsWith(sha256(FILES['model.safetensors'] as Buffer))), blobs.join());
  damage = false;
  await resolveModel('org/model');
});

test('refusals name the remedy', async () => {
  status = 401;
  await assert.rejects(resolveModel('org/model'), { code: 'ERR_MARTLET_HUB', message: /HF_TOKEN/ });
  status = 404;
  await assert.rejects(resolveModel('org/model'), { code: 'ERR_MARTLET_MODEL_NOT_FOUND', message: /Check the name/ });
  process.env.HF_HUB_OFFLINE = '1';
  await assert.rejects(
    resolveModel('org/model'),
    (error: Error & { code: string; details: { searched: string[] } }) => {
      assert.equal(error.code, 'ERR_MARTLET_MODEL_NOT_FOUND');
      assert.match(error.message, /HF_HUB_OFFLINE/);
      for (const place of [join(root, 'hf', 'hub'), join(root, 'ms')])
        assert.ok(error.details.searched.includes(place));
      return true;
    },
  );
});

test('a file name that leads out of the cache is refused', async () => {
  for (const name of ['../evil.json', '/etc/evil.json', 'a/../../evil.json', 'a\\..\\evil.json']) {
    badName = name;
    await assert.rejects(resolveModel('org/model'), { code: 'ERR_MARTLET_HUB', message: /no safe path/ });
  }
});

test("ModelScope's cache is searched; a cache cut off in a download is not taken", async () => {
  process.env.HF_HUB_OFFLINE = '1';
  const dir = join(root, 'ms', 'models', 'org', 'model-1___5');
  await mkdir(dir, { recursive: true });
  await writeFile(join(dir, 'config.json'), '{}');
  await writeFile(
    join(dir, 'model.safetensors.index.json'),
    '{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}',
  );
  await writeFile(join(dir, '1.safetensors'), '');
  await assert.rejects(resolveModel('org/model-1.5'), { code: 'ERR_MARTLET_MODEL_NOT_FOUND' });
  await writeFile(join(dir, '2.safetensors'), '');
  assert.equal(await resolveModel('org/model-1.5'), dir);
});

test('an abort ends a download', async () => {
  failures = 100;
  const abort = new AbortController();
  setTimeout(() => abort.abort(), 50);
  await assert.rejects(resolveModel('org/model', { signal: abort.signal }), { name: 'AbortError' });
});
