"""The engine on real processes: what is run, what is not run twice, what a report is made of."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.compare import report_data
from halfbyte.compare.cells import CELL, SMALL
from halfbyte.compare.compare import Comparison, compare
from halfbyte.compare.pack import pack
from halfbyte.errors import DoesNotFit, Interrupted, UsageError
from halfbyte.evaluate.rows_file import read_rows
from halfbyte.run.folder import read_config
from halfbyte.train.events import read_events
from tests.compare.conftest import request_of
from tests.run.conftest import rows, write_rows


class Events(list[dict[str, Any]]):
    """What was told; `begun` names the cells for which a worker was started."""

    def __call__(self, event: dict[str, Any]) -> None:
        self.append(event)

    @property
    def begun(self) -> list[tuple[str, str]]:
        return [(e["cell"].variant, e["status"]) for e in self if e["event"] == "cell" and e["status"] != "done"]


def losses(report: Any) -> list[Any]:
    """All that does not depend on the clock: losses and counts of every variant, and what was concluded from them."""
    timed = ("seconds", "step_seconds", "tokens_per_second", "warmup_seconds", "cost", "energy_joules")
    timed += ("peak_memory_bytes", "checkpoint_bytes")
    kept = [
        {name: figure for name, figure in variant["figures"].items() if name not in timed}
        for variant in report["variants"]
    ]
    curves = [
        [{k: v for k, v in point.items() if k != "seconds"} for points in v["curves"].values() for point in points]
        for v in report["variants"]
    ]
    compared = [c for c in report["comparisons"] if c["metric"] not in timed]
    reached = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in level["rows"]] for level in report["convergence"]
    ]
    masked = {"created", "command", "sentence", "variants", "comparisons", "convergence", "pareto", "plan", "cells",
              "commands", "title", "machine", "versions"}  # fmt: skip
    cells = [{k: v for k, v in cell.items() if k not in ("seconds", "others_share")} for cell in report["cells"]]
    of_sessions = ("Other work took", "What else the processor did", "Memory by component is")  # known of whole ones
    told = {n: [one for one in report[n] if not one.startswith(of_sessions)] for n in ("warnings", "notes")}
    rest = {k: v for k, v in report.items() if k not in masked} | told
    return [kept, curves, compared, reached, cells, rest]


def test_a_comparison_from_request_to_report(whole: Comparison) -> None:
    report = whole.report
    assert report is not None
    assert whole.exit_code == 0
    assert json.loads((whole.path / "report.json").read_text()) == report
    assert [v["key"] for v in report["variants"]] == ["lora", "qlora"]
    assert [c["status"] for c in report["cells"]] == ["done"] * 4
    for variant in report["variants"]:
        figures = variant["figures"]
        assert figures["eval_loss"]["n"] == 2
        assert figures["eval_loss"]["low"] < figures["eval_loss"]["mean"] < figures["eval_loss"]["high"]
        assert figures["eval_loss"]["mean"] < report["baselines"]["eval_loss"]["base"] - 1
        assert figures["peak_memory_bytes"]["mean"] > 1e8
        assert figures["adapter_bytes"]["mean"] > 1000
        assert variant["components_measured"]
        assert 0 < sum(variant["components"].values()) <= figures["peak_memory_bytes"]["mean"]
        assert variant["predicted"]["seconds"]["p50"] > 0
        assert variant["curves"]["eval"][0]["supervised_tokens"] == 0
        assert len(variant["curves"]["train"]) == 6
        assert variant["command"].startswith("halfbyte train --model ")
    precision = [v["precision"] for v in report["variants"]]
    assert precision == ["float32", "nf4"]
    by_metric = {c["metric"]: c for c in report["comparisons"]}
    assert by_metric["eval_loss"]["paired_by"] == "seed and row"
    assert by_metric["seconds"]["paired_by"] == "seed"
    levels = [level["loss"] for level in report["convergence"]]
    assert levels == sorted(levels, reverse=True)
    assert report["settings"]["supervised_tokens"] == report["variants"][0]["curves"]["train"][-1]["supervised_tokens"]


def test_every_cell_is_an_ordinary_run_in_a_process_of_its_own(whole: Comparison) -> None:
    assert whole.report is not None
    started = set()
    for cell in whole.report["cells"]:
        path = whole.path / cell["path"]
        config, _ = read_config(path)
        assert config.seed == cell["seed"]
        assert config.eval_seed == 42
        assert not list(path.glob("checkpoint-*"))
        assert (path / "adapter_model.safetensors").is_file()
        began = read_events(path / "events.jsonl")[0]
        started.add(began["pid"])
        assert began["pid"] != os.getpid()
    assert len(started) == 4


def test_the_report_is_a_function_of_the_files(whole: Comparison, tmp_path: Path) -> None:
    assert report_data.build(whole.path) == whole.report
    small = tmp_path / "small"
    for file in whole.path.rglob("*"):
        if file.name in SMALL or file.name == "comparison.json":
            out = small / file.relative_to(whole.path)
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out)
    assert report_data.build(small) == whole.report


def test_finished_cells_are_never_run_twice(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    events = Events()
    again = compare(request_of(model_folder, data_file, copy), events)
    assert events.begun == []
    assert again.report is not None
    assert whole.report is not None
    assert again.report == {**whole.report, "command": again.report["command"]}


def test_stopped_in_the_middle_there_is_a_report_of_what_is_finished(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    assert whole.report is not None
    last = whole.report["cells"][-1]
    shutil.rmtree(copy / last["path"])

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "cell" and event["status"] == "train":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command goes on"):
        compare(request_of(model_folder, data_file, copy), stop)
    report = json.loads((copy / "report.json").read_text())
    assert [cell["status"] for cell in report["cells"]] == ["done", "done", "done", "missing"]
    assert any("1 runs are missing" in warning for warning in report["warnings"])
    assert "1 runs are missing" in (copy / "report.html").read_text()


def test_a_run_that_ran_short_of_memory_is_told(whole: Comparison, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    assert whole.report is not None
    cell = whole.report["cells"][0]
    result = json.loads((copy / cell["path"] / "result.json").read_text())
    assert not any(result["layout"].values())
    result["layout"]["halvings"] = 1
    (copy / cell["path"] / "result.json").write_text(json.dumps(result))
    (told,) = (w for w in report_data.build(copy)["warnings"] if "memory ran short" in w)
    assert told.startswith(f"{cell['variant']}, seed {cell['seed']}: ")
    assert not any("memory ran short" in warning for warning in whole.report["warnings"])


def test_other_work_beside_a_run_is_told(whole: Comparison, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    assert whole.report is not None
    for number, cell in enumerate(whole.report["cells"]):
        file = copy / cell["path"] / CELL
        said = json.loads(file.read_text())
        assert 0 <= said["others_share"] <= 1
        file.write_text(json.dumps(said | {"others_share": 0.0 if number else 0.4}))
    report = report_data.build(copy)
    assert [cell["others_share"] for cell in report["cells"]] == [0.4, 0.0, 0.0, 0.0]
    (told,) = (warning for warning in report["warnings"] if "Other work" in warning)
    assert told == (
        "Other work took up to 40% of the processor beside 1 of 4 runs: their times are of a shared machine."
    )


@pytest.mark.slow
def test_half_removed_cells_and_moved_rows_are_no_dead_end(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """Killed while a cell was removed, and another one was begun where the rows lay before."""
    assert whole.report is not None
    copy, moved = tmp_path / "copy", tmp_path / "moved" / data_file.name
    shutil.copytree(whole.path, copy)
    moved.parent.mkdir()
    shutil.copyfile(data_file, moved)
    first, second = (copy / cell["path"] for cell in whole.report["cells"][:2])
    (first / "run.yaml").unlink()
    (second / "result.json").unlink()
    text = (second / "run.yaml").read_text()
    assert str(data_file) in text
    (second / "run.yaml").write_text(text.replace(str(data_file), str(tmp_path / "gone" / data_file.name)))
    events = Events()
    again = compare(request_of(model_folder, moved, copy), events)
    assert again.failed == {}
    assert events.begun == [("lora", "train"), ("qlora", "train")]
    assert losses(again.report) == losses(whole.report)


@pytest.mark.slow
def test_one_more_method_runs_only_its_own_cells(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    events = Events()
    more = compare(request_of(model_folder, data_file, copy, methods="lora,full", seeds=1), events)
    assert events.begun == [("full", "train")]
    assert more.report is not None
    assert [v["against_full"] is None for v in more.report["variants"]] == [False, True]
    assert more.report["variants"][1]["figures"]["adapter_bytes"] is None
    assert "One seed" in " ".join(more.report["warnings"])
    full = next(cell for cell in more.report["cells"] if cell["variant"] == "full")
    assert not list((copy / full["path"]).glob("model*.safetensors"))
    assert json.loads((copy / full["path"] / CELL).read_text())["weight_bytes"] > 1000


def test_runs_of_elsewhere_are_accepted_and_named(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """The same runs, brought as their small files: one of this machine, and two of others, that say so: another
    processor, and the same one with more cores."""
    assert whole.report is not None
    brought = tmp_path / "brought"
    for number, cell in enumerate(whole.report["cells"]):
        out = brought / f"run-{number}"
        out.mkdir(parents=True)
        for name in SMALL:
            if (whole.path / cell["path"] / name).is_file():
                shutil.copyfile(whole.path / cell["path"] / name, out / name)
    said = json.loads((brought / "run-1" / CELL).read_text())
    said["machine"]["processor"] = "Some Other Processor"
    (brought / "run-1" / CELL).write_text(json.dumps(said))
    said = json.loads((brought / "run-2" / CELL).read_text())
    here = dict(said["machine"])
    said["machine"]["cores"] += 62
    (brought / "run-2" / CELL).write_text(json.dumps(said))
    (brought / "run-0" / CELL).unlink()  # as `halfbyte train` leaves it
    shutil.rmtree(brought / "run-3")
    request = request_of(model_folder, data_file, tmp_path / "new", accept=(brought,))
    events = Events()
    compare(request, events, dry_run=True)
    assert (events[0]["finished"], events[0]["accepted"]) == (0, 3)
    assert not (tmp_path / "new").exists()
    events = Events()
    made = compare(request, events)
    assert events.begun == [("qlora", "train")]
    assert made.report is not None
    origins = [cell["origin"] for cell in made.report["cells"]]
    assert [origin.partition(", ")[0] for origin in origins] == [
        "an earlier run", "another machine: Some Other Processor", "another machine: " + here["processor"],
        "this comparison",
    ]  # fmt: skip
    assert f"{here['cores'] + 62} cores" in origins[2]
    assert any("another machine" in warning for warning in made.report["warnings"])
    kept = [v["figures"]["eval_loss"] for v in made.report["variants"]]
    assert kept == [v["figures"]["eval_loss"] for v in whole.report["variants"]]


def test_a_run_that_is_another_is_not_accepted(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    from halfbyte.compare import cells as cell_files
    from halfbyte.compare.design import make_design

    design = make_design(request_of(model_folder, data_file, tmp_path / "x", lora_r=8), {})
    found = cell_files.accept([whole.path], tmp_path / "cells", design.cells(), {"processor": "any"})
    assert found.taken == {}
    assert any("lora_r 4, not 8" in note for note in found.notes)
    damaged = tmp_path / "damaged"
    shutil.copytree(whole.path, damaged)
    for result in damaged.rglob("result.json"):
        result.write_text(result.read_text()[:100])
    design = make_design(request_of(model_folder, data_file, tmp_path / "x"), {})
    found = cell_files.accept([damaged], tmp_path / "cells", design.cells(), {"processor": "any"})
    assert found.taken == {}
    extended = tmp_path / "extended"
    shutil.copytree(whole.path, extended)
    for events in extended.rglob("events.jsonl"):
        first, *rest = events.read_text().splitlines(keepends=True)
        begun = json.loads(first) | {"event": "resume", "step": 3, "total_steps": 4}
        events.write_text("".join([first, *rest[:-1], json.dumps(begun) + "\n", rest[-1]]))
    found = cell_files.accept([extended], tmp_path / "cells", design.cells(), {"processor": "any"})
    assert found.taken == {}
    assert any("for another number of updates than it was begun with" in note for note in found.notes)
    halves = [replace(cell, config=cell.config.replace(dtype="bfloat16")) for cell in design.cells()]
    found = cell_files.accept([whole.path], tmp_path / "cells", halves, {"processor": "any"})
    assert found.taken == {}
    assert any("dtype float32, not bfloat16" in note for note in found.notes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no finished run is there"):
        cell_files.accept([tmp_path / "empty"], tmp_path / "cells", design.cells(), {"processor": "any"})
    with pytest.raises(UsageError, match="no such folder"):
        cell_files.accept([tmp_path / "missing"], tmp_path / "cells", design.cells(), {"processor": "any"})


@pytest.mark.slow
def test_what_fails_is_said_and_the_rest_is_reported(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """A learning rate at which training breaks: its cell fails, the other's report is made, the exit code tells."""
    variants = ({"method": "lora"}, {"name": "broken", "method": "lora", "learning_rate": 1e15, "max_grad_norm": 0})
    events = Events()
    made = compare(request_of(model_folder, data_file, tmp_path / "c", methods=(), variants=variants, seeds=1), events)
    assert made.exit_code == 1
    assert made.report is not None
    assert [cell["status"] for cell in made.report["cells"]] == ["done", "failed"]
    assert any("broken, seed 42 failed" in warning for warning in made.report["warnings"])
    assert made.report["sentence"].startswith("Only lora has finished runs")
    assert len([1 for name, _ in events.begun if name == "broken"]) == 2  # begun once, failed once


@pytest.mark.slow
def test_a_run_whose_metric_fails_is_still_a_run(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    metric = tmp_path / "mine.py"
    metric.write_text("def odd(prediction, reference):\n    raise ValueError('no')\n")
    request = request_of(model_folder, data_file, tmp_path / "c", seeds=1, metrics=f"{metric}:odd", max_new_tokens=2)
    made = compare(request)
    assert made.exit_code == 1
    report = made.report
    assert report is not None
    assert [cell["status"] for cell in report["cells"]] == ["done", "done"]
    assert all(variant["figures"]["eval_loss"]["n"] == 1 for variant in report["variants"])
    assert any("lora, seed 42 is not measured whole: metric" in warning for warning in report["warnings"])
    assert any(c["metric"] == "seconds" for c in report["comparisons"])
    metric.write_text("def odd(prediction, reference):\n    return 1.0\n")
    events = Events()
    again = compare(request, events)
    assert again.exit_code == 0
    assert {status for _, status in events.begun} == {"metrics", "base"}
    assert again.report is not None
    assert again.report["metrics"][0]["key"] == "odd"
    fewer = request_of(model_folder, data_file, tmp_path / "c", seeds=1, metrics=f"{metric}:odd", max_new_tokens=1)
    events = Events()
    compare(fewer, events)
    assert {status for _, status in events.begun} == {"metrics", "base"}  # shorter answers are others


@pytest.mark.slow
def test_a_chain_goes_on_from_the_same_seeds_adapter(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    variants = (
        {"name": "half", "method": "qlora", "max_steps": 3, "only_a_start": True},
        {"name": "switch", "method": "lora", "max_steps": 3, "continue_from": "half"},
    )
    made = compare(
        request_of(model_folder, data_file, tmp_path / "c", methods="lora", variants=variants, seeds=1, max_steps=6)
    )
    report = made.report
    assert report is not None
    assert made.failed == {}
    assert [v["key"] for v in report["variants"]] == ["lora", "switch"]
    straight, switch = (v["curves"]["train"] for v in report["variants"])
    assert len(straight) == len(switch) == 6
    assert switch[-1]["supervised_tokens"] == straight[-1]["supervised_tokens"]
    cell = next(c for c in report["cells"] if c["variant"] == "switch")
    config, _ = read_config(made.path / cell["path"])
    assert config.adapter_path is not None
    assert Path(config.adapter_path).parent == (made.path / "cells").resolve()
    events = Events()
    again = request_of(model_folder, data_file, tmp_path / "c", methods="lora", variants=variants, seeds=1, max_steps=6)
    assert losses(compare(again, events).report) == losses(report)
    assert events.begun == []
    shutil.rmtree(made.path / cell["path"])  # what it goes on from is finished already
    assert losses(compare(again, events).report) == losses(report)
    assert events.begun == [("switch", "train")]
    # Its small files are all that a packed run keeps: none of it can be gone on from.
    half = Path(config.adapter_path)
    (half / "adapter_model.safetensors").unlink()
    shutil.rmtree(made.path / cell["path"])
    more = request_of(
        model_folder, data_file, tmp_path / "new", methods="lora", variants=variants, seeds=1, max_steps=6,
        accept=(made.path,),
    )  # fmt: skip
    planned: list[Any] = []
    compare(more, planned.append, dry_run=True)
    assert planned[0]["accepted"] == 1
    events = Events()
    assert losses(compare(more, events).report)[0] == losses(report)[0]
    assert sorted(events.begun) == [("half", "train"), ("switch", "train")]
    events = Events()
    assert losses(compare(again, events).report) == losses(report)  # what is here already is no dead end either
    assert sorted(events.begun) == [("half", "train"), ("switch", "train")]
    assert half.with_name(f"{half.name}.set-aside-1").is_dir()


@pytest.mark.slow
def test_the_search_for_learning_rates(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    request = request_of(
        model_folder, data_file, tmp_path / "c", tune_lr=True, tune_multiples=(1e-4, 1e-3), tune_steps=3, seeds=1
    )
    events = Events()
    made = compare(request, events)
    report = made.report
    assert report is not None
    # Each end was the best: from 1e-6 and 1e-5 on to 1e-4 and 1e-3, and no further.
    tuned = report["settings"]["tune_lr"]
    assert tuned["grid"] == {key: pytest.approx([1e-6, 1e-5, 1e-4, 1e-3]) for key in ("lora", "qlora")}
    assert tuned["chosen"] == {"lora": pytest.approx(1e-3), "qlora": pytest.approx(1e-3)}
    assert [v["learning_rate"] for v in report["variants"]] == pytest.approx([1e-3, 1e-3])
    assert any("at an end of its grid" in note for note in report["notes"])
    assert len(events.begun) == 10
    # A packed search is a search: whoever accepts it searches nothing again.
    pack(made.path, tmp_path / "packed")
    elsewhere = request_of(
        model_folder, data_file, tmp_path / "new", tune_lr=True, tune_multiples=(1e-4, 1e-3), tune_steps=3, seeds=1,
        accept=(tmp_path / "packed",),
    )  # fmt: skip
    accepting = Events()
    assert losses(compare(elsewhere, accepting).report)[0] == losses(report)[0]
    assert accepting.begun == []
    # What is planned next time knows the searched rates, and with them which runs are there.
    planned: list[Any] = []
    compare(request, planned.append, dry_run=True)
    assert planned[0]["finished"] == 2
    assert (planned[0]["left"], planned[0]["seconds_left"]) == (0, 0)
    shutil.rmtree(made.path / next(c["path"] for c in report["cells"] if c["variant"] == "lora"))
    more = request_of(
        model_folder, data_file, tmp_path / "c", tune_lr=True, tune_multiples=(1e-4, 1e-3), tune_steps=3, seeds=1,
        methods="lora,qlora,dora",
    )  # fmt: skip
    compare(more, planned.append, dry_run=True)
    assert planned[1]["finished"] == 1
    lora, dora = (planned[1]["design"].variant(key).plan["seconds"]["p50"] for key in ("lora", "dora"))
    assert planned[1]["seconds_left"] == pytest.approx(lora + dora * (1 + 2 * 3 / 6))


@pytest.mark.slow
def test_metrics_merges_and_prices(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    made = compare(
        request_of(
            model_folder, data_file, tmp_path / "c", methods="full,qlora", seeds=1, metrics="token_f1", metric_rows=4,
            max_new_tokens=4, merge_loss=True, price="0.5 EUR/h",
        )
    )  # fmt: skip
    report = made.report
    assert report is not None
    assert made.failed == {}
    assert report["metrics"][0]["key"] == "token_f1"
    full, qlora = (v["figures"] for v in report["variants"])
    for cell in (made.path / "cells").iterdir():
        answered = read_rows(cell / "metric_rows.jsonl")  # their loss is the run's own, not computed again
        assert [row.nll for row in answered] == [row.nll for row in read_rows(cell / "eval_rows.jsonl")[:4]]
    assert 0 <= qlora["token_f1"]["mean"] <= 1
    assert full["merge_loss"] is None
    assert qlora["merge_loss"]["mean"] == pytest.approx(qlora["eval_loss"]["mean"], rel=0.05)
    assert qlora["cost"]["mean"] == pytest.approx(qlora["seconds"]["mean"] / 3600 * 0.5)
    assert report["plan"]["cost"]["currency"] == "EUR"
    assert report["baselines"]["token_f1"]["base"] is not None
    assert not list((made.path / "cells").glob(".*"))


@pytest.mark.slow
def test_side_by_side(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    report = compare(request_of(model_folder, data_file, tmp_path / "c", jobs=2, seeds=1, max_steps=300)).report
    assert report is not None
    assert report["settings"]["side_by_side"]
    assert any("side by side" in warning for warning in report["warnings"])
    runs = [read_events(tmp_path / "c" / cell["path"] / "events.jsonl") for cell in report["cells"]]
    assert [[event["event"] for event in (events[0], events[-1])] for events in runs] == [["start", "end"]] * 2
    first, second = ((events[0]["time"], events[-1]["time"]) for events in runs)
    assert max(first[0], second[0]) < min(first[1], second[1])


def test_a_dry_run_writes_nothing(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    events = Events()
    made = compare(request_of(model_folder, data_file, tmp_path / "c", price="1 USD/h"), events, dry_run=True)
    assert made.report is None
    assert made.plan["seconds"]["p50"] > 0
    assert made.plan["cost"]["amount"] == pytest.approx(made.plan["seconds"]["p50"] / 3600, rel=0.01)
    assert not (tmp_path / "c").exists()
    assert [event["event"] for event in events] == ["planned"]


def test_what_cannot_be_measured_is_refused_before_anything_is_run(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    for changes, message in (
        ({"metrics": "exact_mach"}, "unknown metric 'exact_mach'"),
        ({"metrics": "pass@1"}, "--allow-code-execution"),
        ({"metrics": "pass@1", "allow_code_execution": True}, "rows with tests"),
        ({"metrics": "accuracy"}, "rows with labels"),
        ({"quality": "exact_match"}, "choose from eval_loss"),
        ({"quality": "token_fl", "metrics": "token_f1"}, "choose from eval_loss, token_f1"),
    ):
        with pytest.raises(UsageError, match=message):
            compare(request_of(model_folder, data_file, tmp_path / "c", **changes), dry_run=True)
    assert compare(request_of(model_folder, data_file, tmp_path / "c", quality="eval_loss"), dry_run=True).plan


def test_one_variant_that_fits_is_nothing_to_compare(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """Hours of one method, and no comparison: that is said before, and not where the other's runs are there already."""
    from halfbyte.compare.compare import _require_two
    from halfbyte.compare.design import make_design

    design = make_design(request_of(model_folder, data_file, tmp_path / "c"), {})
    lora, qlora = design.variants
    design = replace(design, variants=(replace(lora, skipped="it needs 9 GB"), qlora))
    with pytest.raises(
        DoesNotFit, match="only qlora fits, and there is nothing to compare it with: lora: it needs 9 GB"
    ):
        _require_two(design, ())
    assert [cell.variant for cell in design.cells()] == ["qlora", "qlora"]
    _require_two(design, [design.cells(skipped=True)[0].id])


def test_rates_are_searched_as_often_for_all_and_on_a_seed_of_their_own(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """A rate that suits one of the comparison's own seeds would favour it; more seeds later search nothing again."""
    from halfbyte.compare.design import make_design
    from halfbyte.compare.tune import search_of

    searches = []
    for seeds in (2, 3):
        request = request_of(model_folder, data_file, tmp_path / "c", methods="full,lora", tune_lr=True, seeds=seeds)
        searches.append(search_of(make_design(request, {}), request.options))
    assert searches[0] == searches[1]
    assert [len(runs) for runs in searches[0].cells.values()] == [3, 3]
    assert {(cell.seed, cell.config.eval_seed) for cell in searches[0].all_cells()} == {(142, 42)}


def test_a_grid_goes_on_where_its_end_is_the_best(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    from halfbyte.compare.design import make_design
    from halfbyte.compare.tune import beyond, search_of

    request = request_of(model_folder, data_file, tmp_path / "c", methods="full,lora", tune_lr=True)
    design = make_design(request, {})
    search = search_of(design, request.options)
    assert search.rates == {"full": (3e-3, 1e-2, 3e-2), "lora": (3e-3, 1e-2, 3e-2)}
    assert beyond(search, design, {"full": [3.0, 1.0, 2.0], "lora": [3.0, 1.0, None]}) is None
    more = beyond(search, design, {"full": [3.0, 2.0, 1.0], "lora": [1.0, 2.0, None]})
    assert more is not None
    assert more.rates == {"full": (3e-3, 1e-2, 3e-2, 9e-2), "lora": (3e-3, 1e-2, 3e-2, 9e-4)}
    assert [cell.config.learning_rate for cell in more.cells["full"]] == [3e-3, 1e-2, 3e-2, 9e-2]
    assert more.cells["full"][:3] == search.cells["full"]
    assert beyond(search, design, {"full": [None] * 3, "lora": [3.0, 1.0, 2.0]}) is None


def test_varied_fields_are_told_as_what_they_are(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """A flag brings words, and whoever reads report.json looks for numbers."""
    from halfbyte.compare.compare import variant_as_dict
    from halfbyte.compare.design import make_design

    request = request_of(model_folder, data_file, tmp_path / "c", methods="qlora,qdora", vary={"lora_r": "4,8"})
    design = make_design(request, {})
    fields = [variant_as_dict(planned, design, request)["fields"] for planned in design.variants]
    assert fields == [{"method": method, "lora_r": r} for method in ("qlora", "qdora") for r in (4, 8)]


def test_a_variant_that_does_not_fit_is_skipped(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="no variant fits: lora: lora needs"):
        compare(request_of(model_folder, data_file, tmp_path / "c", memory="1MB"))
    assert not (tmp_path / "c").exists()


def test_what_is_no_comparison_is_refused(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("")
    with pytest.raises(UsageError, match="holds no comparison"):
        compare(request_of(model_folder, data_file, other))
    with pytest.raises(UsageError, match="another number of supervised tokens"):
        compare(request_of(model_folder, data_file, tmp_path / "c", methods="lora", vary={"max_steps": (3, 6)}))
    with pytest.raises(UsageError, match="learns from other rows"):
        compare(request_of(model_folder, data_file, tmp_path / "c", methods="lora", vary={"max_seq_length": (12, 64)}))
    with pytest.raises(UsageError, match="no rows are held out"):
        compare(request_of(model_folder, data_file, tmp_path / "c", eval_split=0))
    made = compare(
        request_of(model_folder, data_file, tmp_path / "c", methods="lora", vary={"max_steps": (3, 6)}, unequal=True),
        dry_run=True,
    )
    assert made.plan["variants"] == ["lora-max-steps-3", "lora-max-steps-6"]


def test_the_report_of_another_model_or_of_other_rows_is_not_overwritten(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    changed, renamed = tmp_path / model_folder.name, tmp_path / "another-model"
    for folder in (changed, renamed):
        shutil.copytree(model_folder, folder)
        tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
        save_file(
            {name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    more = write_rows(tmp_path / "more.jsonl", rows(61))
    for model, data, message in (
        (renamed, data_file, f"{model_folder.name}, and another-model is another model"),
        (changed, data_file, f"{model_folder.name} with other weights than it has now"),
        (model_folder, more, rf"other rows \({data_file.name}: .*\)"),
    ):
        for dry_run in (True, False):
            with pytest.raises(UsageError, match=f"{copy} holds a comparison of {message}: choose another output"):
                compare(request_of(model, data, copy), dry_run=dry_run)
    assert report_data.build(copy) == whole.report
    longer = request_of(
        model_folder, data_file, copy, methods="lora", vary={"max_seq_length": (12, 64)}, unequal=True
    )  # fmt: skip
    assert compare(longer, dry_run=True).plan  # one variant is new, the other one's rows are the report's
    for cell in copy.glob(f"cells/*/{CELL}"):
        cell.unlink()
    assert compare(request_of(renamed, more, copy), dry_run=True).plan  # begun, and nothing of it finished


def test_grids_leave_out_what_is_the_same_run(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    from halfbyte.compare.design import make_design

    request = request_of(model_folder, data_file, tmp_path / "c", methods="full,lora", vary={"lora_r": (4, 8)})
    design = make_design(request, {})
    assert [planned.key for planned in design.variants] == ["full-r4", "lora-r4", "lora-r8"]
    assert design.notes == ("full-r8 is the same run as full-r4 and is left out.",)


def test_what_equal_variants_leave_over_is_told(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    from halfbyte.compare.design import make_design

    def design(**changes: Any) -> Any:
        return make_design(request_of(model_folder, data_file, tmp_path / "c", **changes), {})

    with pytest.raises(UsageError, match="one variant is nothing to compare: full-r8 is the same run as full-r4"):
        design(methods="full", vary={"lora_r": (4, 8)})
    half = {"name": "half", "method": "qlora", "only_a_start": True}
    switch = {"name": "switch", "method": "lora", "continue_from": "half"}
    with pytest.raises(UsageError, match="switch: continue_from half, which is the same run as another variant"):
        design(methods="qlora,lora", variants=[half, switch], unequal=True)
    start, twin = {**half, "name": "a"}, {"name": "b", "method": "qlora"}
    with pytest.raises(UsageError, match="b is the same run as a, which is only a start"):
        design(methods="", variants=[start, twin, {"name": "c", "method": "lora"}])


def test_the_adapter_that_a_variant_goes_on_from_brings_its_dropout(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """As a run does, so that the finished run is recognized as the cell's."""
    from halfbyte.compare.design import make_design

    half = {"name": "half", "method": "qlora", "only_a_start": True, "lora_dropout": 0.1}
    switch = {"name": "switch", "method": "lora", "continue_from": "half"}
    request = request_of(model_folder, data_file, tmp_path / "c", variants=[half, switch], unequal=True)
    assert make_design(request, {}).variant("switch").config.lora_dropout == 0.1


def test_a_finished_run_that_is_another_now_is_kept_aside(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    assert whole.report is not None
    cell = whole.report["cells"][0]
    path = copy / cell["path"]
    (path / "run.yaml").write_text((path / "run.yaml").read_text().replace("max_steps: 6", "max_steps: 9"))
    events = Events()
    made = compare(request_of(model_folder, data_file, copy), events)
    assert events.begun == [(cell["variant"], "train")]
    (told,) = (event["message"] for event in events if event["event"] == "note")
    assert "set-aside-1" in told
    assert "max_steps" in told
    assert (path.with_name(f"{path.name}.set-aside-1") / "adapter_model.safetensors").is_file()
    assert made.report is not None
    assert losses(made.report) == losses(whole.report)


@pytest.mark.slow
def test_rows_that_change_while_it_runs_end_the_cells_and_not_in_a_circle(model_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(60))
    begun = []

    def grow(event: dict[str, Any]) -> None:
        if event["event"] == "cell" and event["status"] == "train":
            begun.append(event["cell"].id)
            write_rows(data, rows(61))

    made = compare(request_of(model_folder, data, tmp_path / "c", seeds=1), grow)
    assert len(begun) == len(made.failed) == 2
    assert all("rows, model or run.yaml were changed" in message for message in made.failed.values())


def test_a_mistyped_folder_costs_a_finished_comparison_nothing(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    with pytest.raises(UsageError, match="no such folder"):
        compare(request_of(model_folder, data_file, copy, accept=(tmp_path / "typo",)))
    assert report_data.build(copy) == whole.report


def test_accepting_again_tells_the_same(whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    from halfbyte.compare import cells as cell_files
    from halfbyte.compare.design import make_design

    design = make_design(request_of(model_folder, data_file, tmp_path / "x", methods="lora,full"), {})
    found = [
        cell_files.accept([whole.path], tmp_path / "cells", design.cells(), {"processor": "any"}) for _ in range(2)
    ]
    assert [len(one.taken) for one in found] == [2, 0]
    assert found[0].notes == found[1].notes
    assert len(found[0].notes) == 2
    others = make_design(request_of(model_folder, data_file, tmp_path / "x"), {}).cells()
    quiet = cell_files.accept([whole.path], tmp_path / "cells", design.cells(), {"processor": "any"}, others)
    assert quiet.notes == ()


STEPS = 80
"""Updates of a run that is to be killed in the middle."""


def command(model: Path, data: Path, out: Path, steps: int = STEPS) -> list[str]:
    words = ["compare", "-m", str(model), "-d", str(data), "-o", str(out), "--methods", "lora,qlora", "--seeds", "2"]
    words += ["--lora-r", "4", "--eval-split", "0.2", "--dtype", "float32", "--learning-rate", "0.01"]
    words += ["--max-seq-length", "64", "--max-steps", str(steps), "--eval-steps", "20", "--save-steps", "7"]
    return [sys.executable, "-m", "halfbyte", *words]


def workers(out: Path) -> list[int]:
    """Processes that write a run below `out`."""
    import psutil

    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(str(out) in word for word in process.info["cmdline"] or []) and process.pid != os.getpid():
            found.append(process.pid)
    return found


def training(out: Path, updates: int, started: subprocess.Popen[bytes]) -> int | None:
    """The worker in the middle of a run, once all runs together have made that many updates; None: all has ended."""
    deadline = time.monotonic() + 120
    while started.poll() is None:
        runs = [read_events(file) for file in out.glob("cells/*/events.jsonl")]
        made = sum(event["event"] == "step" for events in runs for event in events)
        begun = {e["pid"] for events in runs if events and events[-1]["event"] != "end"
                 for e in events if e["event"] in ("start", "resume")}  # fmt: skip
        at_work = begun & set(workers(out / "logs"))
        if made >= updates and at_work:
            return int(at_work.pop())
        assert time.monotonic() < deadline, f"no worker came to {updates} updates"
        time.sleep(0.02)
    return None


def kill_worker(pid: int, out: Path) -> Path | None:
    """The run that a worker was killed in; None: it had just come to its end."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return None
    for file in out.glob("cells/*/events.jsonl"):
        events = read_events(file)
        if any(event.get("pid") == pid for event in events) and events[-1]["event"] != "end":
            return file
    return None


@pytest.mark.slow
def test_killed_at_random_points_it_gives_the_same_report(model_folder: Path, tmp_path: Path) -> None:
    """kill -9 of the comparison or of its worker, again and again; what comes out is bit for bit the same losses.

    The points are counted in updates, so that they are in the middle of runs on any machine.
    """
    import random

    data = write_rows(tmp_path / "rows.jsonl", rows(60))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(command(model_folder, data, straight), check=True, capture_output=True)
    random.seed(5)
    # None is any time of the start. Each point is beyond the first checkpoint of its run and well before the end.
    points = [None, *sorted(cell * STEPS + random.randint(10, STEPS // 2) for cell in range(4))]
    hit = []
    for number, point in enumerate(points):
        started = subprocess.Popen(command(model_folder, data, killed), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        worker = None if point is None else training(killed, point, started)
        if worker is not None and number % 2:
            hit.append(kill_worker(worker, killed))
            time.sleep(0.5)  # it is started once more, by a comparison that is killed, too
        else:
            time.sleep(random.uniform(0.0, 3.0 if point is None else 1.0))
        started.kill()
        started.wait()
    subprocess.run(command(model_folder, data, killed), check=True, capture_output=True)
    runs_hit = {file for file in hit if file is not None}
    assert runs_hit
    for file in runs_hit:
        assert "resume" in [event["event"] for event in read_events(file)]
    reports = [json.loads((out / "report.json").read_text()) for out in (straight, killed)]
    assert losses(reports[0]) == losses(reports[1])
    for cell in reports[1]["cells"]:
        steps = [e["step"] for e in read_events(killed / cell["path"] / "events.jsonl") if e["event"] == "step"]
        assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_comparison_saves_and_says_how_to_go_on(
    model_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl", rows(60)), tmp_path / "c"
    started = subprocess.Popen(
        command(model_folder, data, out, steps=4000), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(out.glob("cells/*/events.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    started.send_signal(number)
    _, said = started.communicate(timeout=60)
    assert started.returncode == Interrupted.exit_code, said
    assert "everything is saved: the same command goes on" in said
    (events,) = out.glob("cells/*/events.jsonl")
    ended = read_events(events)[-1]
    assert (ended["event"], ended["status"]) == ("end", "interrupted")
    assert workers(out / "logs") == []
    assert not (out / "compare.lock").exists()


@pytest.mark.slow
def test_a_killed_comparisons_worker_saves_and_leaves(model_folder: Path, tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl", rows(60)), tmp_path / "c"
    started = subprocess.Popen(command(model_folder, data, out, steps=4000), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(out.glob("cells/*/events.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    started.kill()
    started.wait()
    while workers(out / "logs") and time.monotonic() < deadline:
        time.sleep(0.1)
    (events,) = out.glob("cells/*/events.jsonl")
    assert read_events(events)[-1]["status"] == "interrupted"


def test_two_comparisons_do_not_write_one_folder(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    from halfbyte.train.lock import Lock

    copy = tmp_path / "copy"
    shutil.copytree(whole.path, copy)
    with Lock(copy / "compare.lock"), pytest.raises(UsageError, match="is being written by process"):
        compare(request_of(model_folder, data_file, copy))
