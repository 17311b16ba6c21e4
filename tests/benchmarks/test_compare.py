"""`make bench`: which processes run in which order, the tables from stored results, and our side end to end."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.benchmarks.conftest import BENCHMARKS


@pytest.fixture
def compare(scripts: dict[str, ModuleType]) -> Any:
    return scripts["compare"]


@pytest.fixture
def tables(scripts: dict[str, ModuleType]) -> Any:
    return scripts["comparison_table"]


ROW = {
    "model": "m",
    "batch": 2,
    "seq": 8,
    "method": "qlora",
    "dtype": "bf16",
    "checkpointing": False,
    "isa": "",
}


def record(contender: str, round_: int, speed: float, memory: float = 1e9, method: str = "qlora") -> dict[str, Any]:
    result = {
        "tokens_per_second": speed,
        "seconds_per_step": 16 / speed,
        "peak_rss_bytes": memory,
        "load_peak_rss_bytes": memory / 2,
    }
    if contender == "halfbyte":
        result |= {"gemm_share": speed / 1000, "gemm_flops": 2e12}
    return {"key": [{**ROW, "method": method}, contender, round_], "revision": "abc", "result": result}


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def cells(text: str, start: str) -> list[list[str]]:
    """The cells of every line of the tables that begins with `start`."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_tables_hold_medians_spreads_and_ratios(tables: Any, tmp_path: Path) -> None:
    records = [record("halfbyte", i, speed) for i, speed in enumerate((500, 400, 420))]
    records += [record("halfbyte", 0, 504, method="lora")]
    records += [record("loop", i, speed, memory=3e9) for i, speed in enumerate((70, 60))]
    records += [record("compile", 0, 105, memory=2.5e9), record("trl", 0, 42, memory=6e9)]
    records += [record("loop+halfbyte", 0, 1e9, memory=1)]  # no peer
    speed, memory = cells(tables.make(write(tmp_path, records)), "m 2x8 qlora bf16")
    assert speed[1:] == [
        "420 (400 to 500, 3 runs)",
        "65 (60 to 70, 2 runs)",
        "105 (1 run)",
        "42 (1 run)",
        "1000000000 (1 run)",
        "4.00",
        "10.00",
        "1.20",
        "42% of 2.00 TFLOP/s",
    ]
    assert memory[1:4] == ["1.00 (1.00 to 1.00, 3 runs)", "3.00 (3.00 to 3.00, 2 runs)", "2.50 (1 run)"]
    assert memory[6:] == ["2.50", "0.50 (0.50 to 0.50, 3 runs)"]
    lora, _ = cells(tables.make(tmp_path), "m 2x8 lora bf16")
    assert lora[6:9] == ["", "", ""]


def test_failures_are_told_until_they_succeed_and_cut_lines_are_no_results(tables: Any, tmp_path: Path) -> None:
    failed = {"key": [ROW, "trl", 0], "revision": "abc", "error": "exit 137: killed"}
    folder = write(tmp_path, [record("halfbyte", 0, 100), failed])
    assert "failed" in cells(tables.make(folder), "m 2x8 qlora bf16")[0]
    assert "- m 2x8 qlora bf16, trl: exit 137: killed" in tables.make(folder)
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(record("trl", 0, 50)) + "\n" + json.dumps(failed) + "\n" + '{"key": [')
    text = tables.make(folder)
    assert "failed" not in text
    assert cells(text, "m 2x8 qlora bf16")[0][3:5] == ["2.00", "2.00"]


def test_a_folder_without_results_says_so(tables: Any, tmp_path: Path) -> None:
    assert tables.make(tmp_path) == f"No results in {tmp_path}.\n"


def test_methods_and_contenders_take_turns(compare: Any) -> None:
    rows = [compare.parse_row(f"{model}:1x8:{method}:bf16") for model in "ab" for method in ("lora", "qlora")]
    jobs = list(compare.plan(rows, ["halfbyte", "loop", "loop+halfbyte"], 2))
    told = [(job.row.model, job.round, job.contender, job.row.method) for job in jobs]
    one_round = [("halfbyte", "lora"), ("halfbyte", "qlora"), ("loop", "lora"), ("loop", "qlora")]
    one_round += [("loop+halfbyte", "qlora")]
    assert told == [(model, round_, *turn) for model in "ab" for round_ in range(2) for turn in one_round]
    assert len({job.key for job in jobs}) == len(jobs)


def test_the_full_preset_has_every_row_in_both_methods(compare: Any) -> None:
    rows = compare.preset("full", "bf16")
    assert len(set(rows)) == len(rows) == 12
    assert {replace(row, method="") for row in rows if row.method == "lora"} == {
        replace(row, method="") for row in rows if row.method == "qlora"
    }


@pytest.mark.parametrize("text", ["m:1x8:qlora", "m:8:qlora:bf16", "m:1x8:full:bf16", "m:0x8:lora:bf16",
                                  "m:1x8:lora:fp16", "m:1x8:lora:bf16:more", ":1x8:lora:bf16"])  # fmt: skip
def test_a_malformed_row_is_refused(compare: Any, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        compare.parse_row(text)


def test_arguments_that_cannot_work_are_refused(
    compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--out", str(tmp_path), "--models", str(tmp_path)]
    for words, said in (
        ([], "--peers-python"),
        (["--contenders", "halfbyte"], "no model folder gemma-3-270m"),
        (["--contenders", "halfbyte,unsloth"], "unsloth"),
        (["--rounds", "0"], "below 1"),
        (["--isa", "sse"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            compare.parse([*base, *words])
        assert said in capsys.readouterr().err, words


def test_everybody_gets_the_same_environment(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", "portable")
    monkeypatch.setenv("HALFBYTE_BNB", "1")
    free, limited = compare.environment("", 3), compare.environment("avx2", 3)
    assert free["OMP_NUM_THREADS"] == limited["OMP_NUM_THREADS"] == "3"
    assert free["OMP_WAIT_POLICY"] == "PASSIVE"
    assert not {"HALFBYTE_ISA", "HALFBYTE_BNB", "ONEDNN_MAX_CPU_ISA"} & set(free)
    assert limited["HALFBYTE_ISA"] == "avx2"
    assert limited["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def test_the_commands_ask_both_sides_for_the_same_work(compare: Any, tmp_path: Path) -> None:
    args = argparse.Namespace(peers_python="peers", models=tmp_path, steps=4)
    row = compare.parse_row("m:2x8:qlora:fp32:ckpt")
    ours, backend = (compare.command(compare.Job(row, name, 0), args) for name in ("halfbyte", "loop+halfbyte"))
    assert ours[:3] == [sys.executable, str(BENCHMARKS / "halfbyte_step.py"), "--gemm"]
    assert backend[:6] == ["peers", str(BENCHMARKS / "peer_step.py"), "--impl", "loop", "--backend", "halfbyte"]
    assert ours[3:] == backend[6:]
    assert ours[-1] == "--checkpointing"


def arguments(compare: Any, model_folder: Path, out: Path, *more: str) -> argparse.Namespace:
    name, models = model_folder.name, str(model_folder.parent)
    words = ["--out", str(out), "--models", models, "--contenders", "halfbyte", "--steps", "1", "--threads", "1"]
    rows = [word for method in ("lora", "qlora") for word in ("--row", f"{name}:2x12:{method}:fp32")]
    result: argparse.Namespace = compare.parse([*words, *rows, "--rounds", "1", *more])
    return result


def test_our_side_end_to_end_and_again(
    compare: Any,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = arguments(compare, model_folder, tmp_path / "out")
    name = model_folder.name
    monkeypatch.setattr(compare, "parse", lambda: args)
    compare.main()
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith(f"[1/2] {name} 2x12 lora fp32 | halfbyte | round 1: ")
    assert "failed" not in printed
    speed, memory = cells(printed, f"{name} 2x12 qlora fp32")
    assert float(speed[2 + 2]) > 0
    assert "TFLOP/s" in speed[5]
    assert float(memory[1].split()[0]) > 0.05
    records = [json.loads(line) for line in (args.out / "results.jsonl").read_text().splitlines()]
    assert {r["key"][0]["method"] for r in records} == {"lora", "qlora"}
    assert all(0 < r["result"]["gemm_share"] < 1 for r in records)
    described = json.loads((args.out / "machine.json").read_text())
    assert described["versions"]["torch"]
    assert described["threads"] == 1

    compare.main()  # nothing is measured again
    assert not capsys.readouterr().out.startswith("[")
    assert len((args.out / "results.jsonl").read_text().splitlines()) == 2

    (args.out / "machine.json").write_text(json.dumps(described | {"cpu": "another"}))
    with pytest.raises(SystemExit, match="cpu changed"):
        compare.main()


def test_a_failed_process_is_recorded_and_tried_again(
    compare: Any,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = arguments(compare, model_folder, tmp_path)
    jobs = list(compare.plan(args.rows, args.contenders, 1))[:1]
    monkeypatch.setattr(compare, "command", lambda job, args: [sys.executable, "-c", "raise SystemExit('no memory')"])
    for _ in range(2):
        compare.run(jobs, args)
    assert capsys.readouterr().out.count("failed: exit 1: no memory") == 2
    monkeypatch.setattr(compare, "command", lambda job, args: [sys.executable, "-c", "import time; time.sleep(60)"])
    args.timeout = 1
    compare.run(jobs, args)
    assert "no result after 1 s" in capsys.readouterr().out
