"""A short session of tests/fuzz.py with a fixed seed, and that it would find what it looks for."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import UsageError
from tests import fuzz
from tests.fuzz_mutate import Files, mutate, parse_gguf
from tests.fuzz_targets import TARGETS, Target, run

CASES = 2000


def test_two_thousand_damaged_files() -> None:
    command = [sys.executable, fuzz.__file__, "--seed", "2026", "--cases", str(CASES), "--seconds", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith(f"{CASES:,} cases: ")
    assert "0 findings" in done.stdout
    assert " (0 accepted)" not in done.stdout, "damage that is no harm is read"


def test_a_case_is_a_function_of_seed_and_number() -> None:
    corpus: dict[str, list[Files]] = {"a": [{"x.json": b'{"a": [1, 2, {"b": null}]}', "y.bin": bytes(100)}]}
    cases = [fuzz.case_of(7, number, corpus)[1] for number in range(200)]
    assert cases == [fuzz.case_of(7, number, corpus)[1] for number in range(200)]
    assert len({json.dumps({k: v.hex() for k, v in files.items()}) for files in cases}) > 150


def test_gguf_is_written_as_it_was_parsed() -> None:
    (target,) = (target for target in TARGETS if target.name == "gguf")
    for files in target.seeds()[-2:]:
        assert parse_gguf(files["model.gguf"]).to_bytes() == files["model.gguf"]


def test_damage_of_damage_is_possible() -> None:
    chance = random.Random(0)
    files: Files = {"a.gguf": b"GGUF" + bytes(40), "b.safetensors": bytes(8), "c.json": b"", "d": b""}
    for _ in range(300):
        assert isinstance(mutate(files, chance), dict)


@pytest.mark.parametrize("raised", [ValueError("a bug"), UsageError("x" * 10)])
def test_what_is_allowed(raised: Exception, tmp_path: Path) -> None:
    def stage() -> Any:
        raise raised

    target = Target("t", list, lambda folder: [stage, lambda: None])
    if isinstance(raised, UsageError):
        assert run(target, tmp_path) == [raised]
    else:
        with pytest.raises(ValueError, match="a bug"):
            run(target, tmp_path)


WRONG = """
import os, sys
sys.path[:0] = [{root!r}]
import tests.fuzz_targets as targets
from tests import fuzz

def stages(folder):
    def stage():
        if folder.name != "case":
            return  # the seed itself is valid
        kind = sum((folder / "n.bin").read_bytes()) % 5
        if kind == 0: raise KeyError("not for the user")
        if kind == 1: os.abort()
        if kind == 2: bytearray(2_000_000_000)
        while kind == 3: pass
    yield stage

targets.TARGETS[:] = [targets.Target("bad", lambda: [{{"n.bin": bytes(range(200))}}], stages)]
fuzz.work(0, int(sys.argv[2]), int(sys.argv[3]), [], fuzz.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_exceptions_crashes_hangs_and_allocations_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's own loop around a worker whose parser does everything that it must not."""
    (tmp_path / "bad.py").write_text(WRONG.format(root=str(fuzz.ROOT)))
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        values = dict(zip(command[2::2], command[3::2], strict=False))
        words = [values["--worker"], values["--start"], values["--cases"]]
        return popen([sys.executable, str(tmp_path / "bad.py"), *words], **options)

    monkeypatch.setattr(fuzz.subprocess, "Popen", start)
    monkeypatch.setattr(fuzz, "_names", lambda: ["bad"])
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 1.0)
    result = fuzz.session(0, 300.0, cases=12)
    assert result.cases["bad"] == 12
    assert 0 < result.accepted["bad"] < 12
    found = "\n".join(result.findings)
    assert "bad: KeyError in " in found
    assert "bad: MemoryError in " in found
    assert "bad: a crash (exit code -6)" in found
    assert "bad: a hang" in found
