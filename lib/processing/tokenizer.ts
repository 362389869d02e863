/** tokenizer.json through @huggingface/tokenizers, with the pieces that templates and decoding need. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Tokenizer as HubTokenizer } from '@huggingface/tokenizers';
import { MartletError } from '../errors.js';
import { createCharsmap } from './charsmap.js';
import { readJsonFile } from './json.js';
import type { StreamDecoder } from './types.js';

interface SpecialToken {
  content: string;
}

export class Tokenizer {
  readonly #hub: HubTokenizer;
  /** Contents of special tokens by role: `bos_token`, `eos_token`, `pad_token`, `unk_token`. */
  readonly special: Readonly<Record<string, string>>;
  /** Ids that the tokenizer puts before every text (`<s>` of Llama). */
  readonly prefixIds: readonly number[];
  /** SentencePiece's habit: every piece of text gets a space in front. */
  readonly prependsSpace: boolean;
  readonly chatTemplate: string | undefined;

  private constructor(hub: HubTokenizer, config: Record<string, unknown>, definition: Record<string, unknown>) {
    this.#hub = hub;
    const special: Record<string, string> = {};
    for (const role of ['bos_token', 'eos_token', 'pad_token', 'unk_token']) {
      const value = config[role] as string | SpecialToken | null | undefined;
      const content = typeof value === 'string' ? value : value?.content;
      if (typeof content === 'string') special[role] = content;
    }
    this.special = special;
    this.prefixIds = hub.encode('', { add_special_tokens: true }).ids;
    this.prependsSpace = JSON.stringify(definition.normalizer ?? null).includes('"Prepend"');
    this.chatTemplate = typeof config.chat_template === 'string' ? config.chat_template : undefined;
  }

  /** From tokenizer.json. @throws ERR_MARTLET_TOKENIZER */
  static async load(modelDir: string): Promise<Tokenizer> {
    const path = join(modelDir, 'tokenizer.json');
    const definition = await readJsonFile(
      path,
      'ERR_MARTLET_TOKENIZER',
      'Download it, or save it with transformers (AutoTokenizer … save_pretrained).',
    );
    const config = await readJsonFile(
      join(modelDir, 'tokenizer_config.json'),
      'ERR_MARTLET_TOKENIZER',
      'Download it with the checkpoint.',
    );
    return Tokenizer.fromDefinition(definition, config, path);
  }

  /** @param definition what tokenizer.json holds; `path` names the file in messages. @throws ERR_MARTLET_TOKENIZER */
  static fromDefinition(definition: Record<string, unknown>, config: Record<string, unknown>, path: string): Tokenizer {
    try {
      const hub = new HubTokenizer(
        { ...definition, pre_tokenizer: withUnicodeSpaces(definition.pre_tokenizer) },
        config,
      );
      useCharsmaps(hub.normalizer, path);
      return new Tokenizer(hub, config, definition);
    } catch (cause) {
      if (cause instanceof MartletError) throw cause;
      throw new MartletError(
        'ERR_MARTLET_TOKENIZER',
        `${path} cannot be used: ${(cause as Error).message}. Download it again.`,
        { path },
        { cause },
      );
    }
  }

  /** Ids of one piece of text, without what the tokenizer puts around a whole text. */
  encode(text: string): number[] {
    return text === '' ? [] : this.#hub.encode(text, { add_special_tokens: false }).ids;
  }

  tokenId(token: string): number | undefined {
    return this.#hub.token_to_id(token) ?? undefined;
  }

  decode(ids: ArrayLike<number>, skipSpecialTokens: boolean): string {
    return ids.length === 0
      ? ''
      : this.#hub.decode(Array.from(ids), {
          skip_special_tokens: skipSpecialTokens,
          clean_up_tokenization_spaces: false,
        });
  }

  /**
   * Tokens depend on what stands before them (a leading space is stripped at the start only), so each new token is decoded together with the ones
   * before it, and only what it adds is given out.
   */
  createStreamDecoder(skipSpecialTokens: boolean): StreamDecoder {
    const ids: number[] = [];
    let prefix = 0;
    let read = 0;
    const emit = (final: boolean): string => {
      const before = this.decode(ids.slice(prefix, read), skipSpecialTokens);
      const now = this.decode(ids.slice(prefix), skipSpecialTokens);
      // U+FFFD at the end is half a character whose other bytes are still to come.
      if (now.length <= before.length || (!final && now.endsWith('\uFFFD'))) return '';
      prefix = read;
      read = ids.length;
      return now.slice(before.length);
    };
    return {
      push: (id) => {
        ids.push(id);
        return emit(false);
      },
      flush: () => emit(true),
    };
  }
}

/** What is used of the library's normalizers, whose types do not come through. */
interface HubNormalizer {
  config: { type?: string; precompiled_charsmap?: unknown };
  /** Of a sequence. */
  normalizers?: (HubNormalizer | null)[];
  normalize(text: string): string;
}

/** The library takes SentencePiece's own normalisation for NFKC; here it is the table that the tokenizer brings. */
function useCharsmaps(normalizer: HubNormalizer | null, path: string): void {
  for (const part of normalizer?.normalizers ?? []) useCharsmaps(part, path);
  const { type, precompiled_charsmap: map } = normalizer?.config ?? {};
  if (normalizer && type === 'Precompiled' && typeof map === 'string')
    normalizer.normalize = createCharsmap(Buffer.from(map, 'base64'), path);
}

/** GPT-2's pieces of text: the tokenizers library's ByteLevel with use_regex. */
const GPT2_PIECES = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`;

/**
 * White space is what Unicode says, as in Hugging Face's own library. In WhitespaceSplit and ByteLevel this one goes by JavaScript's `\s`, which lacks
 * U+0085 and has U+FEFF; in Split it does not.
 */
function withUnicodeSpaces(preTokenizer: unknown): unknown {
  const own = (preTokenizer ?? {}) as {
    type?: unknown;
    pretokenizers?: unknown;
    use_regex?: boolean;
    add_prefix_space?: boolean;
  };
  const split = (pattern: string, behavior: string) =>
    ({ type: 'Split', pattern: { Regex: pattern }, behavior, invert: false }) as const;
  if (own.type === 'WhitespaceSplit') return split(String.raw`\s+`, 'Removed');
  if (own.type === 'ByteLevel' && own.use_regex !== false && own.add_prefix_space === false)
    return { type: 'Sequence', pretokenizers: [split(GPT2_PIECES, 'Isolated'), { ...own, use_regex: false }] };
  return Array.isArray(own.pretokenizers)
    ? { ...own, pretokenizers: own.pretokenizers.map(withUnicodeSpaces) }
    : preTokenizer;
}

/** The checkpoint's chat template. @throws ERR_MARTLET_TEMPLATE when it has none */
export async function requireChatTemplate(modelDir: string, tokenizer: Tokenizer): Promise<string> {
  const source = await loadChatTemplate(modelDir, tokenizer);
  if (source !== undefined) return source;
  throw new MartletError(
    'ERR_MARTLET_TEMPLATE',
    `${modelDir} has no chat template (chat_template.jinja, chat_template.json or tokenizer_config.json). Download it, or use template: ms-swift.`,
    { path: modelDir },
  );
}

/** chat_template.jinja, chat_template.json, the processor's or the tokenizer's configuration, in this order. */
async function loadChatTemplate(modelDir: string, tokenizer: Tokenizer): Promise<string | undefined> {
  try {
    return await readFile(join(modelDir, 'chat_template.jinja'), 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
  for (const name of ['chat_template.json', 'processor_config.json']) {
    const file = await readJsonFile(join(modelDir, name), 'ERR_MARTLET_TEMPLATE', 'Download it again.', {
      optional: true,
    });
    if (typeof file.chat_template === 'string') return file.chat_template;
  }
  return tokenizer.chatTemplate;
}
