"""`push` of runs: where the base came from, what must not leave the machine, and what is not finished."""

import json
from pathlib import Path

import pytest
import yaml

from halfbyte.cli import main
from halfbyte.errors import UsageError
from halfbyte.export.push import PushOptions
from halfbyte.run.config import RunConfig
from halfbyte.run.pushing import collect_target
from halfbyte.run.run import run
from halfbyte.train.run_directory import CONFIG, RESULT


@pytest.fixture
def finished(tiny_config: RunConfig) -> Path:
    return run(tiny_config.replace(max_steps=2)).path


def test_a_run(finished: Path, model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    model = collect_target(str(finished), "me/mine", PushOptions())
    files = {upload.name: upload.content for upload in model.uploads}
    assert set(files) >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"}
    assert not set(files) & {"run.yaml", "result.json", "plan.json", "events.jsonl", "run.lock"}
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.read_bytes()
        for private in (model_folder.parent, data_file.parent, tmp_path, Path.home()):
            assert str(private).encode() not in raw, name
    card = files["README.md"]
    assert isinstance(card, bytes)
    assert f"`{model_folder.name}`".encode() in card
    assert "base_model" not in yaml.safe_load(card.decode().split("---\n")[1])
    assert any("--base-model" in note for note in model.notes)


def test_the_base_as_the_user_names_it_or_as_the_run_recorded_it(finished: Path) -> None:
    named = collect_target(str(finished), "me/mine", PushOptions(base_model="Qwen/Qwen3-0.6B"))
    recorded = yaml.safe_load((finished / CONFIG).read_text())
    recorded["model"] = "google/gemma-3-270m"
    recorded["record"]["base_model"] |= {"kind": "hub", "revision": "a" * 40}
    (finished / CONFIG).write_text(yaml.safe_dump(recorded))
    known = collect_target(str(finished), "me/mine", PushOptions())
    for model, base in ((named, "Qwen/Qwen3-0.6B"), (known, "google/gemma-3-270m")):
        files = {upload.name: upload.content for upload in model.uploads}
        card, adapter = files["README.md"], files["adapter_config.json"]
        assert isinstance(card, bytes)
        assert isinstance(adapter, bytes)
        assert yaml.safe_load(card.decode().split("---\n")[1])["base_model"] == base
        assert json.loads(adapter)["base_model_name_or_path"] == base


def test_what_cannot_be_pushed(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a Hub id"):
        collect_target(str(finished), "me/mine", PushOptions(base_model="/home/me/base"))
    with pytest.raises(UsageError, match="not a repository's name"):
        collect_target(str(finished), "mine", PushOptions())
    (finished / RESULT).unlink()
    with pytest.raises(UsageError, match="is not finished: `halfbyte resume"):
        collect_target(str(finished), "me/mine", PushOptions())
    with pytest.raises(UsageError, match="neither a folder nor"):
        collect_target(str(tmp_path / "nowhere"), "me/mine", PushOptions())


def test_a_checkpoint_is_an_adapter_too(finished: Path) -> None:
    model = collect_target(str(finished / "checkpoint-2"), "me/mine", PushOptions())
    assert [upload.name for upload in model.uploads] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(("kind", "relation"), [("hf", "finetune"), ("gguf", "quantized"), ("gguf-adapter", "adapter")])
def test_exports(finished: Path, kind: str, relation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main(["export", str(finished), "--to", kind, "--output", str(tmp_path / "out"), "--no-parity"])
    assert leaving.value.code == 0
    assert str(tmp_path) in Path("out/parity.json").read_text(), "the command that serves it"
    model = collect_target("out", "me/mine", PushOptions(base_model="owner/base"))
    files = {upload.name: upload.content for upload in model.uploads}
    assert {"README.md", "parity.json"} <= set(files)
    assert [name for name in files if name.endswith((".safetensors", ".gguf"))]
    assert any("was not compared" in note for note in model.notes)
    card = files["README.md"]
    assert isinstance(card, bytes)
    front = yaml.safe_load(card.decode().split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("owner/base", relation)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.read_bytes()
        assert str(tmp_path).encode() not in raw, name
    parity = Path("out/parity.json")
    parity.write_text(json.dumps(json.loads(parity.read_text()) | {"passed": False}))
    assert any("does not behave as trained" in note for note in collect_target("out", "me/mine", PushOptions()).notes)
