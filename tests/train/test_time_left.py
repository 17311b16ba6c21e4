"""The time left, replayed over the logs of real runs and over simulated hostile ones.

How far off it is: |estimated - actual| time left over the actual one, or over a floor of 2 % of the run or 5 s, the
larger of both, at every event after 5 % of the run. Everything until the last file is written counts.
"""

import json
import random
import statistics
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest

from halfbyte.train.time_left import MOST_RECORDS, TimeLeft

LOGS = sorted((Path(__file__).parent / "logs").glob("*.jsonl"))
STEADY = [path for path in LOGS if not path.name.startswith("noisy-")]
NOISY = [path for path in LOGS if path.name.startswith("noisy-")]
Log = list[dict[str, Any]]


def read(path: Path) -> Log:
    return [json.loads(line) for line in path.read_text().splitlines()]


def replay(log: Log) -> list[tuple[float, float, float]]:
    """(time, estimated, actual seconds left) after every event but the last."""
    left, end = TimeLeft(), log[-1]["time"]
    found = []
    for event in log[:-1]:
        left.take(event)
        if event["event"] != "end" and left.seconds is not None:
            found.append((event["time"], left.seconds, end - event["time"]))
    return found


def errors(log: Log, after: float = 0.05) -> list[float]:
    end = log[-1]["time"]
    floor = max(0.02 * end, 5.0)
    return [abs(said - was) / max(was, floor) for time, said, was in replay(log) if time >= after * end]


def prices(log: Log) -> list[float]:
    return [event["seconds"] / event["tokens"] for event in log if event["event"] == "step"]


def test_there_are_logs_of_many_kinds() -> None:
    assert len(STEADY) >= 8
    assert len(NOISY) >= 3
    assert max(path.stat().st_size for path in LOGS) <= 60_000


@pytest.mark.parametrize("path", STEADY, ids=lambda path: path.stem)
def test_on_a_machine_that_keeps_its_speed_it_is_never_20_percent_off(path: Path) -> None:
    log = read(path)
    found, n = prices(log), len(prices(log))
    middle = statistics.median(found)
    fifths = [statistics.median(found[i * n // 5 : (i + 1) * n // 5]) / middle for i in range(5)]
    assert 0.89 < min(fifths) <= max(fifths) < 1.11, "this log is not steady"
    assert max(errors(log)) <= 0.2


def at_one_speed(log: Log) -> Log:
    """The log as a machine would have written it that keeps its speed: all times over how slow it was just then, the
    median price of the 21 step events around over that of all. What the future does to a machine is in no log."""
    found = prices(log)
    steps = [event["step"] for event in log if event["event"] == "step"]
    middle = statistics.median(found)
    slow = {step: statistics.median(found[max(0, i - 10) : i + 11]) / middle for i, step in enumerate(steps)}
    made, now, before, factor = [], 0.0, 0.0, slow[steps[0]]
    for event in log:
        factor = slow.get(event.get("step"), factor)
        now, before = now + (event["time"] - before) / factor, event["time"]
        changed = {"time": now} | ({"seconds": event["seconds"] / factor} if "seconds" in event else {})
        made.append(event | changed)
    return made


@pytest.mark.parametrize("path", NOISY, ids=lambda path: path.stem)
def test_on_a_noisy_machine_neither_once_its_changes_of_speed_are_taken_out(path: Path) -> None:
    assert max(errors(at_one_speed(read(path)))) <= 0.2


# -- simulated runs --------------------------------------------------------------------------------------------------

Seconds = Callable[[int, float], float]
"""(step, its seconds on a quiet machine) -> the seconds that it takes."""


def simulate(
    tokens: Sequence[int],
    slowed: Seconds = lambda step, seconds: seconds,
    logging_steps: int = 1,
    eval_every: int = 0,
    evaluation: float = 0.0,
    save_steps: int | None = None,
    save: float = 0.0,
    final_evaluations: int = 0,
    predicted: dict[str, Any] | None = None,
) -> Log:
    """A run at 1,000 tokens a second, whatever `slowed` does to it."""
    total = len(tokens)
    plan = {"eval_every": eval_every, "save_steps": save_steps, "save_minutes": None, "predicted": predicted}
    log: Log = [
        {"event": "start", "time": 0.0, "step": 0, "total_steps": total, "total_tokens": sum(tokens), "tokens": 0}
    ]
    log[0] |= {"final_evaluations": final_evaluations} | plan
    now, window, counted = 0.0, 0.0, 0
    for step, count in enumerate(tokens, start=1):
        seconds = slowed(step, count / 1000)
        now, window, counted = now + seconds, window + seconds, counted + count
        if step % logging_steps == 0 or step == total:
            log.append({"event": "step", "time": now, "step": step, "seconds": window, "tokens": counted})
            window, counted = 0.0, 0
        if eval_every and (step % eval_every == 0 or step == total):
            now += evaluation
            log.append({"event": "eval", "time": now, "step": step, "seconds": evaluation, "best": False})
        if save_steps and (step % save_steps == 0 or step == total):
            now += save
            log.append({"event": "checkpoint", "time": now, "step": step, "seconds": save})
    log.append({"event": "end", "time": now, "step": total})
    log.append({"event": "finished", "time": now + final_evaluations * evaluation})
    return log


def rows(steps: int, low: int = 800, high: int = 1200, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(low, high) for _ in range(steps)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("logging_steps", [1, 10])
def test_very_unequal_lengths_and_noise(seed: int, logging_steps: int) -> None:
    """Updates of 50 to 16,000 tokens, each up to 30 % slower or faster than its tokens say."""
    rng = random.Random(seed)
    tokens = [int(50 * 320 ** rng.random()) for _ in range(600)]
    log = simulate(tokens, lambda step, seconds: seconds * rng.uniform(0.7, 1.3), logging_steps)
    assert max(errors(log)) <= 0.2


@pytest.mark.parametrize("slept_at", [1, 2, 3, 30, 150, 290])
def test_a_laptop_that_slept_for_ten_minutes_is_as_right_afterwards_as_before(slept_at: int) -> None:
    """After three updates at least: of one that took long nobody can say that it is unusual."""
    log = simulate(rows(300), lambda step, seconds: seconds + 600 * (step == slept_at))
    woke = next(event["time"] for event in log if event.get("step") == max(slept_at, 3))
    assert all(abs(said - was) <= 0.2 * max(was, 6.0) for time, said, was in replay(log) if time >= woke)


def test_what_is_slow_again_and_again_is_expected_again() -> None:
    """Every 25th update takes twenty times as long: three quarters more in all. That takes some of them to
    be known, and near the end it is all or nothing."""
    log = simulate(rows(1000), lambda step, seconds: seconds * (20 if step % 25 == 24 else 1))
    end = log[-1]["time"]
    middle = [(said, was) for time, said, was in replay(log) if 0.2 * end <= time <= 0.85 * end]
    assert max(abs(said - was) / was for said, was in middle) <= 0.2


def test_a_machine_that_is_half_as_fast_for_a_while() -> None:
    """Nobody knows how long that will last: when as much has been done since as before, the estimate is right again,
    and never is it further off than the machine's speed was."""
    log = simulate(rows(400), lambda step, seconds: seconds * (2 if 100 < step <= 140 else 1))
    over = next(event["time"] for event in log if event.get("step") == 220)
    for time, said, was in replay(log):
        assert said <= 2 * was + 3
        assert said >= 0.5 * was
        if time >= over:
            assert abs(said - was) <= 0.2 * max(was, 10.0)


def test_a_lasting_change_is_followed() -> None:
    """Half as fast from a quarter on: right again when as much has been done so as before."""
    log = simulate(rows(400), lambda step, seconds: seconds * (2 if step > 100 else 1))
    followed = next(event["time"] for event in log if event.get("step") == 200)
    assert all(abs(said - was) <= 0.2 * max(was, 14.0) for time, said, was in replay(log) if time >= followed)


def test_evaluations_checkpoints_and_the_end_are_counted_at_their_own_price() -> None:
    """Half of the run's time is not training, and most of it is late."""
    shape: dict[str, Any] = {
        "eval_every": 100,
        "evaluation": 40.0,
        "save_steps": 100,
        "save": 5.0,
        "final_evaluations": 2,
    }
    log = simulate(rows(300), **shape, predicted={"seconds": {"train": 300.0, "evaluate": 200.0}, "probed": True})
    assert max(errors(log)) <= 0.2
    measured = simulate(rows(300), **shape)
    found = {time: (said, was) for time, said, was in replay(measured)}
    after_the_first = next(event["time"] for event in measured if event["event"] == "checkpoint")
    assert all(abs(said - was) <= 0.1 * max(was, 10) for time, (said, was) in found.items() if time >= after_the_first)


def test_before_the_first_step_it_is_what_was_predicted_and_a_rehearsal_corrects_it() -> None:
    log = simulate(rows(100), predicted={"seconds": {"train": 50.0, "evaluate": 9.0, "save": 1.0}, "probed": False})
    left = TimeLeft()
    assert left.seconds is None
    left.take(log[0])
    assert left.seconds == pytest.approx(51.0)
    left.take({"event": "rehearsal", "step": 0, "predicted": {"seconds": {"train": 110.0}, "probed": True}})
    assert left.seconds == pytest.approx(110.0)
    for event in log[1:11]:
        left.take(event)
    assert left.seconds == pytest.approx(91, rel=0.1)


def test_a_wrong_prediction_is_outvoted_before_5_percent_of_the_run() -> None:
    for wrong in (0.3, 3.0):
        log = simulate(rows(400), predicted={"seconds": {"train": 400.0 * wrong}, "probed": False})
        assert max(errors(log)) <= 0.2


def test_a_resumed_run_counts_from_where_it_goes_on() -> None:
    tokens = rows(400)
    whole = simulate(tokens, eval_every=100, evaluation=10.0)
    done, first = sum(tokens[:250]), next(event["time"] for event in whole if event.get("step") == 250)
    resumed = [whole[0] | {"event": "resume", "step": 250, "tokens": done}]
    resumed += [
        e | {"time": e["time"] - first} for e in whole[1:] if e.get("step", 400) > 250 or e["event"] == "finished"
    ]
    assert max(errors(resumed)) <= 0.2
    left = TimeLeft()  # a reader who saw the first part too, and steps that were lost
    for event in [event for event in whole if event.get("step", 400) <= 270] + resumed:
        left.take(event)
        if event["event"] == "resume":
            assert left.seconds == pytest.approx(150 + 2 * 10, rel=0.1)
    assert left.seconds == 0


def test_what_was_lost_before_a_resume_is_no_further_ahead_than_behind() -> None:
    """Every tenth update is slow, the run is resumed at an early step by a reader who saw all of it."""
    tokens = [1000] * 300
    whole = simulate(tokens, lambda step, seconds: seconds * (11 if step % 10 == 5 else 1))
    left = TimeLeft()
    for event in whole[:202]:
        left.take(event)
    left.take(whole[0] | {"event": "resume", "step": 100, "tokens": 100_000})
    assert left.seconds == pytest.approx(400, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_steady(seed: int) -> None:
    """From one update to the next it changes by no more than a few percent, noise of 20 % an update or not."""
    rng = random.Random(seed)
    log = simulate(rows(500), lambda step, seconds: seconds * rng.lognormvariate(0, 0.2))
    said = [estimate for time, estimate, was in replay(log) if was > 0.1 * log[-1]["time"] and time > 20]
    assert max(abs(b / a - 1) for a, b in pairwise(said)) < 0.06


def test_long_runs_are_remembered_in_little_room() -> None:
    tokens = rows(5 * MOST_RECORDS)
    left, behind = TimeLeft(), [0, *accumulate(tokens)]
    log = simulate(tokens, lambda step, seconds: seconds * random.Random(step).uniform(0.5, 1.5))
    for event in log[:-2]:
        left.take(event)
    assert len(left._records) <= MOST_RECORDS
    assert sum(record.tokens for record in left._records) == behind[-1] - tokens[0]


def test_logs_of_older_versions_say_less_and_still_do() -> None:
    log = simulate(rows(100), eval_every=50, evaluation=5.0, final_evaluations=2)
    for name in ("eval_every", "save_steps", "save_minutes", "final_evaluations", "predicted"):
        del log[0][name]
    left = TimeLeft()
    for event in log[:-1]:
        left.take(event)
        if event["step"] == 50:
            assert left.seconds == pytest.approx(50, rel=0.1)
    assert left.seconds == 0
    without = TimeLeft()
    without.take(log[0] | {"total_tokens": None})
    assert without.seconds is None
    without.take(log[1])
    assert without.seconds == pytest.approx(99 * log[1]["seconds"])
