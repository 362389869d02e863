/** A tokenizer.json as Llama has it: SentencePiece-style BPE (▁ for a space) with byte fallback. */

const SPECIAL = ['<unk>', '<s>', '</s>'];

/** `lines`: the corpus; `alphabet`: single characters to have in any case. */
export function trainTokenizer({ lines, alphabet }, merges) {
  const vocabulary = [
    ...SPECIAL,
    ...Array.from({ length: 256 }, (_, i) => `<0x${i.toString(16).toUpperCase().padStart(2, '0')}>`),
  ];
  const words = new Map();
  for (const line of lines) {
    for (const word of `▁${line.replaceAll(' ', '▁')}`.match(/▁?[^▁]+|▁/g) ?? [])
      words.set(word, (words.get(word) ?? 0) + 1);
  }
  const pieces = [...words].map(([word, count]) => ({ parts: [...word], count }));
  const characters = new Set(['▁', ...alphabet, ...pieces.flatMap(({ parts }) => parts)]);
  vocabulary.push(...[...characters].sort());

  const rules = [];
  while (rules.length < merges) {
    const counts = new Map();
    for (const { parts, count } of pieces) {
      for (let i = 0; i + 1 < parts.length; i++) {
        const pair = `${parts[i]} ${parts[i + 1]}`;
        counts.set(pair, (counts.get(pair) ?? 0) + count);
      }
    }
    // the most frequent pair; ties in alphabetical order
    const best = [...counts].sort(([a, m], [b, n]) => n - m || (a < b ? -1 : 1))[0];
    if (!best || best[1] < 2) break;
    const [left, right] = best[0].split(' ');
    rules.push([left, right]);
    if (!vocabulary.includes(left + right)) vocabulary.push(left + right);
    for (const piece of pieces) {
      const out = [];
      for (const part of piece.parts) {
        if (part === right && out.at(-1) === left) out[out.length - 1] = left + right;
        else out.push(part);
      }
      piece.parts = out;
    }
  }

  const image = vocabulary.push('<image>') - 1;
  const pad = vocabulary.push('<pad>') - 1;
  const added = (id, content) => ({
    id,
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  });
  return {
    image,
    pad,
    size: vocabulary.length,
    json: {
      version: '1.0',
      truncation: null,
      padding: null,
      added_tokens: [...SPECIAL.map((content, id) => added(id, content)), added(image, '<image>'), added(pad, '<pad>')],
      normalizer: {
        type: 'Sequence',
        normalizers: [
          { type: 'Prepend', prepend: '▁' },
          { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
        ],
      },
      pre_tokenizer: null,
      post_processor: {
        type: 'TemplateProcessing',
        single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
        pair: [
          { SpecialToken: { id: '<s>', type_id: 0 } },
          { Sequence: { id: 'A', type_id: 0 } },
          { SpecialToken: { id: '<s>', type_id: 1 } },
          { Sequence: { id: 'B', type_id: 1 } },
        ],
        special_tokens: { '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] } },
      },
      decoder: {
        type: 'Sequence',
        decoders: [
          { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
          { type: 'ByteFallback' },
          { type: 'Fuse' },
          { type: 'Strip', content: ' ', start: 1, stop: 0 },
        ],
      },
      model: {
        type: 'BPE',
        dropout: null,
        unk_token: '<unk>',
        continuing_subword_prefix: null,
        end_of_word_suffix: null,
        fuse_unk: true,
        byte_fallback: true,
        ignore_merges: false,
        vocab: Object.fromEntries(vocabulary.slice(0, image).map((token, id) => [token, id])),
        merges: rules,
      },
    },
  };
}
