/** Generated pictures: one group of 1 to 4 equal shapes of one colour in one part of the picture. Seeded, so every file can be made again. */
import sharp from 'sharp';

export const COLOURS = {
  red: [214, 40, 40],
  green: [46, 160, 67],
  blue: [40, 90, 220],
  yellow: [240, 205, 40],
  purple: [140, 60, 180],
  black: [30, 30, 34],
};
export const SHAPES = ['circle', 'square', 'triangle', 'cross'];
export const PLACES = ['left', 'right', 'top', 'bottom', 'middle'];
export const COUNTS = [1, 2, 3, 4];

/** mulberry32: numbers in [0, 1), the same for the same seed everywhere. */
export function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

export const pick = (list, rng) => list[Math.floor(rng() * list.length)];

export function randomScene(rng) {
  return {
    colour: pick(Object.keys(COLOURS), rng),
    shape: pick(SHAPES, rng),
    count: pick(COUNTS, rng),
    place: pick(PLACES, rng),
  };
}

// Centres in a square of side 1; the group's members stand at these offsets from its centre.
const CENTRES = { left: [0.28, 0.5], right: [0.72, 0.5], top: [0.5, 0.28], bottom: [0.5, 0.72], middle: [0.5, 0.5] };
const LAYOUTS = {
  1: [[0, 0]],
  2: [
    [-0.5, 0],
    [0.5, 0],
  ],
  3: [
    [-0.5, 0.45],
    [0.5, 0.45],
    [0, -0.45],
  ],
  4: [
    [-0.5, -0.5],
    [0.5, -0.5],
    [-0.5, 0.5],
    [0.5, 0.5],
  ],
};

const INSIDE = {
  circle: (x, y) => x * x + y * y <= 1,
  square: (x, y) => Math.abs(x) <= 0.92 && Math.abs(y) <= 0.92,
  triangle: (x, y) => y <= 0.85 && y >= -0.95 && Math.abs(x) <= ((y + 0.95) / 1.8) * 1.05,
  cross: (x, y) => (Math.abs(x) <= 0.34 && Math.abs(y) <= 1) || (Math.abs(y) <= 0.34 && Math.abs(x) <= 1),
};

/** Raw RGB of a scene. Shapes stay inside the centre square, which is what the processor's crop keeps. */
export function draw(scene, width, height, rng) {
  const side = Math.min(width, height);
  const [x0, y0] = [(width - side) / 2, (height - side) / 2];
  const base = [205 + rng() * 45, 205 + rng() * 45, 205 + rng() * 45];
  const tilt = [(rng() - 0.5) * 24, (rng() - 0.5) * 24];
  const ink = COLOURS[scene.colour].map((value) => Math.max(0, Math.min(255, value + (rng() - 0.5) * 24)));
  const radius = (0.1 + rng() * 0.025) * side;
  const spread = radius * 2.3;
  const [cx, cy] = CENTRES[scene.place].map((value) => value + (rng() - 0.5) * 0.06);
  const members = LAYOUTS[scene.count].map(([dx, dy]) => [
    x0 + cx * side + dx * spread + (rng() - 0.5) * radius * 0.2,
    y0 + cy * side + dy * spread + (rng() - 0.5) * radius * 0.2,
  ]);
  const inside = INSIDE[scene.shape];
  const data = new Uint8Array(width * height * 3);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let covered = 0;
      for (const [mx, my] of members) {
        if (Math.abs(x - mx) > radius + 1 || Math.abs(y - my) > radius + 1) continue;
        // four samples a pixel: soft edges
        for (const [sx, sy] of [
          [0.25, 0.25],
          [0.75, 0.25],
          [0.25, 0.75],
          [0.75, 0.75],
        ]) {
          if (inside((x + sx - mx) / radius, (y + sy - my) / radius)) covered += 0.25;
        }
      }
      covered = Math.min(1, covered);
      const shade = (tilt[0] * x) / width + (tilt[1] * y) / height;
      const at = (y * width + x) * 3;
      for (let c = 0; c < 3; c++)
        data[at + c] = Math.max(0, Math.min(255, covered * ink[c] + (1 - covered) * (base[c] + shade)));
    }
  }
  return data;
}

/** Sizes that pictures come in; the model's own is 96 × 96. */
const SIZES = [
  [96, 96],
  [96, 96],
  [96, 96],
  [128, 128],
  [144, 96],
  [100, 140],
  [80, 80],
  [200, 160],
];

/** Writes one picture as PNG or JPEG. */
export async function writePicture(path, scene, rng) {
  const [width, height] = pick(SIZES, rng);
  const image = sharp(draw(scene, width, height, rng), { raw: { width, height, channels: 3 } });
  await (path.endsWith('.jpg')
    ? image.jpeg({ quality: 82 + Math.floor(rng() * 12) })
    : image.png({ compressionLevel: 6 })
  ).toFile(path);
}
