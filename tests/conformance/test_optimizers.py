"""bitsandbytes' cases of AdamW: test_optim.py, 32-bit and 8-bit block-wise states.

The oracle of the values is torch's AdamW in float32, as there; bitsandbytes' own optimizer runs beside ours on the same
gradients. Weight decay: bitsandbytes decays before the update on a CPU, as ours and torch's do. Ours decays matrices
only, so the cases are matrices. There are no float16 weights in halfbyte's training.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.optim import OptimOptions
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.moments import join_bits

RATE = 1e-3
SHAPES = [(1024, 32), (256, 256), (64, 4097), (1024, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
decays = pytest.mark.parametrize("decay", [0.0, 0.1])


def options(decay: float = 0.0, optim: str = "adamw") -> OptimOptions:
    return OptimOptions.model_validate({"learning_rate": RATE, "weight_decay": decay, "optim": optim})


def moments(optimizer: AdamW) -> tuple[Tensor, Tensor]:
    """Both moments of the parameter "w" in float32, however they are kept."""
    state = optimizer.state_dict()
    found = []
    for name, signed in (("w.exp_avg", True), ("w.exp_avg_sq", False)):
        if name in state:
            found.append(state[name])
        else:
            found.append(ops.dequantize_dynamic(state[f"{name}.codes"], state[f"{name}.absmax"], 256, signed))
    return found[0], found[1]


def theirs(parameter: Tensor, optimizer: Any) -> tuple[Tensor, Tensor]:
    """The same of a bitsandbytes optimizer."""
    import bitsandbytes

    state = optimizer.state[parameter]
    if state["state1"].dtype != torch.uint8:
        return state["state1"].view(-1), state["state2"].view(-1)
    first, second = (
        bitsandbytes.functional.dequantize_blockwise(
            state[f"state{i}"], code=state[f"qmap{i}"], absmax=state[f"absmax{i}"], blocksize=256
        ).view(-1)
        for i in (1, 2)
    )
    return first, second


@shapes
@decays
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_32_bit_states(shape: tuple[int, int], decay: float, dtype: torch.dtype) -> None:
    """20 steps. float32: bitsandbytes' own tolerances of 1e-6 and 1e-5.

    bfloat16: bitsandbytes loses what is below the weights' 8 bits at every step and allows 1e-2 after each. Ours keeps
    those bits, so 20 steps together end at the float32 weight's rounding.
    """
    import bitsandbytes

    start = (torch.randn(shape) * 0.1).to(dtype)
    ours = nn.Parameter(start.clone())
    single, other = nn.Parameter(start.float().clone()), nn.Parameter(start.clone())
    optimizer = AdamW({"w": ours}, options(decay))
    reference = torch.optim.AdamW([single], lr=RATE, weight_decay=decay)
    peer = bitsandbytes.optim.AdamW([other], lr=RATE, weight_decay=decay)
    for _ in range(20):
        gradient = (torch.randn(shape) * 0.01).to(dtype)
        ours.grad, other.grad, single.grad = gradient.clone(), gradient.clone(), gradient.float()
        optimizer.step(RATE)
        reference.step()
        peer.step()
        for found, name in zip(moments(optimizer), ("exp_avg", "exp_avg_sq"), strict=True):
            torch.testing.assert_close(found, reference.state[single][name].view(-1), atol=1e-6, rtol=1e-5)
        for found, expected in zip(moments(optimizer), theirs(other, peer), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(ours.detach(), single.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.detach(), other.detach(), atol=1e-6, rtol=1e-5)
        return
    torch.testing.assert_close(ours.detach().float(), single.detach(), atol=1e-6, rtol=2**-8)
    mine, its = (float((p.detach().float() - single.detach()).abs().mean()) for p in (ours, other))
    assert mine < its


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@decays
def test_8_bit_states(shape: tuple[int, int], dtype: torch.dtype, decay: float) -> None:
    """50 steps; the float32 twin takes the 8-bit weights and moments over after each, as in bitsandbytes' test.

    So a step's weights differ by float32 rounding only (bitsandbytes allows 6e-5, 1.7e-4 in bfloat16), and its moments
    by one quantization: fewer than 20 beyond 3e-3 + 1e-3 relative, bitsandbytes' bound, and no more in the mean than
    bitsandbytes' own, whose look-up is coarser than the nearest code.
    """
    import bitsandbytes

    start = (torch.randn(shape) * 0.1).to(dtype)
    ours, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = AdamW({"w": ours}, options(decay, "adamw_8bit"))
    peer = bitsandbytes.optim.AdamW8bit([other], lr=RATE, weight_decay=decay)
    twins = [nn.Parameter(start.float().clone()) for _ in range(2)]
    references = [torch.optim.AdamW([twin], lr=RATE, weight_decay=decay) for twin in twins]
    errors = torch.zeros(2, 2)
    for _ in range(50):
        gradient = (torch.randn(shape) * 0.01).to(dtype)
        ours.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step(RATE)
        peer.step()
        stepped = ((whole(ours, optimizer), moments(optimizer)), (other.detach().float(), theirs(other, peer)))
        for i, (weight, held) in enumerate(stepped):
            twin, state = twins[i], references[i].state
            twin.grad = gradient.float()
            references[i].step()
            if i == 0:
                torch.testing.assert_close(weight, twin.detach(), atol=1e-6, rtol=1e-5)
            for k, (name, found) in enumerate(zip(("exp_avg", "exp_avg_sq"), held, strict=True)):
                exact = state[twin][name].view(-1)
                errors[i, k] += (exact - found).abs().mean()
                assert i or int((~torch.isclose(exact, found, atol=3e-3, rtol=1e-3)).sum()) < 20
                exact.copy_(found)
            twin.data.copy_(weight)
    assert bool((errors[0] <= 1.001 * errors[1]).all())


def whole(parameter: Tensor, optimizer: AdamW) -> Tensor:
    """The float32 weight: bfloat16 ones with the bits below them."""
    low = optimizer.state_dict().get("w.low_bits")
    flat = parameter.detach().view(-1)
    return (flat if low is None else join_bits(flat, low)).clone().view(parameter.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_8_bit_training_ends_where_bitsandbytes_does(dtype: torch.dtype) -> None:
    """100 steps without any help; the distance to float32 states, beside what the weights moved."""
    import bitsandbytes

    start = torch.randn(128, 256).to(dtype)
    ours, other, exact = nn.Parameter(start.clone()), nn.Parameter(start.clone()), nn.Parameter(start.float().clone())
    optimizer = AdamW({"w": ours}, options(0.0, "adamw_8bit"))
    peer = bitsandbytes.optim.AdamW8bit([other], lr=RATE, weight_decay=0.0)
    reference = torch.optim.AdamW([exact], lr=RATE, weight_decay=0.0)
    for _ in range(100):
        gradient = (torch.randn(128, 256) + start.float()).to(dtype)
        ours.grad, other.grad, exact.grad = gradient.clone(), gradient.clone(), gradient.float()
        optimizer.step(RATE)
        peer.step()
        reference.step()
    moved = float((exact.detach() - start.float()).abs().mean())
    mine, its = (float((p.detach().float() - exact.detach()).abs().mean()) for p in (whole(ours, optimizer), other))
    assert mine < 0.03 * moved
    assert mine <= 1.05 * its


@pytest.mark.parametrize("count", [1, 4095, 4096, 5000])
def test_small_tensors_keep_float32(count: int) -> None:
    """From 4,096 elements on a state is 8-bit, in both."""
    import bitsandbytes

    ours, other = nn.Parameter(torch.randn(count, 1)), nn.Parameter(torch.randn(count, 1))
    peer = bitsandbytes.optim.AdamW8bit([other], lr=RATE)
    other.grad = torch.randn(count, 1)
    peer.step()
    eight = peer.state[other]["state1"].dtype == torch.uint8
    state = AdamW({"w": ours}, options(0.0, "adamw_8bit")).state_dict()
    assert ("w.exp_avg.codes" in state) == eight == (count >= 4096)
    if eight:
        assert state["w.exp_avg.codes"].numel() == count
        assert state["w.exp_avg.absmax"].shape == peer.state[other]["absmax1"].shape


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_a_saved_state_goes_on_the_same(optim: str) -> None:
    """Saved after 10 of 20 steps, and no NaN anywhere."""
    torch.manual_seed(1)
    gradients = [torch.randn(64, 256) for _ in range(20)]
    straight, stopped = nn.Parameter(torch.zeros(64, 256)), nn.Parameter(torch.zeros(64, 256))
    first, second = AdamW({"w": straight}, options(0.1, optim)), AdamW({"w": stopped}, options(0.1, optim))
    for step, gradient in enumerate(gradients):
        if step == 10:
            saved = {key: value.clone() for key, value in second.state_dict().items()}
            second = AdamW({"w": stopped}, options(0.1, optim))
            second.load_state_dict(saved)
            assert all(torch.equal(saved[key], value) for key, value in second.state_dict().items())
        straight.grad, stopped.grad = gradient.clone(), gradient.clone()
        first.step(RATE)
        second.step(RATE)
    assert torch.equal(straight, stopped)
    assert torch.isfinite(straight).all()


def test_float16_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="must be float32 or bfloat16"):
        AdamW({"w": nn.Parameter(torch.zeros(4, 4, dtype=torch.float16))}, options())
