"""Floats to GGUF blocks: the gguf package's bytes, the native library's, and no worse than llama.cpp's quantizer."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte.models.source import open_source
from halfbyte.ops import native
from halfbyte.quant.gguf_decode import dequantize_into
from halfbyte.quant.gguf_encode import TYPES, block_of, encode, row_bytes
from tests.ops.conftest import available

SIMPLE = ("Q8_0", "Q4_0", "Q5_0", "Q5_1")
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(autouse=True)
def _keep_choice() -> Iterator[None]:
    yield
    native.use(None)


def gaussian(rows: int = 64, columns: int = 1024, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03


def awkward() -> Tensor:
    """Rows of zeros, constants, one sign, outliers, and of the smallest and largest scales that fit."""
    rows = gaussian(16, 768, seed=1)
    rows[0] = 0
    rows[1], rows[2] = 0.7, -0.3
    rows[3], rows[4] = rows[3].abs(), -rows[4].abs()
    rows[5, ::7] *= 50
    rows[6] *= 1e-7
    rows[7] *= 1e6 / 4
    rows[8, 1:] = 0
    rows[9, ::2] = 0
    rows[10] = 1 + rows[10] * 1e-3
    rows[11] = torch.linspace(-1, 1, 768)
    rows[12] = torch.tensor([1.0, -1.0]).repeat(384)
    return rows


def decoded(raw: Tensor, type_name: str) -> Tensor:
    weights, nbytes = block_of(type_name)
    out = torch.empty(raw.shape[0], raw.shape[1] // nbytes * weights)
    dequantize_into(raw.view(-1, nbytes), type_name, out)
    return out


def squared_error(rows: Tensor, raw: Tensor, type_name: str) -> float:
    return float((decoded(raw, type_name) - rows).double().pow(2).sum())


@pytest.mark.parametrize("type_name", [*SIMPLE, "F32", "F16", "BF16"])
@pytest.mark.parametrize("rows", [gaussian(), awkward()], ids=["gaussian", "awkward"])
def test_bytes_are_those_of_the_gguf_package(type_name: str, rows: Tensor) -> None:
    expected = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType[type_name])
    assert np.array_equal(encode(rows, type_name).numpy(), expected.view(np.uint8).reshape(rows.shape[0], -1))


@pytest.mark.parametrize("type_name", K_QUANTS)
def test_native_bytes_are_those_of_the_reference(type_name: str) -> None:
    made = {}
    for isa in available():
        native.use(isa)
        made[isa] = [encode(rows, type_name) for rows in (gaussian(), awkward(), gaussian().abs(), gaussian() ** 3)]
    if made.keys() == {"reference"}:
        pytest.skip("this build has no native library")
    for isa, results in made.items():
        for raw, expected in zip(results, made["reference"], strict=True):
            assert torch.equal(raw, expected), isa


@pytest.mark.parametrize(
    ("type_name", "bound"),
    # Mean squared error of gaussian weights over their variance.
    [
        ("Q8_0", 4e-5),
        ("Q4_0", 8e-3),
        ("Q5_0", 2e-3),
        ("Q5_1", 1.6e-3),
        ("Q4_K", 5.3e-3),
        ("Q5_K", 1.35e-3),
        ("Q6_K", 3.3e-4),
        ("F16", 1e-7),
        ("BF16", 3e-6),
        ("F32", 0),
    ],
)
def test_error_of_gaussian_rows(type_name: str, bound: float) -> None:
    rows = gaussian()
    raw = encode(rows, type_name)
    assert raw.dtype == torch.uint8
    assert raw.shape == (64, row_bytes(1024, type_name))
    if type_name in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type_name]
        error = float((raw.view(dtype).float() - rows).pow(2).sum())
    else:
        error = squared_error(rows, raw, type_name)
    assert error <= bound * float(rows.pow(2).sum())


@pytest.mark.parametrize("type_name", K_QUANTS)
def test_awkward_rows_come_back(type_name: str) -> None:
    """Within one step of the coarsest sub-block, whatever the values: zeros and constants nearly exactly."""
    rows = awkward()
    found = decoded(encode(rows, type_name), type_name)
    largest = rows.abs().amax(1)
    error = (found - rows).abs().amax(1) / largest.clamp_min(1e-30)
    levels = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 32}[type_name]
    assert error[[0, 1, 2]].max() < 5e-4
    checked = [i for i in range(16) if i != 6]  # 1e-9 is below half precision's scales: rounded to zero, as in ggml
    assert error[checked].max() < 2.2 / levels
    assert found[6].abs().max() <= largest[6] * 1.01


def test_blocks_do_not_depend_on_their_neighbours() -> None:
    rows = gaussian(40, 512)
    for type_name in TYPES:
        whole = encode(rows, type_name)
        assert torch.equal(encode(rows[7:9], type_name), whole[7:9])
        assert torch.equal(encode(rows.bfloat16(), type_name), encode(rows.bfloat16().float(), type_name))
        assert encode(rows[:0], type_name).shape == (0, whole.shape[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("type_name", TYPES)
def test_what_is_not_finite_is_refused(type_name: str, value: float) -> None:
    rows = gaussian(2, 256)
    rows[1, 200] = value
    with pytest.raises(ValueError, match="not finite"):
        encode(rows, type_name)


@pytest.mark.parametrize("type_name", TYPES)
def test_what_half_precision_cannot_hold_is_refused(type_name: str) -> None:
    rows = gaussian(2, 256)
    rows[1, 200] = -70000
    if type_name in ("F32", "BF16"):
        encode(rows, type_name)
    else:
        with pytest.raises(ValueError, match="a value of 70000 is beyond half precision"):
            encode(rows, type_name)


def test_bad_shapes_and_types() -> None:
    with pytest.raises(ValueError, match=r"\[2, 128\] is not rows of blocks of 256"):
        encode(torch.zeros(2, 128), "Q4_K")
    with pytest.raises(ValueError, match="is not rows"):
        encode(torch.zeros(256), "Q4_K")
    with pytest.raises(ValueError, match="Q3_K is not one of F32"):
        encode(torch.zeros(1, 256), "Q3_K")


# -- llama.cpp's quantizer --------------------------------------------------------------------------------------------


def ggml_encode(rows: Tensor, type_name: str) -> Tensor:
    """The same through ggml's own library."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes, function.restype = [ctypes.c_int, pointer, pointer, size, size, size, pointer], ctypes.c_size_t
    rows, out = rows.contiguous(), torch.empty(rows.shape[0], row_bytes(rows.shape[1], type_name), dtype=torch.uint8)
    kind = int(gguf.GGMLQuantizationType[type_name])
    assert function(kind, rows.data_ptr(), out.data_ptr(), 0, *rows.shape, None) == out.numel()
    return out


def distributions() -> dict[str, Tensor]:
    torch.manual_seed(0)
    outliers = gaussian(seed=3)
    outliers[:, ::97] *= 12
    return {
        "gaussian": gaussian(),
        "outliers": outliers,
        "laplace": torch.distributions.Laplace(0.0, 0.05).sample((64, 1024)),
        "positive": torch.rand(64, 1024),
    }


@pytest.mark.parametrize("type_name", SIMPLE)
def test_bytes_are_those_of_ggml(type_name: str) -> None:
    for rows in distributions().values():
        assert torch.equal(encode(rows, type_name), ggml_encode(rows, type_name))


@pytest.mark.parametrize("type_name", K_QUANTS)
def test_no_worse_than_ggml(type_name: str) -> None:
    for name, rows in distributions().items():
        ours, theirs = encode(rows, type_name), ggml_encode(rows, type_name)
        assert squared_error(rows, ours, type_name) < 1.02 * squared_error(rows, theirs, type_name), name


@pytest.mark.real_model
@pytest.mark.parametrize("type_name", K_QUANTS)
def test_no_worse_than_ggml_on_a_real_model(type_name: str, qwen_gguf: Path) -> None:
    """Weights that were Q4_K and Q6_K once: a harder case, as they lie on a grid that a good fit finds again."""
    source = open_source(str(qwen_gguf))
    for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.gate_proj"):
        rows = source.read_rows(f"model.layers.9.{name}.weight", 0, 64).float()
        ours, theirs = encode(rows, type_name), ggml_encode(rows, type_name)
        assert squared_error(rows, ours, type_name) < 1.02 * squared_error(rows, theirs, type_name), name
