"""Running programs that a model wrote, each in a child process with limits.

This protects a machine from mistakes (endless loops, memory, forks, files all over the place), not from malice: the
program runs as the user, with the same kernel, and can read what the user can. For answers of a model that somebody
else trained to harm, use a virtual machine.

Around the child: its own session, killed as a whole at the end; a fresh folder, deleted afterwards; no environment, no
standard input, output thrown away; a wall clock. Inside, see `code_runner`. How much a program writes in all is not
limited, only how long a single file becomes.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from halfbyte.errors import HalfbyteError, UsageError

RUNNER = Path(__file__).with_name("code_runner.py")
MEMORY_BYTES = 1 << 30
FILE_BYTES = 16 << 20
_ANSWER_BYTES = 65_536
PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY = "passed", "failed", "timed out", "out of memory"

CONFINED = {
    "landlock": "writes only in its own folder (Landlock)",
    "seccomp": "no further process, no signal to others and no network (seccomp)",
}


@dataclass(frozen=True)
class Outcome:
    """How a program ended: passed, failed, timed out or out of memory; and the exception or the signal, in words."""

    status: str
    detail: str = ""
    confined: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}" if self.detail else self.status


def run_program(pieces: Sequence[str], timeout: float, memory: int = MEMORY_BYTES) -> Outcome:
    """Run Python source, piece after piece in one namespace; passed only if the last piece came to its end.

    timeout   seconds of wall clock for all of it;  memory   bytes of address space

    Raises UsageError where the system has no such processes (Windows), HalfbyteError where it refuses one, a pipe or a
    folder for temporary files.
    """
    if os.name != "posix":
        raise UsageError("programs are run on Linux and macOS only: pass@1 cannot be measured here")
    nonce = secrets.token_hex(16)
    limits = {"cpu_seconds": int(timeout) + 1, "memory": memory, "file_size": FILE_BYTES}
    told = json.dumps({"pieces": list(pieces), "nonce": nonce, "parent": os.getpid(), **limits})
    with _folder() as folder:
        try:
            work, payload = folder / "work", folder / "payload.json"
            work.mkdir()
            payload.write_text(told, encoding="utf-8")
            child, reading = _start(work, payload)
        except OSError as error:
            raise _cannot_run(error) from error
        try:
            return _watch(child, reading, nonce, timeout)
        finally:
            os.close(reading)


def _start(work: Path, payload: Path) -> tuple["subprocess.Popen[bytes]", int]:
    """(the child, the end of its pipe that is read)."""
    reading, writing = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(RUNNER), str(payload), str(writing)],
            cwd=work, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=[writing], start_new_session=True,
        )  # fmt: skip
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    return child, reading


def _cannot_run(error: OSError) -> HalfbyteError:
    return HalfbyteError(f"the model's programs cannot be run: {error}")


@contextmanager
def _folder() -> Iterator[Path]:
    """A fresh folder for temporary files, gone afterwards; HalfbyteError where there can be none."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="halfbyte-code-"))
    except OSError as error:
        raise _cannot_run(error) from error
    try:
        yield folder
    finally:
        remove_tree(folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that a program may have left there; what cannot be removed stays, without an error.

    Folders in folders can be deeper than a path may be long, and than a recursion: each is moved up to the first level
    before it is looked into.
    """
    found = [folder]
    for path in found:  # grows meanwhile
        entries: list[Path] = []
        with suppress(OSError):
            entries = list(path.iterdir())
        for entry in entries:
            with suppress(OSError):
                if entry.is_symlink() or not entry.is_dir():
                    entry.unlink()
                else:
                    entry.chmod(0o700)  # one that may not be written cannot be moved either
                    found.append(entry.rename(folder / f"{len(found)}.removed"))
    for path in reversed(found):
        with suppress(OSError):
            path.rmdir()


def _watch(child: "subprocess.Popen[bytes]", pipe: int, nonce: str, timeout: float) -> Outcome:
    """Wait for the child's word, or its end, or the clock; whatever it was, nothing of its session lives on."""
    deadline, told, late = time.monotonic() + timeout, b"", False
    word = select.poll()  # select() itself knows no more than 1,024 open files
    word.register(pipe, select.POLLIN)
    try:
        while len(told) < _ANSWER_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or not word.poll(1000 * left):
                return Outcome(TIMED_OUT, f"after {timeout:g} s")
            piece = os.read(pipe, 4096)
            if not piece:
                break
            told += piece
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        ended = child.wait()
    return _outcome(told, nonce, None if late else ended, timeout)


def _outcome(told: bytes, nonce: str, ended: int | None, timeout: float) -> Outcome:
    """`ended`: the return code of Popen, None where the child had to be stopped."""
    try:
        word = json.loads(told)
    except ValueError:
        word = None
    if not isinstance(word, dict) or word.get("nonce") != nonce:
        if ended is None:
            return Outcome(TIMED_OUT, f"after {timeout:g} s")
        if ended == -signal.SIGXCPU:
            return Outcome(TIMED_OUT, f"after {timeout:g} s of processor time")
        if ended == -signal.SIGKILL:  # by the system, or as SIGXCPU was ignored; the clock's own is told apart above
            return Outcome(FAILED, "killed from outside (is the machine out of memory?) before the tests ended")
        how = f"killed by {signal.Signals(-ended).name}" if ended < 0 else f"left with exit code {ended}"
        return Outcome(FAILED, f"{how} before the tests ended")
    status = {"passed": PASSED, "memory": OUT_OF_MEMORY}.get(word["status"], FAILED)
    return Outcome(status, str(word["detail"]), tuple(word["confined"]))


@cache
def confinement() -> tuple[str, ...]:
    """What holds a program on this machine beside the limits, found out by running an empty one."""
    return tuple(CONFINED[name] for name in run_program([""], 10.0).confined)
