"""Before the first step: what is tried, what is measured, and that nothing of it is left."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.data.sampler import Sampler
from halfbyte.errors import DoesNotFit, Interrupted
from halfbyte.plan.time import Counts
from halfbyte.run import planning
from halfbyte.run import rehearsal as rehearsal_module
from halfbyte.run.config import RunConfig
from halfbyte.run.rehearsal import SCRATCH, Measured, Rehearsal, is_due
from halfbyte.run.run import resume, run
from halfbyte.train import checkpoint
from halfbyte.train.budget import Budget, Layout
from halfbyte.train.events import read_events
from halfbyte.train.feed import Feed
from halfbyte.train.loop import train
from halfbyte.train.run_directory import RunDirectory
from halfbyte.train.state import CPU, TrainPlan
from halfbyte.train.update import NonFinite
from tests.run.conftest import rows, write_rows
from tests.train import tiny
from tests.train.test_budget import long_plan, measured_need


def trained(path: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.load(checkpoint.list_checkpoints(path)[-1])
    names = {**{f"t {k}": v for k, v in found.trainable.items()}, **{f"o {k}": v for k, v in found.optimizer.items()}}
    return {name: tensor.clone() for name, tensor in names.items()}


def told(path: Path) -> list[dict[str, Any]]:
    """The events without what differs from run to run."""
    return [
        {k: v for k, v in event.items() if k not in ("time", "seconds", "pid") and "memory" not in k}
        for event in read_events(path / "events.jsonl")
        if event["event"] in ("step", "eval")
    ]


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "dropout": {"lora_dropout": 0.3},
    "8-bit": {"optim": "adamw_8bit"},
    "paged": {"optim": "paged_adamw", "optim_memory": 0},
    "dora": {"use_dora": True, "lora_dropout": 0.1},
    "full bfloat16": {"method": "full", "dtype": "bfloat16", "learning_rate": 1e-3},
    "full paged 8-bit": {"method": "full", "dtype": "bfloat16", "optim": "paged_adamw_8bit"},
    "galore": {"method": "full", "optim": "galore_adamw", "galore_rank": 4, "galore_update_proj_gap": 3},
    "per layer": {"method": "full", "dtype": "bfloat16", "per_layer_updates": True},
    "float16": {"dtype": "float16", "method": "lora"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_with_rehearsal_is_one_without(tiny_config: RunConfig, tmp_path: Path, name: str) -> None:
    config = tiny_config.replace(max_steps=3, **CASES[name])
    paths = tmp_path / "with", tmp_path / "without"
    for path, rehearsal in zip(paths, (True, False), strict=True):
        run(config.replace(output_dir=path, rehearsal=rehearsal))
    kinds = [[event["event"] for event in read_events(path / "events.jsonl")] for path in paths]
    assert kinds[0][:2] == ["start", "rehearsal"]
    assert "rehearsal" not in kinds[1]
    one, other = (trained(path) for path in paths)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert told(paths[0]) == told(paths[1])
    results = [json.loads((path / "result.json").read_text()) for path in paths]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]
    assert not (paths[0] / SCRATCH).exists()


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"say {i}", "chosen": f"yes {i % 5}", "rejected": f"no, not {i % 7}"} for i in range(count)]


def sentences(count: int) -> list[dict[str, Any]]:
    kinds = [("woof", "dog"), ("purr", "cat")]
    return [{"text": f"{i} it said {kinds[i % 2][0]}", "label": kinds[i % 2][1]} for i in range(count)]


TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "dpo": (pairs(40), {"lora_dropout": 0.1}),
    "classifier": (sentences(40), {"task": "classification", "method": "lora", "logging_steps": 2}),
    "packed": (rows(60), {"packing": True, "per_device_train_batch_size": 2}),
    "stopping early": (rows(60), {"eval_steps": 1, "early_stopping_patience": 1, "learning_rate": 1e-12}),
}


@pytest.mark.parametrize("name", TASKS)
def test_so_it_is_of_every_task(tiny_config: RunConfig, tmp_path: Path, name: str) -> None:
    values, options = TASKS[name]
    data = str(write_rows(tmp_path / "rows.jsonl", values))
    config = tiny_config.replace(data=data, eval_split=8, max_steps=4, learning_rate=1e-3, max_seq_length=96)
    paths = tmp_path / "with", tmp_path / "without"
    for path, rehearsal in zip(paths, (True, False), strict=True):
        run(config.replace(**{**options, "output_dir": path, "rehearsal": rehearsal}))
    one, other = (trained(path) for path in paths)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert told(paths[0]) == told(paths[1])
    assert "rehearsal" in [event["event"] for event in read_events(paths[0] / "events.jsonl")]


def test_its_event_and_the_corrected_plan(tiny_config: RunConfig) -> None:
    assert tiny_config.output_dir is not None
    path = tiny_config.output_dir
    at_first_step: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 1:
            at_first_step.append(json.loads((path / "plan.json").read_text()))

    planned: list[Any] = []
    run(
        tiny_config.replace(rehearsal=True),
        lambda event: (listen(event), planned.append(event["plan"]) if event["event"] == "planned" else None),
    )
    (event,) = [e for e in read_events(path / "events.jsonl") if e["event"] == "rehearsal"]
    assert event["tried"] == ["save", "training", "optimizer step", "evaluation", "restore"]
    assert event["step"] == 0
    assert event["seconds"] > 0
    assert event["peak_memory_bytes"] > 1e8
    tokens = [probe["tokens"] for probe in event["probes"]]
    assert tokens == sorted(tokens, reverse=True)
    assert 1 <= len(tokens) <= 3
    assert all(probe["seconds"] > 0 for probe in event["probes"])
    plan, before = at_first_step[0], planned[0].as_dict()
    assert plan["probed"] is True
    assert plan["before_probe"]["seconds"] == before["seconds"]
    assert plan["before_probe"]["seconds_by_phase"] == before["seconds_by_phase"]
    assert plan["seconds"] != before["seconds"]
    assert 0 < plan["seconds_by_phase"]["rehearsal"]["p50"] <= event["seconds"] + 0.1
    assert plan["peak_memory_bytes"] == before["peak_memory_bytes"]
    assert plan == json.loads((path / "plan.json").read_text())


def test_by_default_only_where_it_costs_little(tiny_config: RunConfig, tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    run(tiny_config.replace(output_dir=short, max_steps=2))
    assert "rehearsal" not in [e["event"] for e in read_events(short / "events.jsonl")]

    class Enough(Exception):
        pass

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "loaded":
            raise Enough

    heard: list[Any] = []
    config = tiny_config.replace(output_dir=long, max_steps=1_000_000)
    with pytest.raises(Enough):
        run(config, lambda event: (heard.append(event), listen(event)))
    plan = next(event["plan"] for event in heard if event["event"] == "planned")
    assert is_due(config, plan)
    assert not is_due(config.replace(rehearsal=False), plan)
    assert not is_due(config, None)
    assert is_due(config.replace(rehearsal=True), None)


def test_a_resumed_run_does_not_rehearse_again(tiny_config: RunConfig) -> None:
    assert tiny_config.output_dir is not None
    run(tiny_config.replace(rehearsal=True, max_steps=2))
    resume(tiny_config.output_dir, max_steps=4)
    kinds = [event["event"] for event in read_events(tiny_config.output_dir / "events.jsonl")]
    assert kinds.count("rehearsal") == 1


# ---------------------------------------------------------------- what it finds


def feed(lengths: list[int], micro_batch: int = 2) -> Feed:
    examples = tiny.examples(len(lengths))
    cut = [
        replace(e, input_ids=np.resize(e.input_ids, n), supervised=np.arange(n) >= n // 2)
        for e, n in zip(examples, lengths, strict=True)
    ]
    return Feed(cut, Sampler(len(cut), seed=3), rows_per_update=4, micro_batch=micro_batch)


def test_the_longest_the_median_and_the_shortest_micro_batch() -> None:
    lengths = [int(n) for n in np.random.default_rng(1).integers(4, 60, 40)]
    made = Rehearsal(feed(lengths), 25, None, lambda measured: None)
    every = list(made.feed.all_micro_batches(25))
    sizes = sorted(sum(lengths[i] for i in members) for members in every)
    chosen = [sum(lengths[i] for i in members) for members in made.chosen()]
    assert chosen == [sizes[-1], sizes[(len(sizes) - 1) // 2], sizes[0]]
    assert chosen[0] * 0.8 > chosen[1] > chosen[2] / 0.8, "or fewer would have been chosen"
    documents = [lengths[i] for members in every for i in members]
    supervised = sum(n - n // 2 for n in documents)
    assert made.counts == Counts(len(every), sum(documents), supervised, sum(n * n for n in documents))
    batches = [batch for step in range(1, 26) for batch in made.feed.batches_for_update(step)]
    assert made.counts.tokens == sum(batch.tokens for batch in batches)


def test_rows_of_about_one_length_are_probed_once() -> None:
    made = Rehearsal(feed([10] * 4 + [11] * 4), 2, None, lambda measured: None)
    assert len(made.chosen()) == 1


def test_a_peak_over_the_budget_steps_down_before_the_run_begins(tmp_path: Path) -> None:
    model = tiny.decoder(layers=6)
    plan = long_plan(model, length=4096, total_steps=1)
    measured: list[Measured] = []
    rehearsal = Rehearsal(plan.batches_for_update.__self__, 1, None, measured.append)  # type: ignore[attr-defined]
    need = measured_need(tiny.decoder(layers=6), length=4096)

    def lowered(planned: TrainPlan, layout: Layout) -> TrainPlan:
        assert plan.lowered is not None
        lower = rehearsal.feed.halved(layout.halvings)
        return replace(plan.lowered(planned, layout), rehearse=rehearsal.lowered(lower, 0))

    limit = Budget(None, CPU).standing + int(0.75 * need)
    with RunDirectory.create(tmp_path / "run") as directory:
        result = train(model, replace(plan, rehearse=rehearsal, memory=limit, lowered=lowered), directory)
    events = read_events(tmp_path / "run" / "events.jsonl")
    kinds = [event["event"] for event in events]
    assert result.layout.halvings >= 1
    assert kinds.index("warning") < kinds.index("rehearsal") < kinds.index("step")
    assert "the rehearsal reached" in events[kinds.index("warning")]["message"]
    assert len(measured) == 1, "what was over the budget corrects no plan"
    assert measured[0].probes[0].counts.tokens < 4 * 4096


def test_a_disk_without_room_ends_the_run_before_its_first_step(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny_config.output_dir is not None
    usage = shutil.disk_usage
    asked: list[Path] = []

    def full(path: Path) -> Any:
        asked.append(Path(path))
        return usage(path)._replace(free=1000 if SCRATCH in str(path) else usage(path).free)

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(DoesNotFit, match=r"the rehearsal before step 1 failed: .*checkpoint of step 0"):
        run(tiny_config.replace(rehearsal=True))
    assert not (tiny_config.output_dir / SCRATCH).exists()
    assert checkpoint.list_checkpoints(tiny_config.output_dir) == []


def test_numbers_that_break_end_the_run_before_its_first_step(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose weights are damaged."""
    from halfbyte.run import run as module

    load = module.load

    def poisoned(*arguments: Any) -> Any:
        loaded = load(*arguments)
        with torch.no_grad():
            loaded.model.get_parameter("norm.weight").fill_(float("nan"))
        return loaded

    monkeypatch.setattr(module, "load", poisoned)
    with pytest.raises(NonFinite, match=r"the rehearsal before step 1 failed: .* the loss is not finite"):
        run(tiny_config.replace(rehearsal=True))
    assert tiny_config.output_dir is not None
    end = read_events(tiny_config.output_dir / "events.jsonl")[-1]
    assert (end["event"], end["status"], end["step"]) == ("end", "failed", 0)
    assert not (tiny_config.output_dir / SCRATCH).exists()


# ---------------------------------------------------------------- how it is left


class Signalled:
    """A model during whose call of some number a signal comes, or two."""

    def __init__(self, model: Any, signals: int) -> None:
        self.model, self.signals, self.calls = model, signals, 0

    def loss(self, batch: Any) -> Any:
        self.calls += 1
        if self.calls == 2:
            for _ in range(self.signals):
                os.kill(os.getpid(), signal.SIGINT)
        return self.model.loss(batch)

    def train(self, mode: bool = True) -> object:
        return self.model.train(mode)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_in_it_leaves_at_once_and_resume_begins_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    """Nothing is read back or saved for somebody who wants to leave: of a full fine-tune that is minutes."""
    monkeypatch.setattr(rehearsal_module, "_put_back", lambda stage, folder: pytest.fail("put back"))
    model = tiny.decoder(dropout=0.1)
    plan = tiny.make_plan(model)
    rehearsal = Rehearsal(plan.batches_for_update.__self__, 20, None, lambda measured: None)  # type: ignore[attr-defined]
    wanted: type[BaseException] = Interrupted if signals == 1 else KeyboardInterrupt
    with RunDirectory.create(tmp_path / "run") as directory, pytest.raises(wanted):
        train(Signalled(model, signals), replace(plan, rehearse=rehearsal), directory)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["events.jsonl"]
    tiny.run(tmp_path / "run", resume=True)
    tiny.run(tmp_path / "straight")
    assert [
        key
        for key, value in trained(tmp_path / "run").items()
        if not torch.equal(value, trained(tmp_path / "straight")[key])
    ] == []


def test_a_checkpoint_that_takes_long_is_a_cost(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a full fine-tune it has the moments, which are several times the weights."""
    plan = planning.plan_of(tiny_config.replace(max_steps=100_000))
    assert is_due(tiny_config, plan)
    monkeypatch.setattr(rehearsal_module, "LOAD_BYTES_A_SECOND", 1.0)
    assert not is_due(tiny_config, plan)


def test_every_evaluation_can_be_lowered_to_single_rows(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rehearsal's and the last one read more at once than those in between, where micro-batches are short."""
    from halfbyte.run import run as module

    class Enough(Exception):
        pass

    seen: list[TrainPlan] = []

    def stop(model: Any, plan: TrainPlan, *rest: Any) -> Any:
        seen.append(plan)
        raise Enough

    monkeypatch.setattr(module, "train", stop)
    with pytest.raises(Enough):
        run(tiny_config.replace(per_device_train_batch_size=1, rehearsal=True))
    (plan,) = seen
    assert plan.lowered is not None
    made = plan.lowered(plan, plan.lowest).rehearse
    assert isinstance(made, Rehearsal)
    assert made.evaluation is not None
    assert len(made.evaluation.longest()) == 1
