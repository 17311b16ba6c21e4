"""GaLore against the paper's algorithm written out in float64, and against the authors' code where it is installed."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import UsageError
from halfbyte.optim import OptimOptions
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.galore import GaloreSlot
from halfbyte.train import checkpoint

SHAPES = {"model.layers.0.q.weight": (48, 24), "model.layers.0.k.weight": (16, 40), "model.norm.weight": (24,)}
TYPES = ["std", "reverse_std", "right", "left", "full"]
RATE = 1e-2
EPSILON = 1e-3
"""Large: where both sides are projected R begins as a diagonal, and AdamW would make a step of the noise beside it."""


def options(**changes: object) -> OptimOptions:
    values = {"optim": "galore_adamw", "galore_rank": 6, "galore_update_proj_gap": 4, "per_layer_updates": False}
    return OptimOptions.model_validate(values | changes)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}


def gradient(name: str, step: int) -> Tensor:
    """Of falling singular values, so that the projection is well determined; another subspace every few steps."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(1000 * len(name) + step // 3)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) == 2:
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        g = u @ torch.diag(0.7 ** torch.arange(len(s), dtype=torch.float64)) @ v
        g += 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return g


class PaperGaLore:
    """Algorithm 2 for one matrix, as it is printed; sides of all kinds, AdamW's decoupled decay before the step."""

    def __init__(self, weight: Tensor, o: OptimOptions) -> None:
        self.w, self.o, self.t = weight.double().clone(), o, 0
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0

    def step(self, g: Tensor) -> None:
        o, (rows, columns) = self.o, self.w.shape
        kind = o.galore_proj_type
        if self.t % o.galore_update_proj_gap == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            # A singular vector's sign is nobody's choice, and moments that go on feel it: LAPACK's in float32 is taken.
            signs = (u * torch.linalg.svd(g.float(), full_matrices=False)[0]).sum(0).sign()
            u, vh = u * signs, vh * signs[:, None]
            tall = rows >= columns
            left = kind in ("left", "full") or (kind == "std" and not tall) or (kind == "reverse_std" and tall)
            right = kind in ("right", "full") or (kind == "std" and tall) or (kind == "reverse_std" and not tall)
            self.p = u[:, : o.galore_rank] if left else torch.eye(rows, dtype=torch.float64)
            self.q = vh[: o.galore_rank].t() if right else torch.eye(columns, dtype=torch.float64)
        self.t += 1
        r = self.p.t() @ g @ self.q
        self.m = o.adam_beta1 * self.m + (1 - o.adam_beta1) * r
        self.v = o.adam_beta2 * self.v + (1 - o.adam_beta2) * r * r
        corrected = self.m / (1 - o.adam_beta1**self.t), self.v / (1 - o.adam_beta2**self.t)
        n = corrected[0] / (corrected[1].sqrt() + o.adam_epsilon)
        self.w = self.w * (1 - RATE * o.weight_decay) - RATE * o.galore_scale * (self.p @ n @ self.q.t())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rank", "gap"), [(6, 4), (1000, 100)])
def test_it_is_the_papers_algorithm(kind: str, rank: int, gap: int) -> None:
    """Over three projections, with moments that go on; a rank beyond the matrix's own is cut."""
    chosen = options(
        galore_proj_type=kind,
        galore_rank=rank,
        galore_update_proj_gap=gap,
        weight_decay=0.1,
        adam_beta2=0.99,
        adam_epsilon=EPSILON,
    )
    ours = parameters()
    papers = {name: PaperGaLore(p.detach(), chosen) for name, p in ours.items() if p.ndim == 2}
    vector = nn.Parameter(ours["model.norm.weight"].detach().clone())
    plain = AdamW({"v": vector}, OptimOptions(adam_beta2=0.99, adam_epsilon=EPSILON))
    optimizer = AdamW(ours, chosen)
    for step in range(11):
        for name, p in ours.items():
            p.grad = gradient(name, step).float()
        vector.grad = gradient("model.norm.weight", step).float()
        optimizer.step(RATE)
        plain.step(RATE)
        for name, paper in papers.items():
            paper.step(gradient(name, step).float().double())
    assert torch.equal(ours["model.norm.weight"], vector)
    for name, paper in papers.items():
        moved = (paper.w - parameters()[name].double()).abs().mean()
        assert (ours[name].double() - paper.w).abs().max() < 1e-3 * moved


@pytest.mark.parametrize("kind", TYPES)
def test_it_is_the_authors_code(kind: str) -> None:
    """Their AdamW adds epsilon before the correction of the square root: corrected here, the steps are the same."""
    theirs_module = pytest.importorskip("galore_torch")
    chosen = options(galore_proj_type=kind, adam_epsilon=EPSILON)
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, chosen)
    group = {"rank": 6, "update_proj_gap": 4, "scale": 0.25, "proj_type": kind}
    matrices = [p for p in theirs.values() if p.ndim == 2]
    reference = theirs_module.GaLoreAdamW(
        [{"params": [p for p in theirs.values() if p.ndim == 1]}, {"params": matrices, **group}],
        lr=RATE,
        no_deprecation_warning=True,
    )
    for step in range(11):
        for name in ours:
            ours[name].grad = gradient(name, step).float()
            theirs[name].grad = gradient(name, step).float()
        for each in reference.param_groups:
            each["eps"] = EPSILON * (1 - 0.999 ** (step + 1)) ** 0.5
        optimizer.step(RATE)
        reference.step()
    for name, p in ours.items():
        moved = (theirs[name] - parameters()[name]).abs().mean()
        assert (p - theirs[name]).abs().max() < 1e-3 * moved


def test_bytes_follow_float32_and_bfloat16_loses_no_small_update() -> None:
    big = {"model.layers.0.down.weight": (96, 128)}
    results = {}
    for optim, dtype in (
        ("galore_adamw", torch.float32),
        ("galore_adamw_8bit", torch.float32),
        ("galore_adamw", torch.bfloat16),
    ):
        start = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype)
        params = {name: nn.Parameter(start.clone()) for name in big}
        (p,) = params.values()
        optimizer = AdamW(params, options(optim=optim, galore_rank=64))
        for step in range(12):
            p.grad = torch.randn(96, 128, generator=torch.Generator().manual_seed(step)).bfloat16().to(dtype)
            optimizer.step(1e-4)
        (slot,) = optimizer.slots
        assert isinstance(slot, GaloreSlot)
        low = slot.low_bits
        weight = (
            p.detach().float()
            if low is None
            else slot.state.__class__(slot.state.exp_avg, slot.state.exp_avg_sq, low)
            .load_weight(slot.weight(0, p.numel()))
            .view(p.shape)
        )
        results[optim, dtype] = weight, start.float(), optimizer.nbytes
    exact, start, whole = results["galore_adamw", torch.float32]
    moved = (exact - start).abs().mean()
    eight, _, small = results["galore_adamw_8bit", torch.float32]
    assert 0 < (eight - exact).abs().mean() < 0.05 * moved
    assert small < 0.6 * whole
    half, _, _ = results["galore_adamw", torch.bfloat16]
    torch.testing.assert_close(half, exact, rtol=0, atol=1e-7)
    assert (exact - start).abs().max() < 2**-9  # far below what bfloat16 alone would keep


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_it_resumes_bit_for_bit_around_a_new_projection(
    tmp_path: Path, optim: str, dtype: torch.dtype, stop: int
) -> None:
    chosen = options(optim=optim)
    straight, resumed = parameters(dtype), parameters(dtype)
    first = AdamW(straight, chosen)

    def advance(optimizer: AdamW, params: dict[str, nn.Parameter], start: int, end: int) -> None:
        for step in range(start, end):
            for name, p in params.items():
                p.grad = gradient(name, step).to(dtype)
            optimizer.step(RATE)

    advance(first, straight, 0, stop)
    folder = checkpoint.save(tmp_path, stop, straight, first.planned(), {"train": {}})
    found = checkpoint.load(folder)
    with torch.no_grad():
        for name, p in resumed.items():
            p.copy_(found.trainable[name])
    second = AdamW(resumed, chosen)
    second.load_state_dict(found.optimizer)
    advance(first, straight, stop, 10)
    advance(second, resumed, stop, 10)
    for name in straight:
        assert torch.equal(straight[name], resumed[name])
    other = second.state_dict()
    assert all(torch.equal(tensor, other[key]) for key, tensor in first.state_dict().items())


def test_only_the_linears_matrices_are_projected() -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight", "score.weight", "model.layers.3.mlp.up_proj.weight")
    params = {name: nn.Parameter(torch.zeros(8, 8)) for name in names}
    params["model.layers.3.self_attn.q_proj.bias"] = nn.Parameter(torch.zeros(8))
    optimizer = AdamW(params, options())
    assert [s.name for s in optimizer.slots if isinstance(s, GaloreSlot)] == ["model.layers.3.mlp.up_proj.weight"]


def test_adapters_are_refused() -> None:
    with pytest.raises(UsageError, match="use it with method full"):
        AdamW({"q.lora_A": nn.Parameter(torch.zeros(2, 2))}, options())


def test_the_state_is_as_small_as_promised() -> None:
    params = {"model.layers.0.q.weight": nn.Parameter(torch.zeros(512, 256))}
    galore, plain = AdamW(params, options(galore_rank=16)), AdamW(params, OptimOptions())
    assert plain.nbytes == 8 * 512 * 256
    assert galore.nbytes == 8 * 512 * 16 + 4 * 16 * 256 + 8
    assert math.isclose(galore.nbytes / plain.nbytes, 0.078, rel_tol=0.01)
