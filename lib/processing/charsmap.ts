/**
 * SentencePiece's precompiled normalisation (`precompiled_charsmap`): a double-array trie (darts-clone) of byte strings, and what each becomes. Applied
 * as Hugging Face's tokenizers library does it (spm_precompiled), whose ids transformers gives.
 */
import { MartletError } from '../errors.js';

/** A grapheme of this many bytes or more is looked up character by character. */
const LONG_GRAPHEME = 6;

/**
 * @param map u32 little-endian: bytes of the trie; the trie's u32 units; the replacements, each ended by a zero byte
 * @param path names the file in messages
 * @throws ERR_MARTLET_TOKENIZER for a map that is not whole
 */
export function createCharsmap(map: Uint8Array, path: string): (text: string) => string {
  if (map.byteLength === 0) return (text) => text; // the identity rule
  const view = new DataView(map.buffer, map.byteOffset, map.byteLength);
  const bytes = map.byteLength >= 4 ? view.getUint32(0, true) : 0;
  if (bytes === 0 || bytes % 4 !== 0 || 4 + bytes > map.byteLength) {
    throw new MartletError(
      'ERR_MARTLET_TOKENIZER',
      `${path} has a normalisation table (precompiled_charsmap) that is not whole. Download it again.`,
      { path, field: 'precompiled_charsmap' },
    );
  }
  const units = Uint32Array.from({ length: bytes / 4 }, (_, i) => view.getUint32(4 + 4 * i, true));
  const replacements = map.subarray(4 + bytes);
  const decoder = new TextDecoder();
  const encoder = new TextEncoder();

  const offset = (unit: number) => (unit >>> 10) << ((unit & 0x200) >>> 6);
  /** The replacement of the shortest beginning of `key` that has one, as the library takes it: what follows that beginning is dropped. */
  const replace = (key: Uint8Array): string | undefined => {
    let place = offset(units[0] as number);
    for (const byte of key) {
      if (byte === 0) return undefined;
      place ^= byte;
      const unit = units[place];
      if (unit === undefined || (unit & 0x800000ff) >>> 0 !== byte) return undefined;
      place ^= offset(unit);
      if ((unit & 0x100) === 0) continue;
      const begin = (units[place] ?? 0) & 0x7fffffff;
      const end = replacements.indexOf(0, begin);
      return decoder.decode(replacements.subarray(begin, end < 0 ? undefined : end));
    }
    return undefined;
  };

  const known = new Map<string, string>();
  const replaceCharacter = (character: string): string => {
    let found = known.get(character);
    if (found === undefined) {
      found = replace(encoder.encode(character)) ?? character;
      known.set(character, found);
    }
    return found;
  };
  const graphemes = new Intl.Segmenter('und', { granularity: 'grapheme' });
  const keepsAscii = Array.from({ length: 95 }, (_, i) => String.fromCharCode(0x20 + i)).every(
    (character) => replaceCharacter(character) === character,
  );

  return (text) => {
    if (keepsAscii && /^[\x20-\x7e]*$/.test(text)) return text;
    let out = '';
    for (const { segment } of graphemes.segment(text)) {
      const whole = segment.length < LONG_GRAPHEME ? encoder.encode(segment) : undefined;
      const replaced = whole && whole.length < LONG_GRAPHEME ? replace(whole) : undefined;
      if (replaced !== undefined) out += replaced;
      else for (const character of segment) out += replaceCharacter(character);
    }
    return out;
  };
}
