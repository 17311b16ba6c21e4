"""The tokenizer that a GGUF file describes, built straight from its vocabulary.

A GGUF file has no tokenizer.json: it lists tokens, their kinds and scores or merges, and names the
pre-tokenizer. transformers can rebuild one too (30 s and 1.5 GB for Gemma's 262,144 tokens, most of it
in Python lists); this takes 3 s and a third of that, and is equal to it token for token on the real
models (tested). Two vocabularies exist for the families that we read:

    llama   SentencePiece's BPE: spaces are ▁, unknown characters fall back to bytes, merges are implied by
            the vocabulary (every split of a token into two tokens)
    gpt2    byte-level BPE: merges are listed, text is first split by a regular expression

Sources: ggml's docs/gguf.md, llama.cpp's llama-vocab.cpp, the models' tokenizer.json on the Hub.
"""

from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from halfbyte.errors import UsageError
from halfbyte.models.gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4
_LONGEST_TOKEN = 2048
"""Characters; every way to cut a token in two is tried. Real vocabularies end at some 130."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
}
"""Pre-tokenizer name -> the regular expression that cuts text before merging; None: GPT-2's own."""
_WHOLE_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
"""Pre-tokenizers whose vocabulary is looked up whole before merges are tried, and that start with BOS by default."""
_NFC = ("qwen2", "deepseek-r1-qwen")


def pre_tokenizer_name(split: str | None, whole_first: bool) -> str | None:
    """The name of a byte-level pre-tokenizer, for writing a file; None where llama.cpp has none that does the same.

    split        the regular expression, None for GPT-2's own
    whole_first  the vocabulary is looked up whole before merges are tried
    """
    names = {_LLAMA3: ("smaug-bpe", "llama-bpe"), _QWEN2: ("qwen2", None), _TEKKEN: (None, "tekken")}
    return (names | {None: ("gpt-2", None)}).get(split, (None, None))[whole_first]


def build_backend(file: GgufFile) -> Tokenizer:
    """The `tokenizers` object, post-processor (BOS, EOS) included. UsageError for a vocabulary that we cannot read."""
    kind = file.need("tokenizer.ggml.model")
    tokens = _array(file, "tokens", str)
    if not tokens:
        raise UsageError(f"{file.path} has no vocabulary (tokenizer.ggml.tokens): convert it again with llama.cpp")
    for name in ("bos", "eos", "unknown", "padding"):
        index = file.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and not (type(index) is int and 0 <= index < len(tokens)):
            raise UsageError(f"{file.path} names token {index} as {name}, of {len(tokens)} tokens: the file is damaged")
    if kind not in ("llama", "gpt2"):
        raise UsageError(
            f"{file.path} has a {kind!r} tokenizer; llama and gpt2 can be read: use the Hugging Face folder"
        )
    try:
        backend = _sentencepiece(file, tokens) if kind == "llama" else _byte_level(file, tokens)
    except UsageError:
        raise
    except Exception as error:  # the only type that tokenizers raises
        raise UsageError(f"{file.path}: the vocabulary and its merges do not fit together ({error})") from None
    _add_tokens(backend, file, tokens)
    _add_post_processor(backend, file, tokens)
    return backend


def _array(file: GgufFile, name: str, kind: Any) -> list[Any]:
    """An array of the tokenizer's. UsageError if it holds other things than `kind`, or texts that no vocabulary has."""
    values = file.array(f"tokenizer.ggml.{name}")
    if not all(isinstance(value, kind) for value in values):
        raise UsageError(f"{file.path}: tokenizer.ggml.{name} holds values of a wrong type: the file is damaged")
    if kind is str and any(len(value) > _LONGEST_TOKEN for value in values):
        raise UsageError(f"{file.path}: tokenizer.ggml.{name} has texts of over {_LONGEST_TOKEN} characters: damaged")
    return values


def special_tokens(file: GgufFile, backend: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token, unk_token, pad_token, those that the file names."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {name: file.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    pieces = {name: backend.id_to_token(index) for name, index in found.items() if index is not None}
    return {name: piece for name, piece in pieces.items() if piece is not None}


def adds_bos(file: GgufFile) -> bool:
    """Whether text starts with BOS: what the file says, else what llama.cpp does for its vocabulary."""
    usual = file.get("tokenizer.ggml.model") == "llama" or file.get("tokenizer.ggml.pre") in _WHOLE_FIRST
    return bool(file.get("tokenizer.ggml.add_bos_token", usual))


def adds_eos(file: GgufFile) -> bool:
    return bool(file.get("tokenizer.ggml.add_eos_token", False))


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    architecture = file.need("general.architecture")
    gemma = architecture.startswith("gemma")
    if gemma:
        # Runs of spaces are stored as spaces; the text that reaches the merges has ▁.
        tokens = ["▁" * len(token) if token.isspace() and set(token) == {" "} else token for token in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Gemma's scores do not follow the order in which its merges were learned; its ids do.
    order = tokens if gemma else _by_score(file, tokens)
    unknown = file.get("tokenizer.ggml.unknown_token_id")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=list(_merges(order, tokens, vocab)),
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tail: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
        parts: list[Any] = [normalizers.Prepend("▁")] if prefix else []
        backend.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
        tail += [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(tail)
    return backend


def _by_score(file: GgufFile, tokens: list[str]) -> list[str]:
    """Best score first: SentencePiece merges by score."""
    scores = _array(file, "scores", int | float)
    if len(scores) != len(tokens):
        raise UsageError(f"{file.path} has {len(scores)} token scores for {len(tokens)} tokens: the file is damaged")
    return [tokens[i] for i in sorted(range(len(tokens)), key=lambda i: -scores[i])]


def _merges(order: list[str], tokens: list[str], vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Every way to make a token of two, the tokens in `order`, a longer left part first."""
    for token in order:
        for cut in range(len(token) - 1, 0, -1):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                yield tokens[left], tokens[right]  # the vocabulary's own strings: half a million pairs share them


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    name = file.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise UsageError(
            f"{file.path} has the pre-tokenizer {name!r}; {', '.join(_SPLITS)} can be read: use the Hugging Face folder"
        )
    listed = _array(file, "merges", str)
    pairs = (merge.split(" ") for merge in listed)
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    if len(merges) != len(listed):
        raise UsageError(f"{file.path} has merges that are not of two parts: the file is damaged")
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=name in _WHOLE_FIRST,
        )
    )
    if name in _NFC:
        backend.normalizer = normalizers.NFC()
    split = _SPLITS[name]
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    """Control tokens are special, user-defined ones are matched whole but kept when decoding."""
    kinds = _array(file, "token_type", int)
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    user = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    # Gemma's runs of spaces are user-defined too, and have been respelled: as they are, they match nothing.
    present = [token for token in user if backend.token_to_id(token) is not None]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in present])


def _add_post_processor(backend: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    parts: list[tuple[str, int]] = []
    bos, eos = file.get("tokenizer.ggml.bos_token_id"), file.get("tokenizer.ggml.eos_token_id")
    single, pair = "$A:0", "$A:0 $B:1"
    if adds_bos(file) and bos is not None:
        parts.append((tokens[bos], bos))
        single, pair = f"{tokens[bos]}:0 {single}", f"{tokens[bos]}:0 $A:0 {tokens[bos]}:1 $B:1"
    if adds_eos(file) and eos is not None:
        parts.append((tokens[eos], eos))
        single = f"{single} {tokens[eos]}:0"
        pair = pair.replace("$A:0", f"$A:0 {tokens[eos]}:0").replace("$B:1", f"$B:1 {tokens[eos]}:1")
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=parts)
