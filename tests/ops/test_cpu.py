"""The native kernels equal the reference bit for bit, whatever the shape, and are chosen as asked."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.ops import levels, native, reference
from tests.ops.conftest import available

NATIVE = [isa for isa in available() if isa != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("keep_choice")
if not NATIVE:
    pytestmark = pytest.mark.skip("halfbyte was built without its native library")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit: -0 is not 0."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@st.composite
def tensors(draw, largest: int = 37) -> torch.Tensor:
    """Any finite float tensor of up to some thousand values: magnitudes from subnormal to huge, ties, zero runs.

    largest  power of ten of the largest magnitude; 37 is near the end of float32
    """
    count = draw(st.one_of(st.integers(0, 70), st.integers(0, 9000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(count, generator=generator) * 10.0 ** draw(st.integers(-42, largest))
    if count and draw(st.booleans()):
        x = (x / x.abs().max().clamp(min=1e-30) * 16).round() / 16  # many values on midpoints and on ±1
    if draw(st.booleans()):
        start = draw(st.integers(0, max(count, 1)))
        x[start : start + draw(st.integers(0, 300))] = 0
    dtype = draw(st.sampled_from(DTYPES))
    return x.to(dtype).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)


QUIET = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("isa", NATIVE)
@QUIET
@given(x=tensors(), quant_type=st.sampled_from(levels.QUANT_TYPES), blocksize=st.sampled_from(ops.BLOCKSIZES))
def test_quantize_equals_the_reference(isa, x, quant_type, blocksize):
    native.use(isa)
    codes, absmax = ops.quantize_blockwise(x, quant_type, blocksize)
    expected_codes, expected_absmax = reference.quantize_blockwise(x, quant_type, blocksize)
    assert same(absmax, expected_absmax)
    assert same(codes, expected_codes)


@pytest.mark.parametrize("isa", NATIVE)
@QUIET
@given(
    x=tensors(largest=34),  # the mean of up to 300 constants is taken below: their sum must stay finite
    quant_type=st.sampled_from(levels.QUANT_TYPES),
    blocksize=st.sampled_from(ops.BLOCKSIZES),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
    own_table=st.booleans(),
    data=st.data(),
)
def test_dequantize_equals_the_reference(isa, x, quant_type, blocksize, dtype, nested, own_table, data):
    native.use(isa)
    codes, absmax = reference.quantize_blockwise(x, quant_type, blocksize)
    start = data.draw(st.integers(0, x.numel()))
    count = data.draw(st.integers(0, x.numel() - start))
    more: dict[str, object] = {}
    if own_table and quant_type != "int8":
        more["table"] = levels.levels(quant_type).flip(0) * 0.7
    if nested and x.numel():
        offset = absmax.mean()
        absmax, more["nested_absmax"] = reference.quantize_dynamic(absmax - offset, 256)
        more["nested_offset"] = offset
    ours, theirs = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
    ops.dequantize_blockwise_out(codes, absmax, quant_type, blocksize, ours, start, **more)
    reference.dequantize_blockwise_out(codes, absmax, quant_type, blocksize, theirs, start, **more)
    assert same(ours, theirs)


@pytest.mark.parametrize("isa", NATIVE)
@QUIET
@given(x=tensors(), signed=st.booleans(), blocksize=st.sampled_from(ops.BLOCKSIZES))
def test_dynamic_equals_the_reference(isa, x, signed, blocksize):
    native.use(isa)
    codes, absmax = ops.quantize_dynamic(x, blocksize, signed)
    expected_codes, expected_absmax = reference.quantize_dynamic(x, blocksize, signed)
    assert same(absmax, expected_absmax)
    assert same(codes, expected_codes)
    table = levels.dynamic_map(signed)
    assert same(
        ops.dequantize_dynamic(codes, absmax, blocksize, signed),
        reference.dequantize_dynamic(codes, absmax, blocksize, table),
    )


@pytest.mark.parametrize("isa", NATIVE)
def test_every_half_is_read_and_written_as_torch_does(isa):
    # All finite 16-bit patterns through INT8 blocks, where decoding goes through every kind of rounding.
    native.use(isa)
    patterns = torch.arange(1 << 16).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)
        x = x[torch.isfinite(x)]
        codes, absmax = ops.quantize_blockwise(x, "int8", 32)
        expected = reference.quantize_blockwise(x, "int8", 32)
        assert same(codes, expected[0])
        assert same(absmax, expected[1])
        for out in DTYPES:
            ours = ops.dequantize_blockwise(codes, absmax, "int8", 32, x.shape, out)
            assert same(ours, reference.dequantize_blockwise(codes, absmax, "int8", 32, x.shape, out))


@pytest.mark.parametrize("isa", NATIVE)
def test_threads_do_not_show(isa):
    native.use(isa)
    assert ops.backend().threaded
    x = torch.randn(1111, 733, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            codes, absmax = ops.quantize_blockwise(x, "nf4", 64)
            back = torch.empty(800, 733, dtype=torch.bfloat16)
            ops.dequantize_blockwise_out(codes, absmax, "nf4", 64, back, 733 * 17)
            results.append((codes, absmax, back))
    finally:
        torch.set_num_threads(before)
    for codes, absmax, back in results[1:]:
        assert same(codes, results[0][0])
        assert same(absmax, results[0][1])
        assert same(back, results[0][2])


@pytest.mark.parametrize("isa", NATIVE)
def test_views_and_transposed_input(isa):
    native.use(isa)
    x = torch.randn(130, 70)
    for view in (x.T, x[3:, 5:], x[::2]):
        ours, expected = ops.quantize_blockwise(view, "nf4", 64), reference.quantize_blockwise(view, "nf4", 64)
        assert same(ours[0], expected[0])
        assert same(ours[1], expected[1])


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("place", [0, 700, 999])
def test_non_finite_weights_are_an_error(isa, bad, place):
    native.use(isa)
    for dtype in DTYPES:
        x = torch.randn(10, 100, dtype=dtype)
        x.view(-1)[place] = bad
        for quant_type in levels.QUANT_TYPES:
            with pytest.raises(UsageError, match=rf"the value at \[{place // 100}, {place % 100}\]"):
                ops.quantize_blockwise(x, quant_type, 64)
        with pytest.raises(UsageError, match="the value at"):
            ops.quantize_dynamic(x, 64)


def _tell(**environment: str) -> subprocess.CompletedProcess[str]:
    code = "from halfbyte import ops; print(ops.backend())"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_choice_is_told_and_can_be_asked_for():
    assert _tell(HALFBYTE_NATIVE="0").stdout.strip() == "reference (asked for with HALFBYTE_NATIVE=0)"
    assert _tell(HALFBYTE_ISA="portable").stdout.strip() == "portable (asked for with HALFBYTE_ISA=portable)"
    assert _tell().stdout.strip() == f"{NATIVE[0]} (the best of this processor)"
    missing = _tell(HALFBYTE_LIBRARY="/nowhere/lib.so")
    assert missing.returncode != 0
    assert "HALFBYTE_LIBRARY=/nowhere/lib.so is not a file" in missing.stderr
    refused = _tell(HALFBYTE_ISA="mmx")
    assert refused.returncode != 0
    assert "HALFBYTE_ISA=mmx is not one of amx, avx512bf16, avx512, avx2, portable" in refused.stderr


def test_without_the_library_the_reference_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(native, "_candidates", lambda: iter(()))
    assert native.use(None).name == "reference"
    assert "without its native library" in str(ops.backend())
    codes, absmax = ops.quantize_blockwise(torch.randn(100), "nf4", 64)
    assert ops.dequantize_blockwise(codes, absmax, "nf4", 64, (100,), torch.float32).shape == (100,)
    with pytest.raises(UsageError, match="HALFBYTE_ISA=avx2: halfbyte was installed without"):
        native.use("avx2")


def test_a_stale_or_broken_library_is_refused(monkeypatch, tmp_path):
    broken = tmp_path / "libhalfbyte_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "_candidates", lambda: iter([broken]))
    assert "cannot be loaded" in native.use(None).reason
    monkeypatch.undo()
    monkeypatch.setattr(native, "_VERSION", -1)
    assert "another version" in native.use(None).reason


def test_without_torchs_pool_one_thread_works(monkeypatch):
    monkeypatch.setattr(native, "_torch_symbols", lambda: (None, None))
    assert "on one thread" in native.use(None).reason
    x = torch.randn(300, 512)
    assert same(ops.quantize_blockwise(x, "nf4", 64)[0], reference.quantize_blockwise(x, "nf4", 64)[0])


def test_a_module_imported_after_the_library_was_loaded_is_served() -> None:
    """Without argument types ctypes would cut its addresses to 32 bits, and the process would die."""
    program = (
        "import torch; from halfbyte import ops; ops.backend()\n"
        "from halfbyte.ops import adamw, linear, loss, attention, native\n"
        "from halfbyte.quant import gguf_encode\n"
        "library = native.library()\n"
        "missing = [name for name in native._SIGNATURES if library and not hasattr(library, name)]\n"
        "unbound = [name for name in native._SIGNATURES if library and getattr(library, name).argtypes is None]\n"
        "print(missing, unbound)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["[]", "[]"]
