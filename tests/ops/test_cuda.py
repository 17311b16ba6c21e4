"""The CUDA path on fake tensors: shapes, dtypes and devices, and which kernel is taken. No GPU is used."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.ops import cuda, levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def repaired():
    """bitsandbytes 0.50.2's fake of `dequantize_4bit.out` compares a Size with a list, which are never equal."""
    cuda.backend()  # the import of bitsandbytes must not happen among fake tensors

    def dequantize_4bit_out(A, absmax, blocksize, quant_type, shape, dtype, out):
        assert (tuple(out.shape), out.dtype, out.device) == (tuple(shape), dtype, A.device)
        assert absmax.dtype == torch.float32
        assert absmax.device == A.device
        assert A.shape == (-(-out.numel() // 2), 1)
        assert absmax.shape == (-(-out.numel() // blocksize),)

    torch.library.register_fake("bitsandbytes::dequantize_4bit.out", dequantize_4bit_out, allow_override=True)


@pytest.fixture
def fake(repaired):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        yield mode


@pytest.fixture
def calls(monkeypatch):
    """The names of bitsandbytes' operators, in the order they are called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "bitsandbytes":
                self.names.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    with Log() as log:
        yield log.names


@pytest.mark.parametrize("quant_type", levels.QUANT_TYPES)
def test_quantize(fake, quant_type):
    for dtype in DTYPES:
        x = torch.empty(7, 33, dtype=dtype, device="cuda")
        for blocksize in ops.BLOCKSIZES:
            if quant_type in ("nf4", "fp4"):
                codes, absmax = cuda.quantize_blockwise(x, quant_type, blocksize)
                expected, _ = torch.ops.halfbyte.quantize_blockwise(x, quant_type, blocksize)
                assert codes.shape == expected.shape
                assert codes.dtype == torch.uint8
                assert absmax.shape == (-(-231 // blocksize),)
                assert absmax.dtype == torch.float32
                assert codes.device.type == absmax.device.type == "cuda"


@pytest.mark.parametrize("quant_type", levels.QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(fake, quant_type, nested, dtype):
    for start in (0, 64, 33, 97):
        codes = torch.empty(500 if quant_type != "int8" else 1000, dtype=torch.uint8, device="cuda")
        absmax = torch.empty(16, device="cuda")
        more: dict[str, object] = {}
        if nested:
            absmax = absmax.to(torch.uint8)
            more = {"nested_absmax": torch.empty(1, device="cuda"), "nested_offset": torch.empty((), device="cuda")}
        out = torch.empty(20, 40, dtype=dtype, device="cuda")
        cuda.dequantize_blockwise_out(codes, absmax, quant_type, 64, out, start, **more)


def test_the_kernels_of_bitsandbytes_are_taken(fake, calls):
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="cuda")
    codes, absmax = cuda.quantize_blockwise(x, "nf4", 64)
    nested, nested_absmax = cuda.quantize_dynamic(absmax, 256)
    out = torch.empty_like(x)
    cuda.dequantize_blockwise_out(
        codes, nested, "nf4", 64, out, 0, None, nested_absmax, torch.empty((), device="cuda"), None, 256
    )
    assert calls == ["quantize_4bit", "quantize_blockwise", "dequantize_blockwise", "dequantize_4bit"]


def test_a_files_own_levels_are_not_ignored(fake, calls):
    codes, absmax = torch.empty(32, dtype=torch.uint8, device="cuda"), torch.empty(1, device="cuda")
    cuda.dequantize_blockwise_out(
        codes, absmax, "nf4", 64, torch.empty(64, device="cuda"), 0, torch.empty(16, device="cuda")
    )
    assert calls == []


def test_constants_on_another_device_are_refused(fake):
    codes, absmax = torch.empty(32, dtype=torch.uint8, device="cuda"), torch.empty(1)
    with pytest.raises(ValueError, match="tensors are on cpu and cuda:0"):
        cuda.dequantize_blockwise_out(codes, absmax, "nf4", 64, torch.empty(64, device="cuda"))


def test_non_finite_weights_are_an_error():
    # The check reads values, so it is tried on real ones.
    x = torch.randn(100)
    x[3] = torch.nan
    with pytest.raises(UsageError, match="NaN or infinite"):
        cuda.quantize_blockwise(x, "nf4", 64)


def test_the_choice_is_told():
    assert ops.backend("cuda").name == "bitsandbytes"
    assert ops.backend("cuda:1").name == "bitsandbytes"
