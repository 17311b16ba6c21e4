"""Reading tensors from a model's files with pread (`halfbyte.rawfile`), one that was cut off named."""

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from halfbyte import rawfile
from halfbyte.errors import UsageError


def read_into(fd: int, out: Tensor, offset: int, path: Path) -> None:
    """Fill `out` (contiguous, on the CPU) with the file's bytes from `offset` on, in the file's byte order."""
    try:
        rawfile.read_into(fd, out, offset)
    except rawfile.CutOff as error:
        raise UsageError(
            f"{path} ends at byte {error.at}, in the middle of a tensor: "
            "the file was cut off while it was read; download or copy it again"
        ) from None


class OpenFile:
    """A file kept open for pread from any thread; closed when the last reference goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise UsageError(f"{path} cannot be opened: {error.strerror}") from error
        self.size = os.fstat(self.fd).st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone as the interpreter exits
        fd = getattr(self, "fd", -1)
        if fd >= 0:
            close(fd)
            self.fd = -1

    def read(self, offset: int, nbytes: int) -> bytes:
        """`nbytes` from `offset` on, fewer at the end of the file."""
        return os.pread(self.fd, nbytes, offset)

    def read_into(self, out: Tensor, offset: int) -> None:
        read_into(self.fd, out, offset, self.path)
