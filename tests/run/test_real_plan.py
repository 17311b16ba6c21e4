"""The first promise, on a real model: what the plan said before the run, beside what the operating system counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_planned_peak_is_within_30_percent(gemma_gguf: Path, tmp_path: Path, method: str) -> None:
    rows = [{"prompt": f"What is {i} plus {i + 1}?", "completion": f" {2 * i + 1} " + "and so on " * (i % 9)}
            for i in range(200)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--model", gemma_gguf, "--data", tmp_path / "rows.jsonl", "-o", tmp_path / "run", "--json",
             "--max-steps", "4", "--method", method]  # fmt: skip
    # A process of its own, since the peak is the process's; one thread, since other tests run beside this one.
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    predicted = result["predicted"]["peak_memory_bytes"]
    assert predicted["p50"] == pytest.approx(result["peak_memory_bytes"], rel=0.3)
    assert result["peak_memory_bytes"] < predicted["p95"]
    assert result["eval_loss"] < result["base_eval_loss"]
