"""Memory by component, against what the tensors of the same model weigh."""

import json
import math

import pytest
import torch
from torch import nn

from halfbyte.quant.weight import BlockWeight
from halfbyte.run import components
from halfbyte.run.config import RunConfig
from halfbyte.run.run import load, make_trainable, run
from halfbyte.train.events import read_events
from halfbyte.train.state import TrainResult

SUMS = [components.REST, "adapters", "base weights", "gradients", "optimizer", "quantization constants", "runtime"]


def stored(model: nn.Module) -> int:
    """Bytes of all the memory that the model's tensors stand in."""
    kept = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memory = tensor.untyped_storage()
        kept[memory.data_ptr()] = tensor.nbytes
    return sum(kept.values())


@pytest.mark.parametrize(("method", "double"), [("qlora", False), ("qlora", True), ("lora", False), ("full", False)])
def test_of_a_run(tiny_config: RunConfig, method: str, double: bool) -> None:
    config = tiny_config.replace(method=method, double_quant=double, optim="adamw")
    done = run(config)
    found = done.result["memory_by_component"]
    end = read_events(done.path / "events.jsonl")[-1]
    assert sorted(found) == SUMS
    assert sum(found.values()) == end["peak_memory_bytes"]
    assert found["runtime"] > 5e7
    loaded = load(done.config)
    base = stored(loaded.model)
    trainable, attached = make_trainable(loaded, done.config)
    if method == "full":  # the base as it is trained: every matrix in the compute dtype
        base = stored(loaded.model)
    assert found["base weights"] + found["quantization constants"] == base
    if method == "full":
        assert found["adapters"] == 0
    else:
        assert found["adapters"] == 4 * attached.trainable_parameters
    assert found["gradients"] == sum(parameter.nbytes for parameter in trainable.values())
    assert found["optimizer"] == 8 * attached.trainable_parameters
    constants = found["quantization constants"]
    if method != "qlora":
        assert constants == 0
    else:  # a float32 for 64 weights, or a byte with a float32 for 256 of those
        blocks = sum(-(-math.prod(m.shape) // 64) for m in loaded.model.modules() if isinstance(m, BlockWeight))
        if double:
            assert blocks < constants < 1.3 * blocks
        else:
            assert constants == 4 * blocks


def test_paged_state_is_not_in_memory(tiny_config: RunConfig) -> None:
    config = tiny_config.replace(method="full", optim="paged_adamw", optim_memory=0)
    held = run(tiny_config.replace(method="full", optim="adamw", output_dir=tiny_config.output_dir.with_name("held")))  # type: ignore[union-attr]
    paged = run(config)
    assert paged.result["memory_by_component"]["gradients"] == 0
    assert held.result["memory_by_component"]["gradients"] > 0
    assert json.loads((paged.path / "result.json").read_text())["memory_by_component"]["optimizer"] > 0  # on their way


def test_nothing_is_told_of_a_card() -> None:
    trained = TrainResult("completed", 1, 1, 1.0, 1.0, 1, 1, 1.0, 1.0, 1.0, None, None, None, 100, None)
    weights = {"base weights": 60}
    assert components.measured(50, weights, trained, torch.device("cuda")) == {}
    assert components.measured(30, weights, trained, torch.device("cpu"))[components.REST] == 10
    assert components.measured(50, weights, trained, torch.device("cpu"))[components.REST] == 0
