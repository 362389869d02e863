/**
 * `node bench/kernels.mjs FILE.csv [MARKER]`: time by kernel, from what `ncu --metrics gpu__time_duration.sum --print-units base --csv` wrote. With a
 * marker, part of the name of a kernel that runs once a step: of what lies between its last two runs. Else of all.
 */
import { readFileSync } from 'node:fs';

const [file, marker] = process.argv.slice(2);
const cells = (line) => [...line.matchAll(/"((?:[^"]|"")*)"/g)].map((match) => match[1]);
const lines = readFileSync(file, 'utf8').split('\n');
const start = lines.findIndex((line) => line.startsWith('"ID"'));
if (start < 0) throw new Error(`${file} has no table: ${lines.slice(0, 5).join(' | ')}`);
const header = cells(lines[start]);
const [kernel, value] = ['Kernel Name', 'Metric Value'].map((name) => header.indexOf(name));
let rows = lines
  .slice(start + 1)
  .map(cells)
  .filter((row) => row.length === header.length);
if (marker) {
  const [first, last] = rows.flatMap((row, i) => (row[kernel].includes(marker) ? [i] : [])).slice(-2);
  if (last === undefined) throw new Error(`${file} has no two kernels with ${marker} in their names`);
  rows = rows.slice(first, last);
}
const sums = new Map();
let total = 0;
for (const row of rows) {
  const milliseconds = Number(row[value].replaceAll(',', '')) / 1e6;
  // Template arguments make names of hundreds of characters; the first hundred tell kernels apart.
  const name = row[kernel].replaceAll(/at::native::|<unnamed>::|\(anonymous namespace\)::|void /g, '').slice(0, 100);
  const sum = sums.get(name) ?? { milliseconds: 0, count: 0 };
  sum.milliseconds += milliseconds;
  sum.count++;
  sums.set(name, sum);
  total += milliseconds;
}
console.log(`${total.toFixed(2)} ms of ${rows.length} kernels`);
for (const [name, { milliseconds, count }] of [...sums]
  .sort((a, b) => b[1].milliseconds - a[1].milliseconds)
  .slice(0, 40))
  console.log(`${milliseconds.toFixed(2).padStart(8)} ms ${String(count).padStart(6)} ×  ${name}`);
