"""The history: kept through whatever may be wrong with its file, by several processes, and nothing of anybody in it."""

import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.plan import arithmetic, calibration, history, refit
from halfbyte.plan.history import Run


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_HISTORY", "1")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "halfbyte" / "history.sqlite"


def made(memory: float = 1.0, time: float = 1.0, probe: float | None = None, **changes: Any) -> Run:
    """A run that took so many times the 2 GB and the 100 s that were predicted."""
    run = Run(
        finished="2026-11-22T12:00:00Z", machine="m1", device="cpu", backend="native", halfbyte="0.1.0",
        arithmetic=arithmetic.version(), family="gemma3_text", parameters=268_098_176,
        trainable_parameters=3_796_992, method_name="qlora", dtype="bfloat16", quant="nf4", rank=16, optim="adamw",
        rows_at_once=4, longest=512, checkpointing=False, steps=60, tokens=90_000,
        predicted_bytes=2e9, said_bytes_p50=2e9, said_bytes_p95=2.45e9, measured_bytes=2e9 * memory,
        predicted_seconds=100.0, said_seconds_p50=100.0, said_seconds_p95=160.0,
        probed_seconds=None if probe is None else 100.0 * time / probe, measured_seconds=100.0 * time,
        phases={"measured": {"seconds": {"train": 90.0}}},
    )  # fmt: skip
    return replace(run, **changes)


def test_what_is_kept_is_read_again(file: Path) -> None:
    first, second = made(probe=1.1), made(1.2, resumed=True, quant=None, rank=None, machine="m2")
    assert history.runs() == []
    assert history.keep(first) is None
    assert history.keep(second) is None
    assert history.runs() == [second, first]
    assert history.runs(machine="m1", device="cpu") == [first]
    assert history.runs(machine="m1", device="cuda") == []
    assert history.runs(last=1) == [second]
    if os.name == "posix":
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_the_file_is_where_users_data_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_DATA_HOME")
    places = {"linux": ".local/share", "darwin": "Library/Application Support", "win32": "AppData/Local"}
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for platform, place in places.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert history.path() == tmp_path / place / "halfbyte" / "history.sqlite"


@pytest.mark.parametrize("value", ["0", "off", "No", " false "])
def test_switched_off_nothing_is_written_or_read(file: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    assert history.keep(made()) is None
    monkeypatch.setenv("HALFBYTE_HISTORY", value)
    before = file.read_bytes()
    assert history.keep(made()) is None
    assert file.read_bytes() == before
    assert history.runs() == []
    assert history.calibration("m1", "cpu") is None
    file.unlink()
    assert history.keep(made()) is None
    assert not file.exists()


# -- a file that cannot be used: a sentence, never an exception -------------------------------------------------------


def refused(words: str) -> None:
    problem = history.keep(made())
    assert problem is not None
    assert words in problem
    assert "\n" not in problem
    assert history.runs() == []
    assert history.calibration("m1", "cpu") is None
    assert history.accuracy("m1", "cpu")["runs"] == 0


@pytest.mark.parametrize(
    "content", [b"this is no database, but it is longer than a header of one is " * 40, b"\0" * 5000]
)
def test_a_damaged_file_is_left_alone(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    refused("delete it")
    assert file.read_bytes() == content
    file.unlink()
    assert history.keep(made()) is None
    assert len(history.runs()) == 1


def test_every_truncation_of_a_good_file_is_survived(file: Path) -> None:
    for _ in range(30):
        history.keep(made())
    whole = file.read_bytes()
    rng = random.Random(3)
    for _ in range(60):
        data = bytearray(whole[: rng.randrange(len(whole) + 1)])
        for _ in range(rng.choice((0, 1, 20))):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
        history.keep(made())
        assert all(isinstance(run, Run) for run in history.runs())
        history.calibration("m1", "cpu")
        history.accuracy("m1", "cpu")


def test_a_newer_schema_is_neither_read_nor_written(file: Path) -> None:
    history.keep(made())
    with sqlite3.connect(file) as database:
        database.execute("ALTER TABLE runs ADD COLUMN later TEXT")
        database.execute(f"PRAGMA user_version = {history.SCHEMA_VERSION + 1}")
    database.close()
    before = file.read_bytes()
    refused("newer halfbyte")
    assert file.read_bytes() == before


def test_a_table_that_is_not_ours(file: Path) -> None:
    file.parent.mkdir(parents=True)
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE runs (id INTEGER PRIMARY KEY, other TEXT)")
        database.execute("PRAGMA user_version = 1")
    database.close()
    refused("history.sqlite")


def test_rows_with_nonsense_are_passed_over(file: Path) -> None:
    for _ in range(3):
        history.keep(made())
    with sqlite3.connect(file) as database:
        database.execute("UPDATE runs SET measured_bytes = 'much' WHERE id = 1")
        database.execute("UPDATE runs SET phases = '{' WHERE id = 2")
    database.close()
    assert len(history.runs()) == 1
    with sqlite3.connect(file) as database:
        database.execute("UPDATE runs SET measured_seconds = -1, predicted_bytes = 0 WHERE id = 3")
    database.close()
    assert history.calibration("m1", "cpu") is None
    assert history.accuracy("m1", "cpu")["worst"] == {"memory": None, "time": None}


def test_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "in the way"))
    refused("in the way")
    monkeypatch.setenv("XDG_DATA_HOME", "/proc/nowhere")
    refused("/proc/nowhere")


def test_a_home_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", unknown)
    refused("home")


def test_a_read_only_file_is_read(file: Path) -> None:
    """As another user where this one is root, whom no mode stops; in a folder that everybody can reach."""
    history.keep(made())
    code = (
        "import os; from halfbyte.plan import history; from tests.plan.test_history import made\n"
        "try:\n    os.setuid(65534)\nexcept PermissionError:\n    pass\n"
        "print(len(history.runs()), history.keep(made()))"
    )
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "halfbyte"
        shutil.copytree(file.parent, folder)
        (folder / file.name).chmod(0o444)
        folder.chmod(0o555)
        Path(home).chmod(0o755)
        told = os.environ | {"XDG_DATA_HOME": home}
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=told)
        folder.chmod(0o755)
    assert found.stdout.startswith("1 this run is not in the history"), found.stdout + found.stderr


def test_a_locked_file_is_given_up_in_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history.keep(made())
    monkeypatch.setattr(history, "PATIENCE", 0.1)
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    refused("locked")
    holder.execute("ROLLBACK")
    holder.close()
    assert history.keep(made()) is None
    assert len(history.runs()) == 2


def _write_many(number: int, count: int, start: Any, problems: Any) -> None:
    start.wait()
    for step in range(count):
        problem = history.keep(made(steps=1000 * number + step))
        if problem is not None:
            problems.put(problem)
        history.runs()


def test_processes_that_write_at_once_lose_nothing(file: Path) -> None:
    """All of them make the file, too: there is none when they begin."""
    context = multiprocessing.get_context("fork")
    start, problems = context.Event(), context.Queue()
    writers = [context.Process(target=_write_many, args=(number, 15, start, problems)) for number in range(6)]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 6
    assert problems.empty()
    assert sorted(run.steps for run in history.runs()) == sorted(1000 * n + s for n in range(6) for s in range(15))


def test_old_rows_make_room(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "KEPT_RUNS", 5)
    for step in range(9):
        history.keep(made(steps=step))
    assert [run.steps for run in history.runs()] == [8, 7, 6, 5, 4]


# -- what the runs change --------------------------------------------------------------------------------------------

SHIPPED = calibration.of("cpu")


def kept(*found: Run) -> calibration.Calibration | None:
    for run in reversed(found):
        history.keep(run)
    return history.calibration("m1", "cpu")


def test_without_runs_of_this_machine_the_shipped_constants_stay() -> None:
    assert kept() is None
    assert kept(made(machine="m2"), made(device="cuda"), made(arithmetic="other")) is None
    assert kept(made(resumed=True), made(first=False, status="stopped_early")) is None
    assert kept(made(first=False, measured_seconds=history.SHORTEST - 0.1)) is None


def test_a_run_that_stepped_down_says_no_more_than_it_can() -> None:
    """It took less memory than its planned layout, and more time: that must not make the next plan bolder."""
    assert kept(made(0.6, 2.0, status=history.STEPPED_DOWN)) is None
    fitted = kept(made(1.3, 2.0, status=history.STEPPED_DOWN))
    assert fitted is not None
    assert fitted.memory_scale > SHIPPED.memory_scale, "it was more than predicted even so"
    assert fitted.time_scale == SHIPPED.time_scale


def test_one_run_moves_the_middle_a_little_and_many_almost_wholly() -> None:
    one = kept(made(1.2, 2.0))
    assert one is not None
    assert one.runs == 1
    assert one.memory_scale == pytest.approx((SHIPPED.memory_scale**5 * 1.2) ** (1 / 6))
    assert one.time_scale == pytest.approx((SHIPPED.time_scale**5 * 2.0) ** (1 / 6))
    for index in range(60):
        history.keep(made(1.2, 2.0, longest=index))
    many = history.calibration("m1", "cpu")
    assert many is not None
    assert many.memory_scale == pytest.approx(1.2, rel=0.03)
    assert many.time_scale == pytest.approx(2.0, rel=0.08)
    assert many.memory_spread < one.memory_spread <= 1.3 * SHIPPED.memory_spread + 0.05
    assert many.runs == 61
    assert many.source == "refitted on 61 runs of this machine"


def test_a_configuration_that_is_repeated_counts_three_times_at_most() -> None:
    nightly = [made(1.4, 3.0, longest=64) for _ in range(100)]
    others = [made(1.0, 1.0, longest=128 + index) for index in range(20)]
    fitted = kept(*nightly, *others)
    assert fitted is not None
    assert fitted.runs == 23
    assert fitted.memory_scale == pytest.approx(1.0, abs=0.01 + abs(SHIPPED.memory_scale - 1))


def test_one_configuration_does_not_narrow_the_interval_for_all_others() -> None:
    fitted = kept(*[made(1.0, 1.0) for _ in range(50)])
    assert fitted is not None
    assert fitted.runs == 3
    assert fitted.memory_spread >= 0.8 * SHIPPED.memory_spread
    assert fitted.time_spread >= 0.8 * SHIPPED.time_spread
    many = kept(*[made(1.0, 1.0, longest=index) for index in range(150)])
    assert many is not None
    assert SHIPPED.memory_spread / 2 <= many.memory_spread < 0.8 * SHIPPED.memory_spread
    assert SHIPPED.time_spread / 2 <= many.time_spread < 0.8 * SHIPPED.time_spread


def test_disturbed_runs_do_not_move_the_middle() -> None:
    """A quarter of the runs shared the machine and took five times as long."""
    rng = random.Random(1)
    found = [made(rng.gauss(1.05, 0.01), rng.gauss(1.5, 0.05) * (5 if i % 4 == 0 else 1), longest=i) for i in range(80)]
    fitted = kept(*found)
    assert fitted is not None
    assert fitted.memory_scale == pytest.approx(1.05, rel=0.02)
    assert fitted.time_scale == pytest.approx(1.5, rel=0.08)


@pytest.mark.parametrize("count", [1, 5, 12, 40, 150])
@pytest.mark.parametrize("seed", range(3))
def test_the_interval_holds_what_has_happened(count: int, seed: int) -> None:
    rng = random.Random(seed)
    found = [made(rng.lognormvariate(0.1, 0.06), rng.lognormvariate(0.3, 0.2), longest=i) for i in range(count)]
    fitted = kept(*found)
    assert fitted is not None
    inside = sum(fitted.memory(run.predicted_bytes).p95 >= run.measured_bytes * (1 - 1e-9) for run in found)
    assert inside >= 0.95 * count - 1e-9
    late = sum(fitted.seconds(run.predicted_seconds).p95 < run.measured_seconds * (1 - 1e-9) for run in found)
    assert late <= 0.05 * count + 1


def test_new_runs_of_a_machine_like_the_past_ones_are_inside_95_times_of_100() -> None:
    """Fitted on 40 runs, asked about 2,000 more of the same distribution."""
    shares = []
    for seed in range(10):
        rng = random.Random(seed)
        ratios = [rng.lognormvariate(0.05, 0.08) for _ in range(40)]
        values = refit.Ratios(tuple(map(refit.math.log, ratios)), tuple(map(str, range(40))))
        nothing = refit.Ratios((), ())
        fitted = refit.refit(SHIPPED, values, values, nothing, [SHIPPED.memory_margin / 2e9] * 40)
        new = [2e9 * rng.lognormvariate(0.05, 0.08) for _ in range(2000)]
        shares.append(sum(fitted.memory(2e9).p95 >= value for value in new) / len(new))
    assert sum(shares) / len(shares) >= 0.94


def test_bounds() -> None:
    wild = kept(*[made(9.0, 5000.0, probe=90.0, longest=i) for i in range(100)])
    assert wild is not None
    assert wild.memory_scale == pytest.approx(1.5 * SHIPPED.memory_scale)
    assert wild.time_scale == pytest.approx(10 * SHIPPED.time_scale)
    assert wild.memory_spread <= refit.SPREAD_BOUNDS["memory"][1]
    assert wild.time_spread <= refit.SPREAD_BOUNDS["time"][1]
    assert wild.probe_spread <= refit.SPREAD_BOUNDS["probe"][1]


def test_probed_runs_fit_their_own_interval() -> None:
    rng = random.Random(2)
    fitted = kept(*[made(1.0, rng.uniform(0.5, 2), probe=rng.gauss(1.0, 0.03), longest=i) for i in range(60)])
    assert fitted is not None
    assert fitted.probe_spread <= calibration.of("cpu").probe_spread / 2
    assert fitted.time_spread > 0.5


def test_accuracy_is_a_table_of_what_was_told() -> None:
    for index in range(20):
        history.keep(made(1.0 + index / 100, 2.0, longest=index))
    history.keep(made(0.5, 0.1, measured_seconds=10.0, method_name="full", family="qwen2", resumed=False))
    history.keep(made(8.0, 8.0, resumed=True))
    found = json.loads(json.dumps(history.accuracy("m1", "cpu")))
    assert found["runs"] == 22
    assert set(found["methods"]) == {"full", "qlora"}
    qlora = found["methods"]["qlora"]
    assert qlora["runs"] == 21
    assert qlora["memory"] == {"runs": 20, "median": pytest.approx(0.0867, abs=2e-3), "p95": 0.1525, "within": 1.0}
    assert qlora["time"] == {"runs": 20, "median": 0.5, "p95": 0.5, "within": 0.0}
    assert found["worst"]["time"]["method_name"] == "full"
    assert found["worst"]["time"]["error"] == pytest.approx(9.0)
    assert found["worst"]["memory"]["predicted"] == 2e9
    assert found["refit"]["runs"] == 21
    assert found["shipped"]["runs"] == SHIPPED.runs
    assert found["other_runs"] == 0
    assert history.accuracy("m2", "cpu")["other_runs"] == 22


def test_runs_elsewhere_are_counted_beyond_those_that_a_refit_looks_at() -> None:
    for index in range(history.LAST_RUNS + 5):
        assert history.keep(made(machine="m2" if index < history.LAST_RUNS else "m1")) is None
    assert history.accuracy("m1", "cpu")["other_runs"] == history.LAST_RUNS
    assert history.accuracy("m1", "cuda")["other_runs"] == history.LAST_RUNS + 5, "another device is another machine"
