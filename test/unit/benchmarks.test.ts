import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { pathToFileURL } from 'node:url';
import { projectRoot } from '../support/fixtures.js';

const { MEASURES } = await import(pathToFileURL(join(projectRoot, 'scripts/benchmarks/figures.mjs')).href);
const readJson = (path: string) => JSON.parse(readFileSync(join(projectRoot, path), 'utf8'));

test('docs/benchmarks.md and its charts are what the results in bench/results give', () => {
  const script = join(projectRoot, 'scripts/generate-benchmarks.mjs');
  const { status, stderr } = spawnSync(process.execPath, [script, '--check'], { encoding: 'utf8' });
  assert.equal(status, 0, stderr);
});

test('bounds name shapes and measures that there are, and one limit', () => {
  const shapes = readJson('bench/shapes.json');
  for (const { text, shape, measure, atLeast, atMost } of readJson('bench/bounds.json')) {
    assert.ok(shape in shapes, `${text}: ${shape}`);
    assert.ok(measure in MEASURES, `${text}: ${measure}`);
    assert.equal(typeof (atLeast ?? atMost), 'number', text);
    assert.ok(atLeast === undefined || atMost === undefined, text);
  }
});

test('measures of a result', () => {
  const result = {
    modelBytes: 12e9,
    fp8Gate: { lossShare: 0.002, cosine: 0.995 },
    curve: { share: 0.004 },
    prompt: { tokens: 90, newTokens: 20 },
    runs: [
      { side: 'device', kind: 'bandwidth', copyBytesPerSecond: [2e12, 3e12, 4e12] },
      { side: 'martlet', kind: 'load', seconds: 2, quantization: 'none', tokenBytes: { weights: 10e9, position: 1e6 } },
      { side: 'martlet', kind: 'load', seconds: 3, quantization: 'nf4', tokenBytes: { weights: 3e9, position: 0 } },
      { side: 'peer-tuned', kind: 'load', mode: 'tuned', seconds: 6 },
      // Neither setting was written by early versions: one answer, unquantised weights.
      {
        side: 'martlet',
        kind: 'decode',
        tokensPerSecond: [200, 210, 220],
        firstTokenSeconds: [0.02],
        peakAllocated: 1,
      },
      {
        ...{ side: 'martlet', kind: 'decode', batch: 1, quantization: 'nf4' },
        ...{ tokensPerSecond: [500], firstTokenSeconds: [0.05], peakAllocated: 1 },
      },
      {
        side: 'peer-tuned',
        kind: 'decode',
        batch: 1,
        tokensPerSecond: [100],
        firstTokenSeconds: [0.06],
        peakAllocated: 1,
      },
      // Two rounds of one setting; another setting; a method of its own.
      ...[1000, 1200].map((tokensPerSecond) => ({
        ...{ side: 'martlet', kind: 'train', batch: 8, recompute: false, tokensPerSecond },
        ...{ tokens: 100, p10: 0.1, p90: 0.2, peakAllocated: 2 ** 31 },
      })),
      { side: 'martlet', kind: 'train', batch: 8, recompute: true, tokensPerSecond: 1, tokens: 1, p10: 1, p90: 1 },
      {
        side: 'peer-tuned',
        kind: 'train',
        batch: 8,
        recompute: false,
        tokensPerSecond: 550,
        tokens: 1,
        p10: 1,
        p90: 1,
      },
      { side: 'peer-default', kind: 'train', batch: 8, recompute: false, error: 'out of memory' },
      ...['lora', 'nf4'].map((method, i) => ({
        ...{ side: 'martlet', kind: 'train', method, batch: 4, recompute: 'none', tokensPerSecond: 1000 - 50 * i },
        ...{ tokens: 1, p10: 1, p90: 1, peakAllocated: 8 * 2 ** 30 },
      })),
      ...[
        { side: 'martlet', method: 'fp8', tokensPerSecond: 1500 },
        { side: 'peer-tuned', method: 'lora', tokensPerSecond: 1000 },
      ].map((run) => ({ kind: 'train', batch: 8, recompute: 'none', tokens: 1, p10: 1, p90: 1, ...run })),
      { side: 'copy', kind: 'merge', mergeSeconds: 5 },
      { side: 'martlet', kind: 'merge', mergeSeconds: 6 },
      { side: 'peer-tuned', kind: 'merge', mergeSeconds: 18 },
      { side: 'martlet', kind: 'data', dataWait: 0.01 },
    ],
  };
  const setting = { batch: 8, recompute: false };
  const expected: [string, object, number | undefined][] = [
    ['trainRatio', { side: 'peer-tuned', ...setting }, 2],
    ['trainRatio', { side: 'peer-default', ...setting }, undefined],
    ['trainPeak', setting, 2],
    ['methodRatio', { method: 'nf4', to: 'lora', batch: 4, recompute: 'none' }, 0.95],
    ['methodPeak', { method: 'nf4', batch: 4, recompute: 'none' }, 8],
    ['methodOverPeer', { side: 'peer-tuned', method: 'fp8', batch: 8, recompute: 'none' }, 1.5],
    ['methodOverPeer', { side: 'peer-default', method: 'fp8', batch: 8, recompute: 'none' }, undefined],
    ['fp8Loss', {}, 0.2],
    ['fp8Cosine', {}, 0.995],
    ['fp8Curve', {}, 0.4],
    ['decodeRatio', { side: 'peer-tuned', answers: 1 }, 2.1],
    ['firstTokenRatio', { side: 'peer-tuned' }, 3],
    // 210 tokens/s of 10 GB and 100 positions of 1 MB, of 3 TB/s
    ['bandwidthShare', { weights: 'none' }, (210 * 10.1) / 3000],
    ['bandwidthShare', { weights: 'nf4' }, 0.5],
    ['bandwidthShare', { weights: 'int8' }, undefined],
    ['loadRate', {}, 6],
    ['loadRatio', {}, 3],
    ['mergeOverCopy', {}, 1.2],
    ['mergeRatio', {}, 3],
    ['visionRatio', { attention: 'sdpa' }, undefined],
    ['dataWait', {}, 0.01],
  ];
  for (const [name, of, value] of expected) {
    const found = MEASURES[name](result, of);
    if (value === undefined) assert.equal(found, undefined, name);
    else assert.ok(Math.abs(found - value) < 1e-9, `${name} ${JSON.stringify(of)}: ${found}, not ${value}`);
  }
});
