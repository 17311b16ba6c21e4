"""AdamW's state as bitsandbytes keeps it, both ways: a run begun there goes on here, and the other way round.

The layout is that of bitsandbytes 0.50.2's `optim.AdamW8bit` and `AdamW32bit`: per parameter `step`, `state1` and
`state2` (codes, or float32 for fewer than 4,096 elements), `absmax1`, `absmax2`, `qmap1`, `qmap2`. Moments, the block
of 256 and the maps are the same here, so nothing is converted and nothing is lost, but for one exception: there are no
bits below a bfloat16 weight there. They are dropped on the way there and zero on the way back.

    theirs = bnb.optim.AdamW8bit(parameter_groups(ours), lr=rate)
    theirs.load_state_dict(to_bitsandbytes(ours, rate))
    from_bitsandbytes(ours, theirs.state_dict(), names)
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.optim.adamw import STEP, AdamW
from halfbyte.optim.galore import GaloreSlot
from halfbyte.optim.moments import ABSMAX, CODES, FIRST, LOW_BITS, SECOND
from halfbyte.optim.slots import Slot

WRAPPER = "__bnb_optimizer_quant_state__"
"""Under this key bitsandbytes' `state_dict` hides a parameter's tensors from FSDP."""
_MOMENTS = ((FIRST, "1", True), (SECOND, "2", False))


def parameter_groups(optimizer: AdamW) -> list[dict[str, Any]]:
    """The parameters as torch's optimizers take them: what decays, then what does not; with `lr` factors of LoRA+ left
    out (UsageError)."""
    return [
        {"params": [slot.parameter for slot in slots], "weight_decay": decay} for slots, decay in _groups(optimizer)
    ]


def to_bitsandbytes(optimizer: AdamW, learning_rate: float) -> dict[str, Any]:
    """What `load_state_dict` of a bitsandbytes optimizer over `parameter_groups(optimizer)` takes; copies."""
    options, mine = optimizer.options, optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for slots, decay in _groups(optimizer):
        first = len(state)
        for slot in slots:
            state[len(state)] = {"step": optimizer.updates, WRAPPER: _exported(slot, mine)}
        groups.append(
            {
                "lr": learning_rate,
                "betas": (options.adam_beta1, options.adam_beta2),
                "eps": options.adam_epsilon,
                "weight_decay": decay,
                "alpha": 0.0,
                "t_alpha": None,
                "t_beta3": None,
                "params": list(range(first, len(state))),
            }
        )
    return {"state": state, "param_groups": groups}


def from_bitsandbytes(optimizer: AdamW, state: Mapping[str, Any], names: Sequence[str]) -> None:
    """Take the state of a bitsandbytes AdamW. UsageError, and nothing is changed, where it is not one over `names`.

    names   the parameters in the order of that optimizer's groups
    """
    _groups(optimizer)
    indices = list(chain.from_iterable(group["params"] for group in state["param_groups"]))
    slots = {slot.name: slot for slot in optimizer.slots}
    if len(indices) != len(names) or set(names) != slots.keys():
        raise UsageError(f"the saved state is of {len(indices)} parameters, and {len(slots)} are trained here")
    found: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for index, name in zip(indices, names, strict=True):
        slot, saved = slots[name], _unwrapped(state["state"].get(index, {}))
        found |= _imported(slot, saved)
        if saved:
            steps[name] = int(saved["step"])
    if len(set(steps.values())) > 1:
        low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise UsageError(
            f"{low} has had {steps[low]} updates and {high} {steps[high]}: here all parameters have had the same number"
        )
    found[STEP] = torch.tensor(next(iter(steps.values()), 0), dtype=torch.int64)
    optimizer.load_state_dict(found)


def _groups(optimizer: AdamW) -> list[tuple[list[Slot], float]]:
    for slot in optimizer.slots:
        if isinstance(slot, GaloreSlot) or slot.rate != 1.0:
            raise UsageError(f"{slot.name}: bitsandbytes' AdamW has no GaLore and no LoRA+ rates: leave them out")
    decaying = [slot for slot in optimizer.slots if slot.decays]
    others = [slot for slot in optimizer.slots if not slot.decays]
    groups = [(decaying, optimizer.options.weight_decay), (others, 0.0)]
    return [(slots, decay) for slots, decay in groups if slots]


def _exported(slot: Slot, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for moment, number, signed in _MOMENTS:
        key = slot.name + moment
        values = mine[key + CODES] if slot.in_bytes else mine[key]
        tensors[f"state{number}"] = values.clone().view(slot.parameter.shape)
        if slot.in_bytes:
            tensors[f"absmax{number}"] = mine[key + ABSMAX].clone()
            tensors[f"qmap{number}"] = ops.levels.dynamic_map(signed).to(slot.device, copy=True)
    return tensors


def _unwrapped(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in saved.items() if key != WRAPPER}, **saved.get(WRAPPER, {})}


def _imported(slot: Slot, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our tensors of one parameter from theirs; the state before the first step where there are none."""
    layout = slot.layout()
    found: dict[str, Tensor] = {}
    if slot.half:
        found[slot.name + LOW_BITS] = torch.zeros(slot.numel, dtype=torch.int16)
    for moment, number, signed in _MOMENTS:
        key = slot.name + moment
        if not saved:
            code = int((ops.levels.dynamic_map(signed) == 0).nonzero()[0])
            for end in (CODES, ABSMAX, ""):
                if moment + end in layout:
                    dtype, count = layout[moment + end]
                    found[key + end] = torch.full((count,), code if end == CODES else 0, dtype=dtype)
            continue
        values = saved.get(f"state{number}")
        wanted = torch.uint8 if slot.in_bytes else torch.float32
        if values is None or values.dtype != wanted or values.numel() != slot.numel:
            said = "nothing" if values is None else f"{values.numel()} x {values.dtype}"
            raise UsageError(
                f"{slot.name}: state{number} should be {slot.numel} x {wanted}, and is {said}: take the optim that "
                "the state is of (adamw_8bit for AdamW8bit, adamw for AdamW32bit)"
            )
        if not slot.in_bytes:
            found[key] = values.reshape(-1)
            continue
        if not torch.equal(saved[f"qmap{number}"].cpu(), ops.levels.dynamic_map(signed)):
            raise UsageError(f"{slot.name}: qmap{number} is not the dynamic 8-bit map: the state is of another kind")
        found[key + CODES], found[key + ABSMAX] = values.reshape(-1), saved[f"absmax{number}"]
    return found
