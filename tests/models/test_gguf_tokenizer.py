"""Tokenizers from GGUF files against what made the vocabularies: sentencepiece, tokenizers, transformers."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from halfbyte.errors import UsageError
from halfbyte.models import gguf_tokenizer
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.tokenizer import from_gguf

TEXT = (
    "the quick brown fox jumps over a lazy dog and it's not 3.14 or 2026 déjà vu Größe naïve été "
    "Москва 東京 def main(): return [x ** 2 for x in range(10)] \t tab\tbed http://a.b/c?d=e&f don't we'll I'm"
)
WORDS = TEXT.split(" ")


def sentences(count: int, seed: int = 0) -> Iterator[str]:
    chance = random.Random(seed)
    gaps = [" ", " ", " ", "  ", "\n", "\n\n", "   ", "\t", ""]
    for _ in range(count):
        yield "".join(chance.choice(WORDS) + chance.choice(gaps) for _ in range(chance.randrange(1, 12)))


AWKWARD = ["", " ", "  ", "\n", " a", "a ", "  a  b  ", "🙂 emoji", "a\u0301 combining", "\u00a0nbsp", "<s>", "x\r\ny"]


def write(path: Path, architecture: str, **fields: Any) -> GgufFile:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text").write_text("\n".join(s.replace("\n", " ") for s in sentences(3000)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spm"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))


def spm_fields(spm: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    count = spm.get_piece_size()
    kinds = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in range(count)]
    return {
        "tokenizer_model": "llama",
        "token_list": [spm.id_to_piece(i) for i in range(count)],
        "token_scores": [spm.get_score(i) for i in range(count)],
        "token_types": kinds,
        "bos_token_id": spm.bos_id(),
        "eos_token_id": spm.eos_id(),
        "unk_token_id": spm.unk_id(),
    }


def test_llama_equals_sentencepiece(spm: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", "llama", **spm_fields(spm))
    tokenizer = from_gguf(file)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    for text in [*sentences(500, seed=1), *(a for a in AWKWARD if "<s>" not in a)]:
        expected = spm.encode(text)
        assert tokenizer(text)["input_ids"] == [spm.bos_id(), *expected], text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text
        if not text.startswith(" "):
            assert tokenizer.decode(expected) == text


def test_special_tokens_stay_whole(spm: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    tokenizer = from_gguf(write(tmp_path / "m.gguf", "llama", **spm_fields(spm)))
    ids = tokenizer("a</s>b", add_special_tokens=False)["input_ids"]
    assert spm.eos_id() in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "ab"


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (False, True), (True, True)])
def test_flags_of_the_file(spm: sentencepiece.SentencePieceProcessor, tmp_path: Path, bos: bool, eos: bool) -> None:
    file = write(tmp_path / "m.gguf", "llama", **spm_fields(spm), add_bos_token=bos, add_eos_token=eos)
    tokenizer = from_gguf(file)
    expected = spm.encode("a fox")
    first, last = [spm.bos_id()] * bos, [spm.eos_id()] * eos
    assert tokenizer("a fox")["input_ids"] == [*first, *expected, *last]
    assert tokenizer("a", "fox")["input_ids"] == [*first, *spm.encode("a"), *last, *first, *spm.encode("fox"), *last]


QWEN2 = transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX
SPLITS = {"qwen2": QWEN2, "llama-bpe": QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")}


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2"])
def test_byte_level_equals_tokenizers(pre: str, tmp_path: Path) -> None:
    made = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "gpt-2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>", "<｜fullwidth｜>"], show_progress=False, initial_alphabet=[]
    )
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(sentences(3000), trainer)
    merges = json.loads(made.to_str())["model"]["merges"]
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    file = write(
        tmp_path / "m.gguf",
        "qwen2",
        tokenizer_model="gpt2",
        tokenizer_pre=pre,
        token_list=tokens,
        token_types=[3, 3] + [1] * (len(tokens) - 2),
        token_merges=[" ".join(pair) for pair in merges],
        eos_token_id=0,
        bos_token_id=1,
        add_bos_token=False,
        chat_template="{{ messages[0].content }}",
    )
    tokenizer = from_gguf(file)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert tokenizer.eos_token == "<|end|>"
    for text in [*sentences(500, seed=1), *AWKWARD, "a<|end|>b<｜fullwidth｜>c"]:
        expected = made.encode(text).ids
        assert tokenizer(text)["input_ids"] == expected, text
        assert tokenizer.decode(expected) == made.decode(expected, skip_special_tokens=False)


def test_saved_files_are_the_same_tokenizer(spm: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    """What a run directory gets must be loadable by transformers and give the same ids, BOS included."""
    tokenizer = from_gguf(write(tmp_path / "m.gguf", "llama", **spm_fields(spm), chat_template="{{ 1 }}"))
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.chat_template == "{{ 1 }}"
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    for text in [*sentences(50, seed=2), *AWKWARD]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer_model": "bert", "token_list": ["a"]}, "'bert' tokenizer"),
        ({"tokenizer_model": "llama"}, "no vocabulary"),
        ({"tokenizer_model": "llama", "token_list": ["a", "b"], "token_scores": [0.0]}, "1 token scores for 2"),
        ({"tokenizer_model": "gpt2", "token_list": ["a"], "tokenizer_pre": "weird"}, "pre-tokenizer 'weird'"),
        ({"tokenizer_model": "gpt2", "token_list": ["a"], "token_merges": ["a b c"]}, "not of two parts"),
        ({"tokenizer_model": "gpt2", "token_list": ["a"], "token_merges": ["a b"]}, "vocabulary and its merges"),
        ({"tokenizer_model": "llama", "token_list": ["a"], "token_scores": [0.0], "bos_token_id": 9}, "token 9"),
    ],
)
def test_bad_vocabularies(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        from_gguf(write(tmp_path / "bad.gguf", "llama", **fields))
    assert "bad.gguf" in str(caught.value)


@pytest.mark.real_model
@pytest.mark.parametrize("fixture", ["gemma_gguf", "qwen_gguf"])
def test_real_vocabularies_equal_transformers(fixture: str, request: pytest.FixtureRequest) -> None:
    """transformers' converter builds the same object, but for Qwen's NFC, which its GGUF path leaves out."""
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    file = GgufFile(request.getfixturevalue(fixture))
    ours = gguf_tokenizer.build_backend(file)
    architecture, vocabulary, _ = get_gguf_tokenizer(str(file.path))
    theirs, _ = convert_gguf_tokenizer(architecture, vocabulary)
    assert ours.get_vocab_size() == theirs.get_vocab_size()
    assert {k: str(v) for k, v in ours.get_added_tokens_decoder().items()}.items() >= {
        k: str(v) for k, v in theirs.get_added_tokens_decoder().items() if str(v) != "<mask>"
    }.items()
    for text in [*sentences(1000, seed=3), *AWKWARD[:8]]:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text).ids) == text


@pytest.mark.real_model
def test_gemma_starts_with_bos_and_qwen_does_not(gemma_gguf: Path, qwen_gguf: Path) -> None:
    gemma, qwen = from_gguf(GgufFile(gemma_gguf)), from_gguf(GgufFile(qwen_gguf))
    assert gemma("Hello")["input_ids"] == [2, 9259]
    assert (gemma.bos_token, gemma.eos_token, gemma.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert (gemma.bos_token_id, gemma.eos_token_id) == (2, 1)
    assert gemma.chat_template is None
    assert qwen("Hello")["input_ids"] == [9707]
    assert (qwen.eos_token, qwen.eos_token_id, qwen.pad_token_id) == ("<|im_end|>", 151645, 151643)
    prompt = qwen.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert qwen(prompt)["input_ids"].count(151644) == 3


@pytest.mark.real_model
def test_memory_of_the_largest_vocabulary(gemma_gguf: Path) -> None:
    """262,144 tokens in under 0.3 GB beside what transformers' import takes (its own GGUF reader: 1.3 GB)."""
    script = """
import pathlib, sys
from transformers import PreTrainedTokenizerFast
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.tokenizer import from_gguf
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1e6
before = peak()
from_gguf(GgufFile(pathlib.Path(sys.argv[1])))
print(peak() - before)
"""
    found = subprocess.run([sys.executable, "-c", script, str(gemma_gguf)], check=True, capture_output=True, text=True)
    assert float(found.stdout) < 0.3
    assert found.stderr == ""
