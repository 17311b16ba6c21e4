"""A tiny real model in a Hugging Face folder, with a tokenizer, and rows that it can learn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.plan import hardware
from halfbyte.plan.hardware import Rates
from halfbyte.run.config import RunConfig, load_config
from tests.evaluate.conftest import VOCAB, byte_tokenizer
from tests.models import families

RATES = Rates("cpu", {"float32": 2e11, "bfloat16": 8e11}, 2e10, 1e9)


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of a machine of the paper: the tests of `plan.hardware` measure."""
    monkeypatch.setattr(hardware, "_measure", lambda machine: RATES)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = families.config("llama3-gqa")
    config.vocab_size = VOCAB
    families.make_model(config).to(torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"say {i}:", "completion": f" {i % 7} and {i % 5}"} for i in range(count)]


def write_rows(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows(60))


@pytest.fixture
def tiny_config(model_folder: Path, data_file: Path, tmp_path: Path) -> RunConfig:
    """Six quick steps with everything switched on that a run has."""
    return load_config(
        model=str(model_folder), data=str(data_file), output_dir=tmp_path / "run", dtype="float32", lora_r=4,
        method="qlora", max_steps=6, eval_split=0.1, learning_rate=1e-2, max_seq_length=64,
    )  # fmt: skip
