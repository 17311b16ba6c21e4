"""Initial factors that know the weight: PiSSA and LoftQ, as functions of a matrix and of what quantizing makes of it.

PiSSA (Meng et al. 2024, arXiv 2404.02948): the adapter begins as the weight's r largest singular components, and the
base becomes what is left of it. LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1): base and adapter together begin
as near to the weight as alternating between quantization and a singular value decomposition brings them.

Both choose scaling * B A, whatever the scaling is, since that product is what the model computes. Where the base is not
the (quantized) weight itself it is that of `weight - shift`, and the shift belongs to the adapter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 8
"""Columns beyond the rank in the randomized decomposition (Halko et al. 2011, arXiv 0909.4061, section 4.2)."""
EXACT_SIDE = 512
"""LoftQ decomposes matrices up to this smaller side exactly; of larger ones that takes minutes a model and step."""
LOFTQ_ITERATIONS = 16
"""Power iterations for the others. What quantizing lost is nearly white, where few would miss the best update; at 16
its error is within a thousandth of the exact one's (tests/adapters/test_initial.py)."""
_NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are rounding; their directions mean nothing."""


@dataclass(frozen=True)
class Shift:
    """What a linear's base was freed of: it is that of W - scaling * B A. `a` [r, in], `b` [out, r], float32."""

    a: Tensor
    b: Tensor
    scaling: float

    def rows(self, start: int, stop: int) -> Tensor:
        """scaling * B A of these rows of the output, float32."""
        return (self.b[start:stop].float() @ self.a.float()) * self.scaling


@dataclass(frozen=True)
class Initial:
    """A [r, in] and B [out, r] that training begins with; shift: what the base must be freed of, None: nothing."""

    a: Tensor
    b: Tensor
    shift: Shift | None = None


def top_factors(
    weight_OI: Tensor, rank: int, iterations: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) with B A the best approximation of this rank, the singular values shared evenly.

    iterations  None: exact, from the smaller Gram matrix in float64; else a randomized range finder with so many
                power iterations, for large matrices
    generator   draws the range finder's test matrix, and the rows of A whose singular value is zero: B is zero
                there, and such a direction learns as one of a plain LoRA would
    """
    out_features, in_features = weight_OI.shape
    usable = min(rank, out_features, in_features)
    if iterations is None:
        u_OR, s_R, v_RI = _largest(weight_OI, usable)
    else:
        width = min(usable + OVERSAMPLING, out_features, in_features)
        basis = _orthonormal(weight_OI @ torch.randn(in_features, width, generator=generator))
        for _ in range(iterations):
            basis = _orthonormal(weight_OI @ _orthonormal(weight_OI.t() @ basis))
        u_OR, s_R, v_RI = _largest(basis.t() @ weight_OI, usable)
        u_OR = basis @ u_OR
    a = (torch.rand(rank, in_features, generator=generator) * 2 - 1) / math.sqrt(in_features)
    b = torch.zeros(out_features, rank)
    count = int((s_R > s_R[0] * _NEGLIGIBLE).sum()) if usable else 0
    root = s_R[:count].sqrt()
    a[:count], b[:, :count] = v_RI[:count] * root[:, None], u_OR[:, :count] * root
    return a, b


def _orthonormal(x: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(x)[0]
    return basis


def _largest(x_MN: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest singular triples (U [M, count], S, V^T [count, N]), float32.

    The eigenvectors of the smaller Gram matrix: several times faster than a decomposition of the whole, and in
    float64 as exact for the large ones.
    """
    if x_MN.shape[0] > x_MN.shape[1]:
        v, s, ut = _largest(x_MN.t(), count)
        return ut.t(), s, v.t()
    wide = x_MN.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.t())
    u = vectors.flip(1)[:, :count]
    s = squares.flip(0)[:count].clamp(min=0).sqrt()
    vt = (u.t() @ wide) / s.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return u.float(), s.float(), vt.float()


def pissa(
    weight_OI: Tensor,
    rank: int,
    scaling: float,
    generator: torch.Generator,
    iterations: int | None = None,
    rounded: torch.dtype = torch.float32,
) -> Initial:
    """The weight's `rank` largest components as the adapter; the base is freed of exactly them.

    weight_OI   the weight before quantization, float32
    iterations  None: exact; else randomized with so many power iterations (PEFT: pissa_niter_N)
    rounded     the type that the adapter's file keeps: the factors are such numbers, so that the base can be made again
    """
    a, b = _scaled(top_factors(weight_OI, rank, iterations, generator), scaling, rounded)
    return Initial(a, b, Shift(a, b, scaling))


def loftq(
    weight_OI: Tensor,
    rank: int,
    scaling: float,
    quantized: Callable[[Shift | None], Tensor],
    generator: torch.Generator,
    steps: int = 1,
    rounded: torch.dtype = torch.float32,
) -> Initial:
    """Repeat: Q = quantized(W - s B A), then s B A = the best approximation of W - Q.

    quantized  what quantizing and dequantizing makes of the weight, freed of the shift: float32 [out, in]
    steps      T of the paper. With 1 the base is the quantized weight itself, without a shift

    The base that belongs to the factors is the last Q: it was freed of the factors of the step before.
    """
    shift: Shift | None = None
    iterations = None if min(weight_OI.shape) <= EXACT_SIDE else LOFTQ_ITERATIONS
    for step in range(steps):
        a, b = _scaled(top_factors(weight_OI - quantized(shift), rank, iterations, generator), scaling, rounded)
        if step < steps - 1:
            shift = Shift(a, b, scaling)
    return Initial(a, b, shift)


def _scaled(factors: tuple[Tensor, Tensor], scaling: float, rounded: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors of a product, so divided that scaling * B A is that product."""
    a, b = (factor / math.sqrt(scaling) for factor in factors)
    return a.to(rounded).float(), b.to(rounded).float()
