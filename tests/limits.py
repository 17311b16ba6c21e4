"""A process's limit on its data (RLIMIT_DATA): what tests starve code with, always in a process of its own."""

import multiprocessing
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def data_bytes() -> int:
    """What RLIMIT_DATA counts: writable private memory, used or not (VmData)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def limit_data(nbytes: int) -> None:
    """From here on this process may have so many bytes."""
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))


@contextmanager
def limited(more: int) -> Iterator[None]:
    """Inside, this process may take `more` bytes beside what it has."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit_data(data_bytes() + more)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _call(send: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    send.send(function(*arguments))


def in_new_process(function: Callable[..., Any], *arguments: Any, seconds: float = 300) -> Any:
    """What a module's function returns in a process that has just begun; AssertionError if it dies."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(send, function, arguments))
    process.start()
    send.close()
    try:
        assert receive.poll(seconds), f"{function.__name__} took longer than {seconds:g} s"
        return receive.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"{function.__name__} died with exit code {process.exitcode}") from None
    finally:
        process.join(10)
