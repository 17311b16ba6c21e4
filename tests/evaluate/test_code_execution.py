"""Programs in their child process: what passes, and everything that must not, or must not get out."""

import contextlib
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import code_execution
from halfbyte.evaluate.code_execution import (
    FAILED,
    OUT_OF_MEMORY,
    PASSED,
    RUNNER,
    TIMED_OUT,
    confinement,
    remove_tree,
    run_program,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")


def status(answer: str, tests: str = "", timeout: float = 10.0) -> str:
    return run_program([answer, tests], timeout).status


def test_an_answer_passes_or_fails_by_its_tests() -> None:
    assert status("def double(x): return 2 * x", "assert double(3) == 6") == PASSED
    outcome = run_program(["def double(x): return x", "assert double(3) == 6, 'three'"], 10)
    assert str(outcome) == "failed: AssertionError: three"
    assert "SyntaxError" in run_program(["def double(x)", "pass"], 10).detail
    assert status("import math, json, re, collections, itertools, typing", "assert math.pi") == PASSED


def test_an_answer_is_a_module_that_is_imported() -> None:
    for block in ("f(int(input()))", "import unittest; unittest.main()"):
        assert status(f"def f(x): return 2\n\nif __name__ == '__main__':\n    {block}", "assert f(1) == 2") == PASSED
    pickled = "import pickle\nassert type(pickle.loads(pickle.dumps(Point(1)))) is Point"
    assert status("import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: int", pickled) == PASSED
    assert status("def f(): return 1", "import answer\nassert answer.f() == 1") == PASSED


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


# tgkill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo, prlimit64, setpriority, sched_setaffinity, process_vm_readv
NUMBERS = {
    "x86_64": (234, 200, 129, 297, 302, 141, 203, 310),
    "aarch64": (131, 130, 138, 240, 261, 140, 122, 270),
}


@linux
@pytest.mark.skipif(platform.machine() not in NUMBERS, reason="the filter is for x86-64 and ARM64")
def test_no_other_process_is_touched() -> None:
    numbers = NUMBERS[platform.machine()]
    tgkill, tkill, queue, queue_to, limit, priority, affinity, read_memory = numbers
    victim = subprocess.Popen(["sleep", "60"])
    nice = os.getpriority(os.PRIO_PROCESS, victim.pid)
    try:
        pid, about = victim.pid, "ctypes.create_string_buffer(struct.pack('iii', 9, 0, -1), 128)"
        for call in (
            f"{tgkill}, {pid}, {pid}, 9",
            f"{tkill}, {pid}, 9",
            f"{queue}, {pid}, 9, {about}",
            f"{queue_to}, {pid}, {pid}, 9, {about}",
            f"{limit}, {pid}, 7, ctypes.create_string_buffer(struct.pack('QQ', 20, 20)), None",
            f"{priority}, 0, {pid}, 5",
            f"{affinity}, {pid}, 8, ctypes.create_string_buffer(b'\\x01', 8)",
            f"{read_memory}, {pid}, None, 0, None, 0, 0",
        ):
            program = (
                f"import ctypes, struct\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.syscall({call}) == -1"
            )
            assert str(run_program([program, "assert ctypes.get_errno() == 1"], 10)) == PASSED, call
        owned = f"import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {pid})"
        assert "PermissionError" in run_program([owned], 10).detail
        assert victim.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, pid) == nice
    finally:
        victim.kill()
        victim.wait()


def test_a_program_may_signal_and_limit_itself() -> None:
    heard = "import os, resource, signal\nheard = []\nsignal.signal(signal.SIGUSR1, lambda *_: heard.append(1))"
    for send in ("signal.raise_signal(signal.SIGUSR1)", "os.kill(os.getpid(), signal.SIGUSR1)"):
        assert status(f"{heard}\n{send}", "assert heard") == PASSED
    assert status(f"{heard}\nresource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))", "assert 1") == PASSED


@linux
def test_modes_and_times_elsewhere_stay(tmp_path: Path) -> None:
    """And copying in its own folder, which sets both, goes on."""
    there = tmp_path / "there"
    there.write_text("mine")
    before = there.stat()
    for change in ("os.chmod({}, 0)", "os.utime({}, (1, 1))", "os.chown({}, 1, 1)", "os.setxattr({}, 'user.a', b'1')"):
        assert status("import os\n" + change.format(repr(str(there)))) == PASSED
    after = there.stat()
    assert (after.st_mode, after.st_mtime, after.st_uid) == (before.st_mode, before.st_mtime, before.st_uid)
    assert os.listxattr(there) == []
    assert (
        status("import shutil\nopen('a', 'w').write('x')\nshutil.copy2('a', 'b')", "assert open('b').read()") == PASSED
    )


def test_nested_folders_are_removed(tmp_path: Path) -> None:
    """Deeper than recursion goes and a path may be long; one that its owner may not write; a link is not followed."""
    nested = "for _ in range(1100):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)"
    where = f"import os\nhere = os.getcwd()\n{nested}\nraise ValueError(here)"
    folder = Path(run_program([where], 10).detail.removeprefix("ValueError: "))
    assert folder.name == "work"
    assert not folder.parent.exists()
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "gone" / "a" / "b").mkdir(parents=True)
    (tmp_path / "gone" / "a" / "link").symlink_to(kept)
    (tmp_path / "gone" / "a").chmod(0o500)
    (kept / "file").touch()
    remove_tree(tmp_path / "gone")
    remove_tree(tmp_path / "gone")  # nothing there is no error
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]


@linux
def test_a_program_does_not_outlive_halfbyte(tmp_path: Path) -> None:
    run = "from halfbyte.evaluate.code_execution import run_program\nrun_program(['import time; time.sleep(20)'], 20)"
    with subprocess.Popen([sys.executable, "-c", run], env={**os.environ, "TMPDIR": str(tmp_path)}) as parent:
        waited = time.monotonic() + 60
        while not count_children() and time.monotonic() < waited:
            time.sleep(0.05)
        assert count_children() == 1
        time.sleep(0.5)  # until it has read what to do
        parent.send_signal(signal.SIGTERM)
    waited = time.monotonic() + 5
    while count_children() and time.monotonic() < waited:
        time.sleep(0.05)
    assert count_children() == 0


def test_a_program_killed_from_outside_is_not_late() -> None:
    outcome = run_program(["import os\nos.kill(os.getpid(), 9)"], 10)
    assert (outcome.status, "out of memory?" in outcome.detail) == (FAILED, True)
    assert status("import os, time\nos.closerange(3, 64)\ntime.sleep(60)", timeout=0.5) == TIMED_OUT


def test_many_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("this system gives a process fewer files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert status("x = 1", "assert x") == PASSED
    finally:
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_the_system_refuses_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(HalfbyteError, match=r"programs cannot be run: .*No such file.*nowhere"):
            run_program(["pass"], 10)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    lowest = os.dup(0)
    os.close(lowest)
    with pytest.raises(HalfbyteError, match=r"programs cannot be run: .*no python"):
        run_program(["pass"], 10)
    again = os.dup(0)
    os.close(again)
    assert again == lowest  # no file was left open


def test_a_child_that_says_passed_without_knowing_the_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever reaches the pipe, only the word that the runner was given counts."""
    fake = tmp_path / "runner.py"
    fake.write_text('import os, sys\nos.write(int(sys.argv[2]), b\'{"status": "passed", "nonce": "guess"}\')')
    monkeypatch.setattr(code_execution, "RUNNER", fake)
    assert status("") == FAILED
    fake.write_text("import os, sys\nwhile True: os.write(int(sys.argv[2]), b'x' * 4096)")
    assert status("", timeout=2) in (FAILED, TIMED_OUT)
