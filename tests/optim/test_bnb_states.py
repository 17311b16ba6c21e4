"""State to bitsandbytes and from it: bit-equal tensors, and training that goes on there as it would have here."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.ops import levels
from halfbyte.optim import OptimOptions
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.bnb_states import WRAPPER, from_bitsandbytes, parameter_groups, to_bitsandbytes

bnb = pytest.importorskip("bitsandbytes")

SHAPES = {"w": (130, 83), "norm": (4099,), "small": (33,), "v": (64, 64)}
NAMES = ["w", "v", "norm", "small"]  # matrices first: the order of the groups
RATE = 1e-2
KINDS = {"adamw_8bit": "AdamW8bit", "adamw": "AdamW32bit"}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(s, generator=generator) * 10.0 ** -(step % 3) for name, s in SHAPES.items()}


def ours(optim: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[dict[str, nn.Parameter], AdamW]:
    params = parameters(dtype)
    return params, AdamW(params, OptimOptions.model_validate({"optim": optim, "weight_decay": 0.1} | options))


def theirs(optim: str) -> tuple[dict[str, nn.Parameter], Any]:
    params, like = ours(optim)
    return params, getattr(bnb.optim, KINDS[optim])(parameter_groups(like), lr=RATE)


def advance(params: dict[str, nn.Parameter], optimizer: Any, steps: range) -> None:
    for step in steps:
        for name, gradient in gradients(step).items():
            params[name].grad = gradient.to(params[name].dtype)
        optimizer.step(RATE) if isinstance(optimizer, AdamW) else optimizer.step()


def copy(to: dict[str, nn.Parameter], source: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, p in to.items():
            p.copy_(source[name])


def close(one: dict[str, nn.Parameter], other: dict[str, nn.Parameter], optim: str) -> None:
    """8 bits: codes at the edge between two differ, as bitsandbytes looks them up in 65,536 bins on a CPU."""
    start = parameters()
    for name, p in one.items():
        moved = (other[name] - start[name]).abs().mean()
        assert moved > 0.02
        assert (p - other[name]).abs().mean() < (2e-3 if optim == "adamw_8bit" else 1e-6) * moved


@pytest.mark.parametrize("optim", KINDS)
def test_begun_there_and_continued_here(optim: str) -> None:
    params, optimizer = theirs(optim)
    advance(params, optimizer, range(7))
    mine, here = ours(optim)
    copy(mine, params)
    from_bitsandbytes(here, optimizer.state_dict(), NAMES)
    assert here.updates == 7
    advance(params, optimizer, range(7, 20))
    advance(mine, here, range(7, 20))
    close(mine, params, optim)


@pytest.mark.parametrize("optim", KINDS)
def test_begun_here_and_continued_there(optim: str) -> None:
    mine, here = ours(optim)
    advance(mine, here, range(7))
    params, optimizer = theirs(optim)
    copy(params, mine)
    optimizer.load_state_dict(to_bitsandbytes(here, RATE))
    advance(params, optimizer, range(7, 20))
    advance(mine, here, range(7, 20))
    close(params, mine, optim)


@pytest.mark.parametrize("optim", KINDS)
def test_there_and_back_is_bit_for_bit(optim: str) -> None:
    """Their state through here is their state, and ours through there is ours; keys, types and shapes included."""
    params, optimizer = theirs(optim)
    advance(params, optimizer, range(3))
    before = optimizer.state_dict()
    _, here = ours(optim)
    from_bitsandbytes(here, before, NAMES)
    after = to_bitsandbytes(here, RATE)
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for index, state in before["state"].items():
        assert after["state"][index]["step"] == state["step"] == 3
        tensors = after["state"][index][WRAPPER]
        assert tensors.keys() == state[WRAPPER].keys()
        for key, tensor in state[WRAPPER].items():
            assert tensors[key].dtype == tensor.dtype
            assert torch.equal(tensors[key], tensor), (index, key)
    _, back = ours(optim)
    from_bitsandbytes(back, to_bitsandbytes(here, RATE), NAMES)
    one, other = here.state_dict(), back.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_maps_are_theirs_and_the_same_values_have_the_same_codes() -> None:
    """But where a bin of their look-up table on a CPU, 65,536 over [-1, 1], has the border of two codes in it."""
    functional = bnb.functional
    for signed in (True, False):
        table = functional.create_dynamic_map(signed)
        assert torch.equal(table, levels.dynamic_map(signed))
        values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) ** 3
        values = values if signed else values.abs()
        codes, absmax = ops.quantize_dynamic(values, 256, signed)
        want, state = functional.quantize_blockwise(values, code=table, blocksize=256)
        assert torch.equal(absmax, state.absmax)
        normalized = values / absmax.repeat_interleave(256)
        borders = (table[:-1] + table[1:]) / 2
        differing = normalized[codes != want]
        distance = (differing[:, None] - borders).abs().amin(1)
        assert 0 < len(differing) < 0.15 * len(values)
        assert distance.max() < 1 / 65_536
        assert (table[codes.long()] - table[want.long()]).abs().max() < 0.02
        assert torch.equal(
            ops.dequantize_dynamic(want, absmax, 256, signed), functional.dequantize_blockwise(want, state)
        )


def test_a_parameter_that_was_never_updated_there_begins_here() -> None:
    params, optimizer = theirs("adamw_8bit")
    for name in ("w", "small"):
        params[name].grad = gradients(0)[name]
    optimizer.step()
    _, here = ours("adamw_8bit")
    fresh = {key: tensor.clone() for key, tensor in here.state_dict().items()}
    from_bitsandbytes(here, optimizer.state_dict(), NAMES)
    state = here.state_dict()
    assert torch.equal(state["v.exp_avg.codes"], fresh["v.exp_avg.codes"])
    assert not torch.equal(state["w.exp_avg.codes"], fresh["w.exp_avg.codes"])


def test_bfloat16_weights_lose_their_lower_bits_on_the_way() -> None:
    mine, here = ours("adamw_8bit", torch.bfloat16)
    advance(mine, here, range(2))
    assert here.state_dict()["w.low_bits"].any()
    from_bitsandbytes(here, to_bitsandbytes(here, RATE), NAMES)
    assert not here.state_dict()["w.low_bits"].any()


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    params, optimizer = theirs("adamw_8bit")
    advance(params, optimizer, range(2))
    state = optimizer.state_dict()
    _, here = ours("adamw_8bit")
    fresh = {key: tensor.clone() for key, tensor in here.state_dict().items()}

    def changed(index: int, **tensors: Any) -> dict[str, Any]:
        each = state["state"][index]
        return {**state, "state": {**state["state"], index: {**each, WRAPPER: {**each[WRAPPER], **tensors}}}}

    uneven = {**state, "state": {**state["state"], 1: {**state["state"][1], "step": 9}}}
    cases = [
        (changed(0, qmap1=torch.zeros(256)), "qmap1 is not the dynamic 8-bit map"),
        (changed(0, state2=torch.zeros(3, dtype=torch.uint8)), "should be 10790 x torch.uint8, and is 3 x torch.uint8"),
        (uneven, "w has had 2 updates and v 9"),
    ]
    for broken, message in cases:
        with pytest.raises(UsageError, match=message):
            from_bitsandbytes(here, broken, NAMES)
    with pytest.raises(UsageError, match="is of 4 parameters"):
        from_bitsandbytes(here, state, NAMES[:3])
    with pytest.raises(UsageError, match="adamw for AdamW32bit"):
        from_bitsandbytes(ours("adamw")[1], state, NAMES)
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in here.state_dict().items())


def test_lora_plus_and_galore_are_refused() -> None:
    lora = {"a.lora_A": nn.Parameter(torch.zeros(2, 4)), "a.lora_B": nn.Parameter(torch.zeros(4, 2))}
    with pytest.raises(UsageError, match="no LoRA"):
        to_bitsandbytes(AdamW(lora, OptimOptions(loraplus_lr_ratio=4)), RATE)
    linear = {"model.layers.0.q.weight": nn.Parameter(torch.zeros(4, 4))}
    with pytest.raises(UsageError, match="no GaLore"):
        parameter_groups(AdamW(linear, OptimOptions(optim="galore_adamw")))
