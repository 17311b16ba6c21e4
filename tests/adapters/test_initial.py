"""PiSSA and LoftQ as functions: what they promise about a weight, at any scaling, rank and format."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halfbyte.adapters.initial import EXACT_SIDE, Shift, loftq, pissa, top_factors
from halfbyte.linear.dora import row_norms
from halfbyte.quant import DenseWeight, QuantOptions, quantize

SHAPE = (96, 160)


def weight(seed: int = 0, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Neither white noise nor of low rank: singular values that fall, as a trained weight's do."""
    generator = torch.Generator().manual_seed(seed)
    u, s, vt = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    return u @ (s * torch.linspace(1, 0.1, len(s)) ** 2)[:, None].mul(vt)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def best_error(w: Tensor, rank: int) -> float:
    """What no matrix of this rank can go below (Eckart and Young)."""
    return float(torch.linalg.svdvals(w.double())[rank:].square().sum().sqrt())


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1], (64, 64)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_exact_factors_are_the_best_of_their_rank(shape: tuple[int, int], rank: int) -> None:
    w = weight(shape=shape)
    a, b = top_factors(w, rank, None, seeded())
    assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
    assert float((w - b @ a).norm()) <= best_error(w, rank) * (1 + 1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # the singular values are shared evenly


def test_randomized_factors_come_near_and_repeat() -> None:
    w = weight()
    errors = [float((w - torch.mm(*top_factors(w, 8, n, seeded())[::-1])).norm()) for n in (1, 2, 8)]
    assert all(one >= best_error(w, 8) * (1 - 1e-5) for one in errors)
    assert errors[2] < best_error(w, 8) * 1.001
    again = top_factors(w, 8, 2, seeded()), top_factors(w, 8, 2, seeded())
    assert all(torch.equal(x, y) for x, y in zip(*again, strict=True))


@pytest.mark.parametrize("iterations", [None, 2])
def test_more_rank_than_the_weight_has(iterations: int | None) -> None:
    """The directions beyond it are those of a fresh LoRA: A random, B zero, so that they learn."""
    w = weight(shape=(12, 20))
    w[:4] = 0
    a, b = top_factors(w, 16, iterations, seeded())
    torch.testing.assert_close(b @ a, w, rtol=0, atol=1e-5)
    assert bool((b[:, 8:] == 0).all())
    assert bool((a[8:].norm(dim=1) > 0.1).all())
    zero = top_factors(torch.zeros(4, 6), 2, iterations, seeded())
    assert bool((zero[1] == 0).all())


@pytest.mark.parametrize("iterations", [None, 4])
@pytest.mark.parametrize("scaling", [2.0, 0.25, 12 / 7**0.5])
def test_pissa_takes_the_largest_components_whatever_the_scaling(scaling: float, iterations: int | None) -> None:
    w = weight()
    found = pissa(w, 6, scaling, seeded(), iterations)
    assert found.shift is not None
    moved = scaling * found.b @ found.a
    torch.testing.assert_close(w - moved, w - found.shift.rows(0, SHAPE[0]))
    rest = torch.linalg.svdvals(w - moved)
    expected = torch.linalg.svdvals(w)[6:]
    torch.testing.assert_close(rest[: len(expected)], expected, rtol=1e-2 if iterations else 1e-3, atol=1e-3)


def test_what_a_bfloat16_file_keeps_is_what_was_subtracted() -> None:
    found = pissa(weight(), 4, 2.0, seeded(), rounded=torch.bfloat16)
    assert found.shift is not None
    for part in (found.a, found.b, found.shift.a, found.shift.b):
        assert torch.equal(part.bfloat16().float(), part)


# -- LoftQ --------------------------------------------------------------------------------------------------------


def levels(bits: int) -> Callable[[Tensor], Tensor]:
    """A symmetric uniform codebook of 2^bits levels, scaled by each block's largest value: a simulated format."""
    codebook = torch.linspace(-1, 1, 2**bits)

    def rounded(x: Tensor) -> Tensor:
        blocks = x.reshape(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
        nearest = (blocks / scale)[..., None].sub(codebook).abs().argmin(-1)
        return (codebook[nearest] * scale).view_as(x)

    return rounded


def formats(name: str) -> Callable[[Tensor], Tensor]:
    if name.endswith("-bit"):
        return levels(int(name[0]))
    kind, _, nested = name.partition("+")
    options = QuantOptions(quant_type=kind, double_quant=bool(nested))  # type: ignore[arg-type]
    return lambda x: quantize(x, options).dequantize(torch.float32)


FORMATS = ["nf4", "nf4+dq", "fp4+dq", "int4", "int8+dq", "2-bit", "3-bit"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.5, 8 / 12**0.5])
def test_loftq_comes_nearer_than_quantizing(name: str, scaling: float) -> None:
    """||W - (Q + s B A)|| < ||W - q(W)||, for alpha != r too, and the base is q of what the shift leaves."""
    w, q = weight(), formats(name)
    plain = float((w - q(w)).norm())

    def quantized(shift: Shift | None) -> Tensor:
        return q(w if shift is None else w - shift.rows(0, w.shape[0]))

    errors = []
    for steps in (1, 5):
        found = loftq(w, 12, scaling, quantized, seeded(), steps)
        base = quantized(found.shift)
        errors.append(float((w - base - scaling * found.b @ found.a).norm()))
        assert (found.shift is None) == (steps == 1)
    assert errors[0] < plain * 0.96
    assert errors[1] < plain * 0.96
    # One step is the best update of its rank over the quantized weight, to float32's rounding.
    assert errors[0] <= best_error(w - q(w), 12) * (1 + 1e-4)


@pytest.mark.parametrize("bits", [2, 3])
def test_five_steps_beat_one_where_levels_are_few(bits: int) -> None:
    """Not step by step: at 2 bits the second step's error here is below the fifth's. The alternation is no descent."""
    w, q = weight(), levels(bits)

    def quantized(shift: Shift | None) -> Tensor:
        return q(w if shift is None else w - shift.rows(0, w.shape[0]))

    errors = []
    for steps in (1, 5):
        found = loftq(w, 12, 2.0, quantized, seeded(), steps)
        errors.append(float((w - quantized(found.shift) - 2.0 * found.b @ found.a).norm()))
    assert errors[1] < errors[0] * 0.98


def test_large_matrices_are_decomposed_nearly_as_well() -> None:
    """The error left by the power iterations against the best of this rank, on what quantizing loses of white noise."""
    w = torch.randn(EXACT_SIDE + 8, 700, generator=seeded())
    q = formats("nf4")(w)
    found = loftq(w, 16, 2.0, lambda shift: q, seeded())
    assert float((w - q - 2.0 * found.b @ found.a).norm()) < best_error(w - q, 16) * 1.001


def test_loftqs_values_do_not_depend_on_the_scaling() -> None:
    w, q = weight(), formats("nf4")
    products = []
    for scaling in (1.0, 3.0):
        found = loftq(w, 8, scaling, lambda shift: q(w), seeded(), 1)
        products.append(scaling * found.b @ found.a)
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-6)


def test_row_norms_are_those_of_the_adapted_weight() -> None:
    w = weight()
    a, b = torch.randn(3, SHAPE[1]), torch.randn(SHAPE[0], 3)
    for held in (DenseWeight(w), quantize(w, QuantOptions())):
        expected = (held.dequantize(torch.float32) + 0.7 * b @ a).norm(dim=1)
        torch.testing.assert_close(row_norms(held, (a, b, 0.7)), expected)
