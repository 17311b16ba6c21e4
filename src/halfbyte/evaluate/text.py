"""Tokens to text as they come: no torn characters, no piece of a stop text.

A token may end inside a UTF-8 character, and a tokenizer's text for a token depends on its neighbours (SentencePiece
drops a leading space at the start). So a new token is decoded together with those of the previous settled step, and
text is given out only once it no longer ends in U+FFFD, the mark of an incomplete character.
"""

from collections.abc import Callable, Sequence

_TORN = "\ufffd"

Decode = Callable[[list[int]], str]


class TextStream:
    """Text of a growing list of tokens.

    decode    token ids -> text, special tokens left out
    stop      texts that end the output; none of them, and no beginning of one that completes, is ever given out
    context   last tokens of the prompt: with them the first word keeps its leading space, as in the model's own text

    `text` is everything given out so far; after `finish` it is the whole output.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        if any(not text for text in stop):
            raise ValueError("an empty stop text would end every output at once")
        self._decode = decode
        self._stop = tuple(stop)
        self._ids = list(context)
        self._start, self._settled = 0, len(self._ids)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more token; return the text that is now certain ("" while a character or stop text is open)."""
        self._ids.append(token)
        return self._release(self._advance(final=False), final=False)

    def finish(self) -> str:
        """The rest: a character that never completed comes as U+FFFD, a stop text that never completed as itself."""
        return self._release(self._advance(final=True), final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._settled])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(_TORN) and not final):
            return ""
        self._start, self._settled = self._settled, len(self._ids)
        return now[len(before) :]

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(self._held) - (0 if final else self._open_stop())
        out, self._held = self._held[:keep], self._held[keep:]
        self.text += out
        return out

    def _open_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        for size in range(min(len(self._held), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(text.startswith(self._held[-size:]) for text in self._stop):
                return size
        return 0
