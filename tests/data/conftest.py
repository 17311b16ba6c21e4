"""Small real tokenizers, of the two kinds whose habits differ, and the real models' ones where they are at hand.

bpe   byte-level BPE as in GPT-2, Llama 3 and Qwen: no BOS of its own, every byte has a token
sp    SentencePiece-like BPE as in Llama 2: a BOS in front, a space before the first word, byte fallback
"""

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# A busy machine is slow; that is no reason to fail.
settings.register_profile("data", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("data")

CORPUS = [
    "User: Assistant: System: The answer is positive or negative, and the question was what is 2 + 2?",
    "### Instruction: ### Response: Below is an instruction that describes a task.",
    "A stirring, funny and finally transporting re-imagining of beauty and the beast.",
    'def main():\n    return {"name": "call", "arguments": {"city": "Paris"}}\n\n\n',
    "Label: premise: hypothesis: the quick brown fox jumps over the lazy dog 0123456789",
] * 4

CACHE = Path("~/.cache/halfbyte-models").expanduser()
REAL = {"gemma": "gemma-3-270m.gguf", "qwen": "qwen2.5-coder-1.5b.gguf"}


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


@cache
def make_bpe() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([_special(name) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@cache
def make_sp(prepend: str = "normalizer") -> PreTrainedTokenizerFast:
    """`prepend`: how the first word gets its space; "normalizer" (Llama 2, legacy) or "first" (Metaspace)."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word for word in state["vocab"] if word not in names]
    vocab = {word: number for number, word in enumerate([*names, *words])}
    merges = [tuple(merge) for merge in state["merges"]]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend == "normalizer":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([_special(name) for name in names[:5]])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return make_bpe()


@pytest.fixture(scope="session")
def sp() -> PreTrainedTokenizerFast:
    return make_sp()


@pytest.fixture(params=["bpe", "sp", "sp-first"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each kind in turn."""
    return small_tokenizer(request.param)


def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return {"bpe": make_bpe, "sp": make_sp, "sp-first": lambda: make_sp("first")}[kind]()


@cache
def _real(name: str) -> Any:
    return AutoTokenizer.from_pretrained(CACHE, gguf_file=REAL[name], local_files_only=True)


@pytest.fixture(params=list(REAL))
def real_tokenizer(request: pytest.FixtureRequest) -> Any:
    """The tokenizer of each real model, in turn."""
    if not (CACHE / REAL[request.param]).is_file():
        pytest.skip(f"no {REAL[request.param]} in {CACHE}")
    return _real(request.param)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public data sets beside the checkout."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return folder


WriteRows = Callable[..., Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows as JSON Lines and return the path."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
