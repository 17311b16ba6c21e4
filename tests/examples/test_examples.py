"""Two of the three rungs are run here: the flat file and the notebook; the third, the recipes, in tests/run."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.run.conftest import data_file, model_folder

__all__ = ["data_file", "model_folder"]

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_flat_example_is_flat_and_trains(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    script = EXAMPLES / "flat_qlora.py"
    assert len(script.read_text().splitlines()) <= 200
    out = tmp_path / "adapter"
    words = [sys.executable, script, model_folder, data_file, out, "--steps", "12", "--tokens-at-once", "64"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = {line.split(": ")[0]: float(line.split(": ")[1]) for line in done.stdout.splitlines() if "loss b" in line
              or "loss a" in line}  # fmt: skip
    assert losses["held-out loss after"] < losses["held-out loss before"]
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert "expected: " in done.stdout


@pytest.mark.slow
def test_the_notebook_runs(model_folder: Path, tmp_path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not committed: they age"
    environment = {**os.environ, "HALFBYTE_QUICKSTART_MODEL": str(model_folder)}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    shown = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "held-out loss: base" in shown
    assert (tmp_path / "runs/dates/result.json").is_file()
