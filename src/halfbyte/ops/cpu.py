"""The operators on the CPU: the C++ kernels of `csrc/` through ctypes, or the reference where there are none.

What runs is chosen at the first call and told by `backend()`. HALFBYTE_NATIVE=0 asks for the reference;
HALFBYTE_ISA=avx512|avx2|portable asks for one instruction set (the results are the same, bit for bit). The kernels run
on torch's own threads: a second pool would spin against torch's.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.ops import levels, reference, schema

ISAS = ("avx512", "avx2", "portable")
_VERSION = 2
_DTYPE = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, list[Any]] = {
    "hb_use": [ctypes.c_char_p, _POINTER],
    "hb_version": [],
    # codes, absmax, table, blocksize, start, count, out, dtype, nested absmax, offset, table, blocksize
    "hb_dequantize": [*[_POINTER] * 3, *[_INT64] * 3, _POINTER, _INT, *[_POINTER] * 3, _INT64],
    # x, dtype, count, midpoints, order, blocksize, codes, absmax
    "hb_quantize": [_POINTER, _INT, _INT64, _POINTER, _POINTER, _INT64, _POINTER, _POINTER],
    # x, dtype, count, first ranks, midpoints, blocksize, codes, absmax
    "hb_quantize_dynamic": [_POINTER, _INT, _INT64, _POINTER, _POINTER, _INT64, _POINTER, _POINTER],
    # codes, absmax, table, blocksize, count, out
    "hb_dequantize_dynamic": [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _POINTER],
}


@dataclass(frozen=True)
class Backend:
    """What runs the CPU operators. name: avx512, avx2, portable, or reference; reason: why, in a sentence."""

    name: str
    reason: str
    threaded: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def _candidates() -> Iterator[Path]:
    """Where the library may lie: beside this file, or, in an editable install, where its build was installed."""
    import halfbyte.ops

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
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _INT if name in ("hb_use", "hb_version") else None
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded: {error}"
    if library.hb_version() != _VERSION:
        return f"{path} is of another version of halfbyte: reinstall it"
    return library


def _torch_parallel_for() -> int | None:
    """The address of torch's own parallel-for, a C symbol of libtorch_cpu since 2.10; None where it is missing."""
    folder = Path(torch.__file__).parent / "lib"
    for place in (str(torch._C.__file__), folder / "torch_cpu.dll"):
        try:
            symbol = ctypes.CDLL(str(place)).torch_parallel_for
        except (OSError, AttributeError):
            continue
        return ctypes.cast(symbol, _POINTER).value
    return None


class _Kernels:
    """The choice, made once and kept."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.backend: Backend | None = None

    def choose(self, isa: str | None = None) -> Backend:
        """Take the best instruction set, or the asked one; UsageError where this machine lacks it."""
        if isa is not None and isa not in (*ISAS, "reference"):
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
        threads = _torch_parallel_for()
        for name in ISAS if isa is None else (isa,):
            if library.hb_use(name.encode(), threads):
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


_kernels = _Kernels()


def backend() -> Backend:
    """What runs the CPU operators, and why."""
    _kernels.ready()
    assert _kernels.backend is not None
    return _kernels.backend


def use(isa: str | None) -> Backend:
    """Choose anew: "avx512", "avx2", "portable", "reference", or None for the best. For tests and benchmarks."""
    return _kernels.choose(isa)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dequantize_blockwise_out(
    codes: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    out: Tensor,
    start: int = 0,
    table: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_table: Tensor | None = None,
    nested_blocksize: int = 256,
) -> None:
    arguments = (codes, absmax, quant_type, blocksize, out, start, table)
    nested = (nested_absmax, nested_offset, nested_table, nested_blocksize)
    schema.check_out(*arguments, *nested)
    library = _kernels.ready()
    if library is None:
        reference.dequantize_blockwise_out(*arguments, *nested)
        return
    if table is None and quant_type != "int8":
        table = levels.levels(quant_type)
    if nested_table is None:
        nested_table = levels.dynamic_map()
    library.hb_dequantize(
        codes.data_ptr(),
        absmax.data_ptr(),
        None if quant_type == "int8" else _pointer(table),
        blocksize,
        start,
        out.numel(),
        out.data_ptr(),
        _DTYPE[out.dtype],
        _pointer(nested_absmax),
        _pointer(nested_offset),
        nested_table.data_ptr(),
        nested_blocksize,
    )


def _quantize_blockwise(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    schema.check_format(quant_type, blocksize)
    schema.check_input(x)
    library = _kernels.ready()
    if library is None:
        return reference.quantize_blockwise(x, quant_type, blocksize)
    x, count = x.contiguous(), x.numel()
    codes = torch.empty(count if quant_type == "int8" else (count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty((count + blocksize - 1) // blocksize, dtype=torch.float32)
    middles, order = (None, None) if quant_type == "int8" else levels.ordering(quant_type)
    library.hb_quantize(
        x.data_ptr(),
        _DTYPE[x.dtype],
        count,
        _pointer(middles),
        _pointer(order),
        blocksize,
        codes.data_ptr(),
        absmax.data_ptr(),
    )
    reference.refuse_non_finite(x, absmax)
    return codes, absmax


def _quantize_dynamic(x: Tensor, blocksize: int, signed: bool = True) -> tuple[Tensor, Tensor]:
    schema.check_blocksize(blocksize)
    schema.check_input(x)
    library = _kernels.ready()
    if library is None:
        return reference.quantize_dynamic(x, blocksize, signed)
    x, count = x.contiguous(), x.numel()
    codes = torch.empty(count, dtype=torch.uint8)
    absmax = torch.empty((count + blocksize - 1) // blocksize, dtype=torch.float32)
    first, middles = levels.dynamic_search(signed)
    library.hb_quantize_dynamic(
        x.data_ptr(),
        _DTYPE[x.dtype],
        count,
        first.data_ptr(),
        middles.data_ptr(),
        blocksize,
        codes.data_ptr(),
        absmax.data_ptr(),
    )
    reference.refuse_non_finite(x, absmax)
    return codes, absmax


def _dequantize_dynamic(codes: Tensor, absmax: Tensor, blocksize: int, table: Tensor) -> Tensor:
    schema.check_dynamic(codes, absmax, blocksize, table)
    library = _kernels.ready()
    if library is None:
        return reference.dequantize_dynamic(codes, absmax, blocksize, table)
    out = torch.empty(codes.numel(), dtype=torch.float32)
    library.hb_dequantize_dynamic(
        codes.data_ptr(), absmax.data_ptr(), table.data_ptr(), blocksize, codes.numel(), out.data_ptr()
    )
    return out


schema.library.impl("quantize_blockwise", _quantize_blockwise, "CPU")
schema.library.impl("dequantize_blockwise_out", _dequantize_blockwise_out, "CPU")
schema.library.impl("quantize_dynamic", _quantize_dynamic, "CPU")
schema.library.impl("dequantize_dynamic", _dequantize_dynamic, "CPU")
