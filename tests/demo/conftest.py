"""A tiny real model, and no measuring of this machine's rates (the tests of `plan.hardware` do that)."""

from pathlib import Path

import pytest
import torch

from halfbyte.plan import hardware
from halfbyte.plan.hardware import Rates
from tests.export.conftest import save_base


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the tests' own, and rates that need no measuring."""
    rates = Rates("cpu", {"float32": 2e11, "bfloat16": 8e11}, 2e10, 1e9)
    monkeypatch.setattr(hardware, "_measure", lambda machine: rates)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand parameters with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    save_base("llama3-gqa", folder, torch.float32)
    return folder
