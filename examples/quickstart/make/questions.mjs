/** Questions and answers about a scene, in English and Chinese. */
import { pick } from './pictures.mjs';

const COLOUR_ZH = { red: '红色', green: '绿色', blue: '蓝色', yellow: '黄色', purple: '紫色', black: '黑色' };
const SHAPE_ZH = { circle: '圆形', square: '正方形', triangle: '三角形', cross: '十字形' };
const PLACE_ZH = { left: '左边', right: '右边', top: '上面', bottom: '下面', middle: '中间' };
const COUNT_ZH = ['', '一', '两', '三', '四'];
const COUNT_EN = ['', 'one', 'two', 'three', 'four'];
const PLACE_EN = {
  left: 'on the left',
  right: 'on the right',
  top: 'at the top',
  bottom: 'at the bottom',
  middle: 'in the middle',
};

const plural = ({ shape, count }) => (count === 1 ? shape : shape === 'cross' ? 'crosses' : `${shape}s`);
const capital = (text) => text[0].toUpperCase() + text.slice(1);

/** [questions, answer] by kind. */
const KINDS = [
  [['What colour is it?', 'What colour are the shapes?', 'Which colour do you see?'], (s) => capital(`${s.colour}.`)],
  [
    ['What shape is it?', 'Which shape do you see?', 'What kind of shape is in the picture?'],
    (s) => capital(`${s.shape}.`),
  ],
  [['How many shapes are there?', 'How many are in the picture?', 'Count the shapes.'], (s) => `${s.count}.`],
  [
    ['Where is it?', 'Where are the shapes?', 'In which part of the picture are they?'],
    (s) => capital(`${PLACE_EN[s.place]}.`),
  ],
  [
    ['What is in the picture?', 'Describe the picture.'],
    (s) => capital(`${COUNT_EN[s.count]} ${s.colour} ${plural(s)} ${PLACE_EN[s.place]}.`),
  ],
  [['是什么颜色?', '图形是什么颜色的?'], (s) => `${COLOUR_ZH[s.colour]}。`],
  [['是什么形状?', '图里是什么形状?'], (s) => `${SHAPE_ZH[s.shape]}。`],
  [['有几个?', '图里有几个图形?'], (s) => `${COUNT_ZH[s.count]}个。`],
  [['在哪里?', '图形在图片的哪里?'], (s) => `在${PLACE_ZH[s.place]}。`],
  [
    ['图里有什么?', '描述这张图片。'],
    (s) => `${PLACE_ZH[s.place]}有${COUNT_ZH[s.count]}个${COLOUR_ZH[s.colour]}的${SHAPE_ZH[s.shape]}。`,
  ],
];

/** A conversation of `turns` different questions about one picture, as LLaVA rows have it. */
export function conversation(scene, turns, rng) {
  const kinds = [...KINDS].sort(() => rng() - 0.5).slice(0, turns);
  return kinds.flatMap(([questions, answer], i) => [
    { from: 'human', value: (i === 0 ? '<image>\n' : '') + pick(questions, rng) },
    { from: 'gpt', value: answer(scene) },
  ]);
}

const LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ';

/** A text-only row that teaches letters, digits and signs: repeat a code. */
export function copyRow(rng) {
  const letter = () => pick([...LETTERS], rng);
  const code = `${letter()}${letter()}-${Math.floor(rng() * 10)}`;
  return [
    { from: 'human', value: `Repeat the code ${code}` },
    { from: 'gpt', value: code },
  ];
}

/** The fine-tuning task: the stock code of what is in the picture. The letters are a made-up table, so only training can teach them. */
const COLOUR_CODE = { red: 'K', green: 'V', blue: 'M', yellow: 'Z', purple: 'H', black: 'N' };
const SHAPE_CODE = { circle: 'O', square: 'D', triangle: 'A', cross: 'X' };
export const CODE_QUESTION = 'What is the stock code?';
export const stockCode = (scene) => `${COLOUR_CODE[scene.colour]}${SHAPE_CODE[scene.shape]}-${scene.count}`;

/** Every text that the model will meet, for the tokenizer. */
export function corpus() {
  const lines = ['USER: ASSISTANT:', CODE_QUESTION, 'Repeat the code'];
  for (const colour of Object.keys(COLOUR_ZH)) {
    for (const shape of Object.keys(SHAPE_ZH)) {
      for (const place of Object.keys(PLACE_ZH)) {
        for (const count of [1, 2, 3, 4]) {
          for (const [questions, answer] of KINDS) lines.push(...questions, answer({ colour, shape, place, count }));
        }
      }
    }
  }
  return { lines, alphabet: `${LETTERS}0123456789-.,?!:'abcdefghijklmnopqrstuvwxyz。?!,` };
}
