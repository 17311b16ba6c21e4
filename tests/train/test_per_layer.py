"""Updates layer by layer in the backward pass, GaLore and paged state, in the loop on a tiny decoder trained whole."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.batch import Batch
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.models.decoder import Decoder
from halfbyte.models.spec import ModelSpec
from halfbyte.optim import OptimOptions
from halfbyte.quant import DenseWeight
from halfbyte.train import checkpoint
from halfbyte.train.events import read_events
from halfbyte.train.feed import Feed
from halfbyte.train.loop import train
from halfbyte.train.run_directory import RunDirectory
from halfbyte.train.state import TrainPlan, TrainResult
from halfbyte.train.update import NonFinite

from . import tiny
from .test_loop import assert_same
from .test_resume import until_killed


def whole_decoder(dtype: torch.dtype = torch.float32, tied: bool = True) -> tuple[Decoder, dict[str, nn.Parameter]]:
    torch.set_num_threads(1)
    spec = ModelSpec.from_config({**tiny.CONFIG, "tie_word_embeddings": tied})
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) / 8 for name, shape in spec.tensors()}
    model = Decoder.build(
        spec,
        lambda name, _: DenseWeight(values[name].to(dtype)),
        lambda name: (values[name] + 1 if "norm" in name else values[name]).to(dtype),
        dtype,
    )
    return model, model.unfreeze()


def whole_plan(optim: dict[str, Any], steps: int = 6, micro_batch: int = 8, tied: bool = True, **changes: Any) -> Any:
    dtype = changes.pop("dtype", torch.float32)
    model, trainable = whole_decoder(dtype, tied)
    model.checkpointing = changes.pop("checkpointing", False)
    plan = tiny.make_plan(model, steps, save_steps=2, **changes)
    feed = plan.batches_for_update.__self__  # type: ignore[attr-defined]
    assert isinstance(feed, Feed)
    options = OptimOptions.model_validate({"learning_rate": 1e-2, "weight_decay": 0.01} | optim)
    batches = replace(feed, micro_batch=micro_batch).batches_for_update
    return model, replace(plan, optim=options, trainable=trainable, batches_for_update=batches)


def run_whole(path: Path, optim: dict[str, Any], resume: bool = False, **options: Any) -> TrainResult:
    listeners = options.pop("listeners", ())
    model, plan = whole_plan(optim, **options)
    with RunDirectory.resume(path) if resume else RunDirectory.create(path) as directory:
        return train(model, plan, directory, listeners)


def run_whole_and_die(path: Path, step: int, optim: dict[str, Any], options: dict[str, Any]) -> None:
    run_whole(path, optim, listeners=(tiny.kill_at_step(step),), **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_clipping_it_equals_the_whole_gradient(
    tmp_path: Path, tied: bool, checkpointing: bool, dtype: torch.dtype
) -> None:
    """Bit for bit, tied embeddings and recomputed activations included: no weight moves before its last use."""
    options: dict[str, Any] = {"tied": tied, "checkpointing": checkpointing, "dtype": dtype}
    run_whole(tmp_path / "whole", {"max_grad_norm": 0}, **options)
    run_whole(tmp_path / "by layer", {"per_layer_updates": True}, **options)
    assert_same(tmp_path / "whole", tmp_path / "by layer")


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_state_equals_state_in_memory(tmp_path: Path, optim: str, dtype: torch.dtype) -> None:
    """With clipping and two micro-batches an update, as everywhere; and nothing is left in the folder."""
    run_whole(tmp_path / "held", {"optim": optim}, micro_batch=4, dtype=dtype)
    run_whole(tmp_path / "paged", {"optim": f"paged_{optim}", "optim_memory": 0}, micro_batch=4, dtype=dtype)
    assert_same(tmp_path / "held", tmp_path / "paged")
    assert not [path.name for path in (tmp_path / "paged").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "optim",
    [
        {"optim": "galore_adamw", "galore_rank": 4, "galore_update_proj_gap": 3},
        {"optim": "galore_adamw_8bit", "galore_rank": 4, "galore_update_proj_gap": 3, "galore_proj_type": "full"},
        {"optim": "paged_adamw", "optim_memory": 0},
        {"optim": "paged_adamw_8bit", "optim_memory": 50_000, "per_layer_updates": True},
    ],
    ids=lambda optim: optim["optim"],
)
def test_killed_and_resumed_is_the_same_run(tmp_path: Path, optim: dict[str, Any]) -> None:
    run_whole(tmp_path / "straight", optim)
    assert until_killed(run_whole_and_die, tmp_path / "killed", 5, optim, {})
    left = [path.name for path in (tmp_path / "killed").iterdir() if "optimizer" in path.name]
    assert left == []
    run_whole(tmp_path / "killed", optim, resume=True)
    assert_same(tmp_path / "straight", tmp_path / "killed")


def test_galore_learns(tmp_path: Path) -> None:
    result = run_whole(tmp_path / "run", {"optim": "galore_adamw", "galore_rank": 8, "galore_scale": 1.0}, steps=30)
    losses = [e["loss"] for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "step"]
    assert result.final_loss is not None
    assert result.final_loss < losses[0] - 0.4


class Poisoned(nn.Module):
    """A decoder whose first layer's queries get a gradient that is not finite, at one step, or whose loss is."""

    def __init__(self, model: Decoder, step: int, loss_too: bool) -> None:
        super().__init__()
        self.model, self.step, self.loss_too, self.steps = model, step, loss_too, 0

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        self.steps += 1
        nll, count = self.model.loss(batch)
        if self.steps >= self.step:
            weight = self.model.layers[0].qkv.parts[0].weight.trainable_tensor()  # type: ignore[union-attr,operator]
            nll = nll + (weight.sum() * 0.0).sqrt() + (math.nan if self.loss_too else 0.0)
        return nll, count


@pytest.mark.parametrize("loss_too", [True, False])
def test_what_is_not_finite_stops_before_its_own_layer(tmp_path: Path, loss_too: bool) -> None:
    """A loss stops before any weight; a gradient before its layer, and then the last whole checkpoint counts."""
    model, plan = whole_plan({"per_layer_updates": True})
    queries = "model.layers.0.self_attn.q_proj.weight"
    seen: list[dict[str, Tensor]] = []
    plan = replace(plan, evaluate=None)

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            seen.append({name: p.detach().clone() for name, p in plan.trainable.items()})

    broken = "loss" if loss_too else f"the gradient of {queries}"
    with RunDirectory.create(tmp_path / "run") as directory, pytest.raises(NonFinite, match=broken) as caught:
        train(Poisoned(model, 4, loss_too), plan, directory, [listen])
    assert "rows.jsonl:" in str(caught.value) or loss_too
    (end,) = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "end"]
    assert end["status"] == "failed"
    assert len(seen) == 3
    moved = {name for name, p in plan.trainable.items() if not torch.equal(p, seen[-1][name])}
    kept = [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path / "run")]
    assert all(bool(p.isfinite().all()) for p in plan.trainable.values())
    if loss_too:
        assert moved == set()
        assert kept == [2, 3]  # the weights are step 3's, and saved
    else:
        assert "model.layers.1.mlp.down_proj.weight" in moved
        assert queries not in moved
        assert kept == [2]


def test_more_than_one_micro_batch_is_refused_by_the_loop(tmp_path: Path) -> None:
    model, plan = whole_plan({"per_layer_updates": True}, micro_batch=4)
    with RunDirectory.create(tmp_path / "run") as directory, pytest.raises(HalfbyteError, match="need one micro-batch"):
        train(model, plan, directory)


def test_float16_is_refused(tmp_path: Path) -> None:
    _, plan = whole_plan({"per_layer_updates": True})
    with pytest.raises(UsageError, match="per_layer_updates cannot be had in float16"):
        TrainPlan(**{**plan.__dict__, "loss_scaling": True})


def test_gradients_never_stand_whole(tmp_path: Path) -> None:
    """At any moment of the backward pass at most the gradients of one layer's call are there."""
    model, plan = whole_plan({"optim": "galore_adamw", "galore_rank": 4}, steps=1)
    standing: list[int] = []

    def count(_: nn.Parameter) -> None:
        standing.append(sum(p.grad is not None for p in plan.trainable.values()))

    hooks = [p.register_post_accumulate_grad_hook(count) for p in plan.trainable.values()]
    with RunDirectory.create(tmp_path / "run") as directory:
        train(model, plan, directory)
    for hook in hooks:
        hook.remove()
    # These hooks run first, the optimizer's after each: one gradient is there, its own.
    assert len(standing) == len(plan.trainable)
    assert max(standing) == 1
