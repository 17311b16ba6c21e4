"""Memory by component, against what the tensors of the same model weigh."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from halfbyte.optim import adamw, paged
from halfbyte.quant.weight import BlockWeight
from halfbyte.run import components, learning
from halfbyte.run.config import RunConfig, to_yaml
from halfbyte.run.run import load, make_trainable, resume, run
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


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: what the tests before had makes the rest larger, and nothing else."""
    monkeypatch.setattr(learning, "untouched", lambda: True)


@pytest.mark.usefixtures("alone")
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


@pytest.mark.usefixtures("alone")
def test_paged_state_is_not_in_memory(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many pages two are in memory, with the gradients in them."""
    assert tiny_config.output_dir is not None
    held = run(tiny_config.replace(method="full", optim="adamw", output_dir=tiny_config.output_dir.with_name("held")))
    monkeypatch.setattr(paged, "PAGE_ELEMENTS", 4096)
    monkeypatch.setattr(adamw, "CHUNK", 4096)
    other = run(tiny_config.replace(method="full", optim="paged_adamw", optim_memory=0))
    whole, part = (made.result["memory_by_component"] for made in (held, other))
    assert whole["gradients"] > 0
    assert part["gradients"] == 0
    page = 4096 * (4 + 4 + 4)  # two moments and the gradient, in float32
    assert page <= part["optimizer"] <= 2.1 * page < whole["optimizer"] / 2


@pytest.mark.usefixtures("alone")
def test_updates_layer_by_layer_hold_no_gradients(tiny_config: RunConfig) -> None:
    found = run(tiny_config.replace(method="full", optim="galore_adamw", galore_rank=4)).result["memory_by_component"]
    assert found["gradients"] == 0
    assert found["optimizer"] > 0


def test_nothing_is_told_where_the_peak_is_not_only_the_runs(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that had much memory before, and of a run that was resumed; in a fresh one it is told."""
    monkeypatch.setattr(learning, "FRESH", 1)
    done = run(tiny_config.replace(max_steps=2))
    assert done.result["memory_by_component"] == {}
    script = (
        "import sys; from pathlib import Path; from halfbyte.run.config import load_config; "
        "from halfbyte.run.run import run; run(load_config(Path(sys.argv[1])))"
    )
    config = tmp_path / "again.yaml"
    config.write_text(to_yaml(tiny_config.replace(max_steps=2, output_dir=tmp_path / "fresh")))
    subprocess.run([sys.executable, "-c", script, config], check=True)
    result = json.loads((tmp_path / "fresh" / "result.json").read_text())
    assert sorted(result["memory_by_component"]) == SUMS
    assert resume(tmp_path / "fresh", max_steps=3).result["memory_by_component"] == {}


def test_nothing_is_told_of_a_card() -> None:
    trained = TrainResult("completed", 1, 1, 1.0, 1.0, 1, 1, 1.0, 1.0, 1.0, None, None, None, 100, None)
    weights = {"base weights": 60}
    assert components.measured(50, weights, trained, torch.device("cuda")) == {}
    assert components.measured(30, weights, trained, torch.device("cpu"))[components.REST] == 10
    assert components.measured(50, weights, trained, torch.device("cpu"))[components.REST] == 0
