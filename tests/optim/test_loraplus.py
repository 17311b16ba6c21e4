"""LoRA+ against PEFT's own optimizer: the same parameters at B's rate, and the same steps."""

import pytest
import torch
from torch import nn

from halfbyte.errors import UsageError
from halfbyte.ops import native
from halfbyte.optim import OptimOptions
from halfbyte.optim.adamw import AdamW

SHAPES = {
    "layers.0.q.lora_A": (4, 96),
    "layers.0.q.lora_B": (64, 4),
    "layers.0.q.magnitude": (64,),
    "layers.0.up.lora_A": (64, 96),
    "layers.0.up.lora_B": (96, 64),
    "head.weight": (64, 80),
}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def put_gradients(params: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator)


def test_rates_are_those_of_peft() -> None:
    """PEFT's grouping, from the optimizer that it makes for a model with these names."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
        peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]),
    )
    made = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    theirs = {id(p): group["lr"] / 1e-3 for group in made.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = AdamW(trained, OptimOptions(loraplus_lr_ratio=16))
    assert {slot.name: slot.rate for slot in ours.slots} == {name: theirs[id(p)] for name, p in trained.items()}
    assert {slot.rate for slot in ours.slots} == {1.0, 16.0}


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("isa", [None, "reference"])
def test_a_step_is_that_of_two_learning_rates(optim: str, isa: str | None) -> None:
    """Bit for bit what two optimizers with two learning rates do, natively and in torch, with weight decay."""
    native.use(isa)
    options = OptimOptions(optim=optim, weight_decay=0.1, loraplus_lr_ratio=8.0)  # type: ignore[arg-type]
    plain = options.model_copy(update={"loraplus_lr_ratio": None})
    together, apart = parameters(), parameters()
    slow = {name for name in SHAPES if "lora_A" in name or name == "head.weight"}
    first = AdamW({n: p for n, p in apart.items() if n in slow}, plain)
    second = AdamW({n: p for n, p in apart.items() if n not in slow}, plain)
    ours = AdamW(together, options)
    for step in range(4):
        put_gradients(together, step)
        put_gradients(apart, step)
        ours.step(1e-2, 0.5)
        first.step(1e-2, 0.5)
        second.step(8e-2, 0.5)
    native.use(None)
    for name, p in together.items():
        assert torch.equal(p, apart[name]), name


def test_without_an_adapter_it_is_refused() -> None:
    with pytest.raises(UsageError, match="loraplus_lr_ratio is for adapters"):
        AdamW({"model.norm.weight": nn.Parameter(torch.ones(3))}, OptimOptions(loraplus_lr_ratio=16))
