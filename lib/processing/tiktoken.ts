/** A tiktoken rank file (`qwen.tiktoken`: a base64 byte string and its rank a line) → the tokenizer.json that gives the same ids. */
import { MartletError } from '../errors.js';

type Json = Record<string, unknown>;

/** A token besides the ranks, by its text. */
export interface AddedForm {
  id: number;
  content: string;
  /** Left out of decoded text. */
  special: boolean;
}

/**
 * @param tokens {@link readRanks}
 * @param pattern splits text into the pieces that merges stay within
 */
export function tiktokenDefinition(tokens: string[], pattern: string, added: AddedForm[]): Json {
  const vocab: Record<string, number> = {};
  for (const [rank, token] of tokens.entries()) vocab[token] = rank;
  // tiktoken joins whichever neighbours make up the token of the lowest rank: each way to split a token is a merge of that token's priority.
  const merges: [string, string][] = [];
  for (const token of tokens) {
    for (let i = 1; i < token.length; i++) {
      const pair: [string, string] = [token.slice(0, i), token.slice(i)];
      if (Object.hasOwn(vocab, pair[0]) && Object.hasOwn(vocab, pair[1])) merges.push(pair);
    }
  }
  return {
    version: '1.0',
    normalizer: null,
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        { type: 'Split', pattern: { Regex: pattern }, behavior: 'Isolated', invert: false },
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: false, use_regex: false },
      ],
    },
    post_processor: null,
    decoder: { type: 'ByteLevel' },
    // A piece that is a token as a whole is never split, as in tiktoken.
    model: { type: 'BPE', vocab, merges, ignore_merges: true },
    added_tokens: added.map((form) => ({
      ...form,
      normalized: false,
      single_word: false,
      lstrip: false,
      rstrip: false,
    })),
  };
}

/** Tokens by rank, each byte as the character that stands for it in tokenizer.json. @throws ERR_MARTLET_TOKENIZER with the path and the line */
export function readRanks(ranks: Uint8Array, path: string): string[] {
  const characters = byteCharacters();
  const tokens: string[] = [];
  const seen = new Set<string>();
  const lines = Buffer.from(ranks.buffer, ranks.byteOffset, ranks.byteLength).toString('latin1').split('\n');
  for (const [i, line] of lines.entries()) {
    if (line === '') continue;
    const match = /^([A-Za-z0-9+/]+={0,2}) (\d+)\r?$/.exec(line);
    const token = match
      ? Array.from(Buffer.from(match[1] as string, 'base64'), (byte) => characters[byte]).join('')
      : '';
    if (!match || Number(match[2]) !== tokens.length || seen.has(token)) {
      throw rankError(path, `line ${i + 1} is not the token of rank ${tokens.length}`, { line: i + 1 });
    }
    seen.add(token);
    tokens.push(token);
  }
  const missing = characters.findIndex((character) => !seen.has(character));
  if (missing >= 0) throw rankError(path, `it has no token for the byte ${missing}`, {});
  return tokens;
}

function rankError(path: string, what: string, details: Record<string, unknown>): MartletError {
  return new MartletError('ERR_MARTLET_TOKENIZER', `${path} is not a whole rank file: ${what}. Download it again.`, {
    path,
    ...details,
  });
}

/** GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100. */
function byteCharacters(): string[] {
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    return String.fromCharCode(printable ? byte : next++);
  });
}
