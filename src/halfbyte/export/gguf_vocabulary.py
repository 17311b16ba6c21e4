"""A fast tokenizer as a GGUF file's vocabulary, so that llama.cpp makes the same ids.

What decides is what the tokenizer does (its tokenizer.json), not what its files are called. Two kinds can be said:

    gpt2    byte-level BPE: tokens, merges, and the name of the regular expression that cuts text before merging
    llama   SentencePiece's BPE: llama.cpp joins the neighbours whose union has the best score, so a token's score is
            minus the rank of its first merge, and every split of a token into two tokens must be among the merges

Anything that llama.cpp would do differently is a UsageError: wrong ids are worse than none. The reverse way is
`models.gguf_tokenizer`. Sources: llama.cpp's src/llama-vocab.cpp and conversion/base.py, tokenizers' own classes.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.export.gguf_container import Fields, boolean, float32s, int32s, string, strings, uint32
from halfbyte.models.gguf_tokenizer import pre_tokenizer_name
from halfbyte.models.model_source import ModelSource
from halfbyte.models.spec import ModelSpec

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_NO_SCORE = -1e6  # of a token that no merge makes: below every rank
_TEMPLATES = "tokenizer.chat_template"


@dataclass(frozen=True)
class Vocabulary:
    """`fields`: the file's `tokenizer.*` keys. `strips_after_special`: whitespace after special tokens is dropped,
    which llama.cpp does for models that are named Phi-3 and for no others."""

    fields: Fields
    strips_after_special: bool


def vocabulary(source: ModelSource, spec: ModelSpec, template: str | None) -> Vocabulary:
    """The vocabulary of the source's tokenizer with this chat template (None: the file has none).

    A GGUF source's keys are copied as they lie.
    """
    file = getattr(source, "file", None)
    if file is not None:
        count = file.get("tokenizer.ggml.tokens", 0)
        if count != spec.vocab_size:
            raise UsageError(f"{source.path} lists {count} tokens for embeddings of {spec.vocab_size}: it is damaged")
        kept = [k for k in file.keys_of("tokenizer.") if not k.startswith(_TEMPLATES)]
        found = Vocabulary({key: file.raw(key) for key in kept}, strips_after_special=False)
    else:
        ends = source.generation.get("eos_token_id") or []
        ends = [*(ends if isinstance(ends, list) else [ends]), *spec.eos_token_ids]
        found = from_tokenizer(source.tokenizer(), spec.vocab_size, ends, template, str(source.path))
    if template is not None:
        found.fields[_TEMPLATES] = string(template)
    return found


def from_tokenizer(
    tokenizer: Any, size: int, ends: Iterable[int | None], template: str | None, where: str
) -> Vocabulary:
    """The vocabulary of a transformers fast tokenizer, without its template.

    size      rows of the embedding: tokens beyond are left out, rows without a token get a placeholder
    ends      token ids that end a text for the model, besides the tokenizer's own EOS
    template  decides one thing: see `_add_space_prefix`
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    refusal = _Refusal(where)
    if model.get("type") != "BPE":
        refusal(f"is a {model.get('type')} model; byte-level BPE and SentencePiece's BPE can be written")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refusal(f"has the option {key}")
    added = [token for token in backend["added_tokens"] if token["id"] < size]
    for token in added:
        if token["lstrip"] or token["single_word"]:
            refusal(f"drops text before the token {token['content']!r}, or wants it as a word of its own")
    tokens, kinds = _tokens(model["vocab"], added, size)
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    if model.get("byte_fallback"):
        fields = _sentencepiece(backend, tokens, kinds, merges, template, refusal)
    else:
        fields = _byte_level(backend, tokens, kinds, merges, refusal)
    fields |= _special_ids(tokenizer, size, ends, refusal)
    return Vocabulary(fields, _strips(tokens, kinds, added, refusal))


class _Refusal:
    """Raises the UsageError for a tokenizer that GGUF cannot express."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, what: str) -> None:
        raise UsageError(
            f"the tokenizer of {self.where} {what}: llama.cpp cannot do the same, so no GGUF file is written "
            "(export a Hugging Face folder instead)"
        )


def _tokens(vocab: dict[str, int], added: Sequence[dict[str, Any]], size: int) -> tuple[list[str], list[int]]:
    """(texts, kinds) by id; rows of the embedding that no token has are [PAD<id>], unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [_UNUSED] * size
    for text, index in vocab.items():
        if index < size:
            tokens[index], kinds[index] = text, _NORMAL
    for token in added:
        text, index = token["content"], token["id"]
        # Runs of ▁ are matched in normalized text only, which is what a plain token does.
        kind = _CONTROL if token["special"] else _NORMAL if text.strip("▁") == "" else _USER_DEFINED
        tokens[index], kinds[index] = text, kind
    return tokens, kinds


_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


def _strips(tokens: list[str], kinds: list[int], added: Sequence[dict[str, Any]], refusal: _Refusal) -> bool:
    """Whether whitespace after special tokens is dropped. llama.cpp knows two ways: never, and Phi-3's, after all of
    them but _KEEPS (which, like </s>, it then expects in the vocabulary)."""
    stripping = {token["content"] for token in added if token["rstrip"]}
    if not stripping:
        return False
    special = {t for t, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)}
    if stripping != special - {*_KEEPS} or not {"</s>", *_KEEPS} <= special:
        refusal(f"drops whitespace after {', '.join(sorted(stripping)[:3])} but not as Phi-3's does")
    return True


# -- byte-level -------------------------------------------------------------------------------------------------------


def _byte_level(
    backend: dict[str, Any], tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]], refusal: _Refusal
) -> Fields:
    normalizers = [part["type"] for part in _parts(backend["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]):
        refusal(f"normalizes text with {', '.join(normalizers)}")
    steps = _parts(backend["pre_tokenizer"], "pretokenizers")
    split: str | None = None
    if len(steps) == 2 and steps[0]["type"] == "Split":
        how = (steps[0]["behavior"], steps[0]["invert"])
        split = steps[0]["pattern"].get("Regex")
        if split is None or how not in (("Isolated", False), ("Removed", True)):
            refusal("cuts text by something other than a regular expression of words")
    elif len(steps) != 1:
        refusal("cuts text in several steps")
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["use_regex"] == (split is not None):
        refusal("is neither byte-level nor SentencePiece's")
    if last["add_prefix_space"]:
        refusal("puts a space before the text")
    name = pre_tokenizer_name(split, bool(backend["model"].get("ignore_merges")))
    if name is None:
        refusal(f"cuts text with a regular expression that llama.cpp has no name for ({split})")
    assert name is not None
    return {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(name),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.token_type": int32s(kinds),
        "tokenizer.ggml.merges": strings([" ".join(pair) for pair in merges]),
    }


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, nested sequences laid out."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[name] for inner in _parts(part, name)]


# -- SentencePiece ----------------------------------------------------------------------------------------------------


def _sentencepiece(
    backend: dict[str, Any],
    tokens: list[str],
    kinds: list[int],
    merges: list[tuple[str, ...]],
    template: str | None,
    refusal: _Refusal,
) -> Fields:
    prefix = _add_space_prefix(backend, template, refusal)
    unknown = backend["model"].get("unk_token")
    present = set()
    for index, token in enumerate(tokens):
        if kinds[index] == _NORMAL and _BYTE_TOKEN.fullmatch(token):
            kinds[index] = _BYTE
            present.add(token)
        elif token == unknown:
            kinds[index] = _UNKNOWN
    if len(present) != 256:
        refusal(f"has {len(present)} of the 256 byte tokens that SentencePiece falls back to")
    return {
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.pre": string("default"),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.scores": float32s(_scores(tokens, kinds, merges, refusal)),
        "tokenizer.ggml.token_type": int32s(kinds),
        "tokenizer.ggml.add_space_prefix": boolean(prefix),
    }


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]], refusal: _Refusal) -> list[float]:
    """Minus the rank of the first merge that makes a token; llama.cpp's order of joining is then that of the merges."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        rank.setdefault("".join(pair), index)
    pairs = set(merges)
    plain = {token for token, kind in zip(tokens, kinds, strict=True) if kind == _NORMAL}
    for text in rank.keys() & plain:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in plain and pair[1] in plain and pair not in pairs:
                refusal(f"does not join {pair[0]!r} and {pair[1]!r} to {text!r}, as SentencePiece would")
    return [-float(rank[token]) if token in rank else _NO_SCORE for token in tokens]


def _add_space_prefix(backend: dict[str, Any], template: str | None, refusal: _Refusal) -> bool:
    """Whether llama.cpp puts a space before text, and again after each special token.

    The normalizer's Prepend does exactly that. Metaspace's scheme `first` does it only at the very start of the text:
    a chat prompt starts with a special token and gets none, plain text gets one. llama.cpp has one switch for both,
    which is set for what the model will be given: chats, if it has a template.
    """
    normalizers = _parts(backend["normalizer"], "normalizers")
    steps = _parts(backend["pre_tokenizer"], "pretokenizers")
    if steps and steps[-1]["type"] == "Metaspace" and len(steps) == 1 and not normalizers:
        space = steps[0]
        if space["replacement"] != "▁" or space["split"]:
            refusal("splits text at spaces before merging")
        scheme = space["prepend_scheme"]
        return scheme == "always" or (scheme == "first" and template is None)
    if steps and not (len(steps) == 1 and steps[0]["type"] == "Split" and steps[0]["pattern"] == {"String": " "}):
        refusal("cuts text before merging")
    kinds = [part["type"] for part in normalizers]
    replaces = kinds[-1:] == ["Replace"] and normalizers[-1]["pattern"] == {"String": " "}
    if not replaces or normalizers[-1]["content"] != "▁" or kinds not in (["Replace"], ["Prepend", "Replace"]):
        refusal(f"normalizes text with {', '.join(kinds) or 'nothing'} where SentencePiece puts ▁ for spaces")
    return len(kinds) == 2


# -- special tokens ---------------------------------------------------------------------------------------------------


def _special_ids(tokenizer: Any, size: int, ends: Iterable[int | None], refusal: _Refusal) -> Fields:
    """bos, eos, eot, unknown and padding, and whether text gets a BOS and an EOS: as the tokenizer really does it."""
    endings = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *ends) if i is not None and i < size))
    if not endings:
        refusal("has no token that ends a text (llama.cpp would take token 11 or 2 for it)")
    found: dict[str, int | None] = {
        "bos": tokenizer.bos_token_id,
        "eos": endings[0],
        "eot": endings[1] if len(endings) > 1 else None,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos, eos = [found["bos"]], [found["eos"]]
    ways = {(first, last): [*bos * first, *plain, *eos * last] for first in (False, True) for last in (False, True)}
    way = next((key for key, ids in ways.items() if ids == whole and (found["bos"] is not None or not key[0])), None)
    if way is None:
        refusal("puts something other than BOS and EOS around a text")
    assert way is not None
    fields = {f"tokenizer.ggml.{n}_token_id": uint32(i) for n, i in found.items() if i is not None and i < size}
    fields["tokenizer.ggml.add_bos_token"] = boolean(way[0])
    fields["tokenizer.ggml.add_eos_token"] = boolean(way[1])
    return fields
