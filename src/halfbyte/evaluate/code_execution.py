"""Running programs that a model wrote, each in a child process with limits.

This protects a machine from mistakes (endless loops, memory, forks, files all over the place), not from malice: the
program runs as the user, with the same kernel, and can read what the user can. For answers of a model that somebody
else trained to harm, use a virtual machine.

Around the child: its own session, killed as a whole at the end; a fresh folder, deleted afterwards; no environment, no
standard input, output thrown away; a wall clock. Inside, see `code_runner`.
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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from halfbyte.errors import UsageError

RUNNER = Path(__file__).with_name("code_runner.py")
MEMORY_BYTES = 1 << 30
FILE_BYTES = 16 << 20
_ANSWER_BYTES = 65_536
PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY = "passed", "failed", "timed out", "out of memory"

CONFINED = {
    "landlock": "writes only in its own folder (Landlock)",
    "seccomp": "no further process and no network (seccomp)",
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

    Raises UsageError where the system has no such processes (Windows).
    """
    if os.name != "posix":
        raise UsageError("programs are run on Linux and macOS only: pass@1 cannot be measured here")
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="halfbyte-code-", ignore_cleanup_errors=True) as folder:
        work = Path(folder) / "work"
        work.mkdir()
        payload = Path(folder) / "payload.json"
        limits = {"cpu_seconds": int(timeout) + 1, "memory": memory, "file_size": FILE_BYTES}
        payload.write_text(json.dumps({"pieces": list(pieces), "nonce": nonce, **limits}), encoding="utf-8")
        reading, writing = os.pipe()
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(RUNNER), str(payload), str(writing)],
                cwd=work, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=[writing], start_new_session=True,
            )  # fmt: skip
            os.close(writing)
            return _watch(child, reading, nonce, timeout)
        finally:
            os.close(reading)


def _watch(child: "subprocess.Popen[bytes]", pipe: int, nonce: str, timeout: float) -> Outcome:
    """Wait for the child's word, or its end, or the clock; whatever it was, nothing of its session lives on."""
    deadline, told = time.monotonic() + timeout, b""
    try:
        while len(told) < _ANSWER_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return Outcome(TIMED_OUT, f"after {timeout:g} s")
            piece = os.read(pipe, 4096)
            if not piece:
                break
            told += piece
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        ended = child.wait()
    return _outcome(told, nonce, ended, timeout)


def _outcome(told: bytes, nonce: str, ended: int, timeout: float) -> Outcome:
    try:
        word = json.loads(told)
    except ValueError:
        word = None
    if not isinstance(word, dict) or word.get("nonce") != nonce:
        if ended in (-signal.SIGXCPU, -signal.SIGKILL):
            return Outcome(TIMED_OUT, f"after {timeout:g} s of processor time")
        how = f"killed by {signal.Signals(-ended).name}" if ended < 0 else f"left with exit code {ended}"
        return Outcome(FAILED, f"{how} before the tests ended")
    status = {"passed": PASSED, "memory": OUT_OF_MEMORY}.get(word["status"], FAILED)
    return Outcome(status, str(word["detail"]), tuple(word["confined"]))


@cache
def confinement() -> tuple[str, ...]:
    """What holds a program on this machine beside the limits, found out by running an empty one."""
    return tuple(CONFINED[name] for name in run_program([""], 10.0).confined)
