"""Streamed text against the tokenizer's own decoding of the whole, by byte-level and SentencePiece rules."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from halfbyte.evaluate.text import Decode, TextStream

TEXT = 'Zoë said: 東京 🦊👩‍👩‍👧 naïve — done.\n\n  {"a": [1, 2]}'


def byte_level() -> Tokenizer:
    """One token a byte, as GPT-2's alphabet: every character outside ASCII is torn over several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Llama's decoder: U+2581 for a space, byte tokens for what is missing, one leading space stripped."""
    words = ["▁Hello", "▁", "▁world", "lo", "!"] + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def decode(tokenizer: Tokenizer) -> Decode:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def stream(
    ids: list[int], decoder: Decode, **settings: tuple[str, ...] | tuple[int, ...]
) -> tuple[list[str], TextStream]:
    out = TextStream(decoder, **settings)  # type: ignore[arg-type]
    pieces = []
    for token in ids:
        pieces.append(out.push(token))
        if out.stopped:
            break
    pieces.append(out.finish())
    assert "".join(pieces) == out.text
    return pieces, out


def test_torn_characters_are_held_until_whole() -> None:
    tokenizer = byte_level()
    pieces, out = stream(tokenizer.encode(TEXT).ids, decode(tokenizer))
    assert out.text == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🦊" in pieces  # four tokens, given out at the last one


def test_an_unfinished_character_shows_at_the_end_and_a_wrong_byte_does_not_block() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a🦊").ids
    pieces, out = stream(ids[:-1], decode(tokenizer))
    assert pieces[-1] == out.text[1:]
    assert out.text == tokenizer.decode(ids[:-1])
    broken = [ids[0], ids[1], *tokenizer.encode("bc").ids]
    pieces, out = stream(broken, decode(tokenizer))
    assert out.text == tokenizer.decode(broken) == "a\ufffdbc"
    assert pieces[2:4] == ["\ufffdb", "c"]


def test_spaces_between_words_of_a_stripping_decoder() -> None:
    tokenizer = sentencepiece_like()
    ids = [0, 2, 4, 5 + 0xE6, 5 + 0x9D, 5 + 0xB1, 2]
    assert stream(ids, decode(tokenizer))[1].text == tokenizer.decode(ids) == "Hello world!東 world"
    # After a prompt the first word keeps the space that the model wrote.
    assert stream(ids, decode(tokenizer), context=(0, 4))[1].text == " Hello world!東 world"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one\ntwo\n", ("\n\n",), "one\ntwo\n"),
        ("abcabd", ("abd",), "abc"),
        ("aab", ("ab", "b"), "a"),
        ("x END y STOP", ("STOP", "END"), "x "),
        ("日本。語", ("。",), "日本"),
        ("never", ("ok",), "never"),
    ],
)
def test_stop_texts(text: str, stop: tuple[str, ...], expected: str) -> None:
    tokenizer = byte_level()
    out = stream(tokenizer.encode(text).ids, decode(tokenizer), stop=stop)[1]
    assert out.text == expected
    assert out.stopped == (expected != text)


def test_random_texts_round_trip_with_any_stop() -> None:
    draw, tokenizer = random.Random(0), byte_level()
    for _ in range(200):
        text = "".join(draw.choices("ab é🦊\n", k=30))
        stop = ("".join(draw.choices("ab é🦊\n", k=draw.randint(1, 4))),)
        out = stream(tokenizer.encode(text).ids, decode(tokenizer), stop=stop)[1]
        assert out.text == text.split(stop[0])[0]


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(ValueError, match="empty stop text"):
        TextStream(lambda ids: "", stop=("",))
