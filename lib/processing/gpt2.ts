/** GPT-2's vocab.json and merges.txt → the tokenizer.json that transformers makes of them. */
import { MartletError } from '../errors.js';

type Json = Record<string, unknown>;

/**
 * @param vocab what vocab.json holds: token → id
 * @param merges the text of merges.txt: a pair a line, most frequent first
 * @param special contents of the special tokens, which text may spell
 * @param prefix the special token in front of every text
 * @param paths name the files in messages
 * @throws ERR_MARTLET_TOKENIZER with the path, and the token or the line
 */
export function gpt2Definition(
  vocab: Json,
  merges: string,
  { special, prefix }: { special: string[]; prefix: string },
  paths: { vocab: string; merges: string },
): Json {
  const refuse = (path: string, what: string, details: Json) =>
    new MartletError('ERR_MARTLET_TOKENIZER', `${path} cannot be used: ${what}. Download it again.`, {
      path,
      ...details,
    });
  for (const [token, id] of Object.entries(vocab)) {
    if (!Number.isSafeInteger(id) || (id as number) < 0)
      throw refuse(paths.vocab, `the id of ${JSON.stringify(token)} is ${JSON.stringify(id)}`, { token });
  }
  const idOf = (token: string) => {
    if (Object.hasOwn(vocab, token)) return vocab[token] as number;
    throw refuse(paths.vocab, `it has no ${token}`, { token });
  };
  const pairs: [string, string][] = [];
  for (const [i, line] of merges.split(/\r?\n/).entries()) {
    if (line === '' || (i === 0 && line.startsWith('#version'))) continue;
    const [left = '', right = '', ...rest] = line.split(' ');
    if (rest.length > 0 || ![left, right, left + right].every((token) => Object.hasOwn(vocab, token))) {
      throw refuse(paths.merges, `line ${i + 1} joins no two tokens of ${paths.vocab}`, { line: i + 1 });
    }
    pairs.push([left, right]);
  }
  const bytes = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
  return {
    version: '1.0',
    added_tokens: [...new Set(special)].map((content) => ({
      id: idOf(content),
      content,
      special: true,
      normalized: true,
      single_word: false,
      lstrip: false,
      rstrip: false,
    })),
    normalizer: null,
    pre_tokenizer: bytes,
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: prefix, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [],
      special_tokens: { [prefix]: { id: prefix, ids: [idOf(prefix)], tokens: [prefix] } },
    },
    decoder: bytes,
    model: { type: 'BPE', vocab, merges: pairs },
  };
}
