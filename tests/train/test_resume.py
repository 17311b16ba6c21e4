"""kill -9 in real processes, at chosen and at random moments, and resume bit for bit."""

import multiprocessing
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.train import checkpoint
from halfbyte.train.events import read_events
from halfbyte.train.lock import alive

from . import tiny
from .test_loop import assert_same, steps_of

OPTIONS: dict[str, Any] = {"save_steps": 5, "eval_steps": 7, "dropout": 0.1}

# One server process imports torch once and forks a child for every life of a run.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.train.tiny"])


def start(target: Callable[..., None], *arguments: Any) -> Any:
    process = processes.Process(target=target, args=arguments)
    process.start()
    return process


def until_killed(target: Callable[..., None], *arguments: Any) -> bool:
    """Run to the end in another process; True if it was killed, False if it finished."""
    process = start(target, *arguments)
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps in one go."""
    path = tmp_path_factory.mktemp("straight") / "run"
    tiny.run(path, **OPTIONS)
    return path


def test_ten_steps_kill_and_ten_more_equal_twenty(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    assert until_killed(tiny.run_and_die, run, 13, False, OPTIONS)
    assert [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run)] == [7, 10]
    assert [event["step"] for event in steps_of(run)] == list(range(1, 14))
    assert (run / "run.lock").exists()
    assert alive(run / "run.lock") is None
    tiny.run(run, resume=True, **OPTIONS)
    assert_same(run, straight)
    (resume,) = [e for e in read_events(run / "events.jsonl") if e["event"] == "resume"]
    assert (resume["step"], resume["dropped_events"]) == (10, 3)


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_quantized_base_resumes_exactly(tmp_path: Path, threads: int) -> None:
    options = OPTIONS | {"quantized": True, "threads": threads}
    assert until_killed(tiny.run_and_die, tmp_path / "run", 13, False, options)
    assert not until_killed(tiny.run_or_resume, tmp_path / "run", options)
    assert not until_killed(tiny.run_or_resume, tmp_path / "straight", options)
    assert_same(tmp_path / "run", tmp_path / "straight")


def test_bfloat16_weights_and_eight_bit_moments_resume_exactly(tmp_path: Path) -> None:
    """Full fine-tuning of bfloat16 matrices, so that both stores of the optimizer's state are used."""
    paths = (tmp_path / "run", tmp_path / "straight")
    assert until_killed(full_and_die, paths[0], 5)
    full_tuning(paths[0], resume=True)
    full_tuning(paths[1])
    assert_same(*paths)
    state = checkpoint.load(paths[0] / "checkpoint-8").optimizer
    assert any(name.endswith("exp_avg.codes") for name in state)
    assert any(name.endswith("low_bits") for name in state)


def full_tuning(path: Path, resume: bool = False, listeners: tuple[Any, ...] = ()) -> None:
    from halfbyte.train.loop import train
    from halfbyte.train.run_directory import RunDirectory

    model = tiny.decoder()
    for parameter in tiny.trainable(model).values():
        parameter.requires_grad_(False)
    from halfbyte.linear import segments

    trained = {}
    for name, segment in segments(model).items():
        weight = segment.weight
        weight.__init__(weight.dequantize(torch.bfloat16).clone(), trainable=True)  # type: ignore[misc]
        tensor = weight.trainable_tensor()
        assert tensor is not None
        trained[name] = tensor
    plan = tiny.with_batches(tiny.make_plan(model, 8, optim="adamw_8bit", save_steps=3), trainable=trained)
    with RunDirectory.resume(path) if resume else RunDirectory.create(path) as run:
        train(model, plan, run, listeners)


def full_and_die(path: Path, step: int) -> None:
    full_tuning(path, listeners=(tiny.kill_at_step(step),))


def test_kills_at_random_moments(tmp_path: Path, straight: Path) -> None:
    """Lives of random length, ever longer, until one finishes."""
    run, lives = tmp_path / "run", 0
    generator = random.Random(4)
    while True:
        process = start(tiny.run_or_resume, run, OPTIONS)
        process.join(generator.uniform(0.02, 0.2 + 0.03 * lives))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        lives += 1
        if process.exitcode == 0:
            break
        assert lives < 200
    assert lives > 1
    assert_same(run, straight)


@pytest.mark.parametrize("function", ["fsync", "rename", "replace", "rmdir"])
def test_kills_at_every_border_of_writing_a_checkpoint(tmp_path: Path, straight: Path, function: str) -> None:
    """The process dies just before the n-th call, for n = 1, 4, 7, … in turn, and is resumed each time."""
    run, count, kills = tmp_path / "run", 1, 0
    while until_killed(tiny.run_and_die_at_call, run, function, count, OPTIONS):
        assert all(checkpoint.verify(folder) for folder in checkpoint.list_checkpoints(run))
        count += 3
        kills += 1
        assert kills < 40
    assert kills >= 1
    assert_same(run, straight)
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("damage", ["cut", "altered", "missing", "no manifest", "broken manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, straight: Path, damage: str) -> None:
    run = tmp_path / "run"
    assert until_killed(tiny.run_and_die, run, 13, False, OPTIONS)
    last = run / "checkpoint-10"
    weights, manifest = last / "trainable.safetensors", last / "manifest.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "altered":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text('{"files": 3')
    tiny.run(run, resume=True, **OPTIONS)
    assert_same(run, straight)
    (warning,) = [e for e in read_events(run / "events.jsonl") if e["event"] == "warning" and e["step"] == 7]
    assert str(last) in warning["message"]
    assert "going on from checkpoint-7" in warning["message"]
    assert (run / "damaged-checkpoint-10").is_dir()


def test_no_whole_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for folder in checkpoint.list_checkpoints(run):
        (folder / "optimizer.safetensors").unlink()
    with pytest.raises(checkpoint.Damaged, match=r"no checkpoint .* is whole .*optimizer.safetensors is missing"):
        tiny.run(run, resume=True, **OPTIONS)


def test_a_torn_last_line_of_events_is_repaired(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    assert until_killed(tiny.run_and_die, run, 13, False, OPTIONS)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "time": 17, "st')
    assert steps_of(run)[-1]["step"] == 13
    tiny.run(run, resume=True, **OPTIONS)
    assert_same(run, straight)
