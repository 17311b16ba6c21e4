"""Tokenizers of folders: tokenizer.json as it is, other vocabularies through transformers, and what is broken named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer

from halfbyte.errors import UsageError
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.tokenizer import from_folder, from_gguf
from tests.models.test_gguf_tokenizer import AWKWARD, sentences, spm, spm_fields, write

__all__ = ["spm"]


@pytest.fixture
def folder(spm: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> Path:
    """A Llama folder with a tokenizer.json whose normalizer is not the one that transformers' class would build."""
    tokenizer = from_gguf(write(tmp_path / "m.gguf", "llama", **spm_fields(spm), chat_template="{{ 1 }}"))
    tokenizer.save_pretrained(tmp_path / "folder")
    transformers.LlamaConfig(vocab_size=700).save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def test_tokenizer_json_is_the_truth(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = from_folder(folder)
    assert tokenizer.chat_template == "{{ 1 }}"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    for text in [*sentences(100), *AWKWARD]:
        assert tokenizer(text)["input_ids"] == backend.encode(text).ids


def test_a_sentencepiece_model_goes_through_transformers(
    spm: sentencepiece.SentencePieceProcessor, folder: Path, tmp_path: Path
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "tokenizer.model").write_bytes(spm.serialized_model_proto())
    tokenizer = from_folder(folder)
    for text in sentences(100):
        text = " ".join(text.split())
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == spm.encode(text)


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 3}', "not json"])
def test_what_is_missing_or_broken_is_named(content: str | None, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match="has no tokenizer") as caught:
        from_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_of_a_tokenizer_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('this ran')")
    assert from_folder(folder)("a fox")["input_ids"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(UsageError):
        from_folder(folder)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize(("fixture", "config"), [("gemma_gguf", "Gemma3TextConfig"), ("qwen_gguf", "Qwen2Config")])
def test_real_tokenizers_survive_being_saved(
    fixture: str, config: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A run's folder is read by transformers' AutoTokenizer, which may rebuild it by the model's type."""
    tokenizer: Any = from_gguf(GgufFile(request.getfixturevalue(fixture)))
    tokenizer.save_pretrained(tmp_path)
    alone = from_folder(tmp_path)
    getattr(transformers, config)().save_pretrained(tmp_path)
    for loaded in (alone, from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.eos_token_id == tokenizer.eos_token_id
        assert loaded.chat_template == tokenizer.chat_template
        for text in [*sentences(100, seed=5), *AWKWARD, "<start_of_turn>user\nhi<end_of_turn><|im_end|>"]:
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"], text
    shutil.rmtree(tmp_path)
