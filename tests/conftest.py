"""Fixtures for all tests: where the shared data and the real models are, skipped visibly where they are not."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
MODELS = Path(os.environ.get("HALFBYTE_TEST_MODELS", "~/.cache/halfbyte-models")).expanduser()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared/data beside the checkout")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def _no_history() -> Iterator[None]:
    """Tests leave nothing in the history of the person who runs them, and their plans do not depend on it."""
    before = os.environ.get("HALFBYTE_HISTORY")
    os.environ["HALFBYTE_HISTORY"] = "0"
    yield
    if before is None:
        del os.environ["HALFBYTE_HISTORY"]
    else:
        os.environ["HALFBYTE_HISTORY"] = before


def _model(name: str) -> Path:
    path = MODELS / name
    if not path.is_file():
        pytest.skip(f"{path} is not here (HALFBYTE_TEST_MODELS names another folder)")
    return path


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """Gemma 3 270M, Q4_K_M, as the demo brings it."""
    return _model("gemma-3-270m.gguf")


@pytest.fixture(scope="session")
def qwen_gguf() -> Path:
    """Qwen2.5-Coder 1.5B Instruct, Q4_K_M."""
    return _model("qwen2.5-coder-1.5b.gguf")
