/** Cuts generated text before the first stop string, token by token, so that no part of a stop string ever gets out. */
import type { StreamChunk } from './types.js';

/** Turns token ids into text step by step; '' while a character is incomplete. */
export interface TextDecoder {
  push(id: number): string;
  flush(): string;
}

export class TokenText {
  /** True once a stop string appeared. */
  stopped = false;
  readonly #decoder: TextDecoder;
  readonly #stop: string[];
  /** Tokens whose text may still turn out to belong to a stop string or to an incomplete character. */
  #pending: StreamChunk[] = [];
  #lastId = -1;

  constructor(decoder: TextDecoder, stop: string[]) {
    this.#decoder = decoder;
    this.#stop = stop;
  }

  /** Takes the next token; gives back the tokens that are now certain to belong to the answer. */
  push(tokenId: number): StreamChunk[] {
    if (this.stopped) return [];
    this.#lastId = tokenId;
    this.#pending.push({ tokenId, text: this.#decoder.push(tokenId) });
    return this.#release(false);
  }

  /** The rest, when generation ended without a stop string. */
  flush(): StreamChunk[] {
    if (this.stopped) return [];
    const rest = this.#decoder.flush();
    const last = this.#pending.at(-1);
    if (last) last.text += rest;
    // the last token was given out with the complete part of its text; its incomplete rest comes under the same id
    else if (rest !== '') this.#pending.push({ tokenId: this.#lastId, text: rest });
    return this.#release(true);
  }

  #release(final: boolean): StreamChunk[] {
    const text = this.#pending.map((chunk) => chunk.text).join('');
    const cut = this.#firstStop(text);
    if (cut >= 0) {
      this.stopped = true;
      return this.#take(cut, true);
    }
    return final ? this.#pending.splice(0) : this.#take(text.length - this.#heldBack(text), false);
  }

  /** Whole tokens within the first `length` characters; with `partial`, also the kept part of the token that the cut goes through. */
  #take(length: number, partial: boolean): StreamChunk[] {
    const out: StreamChunk[] = [];
    let left = length;
    while (this.#pending.length > 0 && left > 0) {
      const next = this.#pending[0] as StreamChunk;
      if (next.text.length > left && !partial) break;
      out.push({ tokenId: next.tokenId, text: next.text.slice(0, left) });
      left -= Math.min(left, next.text.length);
      this.#pending.shift();
    }
    return out;
  }

  #firstStop(text: string): number {
    const found = this.#stop.map((stop) => text.indexOf(stop)).filter((index) => index >= 0);
    return found.length === 0 ? -1 : Math.min(...found);
  }

  /** Length of the longest end of `text` that begins a stop string. */
  #heldBack(text: string): number {
    let longest = 0;
    for (const stop of this.#stop) {
      for (let n = Math.min(stop.length - 1, text.length); n > longest; n--) {
        if (text.endsWith(stop.slice(0, n))) longest = n;
      }
    }
    return longest;
  }
}
