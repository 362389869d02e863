/** Numbers and times as people read them. One place, so that the bar, `train.log` and `logging.jsonl` agree. */

/** `17m 54s`, `2h 5m 3s`, `1d 0h 12m`. */
export function duration(seconds: number): string {
  if (!Number.isFinite(seconds)) return '?';
  const total = Math.max(0, Math.round(seconds));
  const [d, h, m, s] = [
    Math.floor(total / 86400),
    Math.floor(total / 3600) % 24,
    Math.floor(total / 60) % 60,
    total % 60,
  ];
  if (d > 0) return `${d}d ${h}h ${m}m`;
  if (h > 0) return `${h}h ${m}m ${s}s`;
  return m > 0 ? `${m}m ${s}s` : `${s}s`;
}

/** `831 MiB`, `3.20 GiB`. */
export function bytes(count: number): string {
  return count < 2 ** 30 ? `${Math.round(count / 2 ** 20)} MiB` : `${gib(count).toFixed(2)} GiB`;
}

/** GiB with two decimals. */
export function gib(count: number): number {
  return Math.round((count / 2 ** 30) * 100) / 100;
}

/** `1,234,567`. */
export function integer(value: number): string {
  return Math.round(value).toLocaleString('en-US');
}

/** Four significant digits, exponent form where it is shorter: `1.049`, `9.035e-05`. */
export function significant(value: number): string {
  if (!Number.isFinite(value) || value === 0) return String(value);
  const magnitude = Math.abs(value);
  if (magnitude >= 1e-3 && magnitude < 1e6) return String(Number(value.toPrecision(4)));
  return value
    .toExponential(3)
    .replace(/\.?0*e([+-])(\d)$/, 'e$10$2')
    .replace(/\.?0*e/, 'e');
}

/** Rounds to `digits` significant digits: short JSON without false precision. */
export function rounded(value: number, digits: number): number {
  return Number.isFinite(value) ? Number(value.toPrecision(digits)) : value;
}
