"""Tensors to and from places in a file, with pread and pwrite: no page of the file counts as this process's memory.

Mapped pages do: a whole checkpoint walked through `mmap` shows up in the peak resident set although each tensor is
dropped. These calls copy straight between the file and the tensor that stays, from any thread.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

MOST = 1 << 30  # Linux moves at most 2 GiB a call


class CutOff(Exception):
    """A file ends in the middle of a tensor, at byte `at`."""

    def __init__(self, at: int) -> None:
        super().__init__(f"the file ends at byte {at}, in the middle of a tensor")
        self.at = at


def read_into(fd: int, out: Tensor, offset: int) -> None:
    """Fill `out` (contiguous, on the CPU) with the file's bytes from `offset` on, in the file's byte order."""
    done, view = 0, bytes_of(out)
    while done < len(view):
        count = os.preadv(fd, [view[done : done + MOST]], offset + done)
        if count == 0:
            raise CutOff(offset + done)
        done += count


def write_from(fd: int, tensor: Tensor, offset: int) -> None:
    """Write `tensor` (contiguous, on the CPU) to the file's bytes from `offset` on. OSError as the system says it."""
    done, view = 0, bytes_of(tensor)
    while done < len(view):
        done += os.pwritev(fd, [view[done : done + MOST]], offset + done)


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory; as bytes, since numpy knows no bfloat16."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data)


def reserve(fd: int, nbytes: int) -> None:
    """Make the file `nbytes` long, with its room on the disk taken where the system can do that. OSError without it."""
    fallocate: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if fallocate is not None and nbytes > 0:
        fallocate(fd, 0, nbytes)
    else:
        os.ftruncate(fd, nbytes)
