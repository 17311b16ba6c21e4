"""`--memory` kept by a whole run: under a real limit of that size, and under one that turns out smaller."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import DoesNotFit
from halfbyte.run import planning
from halfbyte.run.config import load_config
from halfbyte.run.run import run
from halfbyte.train.events import read_events
from tests.limits import in_new_process
from tests.models import families
from tests.run import starved
from tests.run.conftest import VOCAB, byte_tokenizer, write_rows

limited = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
TOKENS = 1000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random Llama whose activations weigh more than it does, and long rows of texts."""
    import torch

    folder = tmp_path_factory.mktemp("long")
    config = families.config("llama3-gqa")
    config.vocab_size, config.max_position_embeddings = VOCAB, 4096
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 192, 512, 4
    config.head_dim = config.hidden_size // config.num_attention_heads
    families.make_model(config).to(torch.float32).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}:", "completion": " and".join(f" {i % 7}" for _ in range(TOKENS))} for i in range(24)]
    return folder / "model", write_rows(folder / "rows.jsonl", rows)


def config_of(files: tuple[Path, Path], path: Path, **options: Any) -> dict[str, Any]:
    given = {"method": "lora", "dtype": "float32", "lora_r": 4, "max_steps": 2, "max_seq_length": TOKENS}
    return {"model": str(files[0]), "data": str(files[1]), "output_dir": path, **given, **options}


def needed(config: dict[str, Any]) -> int:
    """The plan's P95 of this very layout."""
    return planning.plan_of(load_config(**config)).chosen.peak_p95


def warnings_of(path: Path) -> list[str]:
    return [event["message"] for event in read_events(path / "events.jsonl") if event["event"] == "warning"]


@limited
@pytest.mark.parametrize("rows", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_stays_within_the_memory_that_it_was_given(files: tuple[Path, Path], tmp_path: Path, rows: int) -> None:
    """Under a limit of exactly `--memory`, in a process of its own: the layout that fits is taken, and it does fit."""
    layout = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4, "gradient_checkpointing": False}
    budget = needed(config_of(files, tmp_path / "plan", **layout))
    config = config_of(files, tmp_path / "run", memory=budget, gradient_accumulation_steps=4)
    made = in_new_process(starved.within, budget, config)
    assert "error" not in made, made["error"]
    assert made["result"]["status"] == "completed"
    assert made["status"]["VmHWM"] <= budget
    assert made["result"]["peak_memory_bytes"] <= budget
    assert warnings_of(tmp_path / "run") == []
    taken = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert taken["peak_memory_bytes"]["p95"] <= budget


@limited
def test_a_limit_below_the_plan_costs_time_and_nothing_else(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The limit is lowered when the run has begun: it steps down, says so, and ends where the smaller layout does."""
    layout = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "rehearsal": True}
    made = in_new_process(starved.cut_off, 170_000_000, "start", config_of(files, tmp_path / "run", **layout))
    assert "error" not in made, made["error"]
    halvings = made["result"]["layout"]["halvings"]
    assert halvings >= 1
    told = warnings_of(tmp_path / "run")
    assert len([message for message in told if "memory ran short" in message]) >= halvings
    kinds = [event["event"] for event in read_events(tmp_path / "run" / "events.jsonl")]
    assert kinds.count("rehearsal") == 1
    smaller = {"per_device_train_batch_size": 8 >> halvings, "gradient_accumulation_steps": 1 << halvings}
    result = run(load_config(**config_of(files, tmp_path / "smaller", **smaller))).result
    exact = not made["result"]["layout"]["evaluation_halvings"]
    for figure in ("train_loss", "final_loss", "eval_loss"):
        expected = result[figure] if exact else pytest.approx(result[figure], rel=1e-5)
        assert made["result"][figure] == expected, figure


@limited
def test_less_than_the_least_is_refused_before_a_weight_is_read(files: tuple[Path, Path], tmp_path: Path) -> None:
    """What this process reads until then is less than the file of weights."""
    config = load_config(**config_of(files, tmp_path / "run", memory=100_000_000))
    weights = (files[0] / "model.safetensors").stat().st_size
    heard: list[str] = []
    for _ in range(2):  # the first time modules are read too
        before = bytes_read()
        with pytest.raises(DoesNotFit) as refused:
            run(config, lambda event: heard.append(event["event"]))
        read = bytes_read() - before
    assert read < weights / 2
    assert refused.value.exit_code == 3
    assert "\n" not in str(refused.value)
    assert "loaded" not in heard
    assert not (tmp_path / "run").exists()


def bytes_read() -> int:
    """By read and pread of this process, whether from the disk or from memory."""
    return int(Path("/proc/self/io").read_text().split()[1])
