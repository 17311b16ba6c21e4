"""One writer a run: a lock file with the process id and the process's start time.

"Running" means that the lock is alive: its process exists and started when the lock says, so a recycled id does not
count. A process on another machine (a shared disk, a container's last life) cannot be asked; its lock is alive while it
is younger than ten minutes, and the training loop touches it with every update.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import write_atomic

SCHEMA_VERSION = 1
FOREIGN_LIFETIME = 600.0


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock. `started` is its start time in seconds since 1970."""

    pid: int
    started: float
    host: str

    @classmethod
    def me(cls) -> Self:
        return cls(os.getpid(), psutil.Process().create_time(), socket.gethostname())


def read_owner(path: Path) -> Owner | None:
    """Who wrote the lock, or None if there is none (or it is not readable as one, which is nobody's)."""
    try:
        fields = json.loads(path.read_bytes())
        return Owner(int(fields["pid"]), float(fields["started"]), str(fields["host"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def alive(path: Path) -> Owner | None:
    """The living owner of a lock, or None: nobody, dead, or another process under the same number."""
    owner = read_owner(path)
    if owner is None:
        return None
    if owner.host != socket.gethostname():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < FOREIGN_LIFETIME:
                return owner
        return None
    try:
        process = psutil.Process(owner.pid)
        running = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner.started) < 2.0
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return owner
    return owner if running else None


class Lock:
    """Held from `acquire` to `release`, or as a context. A dead owner's lock is taken over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner: Owner | None = None

    def acquire(self) -> None:
        """Take the lock or say who has it (UsageError)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self.path.parent):
            holder = alive(self.path)
            if holder is not None:
                raise UsageError(
                    f"{self.path.parent} is being written by process {holder.pid} on {holder.host}: wait for it, stop "
                    "it, or choose another output_dir"
                )
            owner = Owner.me()
            write_atomic(self.path, json.dumps({"schema_version": SCHEMA_VERSION, **asdict(owner)}) + "\n")
            self.owner = owner

    def release(self) -> None:
        """Give it back; a lock that another process has taken over meanwhile is left alone."""
        if self.owner is not None and read_owner(self.path) == self.owner:
            self.path.unlink(missing_ok=True)
        self.owner = None

    def touch(self) -> None:
        """Show to other machines that the owner lives; an error if the lock is no longer ours."""
        if self.owner is None or read_owner(self.path) != self.owner:
            raise HalfbyteError(
                f"{self.path} was removed or taken over by another process: stopping, it writes here now"
            )
        os.utime(self.path)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two processes that find the same dead lock must not both take it over. Windows has no flock; there the window
    of a few milliseconds stays."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
