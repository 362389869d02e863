/** Bar charts as SVG, in the page's light and dark colours. */

const COLOURS = { martlet: '#1f6feb', 'peer-default': '#8b949e', 'peer-tuned': '#bf8700', copy: '#57606a' };
const [LABEL, BAR, VALUE, ROW, HEAD] = [330, 380, 90, 24, 44];
const escaped = (text) => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;');

/**
 * Horizontal bars, those of one group beside each other. `bars`: { group, side, name, value, text }, the text beside the bar; without a value only the
 * text stands there.
 */
export function barChart(title, bars) {
  const highest = Math.max(...bars.map(({ value = 0 }) => value));
  const parts = [];
  let y = HEAD;
  let group;
  for (const bar of bars) {
    if (group !== undefined && bar.group !== group) y += ROW / 2;
    const label = bar.group === group ? bar.name : `${bar.group}: ${bar.name}`;
    group = bar.group;
    const width = bar.value ? Math.max(2, Math.round((bar.value / highest) * BAR)) : 0;
    parts.push(
      `<text x="${LABEL - 8}" y="${y + 15}" text-anchor="end">${escaped(label)}</text>`,
      `<rect x="${LABEL}" y="${y + 3}" width="${width}" height="${ROW - 6}" rx="2" fill="${COLOURS[bar.side]}"/>`,
      `<text x="${LABEL + width + 6}" y="${y + 15}">${escaped(bar.text)}</text>`,
    );
    y += ROW;
  }
  const [width, height] = [LABEL + BAR + VALUE, y + 12];
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" role="img" aria-label="${escaped(title)}">
<style>text{font:12px system-ui,sans-serif;fill:#57606a}.title{font-weight:600;font-size:14px}@media(prefers-color-scheme:dark){text{fill:#adbac7}}</style>
<text class="title" x="8" y="24">${escaped(title)}</text>
${parts.join('\n')}
</svg>
`;
}
