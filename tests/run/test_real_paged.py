"""Paged state on a real model: the files of the run are those of state in memory, byte for byte, in less memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.files import sha256_file

ROWS = [{"text": f"{i} and {i + 1} make {2 * i + 1}, " * 20} for i in range(40)]


def train(model: Path, folder: Path, optim: str) -> dict[str, Any]:
    """Two updates of two micro-batches in a process of its own, as the peak is the process's."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["train", "--model", model, "--data", folder / "rows.jsonl", "-o", folder / optim, "--json",
             "--method", "full", "--optim", optim, "--max-steps", "2", "--dtype", "bfloat16", "--eval-split", "0",
             "--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "2", "--gradient-checkpointing",
             "--learning-rate", "1e-4", "--max-grad-norm", "0.5"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_paged_state_gives_the_same_files(gemma_gguf: Path, tmp_path: Path, optim: str) -> None:
    held = train(gemma_gguf, tmp_path, optim)
    paged = train(gemma_gguf, tmp_path, f"paged_{optim}")
    assert held["final_loss"] == paged["final_loss"]
    for name in ("model.safetensors", "checkpoint-2/trainable.safetensors", "checkpoint-2/optimizer.safetensors"):
        one, other = (tmp_path / kind / name for kind in (optim, f"paged_{optim}"))
        assert sha256_file(one) == sha256_file(other), name
    # Float32 moments, low bits and gradients of 268 million weights are 3.2 GB, moments in bytes 1.6 GB.
    saved = held["peak_memory_bytes"] - paged["peak_memory_bytes"]
    assert saved > (2.2e9 if optim == "adamw" else 0.7e9)
    assert paged["peak_memory_bytes"] < paged["predicted"]["peak_memory_bytes"]["p95"]
