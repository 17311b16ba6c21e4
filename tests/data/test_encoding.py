"""Segments: joined pieces mean the same text, and a piece does not depend on its neighbours."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from halfbyte.data.encoding import Encoder, Segment
from halfbyte.errors import UsageError
from tests.data.conftest import make_bpe, small_tokenizer

plain_text = st.text(st.characters(exclude_categories=["Cs", "Co"]))


def test_what_the_tokenizer_puts_first(bpe: PreTrainedTokenizerFast, sp: PreTrainedTokenizerFast) -> None:
    assert (Encoder(bpe).prefix, Encoder(bpe).adds_bos) == ((), False)
    assert (Encoder(sp).prefix, Encoder(sp).adds_bos) == ((sp.bos_token_id,), True)


@given(st.lists(plain_text, min_size=1, max_size=4), st.sampled_from(["bpe", "sp", "sp-first"]))
def test_segments_decode_to_the_whole_text(texts: list[str], kind: str) -> None:
    """No space is invented between segments, which SentencePiece would do for each text on its own."""
    tokenizer = small_tokenizer(kind)
    pieces = Encoder(tokenizer).encode_segments([[Segment(text) for text in texts]])[0]
    decoded = tokenizer.decode([token for piece in pieces for token in piece], clean_up_tokenization_spaces=False)
    first = texts[0]
    if kind == "sp-first" and first.startswith((" ", "▁")):
        return  # this tokenizer itself loses a leading space
    if kind != "bpe":
        if not first:
            return  # a continuation has no first word's space, which this decoder strips
        texts = [text.replace("▁", " ") for text in texts]
    assert decoded == "".join(texts)


@given(st.text(max_size=8), st.sampled_from(["bpe", "sp", "sp-first"]))
def test_a_piece_does_not_depend_on_its_neighbours(text: str, kind: str) -> None:
    encoder = Encoder(small_tokenizer(kind))
    text = text.encode("utf-8", "ignore").decode()
    alone = encoder.encode_continuation(text)
    rows = [[Segment("User:\n"), Segment(text)], [Segment(""), Segment(text), Segment("x")]]
    first, second = encoder.encode_segments(rows)
    assert first[1] == second[1] == alone


def test_special_tokens_at_the_ends(bpe: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(bpe)
    assert encoder.special_suffix("a<|im_end|>") == "<|im_end|>"
    assert encoder.special_prefix("<|im_end|>a") == "<|im_end|>"
    assert encoder.special_suffix("a<|im_end|>\n") is None
    assert encoder.special_suffix("") is None
    assert encoder.has_token("<|im_end|>")
    assert not encoder.has_token("<end_of_turn>")
    assert encoder.spells_special("so <|im_start|> is special")
    assert not encoder.spells_special("a < b > c [INST] <br> <|im_|>")


def test_a_tokenizer_without_eos() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_bpe().backend_tokenizer)
    with pytest.raises(UsageError, match="no EOS token"):
        _ = Encoder(tokenizer).eos
