"""AdamW against torch.optim.AdamW, a float64 reference and bitsandbytes' 8-bit AdamW."""

import pytest
import torch
from torch import nn

from halfbyte.errors import UsageError
from halfbyte.ops import native
from halfbyte.optim import OptimOptions, adamw
from halfbyte.optim.adamw import AdamW, clip_factor, global_norm
from halfbyte.optim.held import HeldStates
from halfbyte.optim.moments import join_bits, split_bits

SHAPES = {"a": (7, 5), "b": (40, 130), "norm": (33,), "scalar": (1,)}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def put_gradients(params: dict[str, nn.Parameter], step: int) -> None:
    """Gradients of very different sizes, the same for every dtype."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, p in enumerate(params.values()):
        p.grad = (torch.randn(p.shape, generator=generator) * 10.0 ** (-2 * index)).to(p.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1 << 18, 256])
def test_equals_torch_over_100_steps(weight_decay: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "CHUNK", chunk)
    ours, theirs = parameters(), parameters(torch.float64)
    options = OptimOptions(learning_rate=1e-2, weight_decay=weight_decay, adam_beta2=0.99)
    optimizer = AdamW(ours, options)
    groups = [
        {"params": [p for p in theirs.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    for step in range(100):
        rate = 1e-2 * (1 - step / 200)
        for group in reference.param_groups:
            group["lr"] = rate
        put_gradients(ours, step)
        for name, p in theirs.items():
            p.grad = ours[name].grad.double()  # type: ignore[union-attr]
        optimizer.step(rate)
        reference.step()
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name].double(), p, rtol=2e-6, atol=2e-6)


def test_bfloat16_weights_lose_no_small_update() -> None:
    half, single = parameters(torch.bfloat16), parameters()
    for name, p in half.items():
        single[name].data.copy_(p.data.float())
    options = OptimOptions(learning_rate=1e-5)
    ours, reference = AdamW(half, options), AdamW(single, options)
    for step in range(60):
        put_gradients(half, step)
        for name, p in half.items():
            single[name].grad = p.grad.float()  # type: ignore[union-attr]
        ours.step(1e-5)
        reference.step(1e-5)
    assert isinstance(ours.store, HeldStates)
    for slot, p in zip(ours.slots, single.values(), strict=True):
        whole = ours.store.states[slot.name].load_weight(slot.weight(0, p.numel()))
        torch.testing.assert_close(whole, p.detach().view(-1), rtol=0, atol=0)
        torch.testing.assert_close(slot.parameter.float(), p, rtol=2**-8, atol=0)


def test_bits_split_and_join_exactly() -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 3e38, 1.00390625, 1.01171875, 65504.0])
    x = torch.cat([special, torch.randn(10_000)])
    high, low = split_bits(x)
    assert torch.equal(join_bits(high, low).view(torch.int32), x.view(torch.int32))
    assert ((high.float() - x).abs() <= (x.bfloat16().float() - x).abs()).all()


def test_eight_bit_follows_float32_as_bitsandbytes_does() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    size = (64, 128)
    start = torch.randn(size, generator=torch.Generator().manual_seed(1))
    ours, exact, theirs = ({"w": nn.Parameter(start.clone())} for _ in range(3))
    eight = AdamW(ours, OptimOptions(learning_rate=1e-3, optim="adamw_8bit"))
    single = AdamW(exact, OptimOptions(learning_rate=1e-3))
    reference = bnb.optim.AdamW8bit(theirs.values(), lr=1e-3, weight_decay=0.0)
    for step in range(50):
        gradient = torch.randn(size, generator=torch.Generator().manual_seed(step)) + start
        for params in (ours, exact, theirs):
            params["w"].grad = gradient.clone()
        eight.step(1e-3)
        single.step(1e-3)
        reference.step()
    moved = (exact["w"] - start).abs().mean()
    assert (ours["w"] - exact["w"]).abs().mean() < 0.05 * moved
    assert (ours["w"] - exact["w"]).abs().mean() < 1.5 * (theirs["w"] - exact["w"]).abs().mean()
    assert eight.nbytes < 0.27 * single.nbytes


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restores_bit_for_bit(optim: str, dtype: torch.dtype) -> None:
    options = OptimOptions(learning_rate=1e-2, optim=optim)  # type: ignore[arg-type]
    straight = parameters(dtype)
    first = AdamW(straight, options)
    for step in range(3):
        put_gradients(straight, step)
        first.step(1e-2)
    resumed = parameters(dtype, seed=9)
    for name, p in straight.items():
        resumed[name].data.copy_(p.data)
    second = AdamW(resumed, options)
    second.load_state_dict({key: tensor.clone() for key, tensor in first.state_dict().items()})
    for optimizer, params in ((first, straight), (second, resumed)):
        put_gradients(params, 3)
        optimizer.step(1e-2)
    for name in straight:
        assert torch.equal(straight[name], resumed[name])
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key])


def test_state_of_another_run_is_refused_and_changes_nothing() -> None:
    optimizer = AdamW(parameters(), OptimOptions())
    put_gradients({s.name: s.parameter for s in optimizer.slots}, 0)
    optimizer.step(1e-3)
    before = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
    for broken in (
        {key: t for key, t in before.items() if key != "b.exp_avg"},
        before | {"x.exp_avg": torch.zeros(2)},
        before | {"b.exp_avg": torch.zeros(2)},
        before | {"b.exp_avg": before["b.exp_avg"].half()},
    ):
        with pytest.raises(UsageError, match="does not match"):
            optimizer.load_state_dict(broken)
        assert all(torch.equal(t, before[key]) for key, t in optimizer.state_dict().items())


def test_scale_multiplies_the_gradients() -> None:
    one, other = parameters(), parameters()
    a, b = AdamW(one, OptimOptions()), AdamW(other, OptimOptions())
    put_gradients(one, 0)
    put_gradients(other, 0)
    for p in other.values():
        p.grad.mul_(0.25)  # type: ignore[union-attr]
    a.step(1e-2, scale=0.25)
    b.step(1e-2)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_parameter_without_gradient_stays() -> None:
    params = parameters()
    before = params["a"].detach().clone()
    optimizer = AdamW(params, OptimOptions(weight_decay=0.5))
    put_gradients(params, 0)
    params["a"].grad = None
    optimizer.step(1e-2)
    assert torch.equal(params["a"], before)
    assert len(optimizer.gradients()) == len(SHAPES) - 1
    optimizer.zero_grad()
    assert optimizer.gradients() == []


def test_clipping_equals_torch() -> None:
    ours, theirs = parameters(), parameters()
    put_gradients(ours, 0)
    put_gradients(theirs, 0)
    norm = global_norm([p.grad for p in ours.values() if p.grad is not None])
    expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    factor = clip_factor(norm, 0.5)
    for name, p in ours.items():
        torch.testing.assert_close(p.grad * factor, theirs[name].grad)
    assert clip_factor(0.1, 0.5) == 1.0
    assert clip_factor(100.0, 0) == 1.0
    assert clip_factor(float("inf"), 1.0) == 1.0
    assert global_norm([]) == 0.0


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match="float16"):
        AdamW({"w": nn.Parameter(torch.zeros(3, dtype=torch.float16))}, OptimOptions())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_native_pass_over_bytes_equals_torch(weight_decay: float) -> None:
    """The same codes but where rounding sits on an edge between two, over steps with clipping and blocks cut short."""
    shapes = {"w": (130, 83), "v": (4099,)}
    options = OptimOptions(optim="adamw_8bit", weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    results = []
    for isa in (None, "reference"):
        native.use(isa)
        params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        optimizer = AdamW(params, options)
        gradients = torch.Generator().manual_seed(1)
        for step in range(20):
            for p in params.values():
                p.grad = torch.randn(p.shape, generator=gradients) * 10.0 ** -(step % 3)
            optimizer.step(1e-2, scale=0.5)
        results.append((params, optimizer.state_dict()))
    native.use(None)
    (ours, state), (theirs, expected) = results
    for name, p in ours.items():
        moved = (theirs[name] - start[name]).abs().mean()
        assert (p - theirs[name]).abs().mean() < 2e-4 * moved
        for moment in ("exp_avg", "exp_avg_sq"):
            mine, reference = (s[f"{name}.{moment}.codes"].int() for s in (state, expected))
            assert (mine != reference).float().mean() < 5e-3
            assert (mine - reference).abs().max() <= 2
            torch.testing.assert_close(
                state[f"{name}.{moment}.absmax"], expected[f"{name}.{moment}.absmax"], rtol=0.02, atol=0
            )


def test_an_update_is_seen_as_a_write() -> None:
    """What is kept of a parameter's value (DoRA's norms) is told apart by its version, whoever wrote to it."""
    for optim in ("adamw", "adamw_8bit"):
        for dtype in (torch.float32, torch.bfloat16):
            parameter = nn.Parameter(torch.randn(64, 128).to(dtype))
            optimizer = AdamW({"lora_A": parameter}, OptimOptions(optim=optim))
            parameter.grad = torch.randn_like(parameter)
            before = parameter._version
            optimizer.step(1e-3)
            assert parameter._version > before, (optim, dtype)
