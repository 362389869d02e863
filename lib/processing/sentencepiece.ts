/** T5's spiece.model (a SentencePiece model in protobuf) → the tokenizer.json that transformers makes of it. */
import { MartletError } from '../errors.js';

type Json = Record<string, unknown>;

/** What is read of sentencepiece_model.proto. */
export interface SentencePieceModel {
  pieces: { piece: string; score: number; type: number }[];
  unknownId: number;
  charsmap: Uint8Array;
}

const MODEL_TYPES = ['', 'unigram', 'bpe', 'word', 'char'];
const UNIGRAM = 1;
/** Of a piece. */
const NORMAL = 1;
const UNKNOWN = 2;
const BYTE = 6;

/** @throws ERR_MARTLET_TOKENIZER for bytes that are no such model, and for models that are not Unigram or fall back on bytes */
export function readSentencePiece(bytes: Uint8Array, path: string): SentencePieceModel {
  const refuse = (what: string, remedy = 'Download it again.') =>
    new MartletError('ERR_MARTLET_TOKENIZER', `${path} cannot be used: ${what}. ${remedy}`, { path });
  const pieces: SentencePieceModel['pieces'] = [];
  let type = UNIGRAM;
  let charsmap: Uint8Array = new Uint8Array();
  try {
    for (const model of fields(bytes)) {
      if (model.number === 1) {
        const entry = { piece: '', score: 0, type: NORMAL };
        for (const field of fields(model.bytes())) {
          if (field.number === 1) entry.piece = new TextDecoder('utf-8', { fatal: true }).decode(field.bytes());
          else if (field.number === 2) entry.score = field.float();
          else if (field.number === 3) entry.type = field.integer();
        }
        if (entry.piece === '' || !Number.isFinite(entry.score)) throw new Error(`piece ${pieces.length} is not whole`);
        pieces.push(entry);
      } else if (model.number === 2) {
        for (const field of fields(model.bytes())) if (field.number === 3) type = field.integer();
      } else if (model.number === 3) {
        for (const field of fields(model.bytes())) if (field.number === 2) charsmap = field.bytes();
      }
    }
  } catch (cause) {
    throw refuse(`it is not a whole SentencePiece model (${(cause as Error).message})`);
  }
  if (pieces.length === 0) throw refuse('it holds no pieces');
  const asJson = 'Save the tokenizer with transformers (AutoTokenizer … save_pretrained), which writes tokenizer.json.';
  if (type !== UNIGRAM) {
    throw refuse(`it is a ${MODEL_TYPES[type] || `type ${type}`} model, and only unigram ones are read`, asJson);
  }
  if (pieces.some((piece) => piece.type === BYTE)) throw refuse('it falls back on bytes, which is not read', asJson);
  const unknownId = pieces.findIndex((piece) => piece.type === UNKNOWN);
  if (unknownId < 0) throw refuse('it has no piece for what it does not know');
  return { pieces, unknownId, charsmap };
}

/** @param extra sentinels `<extra_id_N>` behind the pieces, the last first */
export function t5Definition({ pieces, unknownId, charsmap }: SentencePieceModel, extra: number, path: string): Json {
  const sentinels = Array.from({ length: extra }, (_, i) => `<extra_id_${extra - 1 - i}>`);
  const idOf = (role: string, content: string) => {
    const id = pieces.findIndex(({ piece }) => piece === content);
    if (id >= 0) return id;
    throw new MartletError('ERR_MARTLET_TOKENIZER', `${path} has no ${content}, T5's ${role}: it is not T5's.`, {
      path,
      token: content,
    });
  };
  const end = idOf('end token', '</s>');
  const special = [
    { id: idOf('padding', '<pad>'), content: '<pad>' },
    { id: end, content: '</s>' },
    { id: unknownId, content: (pieces[unknownId] as { piece: string }).piece },
    ...sentinels.map((content, i) => ({ id: pieces.length + i, content })),
  ];
  const metaspace = { type: 'Metaspace', replacement: '▁', prepend_scheme: 'always', split: true };
  return {
    version: '1.0',
    added_tokens: special.map((token) => ({
      ...token,
      special: true,
      normalized: false,
      single_word: false,
      lstrip: false,
      rstrip: false,
    })),
    normalizer:
      charsmap.byteLength === 0
        ? null
        : { type: 'Precompiled', precompiled_charsmap: Buffer.from(charsmap).toString('base64') },
    pre_tokenizer: { type: 'Sequence', pretokenizers: [{ type: 'WhitespaceSplit' }, metaspace] },
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ Sequence: { id: 'A', type_id: 0 } }, { SpecialToken: { id: '</s>', type_id: 0 } }],
      pair: [],
      special_tokens: { '</s>': { id: '</s>', ids: [end], tokens: ['</s>'] } },
    },
    decoder: metaspace,
    model: {
      type: 'Unigram',
      unk_id: unknownId,
      vocab: [...pieces.map(({ piece, score }) => [piece, score]), ...sentinels.map((content) => [content, 0])],
    },
  };
}

/** One field of a protobuf message; reading it as what it is not throws. */
interface Field {
  number: number;
  integer(): number;
  float(): number;
  bytes(): Uint8Array;
}

/** Fields of a message in order. @throws Error for bytes that are no message */
function* fields(message: Uint8Array): Generator<Field> {
  const view = new DataView(message.buffer, message.byteOffset, message.byteLength);
  let at = 0;
  const take = (count: number): number => {
    if (count > message.byteLength - at)
      throw new Error(`it ends ${count - (message.byteLength - at)} bytes too early`);
    at += count;
    return at - count;
  };
  const varint = (): number => {
    let value = 0;
    for (let shift = 0; shift < 70; shift += 7) {
      const byte = message[take(1)] as number;
      value += (byte & 0x7f) * 2 ** shift;
      if (byte < 0x80) return value;
    }
    throw new Error('a number does not end');
  };
  while (at < message.byteLength) {
    const key = varint();
    const number = Math.floor(key / 8);
    const wire = key % 8;
    const wrong = () => new Error(`field ${number} has the wrong type`);
    let value = 0;
    let place = 0;
    let length = 0;
    if (wire === 0) value = varint();
    else if (wire === 1) take(8);
    else if (wire === 2) {
      length = varint();
      place = take(length);
    } else if (wire === 5) place = take(4);
    else throw new Error(`a field has the unknown type ${wire}`);
    yield {
      number,
      integer: () => {
        if (wire !== 0) throw wrong();
        return value;
      },
      float: () => {
        if (wire !== 5) throw wrong();
        return view.getFloat32(place, true);
      },
      bytes: () => {
        if (wire !== 2) throw wrong();
        return message.subarray(place, place + length);
      },
    };
  }
}
