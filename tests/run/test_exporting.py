"""A run as values for `export`: its rows as a server is given them, its template, its base; and the verb itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.data.options import DataOptions
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.export import ExportOptions
from halfbyte.models.source import open_source
from halfbyte.run import planning, target
from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.exporting import export_target, held_out_rows, subject_of
from halfbyte.run.run import run

HF = ExportOptions(to="hf", quantization=("f32",), rows=4, max_new_tokens=8)


def trained(model: Path, data: list[dict[str, Any]], folder: Path, **changes: Any) -> Path:
    """A short finished run on `data`."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    values: dict[str, Any] = {
        "model": str(model), "data": str(file), "output_dir": folder / "run", "lora_r": 4, "dtype": "float32",
        "max_steps": 8, "eval_split": 0.2, "learning_rate": 2e-2, "max_seq_length": 96,
    }  # fmt: skip
    return run(load_config(**(values | changes))).path


@pytest.fixture(scope="module")
def chats(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one and two turns, some with a system message, with halfbyte's own template; QLoRA."""
    rows = []
    for i in range(40):
        talk = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i % 7} and {i % 5}"}]
        talk += [{"role": "user", "content": "again"}, {"role": "assistant", "content": f"no {i}"}] if i % 2 else []
        rows.append({"messages": [{"role": "system", "content": "Be brief."}, *talk] if i % 3 == 0 else talk})
    return trained(model_folder, rows, tmp_path_factory.mktemp("chats"), method="qlora")


def test_a_run_on_conversations(chats: Path, tmp_path: Path) -> None:
    found = target.find(str(chats))
    subject = subject_of(found, open_source(found.config.model), HF)
    assert subject.name == "run"
    assert subject.quant is not None
    assert subject.template is not None
    assert subject.stop == ("<eos>",)
    rows, question = subject.held_out()
    assert len(rows) == 4
    model = subject.trained()
    assert model.dtype == torch.float32
    for row in rows:
        assert isinstance(row.prompt, list)
        assert row.prompt[-1]["role"] == "user"
        # The server renders what the row was trained with: its ids are the beginning of the row's.
        ids = model.token_ids(row.prompt)
        assert list(row.input_ids[: len(ids)]) == ids
        assert not any(row.supervised[: len(ids)]) or len(row.prompt) > 2
        assert row.answer is not None
        assert model.tokenizer.decode(row.input_ids[len(ids) :]).startswith(row.answer)
    assert model.tokenizer.eos_token_id in question.stop_ids
    assert len(subject.calibration()) == 32
    report = export_target(found, tmp_path / "out", HF)
    assert report.passed is True
    result = report.results[""]
    assert (result.prompts, result.same_prompts) == (4, 4)
    assert result.mean_kl < 1e-5
    assert result.strength == pytest.approx(1, abs=0.01)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Does it behave as trained?" in card
    assert "| this folder | f32 | passed | 4 of 4 |" in card
    assert "vllm serve" in card
    assert "library_name: transformers" in card


def test_other_rows_by_a_relative_path(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their conversations are found again, whatever the path was: a rendered text rendered once more is no prompt."""
    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "content": "say 3"}, {"role": "assistant", "content": "3 and 3"}]
    Path("other.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(3)))
    found = target.find(str(chats))
    subject = subject_of(found, open_source(found.config.model), HF, "other.jsonl")
    rows, _ = subject.held_out()
    assert [row.prompt for row in rows] == [talk[:1]] * 3
    prepared = planning.survey(planning.absolute(target.rows_from(found, "other.jsonl").config)).prepared
    assert prepared is not None
    with pytest.raises(HalfbyteError, match=r"this held-out row was not found again"):
        held_out_rows(prepared.eval, target.rows_from(found, "other.jsonl").config.pick(DataOptions))


def test_prompts_and_completions_are_plain_text(model_folder: Path, tmp_path: Path, tiny_config: RunConfig) -> None:
    path = run(tiny_config).path
    subject = subject_of(target.find(str(path)), open_source(tiny_config.model), HF)
    assert subject.template is None
    assert subject.stop == ()
    rows, _ = subject.held_out()
    assert all(isinstance(row.prompt, str) and row.prompt.startswith("say ") for row in rows)
    report = export_target(target.find(str(path)), None, HF.model_copy(update={"metrics": ("token_f1",)}))
    assert report.path == path.parent / "run-hf"
    assert report.passed is True
    assert set(report.results[""].metrics) == {"token_f1"}


def test_classification_documents_and_other_rows(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"number {i}", "label": i % 2} for i in range(40)]
    path = trained(model_folder, rows, tmp_path, label_names=["even", "odd"])
    report = export_target(target.find(str(path)), tmp_path / "out", HF)
    assert report.passed is True
    assert set(report.results[""].metrics) == {"accuracy"}
    (tmp_path / "texts").mkdir()
    texts = trained(model_folder, [{"text": f"a longer text of many words {i}"} for i in range(30)], tmp_path / "texts")
    report = export_target(target.find(str(texts)), tmp_path / "texts-out", HF)
    assert report.passed is True
    assert (report.results[""].prompts, report.results[""].answers) == (0, 0)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"these {i}", "label": 1}) + "\n" for i in range(3)))
    again = export_target(target.find(str(path)), tmp_path / "again", HF, data=str(other))
    assert again.results[""].rows == 3


def test_a_row_that_did_not_fit_is_asked_up_to_its_last_whole_answer(model_folder: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "first"}]
    talk += [{"role": "user", "content": "b" * 200}, {"role": "assistant", "content": "second"}]
    path = trained(model_folder, [{"messages": [{"role": "user", "content": str(i)}, *talk[1:]]} for i in range(20)],
                   tmp_path, max_seq_length=60)  # fmt: skip
    subject = subject_of(target.find(str(path)), open_source(str(model_folder)), HF)
    rows, _ = subject.held_out()
    assert rows
    for row in rows:
        assert isinstance(row.prompt, list)
        assert len(row.prompt) == 1
        assert row.answer == "first"


def test_an_adapters_folder_has_no_rows_and_no_card(chats: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((chats / name).read_bytes())
    found = target.find(str(adapter), dtype="float32", method="qlora")
    report = export_target(found, tmp_path / "out", HF)
    assert report.passed is None
    assert "no rows to evaluate on" in report.results[""].skipped
    assert not (tmp_path / "out" / "README.md").exists()


def test_what_was_not_trained_is_no_export(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a model as it came: export a run, or an adapter"):
        export_target(target.find(str(model_folder)), tmp_path / "out", HF)


def test_a_fully_tuned_run_is_a_folder_already(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(20)]
    path = trained(model_folder, rows, tmp_path, method="full", learning_rate=1e-3)
    with pytest.raises(UsageError, match="is a Hugging Face folder already"):
        export_target(target.find(str(path)), tmp_path / "out", HF)
