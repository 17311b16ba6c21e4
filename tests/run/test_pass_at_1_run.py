"""Learn a program, write it, pass its tests: pass@1 on the command line, with permission and without."""

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from halfbyte.cli import main
from halfbyte.run.config import load_config
from halfbyte.run.run import run
from tests.models.test_seq2seq import t5_tokenizer
from tests.run.conftest import write_rows
from tests.run.test_seq2seq import write_base

# What the model learns to say goes on behind a special token, as a base model's next document does: not its program.
ROW = {
    "prompt": 'def total(numbers):\n    """Sum."""\n',
    "canonical_solution": "    return sum(numbers)<|im_end|>)(",
    "test": "def check(f):\n    assert f([1, 2]) == 3",
    "entry_point": "total",
}


def test_a_model_that_learned_to_write_it_passes(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{**ROW, "prompt": f"# {n}\n{ROW['prompt']}"} for n in range(12)])
    config = load_config(
        model=str(model_folder), data=str(data), dtype="float32", output_dir=tmp_path / "run", lora_r=8, max_steps=60,
        eval_split=4, learning_rate=2e-2, method="lora", per_device_train_batch_size=4, gradient_accumulation_steps=1,
    )  # fmt: skip
    run(config)
    asked = ["evaluate", str(tmp_path / "run"), "--metrics", "pass@1", "--max-new-tokens", "32", "--json"]
    with pytest.raises(SystemExit) as refused:
        main(asked)
    assert refused.value.code == 2
    assert "--allow-code-execution" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main([*asked, "--rows", "--allow-code-execution"])
    assert not left.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["pass@1"] == 1
    assert found["base"]["pass@1"] == 0
    assert found["gains"]["pass@1"] == 1
    assert found["intervals"]["pass@1"][0] == pytest.approx(0.51, abs=0.01)
    assert [row["outcome"] for row in found["rows"]] == ["passed"] * 4
    assert all(row["outcome"].startswith("failed: ") for row in found["base"]["rows"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call
def test_an_encoder_decoder_begins_with_a_special_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As BART does, whose every text is wrapped in two: its program is what stands between them."""
    base = write_base("bart", tmp_path / "base")
    tokenizer = t5_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A <eos>", special_tokens=[("<|im_end|>", 257), ("<eos>", 256)]
    )
    tokenizer.save_pretrained(base)
    programs = [f"x={a}{b}{c}" for a in "1234" for b in "1234" for c in "1234"]
    values = [{"prompt": p, "completion": p, "tests": f"assert x == {p[2:]}"} for p in programs]
    config = load_config(
        model=str(base), data=str(write_rows(tmp_path / "rows.jsonl", values)), output_dir=tmp_path / "run",
        method="lora", dtype="float32", lora_r=32, lora_alpha=64, max_steps=90, learning_rate=3e-3, eval_split=8,
        max_seq_length=32, per_device_train_batch_size=32,
    )  # fmt: skip
    run(config)
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(tmp_path / "run"), "--metrics", "pass@1", "--max-new-tokens", "12", "--json",
              "--allow-code-execution"])  # fmt: skip
    assert not left.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["pass@1"] > 0.8
    assert found["base"]["pass@1"] == 0
