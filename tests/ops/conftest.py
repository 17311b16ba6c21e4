"""bitsandbytes' pure-PyTorch implementation of its operators, and a choice of our kernels that is put back."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey

from halfbyte.ops import native


class BitsAndBytes:
    """Its default backend, called past the dispatcher: 0.50.2's CPU kernels are wrong for some shapes.

    Run eagerly: compiled, a multiplication and an addition may be fused, and round once instead of twice.
    """

    def __init__(self) -> None:
        import bitsandbytes

        self.functional = bitsandbytes.functional
        self.ops = torch.ops.bitsandbytes

    def quantize_4bit(self, x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
        codes, absmax = self.ops.quantize_4bit.default._op_dk(
            DispatchKey.CompositeExplicitAutograd, x, blocksize, quant_type, torch.uint8
        )
        return codes.view(-1), absmax

    def dequantize_4bit(
        self, codes: Tensor, absmax: Tensor, quant_type: str, blocksize: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return self.ops.dequantize_4bit.default._op_dk(
                DispatchKey.CompositeExplicitAutograd, codes[:, None], absmax, blocksize, quant_type, shape, dtype
            )

    def quantize_blockwise(self, x: Tensor, table: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        return self.ops.quantize_blockwise.default._op_dk(
            DispatchKey.CompositeExplicitAutograd, x.view(-1), table, blocksize
        )

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, table: Tensor, blocksize: int) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return self.ops.dequantize_blockwise.default._op_dk(
                DispatchKey.CompositeExplicitAutograd, codes, absmax, table, blocksize, torch.float32
            )


@pytest.fixture(scope="session")
def bnb() -> BitsAndBytes:
    return BitsAndBytes()


@pytest.fixture
def keep_choice() -> Iterator[None]:
    """Put the automatic choice of kernels back after the test."""
    yield
    native.use(None)


def available() -> list[str]:
    """The instruction sets that this machine and this build have, and the reference."""
    found = ["reference"]
    for isa in (*native.ISAS, native.EMULATED):
        try:
            native.use(isa)
        except Exception:
            continue
        found.append(isa)
    native.use(None)
    return found
