import assert from 'node:assert/strict';
import { test } from 'node:test';
import { TokenText } from '../../lib/api/stop-text.js';

/** Tokens are the characters of a table; '\u0000' stands for an incomplete character. */
function decoderOf(pieces: string[], rest = '') {
  return { push: (id: number) => pieces[id] as string, flush: () => rest };
}

function feed(pieces: string[], stop: string[], rest = '') {
  const text = new TokenText(decoderOf(pieces, rest), stop);
  const steps = pieces.map((_, id) =>
    text
      .push(id)
      .map((chunk) => chunk.text)
      .join(''),
  );
  const end = text.flush();
  return { steps, end: end.map((chunk) => chunk.text).join(''), stopped: text.stopped };
}

test('without stop strings every token comes out at once', () => {
  assert.deepEqual(feed(['He', 'llo', '!'], []), { steps: ['He', 'llo', '!'], end: '', stopped: false });
});

test('no part of a stop string gets out, however the tokens cut it', () => {
  assert.deepEqual(feed(['a', 'b#', '#', '#c'], ['###']), { steps: ['a', '', '', 'b'], end: '', stopped: true });
  assert.deepEqual(feed(['yes\nUS', 'ER', ': no'], ['\nUSER:']), { steps: ['', '', 'yes'], end: '', stopped: true });
});

test('what only looked like a stop string comes out later, whole', () => {
  assert.deepEqual(feed(['a#', '#', 'b'], ['###']), { steps: ['', '', 'a##b'], end: '', stopped: false });
  assert.deepEqual(feed(['a', '##'], ['###']), { steps: ['a', ''], end: '##', stopped: false });
});

test('the earliest of several stop strings counts', () => {
  assert.deepEqual(feed(['one. two; three'], ['three', ';', '.']), { steps: ['one'], end: '', stopped: true });
});

test('token ids go with the text that is kept', () => {
  const text = new TokenText(decoderOf(['a', 'b', 'c\n', '\n', 'd']), ['\n\n']);
  const chunks = [0, 1, 2, 3, 4].flatMap((id) => text.push(id));
  assert.deepEqual(chunks, [
    { tokenId: 0, text: 'a' },
    { tokenId: 1, text: 'b' },
    { tokenId: 2, text: 'c' },
  ]);
  assert.equal(text.stopped, true);
});

test('a stop string at the very start gives no text and no token', () => {
  const text = new TokenText(decoderOf(['END']), ['END']);
  assert.deepEqual(text.push(0), []);
  assert.equal(text.stopped, true);
});

test('tokens of an incomplete character wait for it; the rest comes at the end', () => {
  const pieces = ['', '', '猫', ''];
  const text = new TokenText(decoderOf(pieces, '\ufffd'), []);
  assert.deepEqual(text.push(0), []);
  assert.deepEqual(text.push(1), []);
  assert.deepEqual(text.push(2), [
    { tokenId: 0, text: '' },
    { tokenId: 1, text: '' },
    { tokenId: 2, text: '猫' },
  ]);
  assert.deepEqual(text.push(3), []);
  assert.deepEqual(text.flush(), [{ tokenId: 3, text: '\ufffd' }]);
});
