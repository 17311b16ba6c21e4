"""Programs in their child process: what passes, and everything that must not, or must not get out."""

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

from halfbyte.evaluate import code_execution
from halfbyte.evaluate.code_execution import FAILED, OUT_OF_MEMORY, PASSED, RUNNER, TIMED_OUT, confinement, run_program

linux = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")


def status(answer: str, tests: str = "", timeout: float = 10.0) -> str:
    return run_program([answer, tests], timeout).status


def test_an_answer_passes_or_fails_by_its_tests() -> None:
    assert status("def double(x): return 2 * x", "assert double(3) == 6") == PASSED
    outcome = run_program(["def double(x): return x", "assert double(3) == 6, 'three'"], 10)
    assert str(outcome) == "failed: AssertionError: three"
    assert "SyntaxError" in run_program(["def double(x)", "pass"], 10).detail
    assert status("import math, json, re, collections, itertools, typing", "assert __name__ == '__main__'") == PASSED


@pytest.mark.parametrize(
    "answer",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os; os.closerange(3, 64)",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{}')\n    except OSError: pass\nos._exit(0)",
        "import os, signal; os.abort()",
        'tests = """',
        "if False:",
        "import atexit; atexit.register(lambda: None); quit = exit = None; raise KeyboardInterrupt",
    ],
)
def test_leaving_before_the_tests_is_no_success(answer: str) -> None:
    assert status(answer, "raise AssertionError('the tests ran')") == FAILED


def test_endless_programs_are_stopped() -> None:
    started = time.monotonic()
    for answer in ("while True: pass", "import time; time.sleep(60)", "while True: print('x' * 100_000)"):
        assert status(answer, timeout=0.5) == TIMED_OUT
    assert time.monotonic() - started < 10


def test_memory_is_limited() -> None:
    assert status("x = bytearray(4 << 30)") == OUT_OF_MEMORY
    assert status("x = []\nwhile True: x.append('x' * 10_000_000)") == OUT_OF_MEMORY
    assert status("x = bytearray(100 << 20)") == PASSED


def test_what_a_program_finds_and_leaves(tmp_path: Path) -> None:
    """No input, no environment, no packages; a folder of its own that is gone afterwards; files of limited size."""
    os.environ["HALFBYTE_TEST_SECRET"] = "secret"
    try:
        assert status("import os", "assert 'HALFBYTE_TEST_SECRET' not in os.environ") == PASSED
    finally:
        del os.environ["HALFBYTE_TEST_SECRET"]
    assert "EOFError" in run_program(["input()"], 10).detail
    assert "ModuleNotFoundError" in run_program(["import torch"], 10).detail
    assert status("import os", "assert os.listdir() == []\nopen('a', 'w').write('x')\nos.remove('a')") == PASSED
    where = "import os; raise ValueError(os.getcwd())"
    folder = Path(run_program([where], 10).detail.removeprefix("ValueError: "))
    assert folder.is_absolute()
    assert not folder.exists()
    assert not folder.parent.exists()
    assert "too large" in run_program(["f = open('a', 'w')\nwhile True: f.write('x' * 1_000_000)"], 10).detail


def count_children() -> int:
    """Processes of this machine that are running a program."""
    found = 0
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += str(RUNNER).encode() in process.read_bytes()
    return found


@linux
def test_forks_are_refused_and_nothing_lives_on() -> None:
    """Small bombs: should the filter fail one day, the limits of this test are what they would reach."""
    for bomb in (
        "import os\nfor _ in range(4): os.fork()",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(5)'])",
        "import multiprocessing, time\nmultiprocessing.Process(target=time.sleep, args=(5,)).start()",
        "import os\nos.posix_spawn('/bin/sleep', ['sleep', '5'], {})",
    ):
        outcome = run_program([bomb], 10)
        assert (outcome.status, outcome.detail.split(":")[0]) == (FAILED, "PermissionError"), bomb
    assert status("import threading\nt = threading.Thread(target=print); t.start(); t.join()") == PASSED
    assert count_children() == 0


@linux
def test_writing_elsewhere_signals_and_the_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    for answer in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(tmp_path / 'there')!r}, 'a')",
        f"import os; os.remove({str(tmp_path / 'there')!r})",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
        f"import os; os.truncate({str(tmp_path / 'there')!r}, 0)",
        f"import os; os.kill({os.getpid()}, 0)",
        "import socket; socket.socket()",
    ):
        outcome = run_program([answer], 10)
        assert (outcome.status, outcome.detail.split(":")[0]) == (FAILED, "PermissionError"), answer
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"
    assert len(confinement()) == 2


def test_a_child_that_says_passed_without_knowing_the_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever reaches the pipe, only the word that the runner was given counts."""
    fake = tmp_path / "runner.py"
    fake.write_text('import os, sys\nos.write(int(sys.argv[2]), b\'{"status": "passed", "nonce": "guess"}\')')
    monkeypatch.setattr(code_execution, "RUNNER", fake)
    assert status("") == FAILED
    fake.write_text("import os, sys\nwhile True: os.write(int(sys.argv[2]), b'x' * 4096)")
    assert status("", timeout=2) in (FAILED, TIMED_OUT)
