/** `node bench/kernels.mjs FILE.csv STEPS`: time by kernel, from what `ncu --metrics gpu__time_duration.sum --print-units base --csv` wrote. */
import { readFileSync } from 'node:fs';

const [file, steps] = [process.argv[2], Number(process.argv[3])];
const cells = (line) => [...line.matchAll(/"((?:[^"]|"")*)"/g)].map((match) => match[1]);
const lines = readFileSync(file, 'utf8').split('\n');
const start = lines.findIndex((line) => line.startsWith('"ID"'));
if (start < 0) throw new Error(`${file} has no table: ${lines.slice(0, 5).join(' | ')}`);
const header = cells(lines[start]);
const [kernel, value] = ['Kernel Name', 'Metric Value'].map((name) => header.indexOf(name));
const sums = new Map();
let total = 0;
for (const line of lines.slice(start + 1)) {
  const row = cells(line);
  if (row.length !== header.length) continue;
  const milliseconds = Number(row[value].replaceAll(',', '')) / 1e6 / steps;
  // Template arguments make names of hundreds of characters; the first hundred tell kernels apart.
  const name = row[kernel].replaceAll(/at::native::|<unnamed>::|\(anonymous namespace\)::|void /g, '').slice(0, 100);
  const sum = sums.get(name) ?? { milliseconds: 0, count: 0 };
  sum.milliseconds += milliseconds;
  sum.count += 1 / steps;
  sums.set(name, sum);
  total += milliseconds;
}
console.log(`${total.toFixed(1)} ms of kernels a step`);
for (const [name, { milliseconds, count }] of [...sums]
  .sort((a, b) => b[1].milliseconds - a[1].milliseconds)
  .slice(0, 40))
  console.log(`${milliseconds.toFixed(2).padStart(8)} ms ${count.toFixed(0).padStart(6)} ×  ${name}`);
