"""The digest of the formulas: it follows what they say, wherever that comes from, and nothing else."""

from collections.abc import Iterator

import pytest

from halfbyte.plan import arithmetic, memory, time


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    arithmetic._version.cache_clear()
    yield
    arithmetic._version.cache_clear()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (memory, "PROCESS_FLOOR"),
        (memory, "WORKSPACE_BYTES"),  # of another package
        (memory, "CUDA_CONTEXT"),
        (time, "LOAD_BYTES_A_SECOND"),
        (time, "FORWARD"),
    ],
)
def test_it_follows_every_constant_and_no_byte(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    before, value = arithmetic.version(), getattr(module, name)
    assert len(before) == 8
    monkeypatch.setattr(module, name, value * 1.2 if isinstance(value, float) else round(value * 1.2))
    arithmetic._version.cache_clear()
    assert arithmetic.version() != before
    monkeypatch.setattr(module, name, value)
    arithmetic._version.cache_clear()
    assert arithmetic.version() == before


def test_a_byte_more_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = arithmetic.version()
    monkeypatch.setattr(memory, "PROCESS_FLOOR", memory.PROCESS_FLOOR + 1)
    arithmetic._version.cache_clear()
    assert arithmetic.version() == before
