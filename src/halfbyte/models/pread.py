"""Reading tensors from files with pread: no page of the file ever counts as this process's memory.

Mapped pages do: a whole checkpoint walked through `mmap` shows up in the peak resident set although
each tensor is dropped. pread copies straight into the tensor that stays.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.errors import UsageError

_MOST = 1 << 30  # Linux moves at most 2 GiB a call


def read_into(fd: int, out: Tensor, offset: int, path: Path) -> None:
    """Fill `out` (contiguous, on the CPU) with the file's bytes from `offset` on, in the file's byte order."""
    if out.numel() == 0:
        return
    view = memoryview(out.view(-1).view(torch.uint8).numpy().data)
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done : done + _MOST]], offset + done)
        if count == 0:
            raise UsageError(
                f"{path} ends at byte {offset + done}, in the middle of a tensor: "
                "the file was cut off while it was read; download or copy it again"
            )
        done += count


class OpenFile:
    """A file kept open for pread from any thread; closed when the last reference goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise UsageError(f"{path} cannot be opened: {error.strerror}") from error
        self.size = os.fstat(self.fd).st_size

    def __del__(self) -> None:
        fd = getattr(self, "fd", -1)
        if fd >= 0:
            os.close(fd)
            self.fd = -1

    def read(self, offset: int, nbytes: int) -> bytes:
        """`nbytes` from `offset` on, fewer at the end of the file."""
        return os.pread(self.fd, nbytes, offset)

    def read_into(self, out: Tensor, offset: int) -> None:
        read_into(self.fd, out, offset, self.path)
