"""Text to token ids, a segment at a time.

A row is tokenized in segments that meet where supervision begins and ends, and so is the prompt at inference. That
makes the ids of a rendered prompt an exact prefix of the ids it was trained with, whatever the tokenizer would have
merged across the border.

Three habits of tokenizers are dealt with here and nowhere else: a BOS put in front of plain text (never twice), the
space that SentencePiece puts before the first word (not again before every segment), and special tokens.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from halfbyte.errors import UsageError

_CHUNK = 4096  # segments per call: enough to keep the tokenizer's threads busy, little enough to bound its memory
#: What special tokens look like: <eos>, </s>, <|im_end|>, [INST].
_BRACKETED = re.compile(r"<[^<>\s]{1,48}>|\[[A-Za-z_/]{1,48}\]")
_ANCHORS = ("\n", "|", "a", "0")


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row's text. `answer`: the assistant's or completion's; `supervised`: whether it is learned."""

    text: str
    answer: bool = False
    supervised: bool = False


class Encoder:
    """A transformers tokenizer, asked for exact ids.

    `prefix`: the ids it puts in front of plain text (its BOS, or nothing); `suffix`: those it puts behind it (T5's and
    BART's end, for most decoders nothing), which only whole texts get.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        self.prefix, self.suffix = self._find_ends()
        self._anchor = self._find_anchor()

    @property
    def eos(self) -> int:
        """The id that ends a text. Raises UsageError for a tokenizer that has none."""
        if self.tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no EOS token, so a model could not learn to stop: set its eos_token")
        return int(self.tokenizer.eos_token_id)

    @property
    def adds_bos(self) -> bool:
        return self.bos is not None and self.bos in self.prefix

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Every special token's text."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        texts = {str(token.content) for token in added.values() if token.special}
        return frozenset(texts.union(self.tokenizer.all_special_tokens) - {""})

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self.special_tokens)))

    @cached_property
    def _special_lengths(self) -> tuple[int, ...]:
        return tuple(sorted({len(token) for token in self.special_tokens}, reverse=True))

    def has_token(self, text: str) -> bool:
        """Whether this is one token of the vocabulary (asking for the whole vocabulary would take a while)."""
        number = self.tokenizer.convert_tokens_to_ids(text)
        return number is not None and (number != self.tokenizer.unk_token_id or text == self.tokenizer.unk_token)

    def special_suffix(self, text: str) -> str | None:
        """The special token that `text` ends with."""
        for length in self._special_lengths:
            if text[-length:] in self.special_tokens:
                return text[-length:]
        return None

    def special_prefix(self, text: str) -> str | None:
        """The special token that `text` begins with."""
        for length in self._special_lengths:
            if text[:length] in self.special_tokens:
                return text[:length]
        return None

    def spells_special(self, text: str) -> bool:
        """Whether the text spells out a special token, which the tokenizer would take for the real one."""
        return any(found in self.special_tokens for found in _BRACKETED.findall(text))

    def encode(self, text: str) -> list[int]:
        """The ids of a whole text, nothing added."""
        return self._call([text])[0]

    def encode_whole(self, text: str) -> list[int]:
        """The ids of a whole text with what the tokenizer puts around it, as transformers' models are given it."""
        return self.wrap(self.encode(text))

    def wrap(self, ids: Sequence[int], room: int | None = None) -> list[int]:
        """The bare ids of a text between prefix and suffix, cut on the right to `room` ids in all."""
        ids = list(ids)
        if ids[: len(self.prefix)] == list(self.prefix):  # the text spells it out
            ids = ids[len(self.prefix) :]
        if room is not None:
            ids = ids[: max(0, room - len(self.prefix) - len(self.suffix))]
        return [*self.prefix, *ids, *self.suffix]

    def encode_segments(self, rows: Sequence[Sequence[Segment]]) -> list[list[tuple[int, ...]]]:
        """The ids of every segment of every row; equal texts are tokenized once."""
        wanted = {(segment.text, index > 0) for row in rows for index, segment in enumerate(row)}
        known = self._encode_all(wanted)
        return [[known[segment.text, index > 0] for index, segment in enumerate(row)] for row in rows]

    def encode_continuation(self, text: str) -> tuple[int, ...]:
        """The ids of a text that follows another segment, e.g. a completion after its prompt."""
        return self._encode_all([(text, True)])[text, True]

    def _encode_all(self, wanted: Iterable[tuple[str, bool]]) -> dict[tuple[str, bool], tuple[int, ...]]:
        """Ids for each (text, whether it continues another segment)."""
        keys = sorted(wanted)
        anchor = self._anchor
        result: dict[tuple[str, bool], tuple[int, ...]] = {}
        for start in range(0, len(keys), _CHUNK):
            chunk = keys[start : start + _CHUNK]
            texts = [anchor.text + text if anchor and continues and text else text for text, continues in chunk]
            for (text, continues), ids in zip(chunk, self._call(texts), strict=True):
                anchored = anchor is not None and continues and bool(text)
                result[text, continues] = tuple(self._without_anchor(text, ids) if anchored else ids)
        return result

    def _without_anchor(self, text: str, ids: list[int]) -> list[int]:
        """Drop the anchor's ids, trying the other anchors where the text merged with this one."""
        assert self._anchor is not None
        if ids[: len(self._anchor.ids)] == self._anchor.ids:
            return ids[len(self._anchor.ids) :]
        for other in map(self._anchor_of, _ANCHORS):
            ids = self.encode(other.text + text)
            if ids[: len(other.ids)] == other.ids:
                return ids[len(other.ids) :]
        return self.encode(text)

    def _call(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        result: list[list[int]] = encoded["input_ids"]
        return result

    def _find_ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        bare = self.encode("a")
        full: list[int] = self.tokenizer("a")["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start]), tuple(full[start + len(bare) :])
        return (), ()

    def _anchor_of(self, text: str) -> "_Anchor":
        return _Anchor(text, self.encode(text))

    def _find_anchor(self) -> "_Anchor | None":
        """A text to put in front of segments, for tokenizers that treat a text's first word in another way."""
        for anchor in map(self._anchor_of, _ANCHORS):
            inside = [self.encode(anchor.text + probe) for probe in ("x", " x", "X")]
            if any(ids[: len(anchor.ids)] != anchor.ids for ids in inside):
                continue  # it merges with what follows; not usable
            alone = [self.encode(probe) for probe in ("x", " x", "X")]
            return anchor if any(i[len(anchor.ids) :] != a for i, a in zip(inside, alone, strict=True)) else None
        return None


@dataclass(frozen=True, slots=True)
class _Anchor:
    text: str
    ids: list[int]
