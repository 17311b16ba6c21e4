"""`halfbyte export`: what it prints, and its exit codes."""

import json
from pathlib import Path

import pytest

from halfbyte.run.config import load_config
from halfbyte.run.run import run
from tests.cli.conftest import Run


@pytest.fixture(scope="module")
def done(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i % 7}"}]}
            for i in range(40)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(
        model=str(model_folder), data=str(folder / "rows.jsonl"), output_dir=folder / "run", lora_r=4, max_steps=8,
        dtype="float32", method="qlora", eval_split=0.2, learning_rate=2e-2, max_seq_length=64,
    )  # fmt: skip
    return run(config).path


def test_an_export_ends_with_the_command_that_serves_it(done: Path, halfbyte: Run) -> None:
    result = halfbyte("export", done, "--to", "hf", "-o", "out", "--rows", 3, "--max-new-tokens", 6)
    assert result.code == 0, result.err
    assert "wrote out: " in result.out
    assert "passed: compared with the trained model in transformers" in result.out
    assert "prompts: the same token ids on 3 of 3" in result.out
    assert result.out.rstrip().endswith("serve it: vllm serve out")
    assert halfbyte("export", done, "--to", "hf", "-o", "out").code == 2
    again = halfbyte("export", done, "--to", "hf", "-o", "out", "--overwrite", "--no-parity", "--json")
    assert again.code == 0
    assert again.json["passed"] is None
    assert again.json["files"][0]["parity"]["skipped"] == "--no-parity was given"


def test_a_failed_comparison_exits_1_and_keeps_the_files(done: Path, halfbyte: Run) -> None:
    """Merged into weights that the adapter has never seen, and called as exact as float32 can be."""
    words = ("export", done, "--to", "hf", "--quantization", "f32", "--base", "16bit", "--rows", 3)
    result = halfbyte(*words, "-o", "out")
    assert result.code == 1
    assert "FAILED: compared with the trained model in transformers" in result.out
    assert "have a KL of" in result.out
    assert "serve it: vllm serve out" in result.out
    assert (Path("out") / "model.safetensors").is_file()
    as_json = halfbyte(*words, "-o", "again", "--json")
    assert as_json.code == 1
    assert as_json.json["passed"] is False
    assert json.loads((Path("again") / "parity.json").read_text())["passed"] is False
    assert halfbyte("export", done, "--to", "hf", "--quantization", "f32", "--rows", 3, "-o", "good").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "onnx"), "--to"),
        ((), "to is needed"),
        (("--to", "hf", "--quantization", "q4_k_m"), "--quantization q4_k_m is not for --to hf"),
        (("--to", "hf", "--rows", "0"), "--rows"),
    ],
)
def test_wrong_usage_is_one_line(done: Path, halfbyte: Run, words: tuple[str, ...], message: str) -> None:
    result = halfbyte("export", done, *words)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1 or "Usage" in result.err
