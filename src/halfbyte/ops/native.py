"""The native library of `csrc/`: loaded with ctypes, its instruction set chosen at the first call.

Modules that call it say at import which functions they need (`declare`); `library()` gives it, or None for the
reference. HALFBYTE_NATIVE=0 asks for the reference; HALFBYTE_ISA=amx|avx512bf16|avx512|avx2|portable for one
instruction set; HALFBYTE_LIBRARY=path for another build of the library (`make sanitize`). Everything native runs on
torch's own threads: a second pool would spin against torch's.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import UsageError

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "portable")
EMULATED = "amx_emulated"
"""amx with its instructions in plain C++: for tests on machines without them."""
_VERSION = 8
DTYPE = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "hb_use": [ctypes.c_char_p, POINTER, POINTER],
    "hb_version": [],
    "hb_multiplies": [INT],
}
_RETURNING_INT = frozenset(_SIGNATURES)


def declare(signatures: Mapping[str, list[Any]]) -> None:
    """Functions of the library by name with the ctypes of their arguments; they return nothing, and raise MemoryError.

    A module that is imported after the library was loaded is served too: called without argument types, ctypes cuts
    every address to 32 bits.
    """
    _SIGNATURES.update(signatures)
    if _choice.library is not None:
        _bind(_choice.library, signatures)


def _bind(library: ctypes.CDLL, signatures: Mapping[str, list[Any]]) -> None:
    """AttributeError where the library lacks a function."""
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, INT
        if name not in _RETURNING_INT:
            function.errcheck = _require_memory


def _require_memory(failed: int, function: Any, arguments: Any) -> None:
    """MemoryError where a function of the library found no memory for what it works with; its results are then void."""
    if failed:
        raise MemoryError(f"{function.__name__} of the native library found no memory to work with")


@dataclass(frozen=True)
class Backend:
    """What runs the CPU operators. name: one of ISAS, or reference; reason: why, in a sentence."""

    name: str
    reason: str
    threaded: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def _candidates() -> Iterator[Path]:
    """Where the library may lie: beside this file, or, in an editable install, where its build was installed.

    Raises UsageError where HALFBYTE_LIBRARY names no file.
    """
    import halfbyte.ops

    if asked := os.environ.get("HALFBYTE_LIBRARY"):
        if not Path(asked).is_file():
            raise UsageError(f"HALFBYTE_LIBRARY={asked} is not a file")
        yield Path(asked)
        return

    suffix = "dll" if sys.platform == "win32" else "so"
    for folder in halfbyte.ops.__path__:
        yield Path(folder) / f"libhalfbyte_native.{suffix}"


def _open() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    path = next((path for path in _candidates() if path.is_file()), None)
    if path is None:
        return "halfbyte was installed without its native library: reinstall it where there is a C++ compiler"
    try:
        library = ctypes.CDLL(str(path))
        _bind(library, _SIGNATURES)
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded: {error}"
    if library.hb_version() != _VERSION:
        return f"{path} is of another version of halfbyte: reinstall it"
    return library


def _torch_symbols() -> tuple[int | None, int | None]:
    """The addresses of torch's own parallel-for and thread count, C symbols of libtorch_cpu since 2.10."""
    folder = Path(torch.__file__).parent / "lib"
    for place in (str(torch._C.__file__), folder / "torch_cpu.dll"):
        try:
            found = ctypes.CDLL(str(place))
            symbols = found.torch_parallel_for, found.torch_get_num_threads
        except (OSError, AttributeError):
            continue
        loop, count = (ctypes.cast(symbol, POINTER).value for symbol in symbols)
        return loop, count
    return None, None


class _Choice:
    """The choice, made once and kept."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.backend: Backend | None = None

    def choose(self, isa: str | None = None) -> Backend:
        """Take the best instruction set, or the asked one; UsageError where this machine lacks it."""
        if isa is not None and isa not in (*ISAS, EMULATED, "reference"):
            raise UsageError(f"HALFBYTE_ISA={isa} is not one of {', '.join(ISAS)}")
        self.library = None
        if isa == "reference":
            self.backend = Backend("reference", "asked for with HALFBYTE_NATIVE=0", threaded=True)
            return self.backend
        library = _open()
        if isinstance(library, str):
            if isa is not None:
                raise UsageError(f"HALFBYTE_ISA={isa}: {library}")
            self.backend = Backend("reference", library, threaded=True)
            return self.backend
        threads, count = _torch_symbols()
        for name in ISAS if isa is None else (isa,):
            if library.hb_use(name.encode(), threads, count):
                reason = "the best of this processor" if isa is None else f"asked for with HALFBYTE_ISA={isa}"
                alone = "" if threads else ", on one thread: this torch has no torch_parallel_for"
                self.library, self.backend = library, Backend(name, reason + alone, threads is not None)
                return self.backend
        raise UsageError(f"HALFBYTE_ISA={isa}: this processor, or the compiler that built halfbyte, lacks it")

    def ready(self) -> ctypes.CDLL | None:
        """The library, chosen now if it has not been; None for the reference."""
        if self.backend is None:
            self.choose("reference" if os.environ.get("HALFBYTE_NATIVE") == "0" else os.environ.get("HALFBYTE_ISA"))
        return self.library


_choice = _Choice()


def backend() -> Backend:
    """What runs the CPU operators, and why."""
    _choice.ready()
    assert _choice.backend is not None
    return _choice.backend


def use(isa: str | None) -> Backend:
    """Choose anew: "avx512", "avx2", "portable", "reference", or None for the best. For tests and benchmarks."""
    return _choice.choose(isa)


def library() -> ctypes.CDLL | None:
    """The library, its instruction set chosen; None where the reference runs."""
    return _choice.ready()


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the native engine has matrix products of this type; if not, torch's are the faster ones."""
    loaded = _choice.ready()
    return loaded is not None and dtype in DTYPE and bool(loaded.hb_multiplies(DTYPE[dtype]))


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
