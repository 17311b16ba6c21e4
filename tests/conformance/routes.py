"""The two ways into our 4-bit kernels with one face, and bitsandbytes' reference beside them.

Direct      halfbyte's own operators, weights and linears
Registered  bitsandbytes' functions, its operators taken over by `halfbyte.bnb_backend`
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.linear import GroupedLinear, Segment
from halfbyte.quant import BlockWeight
from tests.ops.conftest import BitsAndBytes

KINDS = ("nf4", "fp4")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor of any shape; what `absmax` and the nested parts hold is as in `BlockWeight`."""

    codes: Tensor
    absmax: Tensor
    kind: str
    blocksize: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    state: Any = None

    @property
    def constants(self) -> Tensor:
        """float32 [blocks], whatever they are stored as."""
        if self.nested_absmax is None:
            return self.absmax
        return ops.dequantize_dynamic(self.absmax, self.nested_absmax) + self.nested_offset

    @property
    def flat(self) -> Tensor:
        """The codes as bytes."""
        return self.codes.reshape(-1).view(torch.uint8)


class Direct:
    name = "direct"

    def quantize(
        self, x: Tensor, kind: str, blocksize: int = 64, nested: bool = False, storage: torch.dtype = torch.uint8
    ) -> Quantized:
        codes, absmax = ops.quantize_blockwise(x, kind, blocksize)
        found = Quantized(codes.view(storage), absmax, kind, blocksize, tuple(x.shape), x.dtype)
        if not nested:
            return found
        offset = absmax.mean()
        short, scales = ops.quantize_dynamic(absmax - offset)
        return replace(found, absmax=short, nested_absmax=scales, nested_offset=offset)

    def dequantize(self, held: Quantized, out: Tensor | None = None) -> Tensor:
        target = torch.empty(held.shape, dtype=held.dtype) if out is None else out
        return ops.dequantize_blockwise_out(
            held.flat, held.absmax, held.kind, held.blocksize, target,
            nested_absmax=held.nested_absmax, nested_offset=held.nested_offset,
        )  # fmt: skip

    def weight(self, held: Quantized) -> BlockWeight:
        return BlockWeight(
            held.flat, held.absmax, held.kind, held.blocksize, (held.shape[0], held.shape[1]), dtype=held.dtype,
            nested_absmax=held.nested_absmax, nested_offset=held.nested_offset,
        )  # fmt: skip

    def linear(self, a: Tensor, held: Quantized, bias: Tensor | None = None) -> Tensor:
        """a [..., K] times the transpose of [N, K]; with gradients of a, and of a bias that asks for them."""
        segment = Segment("w", self.weight(held))
        if bias is not None:
            segment.bias = bias if isinstance(bias, torch.nn.Parameter) else torch.nn.Parameter(bias, False)
        return GroupedLinear([segment])(a.reshape(-1, a.shape[-1])).view(*a.shape[:-1], held.shape[0])


class Registered:
    name = "registered"

    def __init__(self) -> None:
        import bitsandbytes

        self.bnb = bitsandbytes
        self.functional = bitsandbytes.functional

    def quantize(
        self, x: Tensor, kind: str, blocksize: int = 64, nested: bool = False, storage: torch.dtype = torch.uint8
    ) -> Quantized:
        codes, state = self.functional.quantize_4bit(
            x, blocksize=blocksize, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        found = Quantized(codes, state.absmax, kind, blocksize, tuple(x.shape), x.dtype, state=state)
        if not nested:
            return found
        return replace(found, nested_absmax=state.state2.absmax, nested_offset=state.offset)

    def dequantize(self, held: Quantized, out: Tensor | None = None) -> Tensor:
        found: Tensor = self.functional.dequantize_4bit(held.codes, held.state, out=out)
        return found.view(held.shape)

    def linear(self, a: Tensor, held: Quantized, bias: Tensor | None = None) -> Tensor:
        found: Tensor = self.bnb.matmul_4bit(a, held.codes, held.state, bias=bias)
        return found


class Reference:
    """bitsandbytes' implementation in PyTorch, past the dispatcher."""

    def __init__(self) -> None:
        self.bnb = BitsAndBytes()

    def quantize(self, x: Tensor, kind: str, blocksize: int) -> tuple[Tensor, Tensor]:
        """(flat bytes, float32 constants)."""
        return self.bnb.quantize_4bit(x, kind, blocksize)

    def dequantize(self, held: Quantized, dtype: torch.dtype | None = None) -> Tensor:
        constants = held.absmax
        if held.nested_absmax is not None:
            table = self.bnb.functional.create_dynamic_map()
            constants = self.bnb.dequantize_blockwise(held.absmax, held.nested_absmax, table, 256) + held.nested_offset
        found: Tensor = self.bnb.dequantize_4bit(
            held.flat, constants, held.kind, held.blocksize, held.shape, dtype or held.dtype
        )
        return found.view(held.shape)
