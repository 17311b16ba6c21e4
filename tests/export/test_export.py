"""From values to folders: what is refused, what is written, and that a failed comparison keeps the files."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.errors import DoesNotFit, UsageError
from halfbyte.export import export as module
from halfbyte.export.export import ExportOptions, ExportReport, Subject, export
from halfbyte.export.parity import PARITY, HeldOutRow, Question
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from tests.export.served_models import Tuned, make_tuned, one_thread, vocabulary
from tests.models import families
from tests.models.gguf_files import write_gguf
from tests.models.ollama_store import add_model

__all__ = ["one_thread"]

pytestmark = pytest.mark.usefixtures("one_thread")
needs_writer = pytest.mark.skipif(
    importlib.util.find_spec("halfbyte.export.gguf_writer") is None, reason="halfbyte.export.gguf_writer is not here"
)
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="the `parity` extra")
HF = ExportOptions(to="hf", quantization=("f32",))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return make_tuned(tmp_path_factory.mktemp("tuned"), "qwen2-tied")


def subject(tuned: Tuned, model: str | None = None, **changes: Any) -> Subject:
    """A run on `tuned`'s base as values."""
    name = model or str(tuned.base)
    (tuned.adapter / "chat_template.jinja").write_text(tuned.template.source)

    def held_out() -> tuple[Sequence[HeldOutRow], Question]:
        return tuned.rows(3), tuned.question

    def calibration() -> list[Tensor]:
        return [torch.tensor(row.input_ids) for row in tuned.rows(4)]

    made = Subject(
        name="mine", model=ModelOptions(model=name), source=open_source(name), adapter=tuned.adapter, quant=None,
        template=tuned.template, adds_bos=True, stop=("<eos>", "<|im_end|>"), system=None, trained=tuned.model,
        held_out=held_out, calibration=calibration, card=lambda exported: f"card of {exported['format']}",
    )  # fmt: skip
    return replace(made, **changes)


def written(out: Path) -> Any:
    return json.loads((out / PARITY).read_text())


def test_a_folder_is_written_and_compared(tuned: Tuned, tmp_path: Path) -> None:
    heard: set[str] = set()
    report = export(subject(tuned), tmp_path / "out", HF, lambda what, done, total: heard.add(what))
    assert report.passed is True
    found = written(tmp_path / "out")
    assert found == json.loads(json.dumps(report.to_json()))
    assert (found["passed"], found["format"]) == (True, "hf")
    (file,) = found["files"]
    assert file["command"] == f"vllm serve {tmp_path / 'out'}"
    assert file["parity"]["same_prompts"] == 3
    assert file["parity"]["mean_kl"] < 1e-6
    assert (tmp_path / "out" / "README.md").read_text() == "card of hf"
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "comparing out: prompts" in heard


def test_a_failed_comparison_keeps_the_files_and_says_why(tuned: Tuned, tmp_path: Path) -> None:
    """The adapter's folder carries another template than the run was trained with, as a broken export would."""
    broken = subject(tuned)
    (tuned.adapter / "chat_template.jinja").write_text("{{ bos_token }}" + tuned.template.source)
    report = export(broken, tmp_path / "out", HF)
    assert report.passed is False
    (failure,) = written(tmp_path / "out")["files"][0]["parity"]["failures"]
    assert "the served prompt begins with BOS twice, the trained one once" in failure
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_wrong_scale_is_found(tuned: Tuned, tmp_path: Path) -> None:
    """The merge believes an alpha that training did not have."""
    copy = tmp_path / "adapter"
    copy.mkdir()
    for path in tuned.adapter.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 2}))
    (copy / "chat_template.jinja").write_text(tuned.template.source)
    report = export(subject(tuned, adapter=copy), tmp_path / "out", HF)
    assert report.passed is False
    assert any("times as strong as trained" in failure for failure in report.results[""].failures)


def test_an_export_is_replaced_only_when_asked_and_only_if_it_is_one(tuned: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick = HF.model_copy(update={"parity": False})
    report = export(subject(tuned), out, quick)
    assert report.passed is None
    assert written(out)["files"][0]["parity"]["skipped"] == "--no-parity was given"
    with pytest.raises(UsageError, match="exists and is not empty"):
        export(subject(tuned), out, quick)
    export(subject(tuned), out, quick.model_copy(update={"overwrite": True}))
    (out / PARITY).unlink()
    with pytest.raises(UsageError, match=r"is not an export \(it has no parity.json\)"):
        export(subject(tuned), out, quick.model_copy(update={"overwrite": True}))
    with pytest.raises(UsageError, match="holds what is read"):
        export(subject(tuned), tuned.base, quick.model_copy(update={"overwrite": True}))
    with pytest.raises(UsageError, match="is a file"):
        export(subject(tuned), out / "config.json", quick)


def test_a_killed_comparison_leaves_an_export_that_says_so(tuned: Tuned, tmp_path: Path) -> None:
    def killed() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(subject(tuned, trained=killed), tmp_path / "out", HF)
    assert written(tmp_path / "out")["files"][0]["parity"]["skipped"] == "the comparison was not finished"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_nothing_is_left_where_writing_fails(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "merge", full)
        with pytest.raises(DoesNotFit, match="the disk became full while"):
            export(subject(tuned), tmp_path / "out", HF)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DoesNotFit, match=r"the export .* needs"):
        export(subject(tuned), tmp_path / "out", HF)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"to": "gguf-adapter"}, {"adapter": None}, "mine has no adapter: export it whole, --to gguf"),
        ({"to": "hf"}, {"adapter": None}, "is a Hugging Face folder already"),
        ({"to": "gguf", "quantization": ("q9",)}, {}, "--quantization q9 is not for --to gguf: f32, f16"),
        ({"to": "hf", "quantization": ("q4_0",)}, {}, "--quantization q4_0 is not for --to hf: f32, f16, bf16 can"),
        ({"to": "awq", "quantization": ("f16",)}, {}, "not for --to awq: it has one kind of weights"),
        ({"to": "hf", "quantization": ("f16", "bf16")}, {}, "--to hf writes one folder"),
        ({"to": "ollama", "quantization": ("f16", "q8_0")}, {}, "--to ollama writes one model"),
        ({"to": "gguf", "over": "x.gguf"}, {}, "--over is the base of an adapter"),
        ({"to": "gguf-adapter", "over": "nowhere.gguf"}, {}, "there is no such file"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    tuned: Tuned, tmp_path: Path, options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        export(subject(tuned, **changes), tmp_path / "out", ExportOptions(**options))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_no_gguf_is_no_base_to_serve_over(tuned: Tuned, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    for over, message in ((tmp_path / "model.bin", "is not a model"), (tuned.base, "there is no such file")):
        with pytest.raises(UsageError, match=message):
            export(subject(tuned), tmp_path / "out", ExportOptions(to="gguf-adapter", over=str(over)))


def test_without_rows_or_memory_nothing_is_compared_and_strict_says_so(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = subject(tuned, held_out=lambda: ([], tuned.question))
    report = export(empty, tmp_path / "a", HF)
    assert report.results[""].skipped == "there are no held-out rows"
    with pytest.raises(UsageError, match="was written and not compared: there are no held-out rows"):
        export(empty, tmp_path / "b", HF.model_copy(update={"strict": True}))
    assert (tmp_path / "b" / "model.safetensors").is_file()

    class Memory:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    report = export(subject(tuned), tmp_path / "c", HF)
    assert "GB of memory" in report.results[""].skipped


def test_without_llama_cpp_a_gguf_is_not_compared_and_strict_refuses_first(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(UsageError, match=r'pip install "halfbyte\[parity\]"'):
        export(subject(tuned), tmp_path / "out", ExportOptions(to="gguf", strict=True))
    assert list(tmp_path.iterdir()) == []


# -- with the GGUF writer ---------------------------------------------------------------------------------------------


@needs_writer
@needs_llama_cpp
def test_gguf_files_one_a_quantization(tuned: Tuned, tmp_path: Path) -> None:
    report = export(subject(tuned), tmp_path / "out", ExportOptions(to="gguf", quantization=("F32", "q8_0", "f32")))
    assert [one.file for one in report.exported] == ["mine-F32.gguf", "mine-Q8_0.gguf"]
    assert passed(report)
    assert report.results["mine-F32.gguf"].mean_kl < 1e-6
    assert report.exported[1].command == f"llama-server -m {tmp_path / 'out' / 'mine-Q8_0.gguf'}"


@needs_writer
@needs_llama_cpp
def test_a_broken_template_in_a_gguf_file_fails(tuned: Tuned, tmp_path: Path) -> None:
    double = replace(tuned.template, source="{{ bos_token }}" + tuned.template.source)
    report = export(
        subject(tuned, template=double, trained=tuned.model),
        tmp_path / "out",
        ExportOptions(to="gguf", quantization=("f32",)),
    )
    assert report.passed is False
    assert "BOS twice" in report.results["mine-F32.gguf"].failures[0]
    assert (tmp_path / "out" / "mine-F32.gguf").is_file()


@needs_writer
@needs_llama_cpp
def test_an_adapter_is_compared_over_the_file_that_it_was_trained_on(tuned: Tuned, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    write_gguf(families.transformers.AutoModelForCausalLM.from_pretrained(tuned.base), base,
               vocabulary=vocabulary(tuned.template.source))  # fmt: skip
    own = subject(tuned, str(base))
    report = export(own, tmp_path / "own", ExportOptions(to="gguf-adapter"))
    assert passed(report)
    assert report.exported[0].kind == "adapter"
    assert report.exported[0].command.startswith(f"llama-server -m {base} --lora ")
    unnamed = export(subject(tuned), tmp_path / "unnamed", ExportOptions(to="gguf-adapter"))
    assert "--over FILE.gguf" in unnamed.results["mine-adapter.gguf"].skipped
    assert unnamed.exported[0].command.startswith("llama-server -m BASE.gguf --lora ")
    named = export(subject(tuned), tmp_path / "named", ExportOptions(to="gguf-adapter", over=str(base)))
    assert passed(named)
    assert named.exported[0].kind == "f32"
    other = make_tuned(tmp_path / "other", "llama3-head-dim")
    wrong = export(subject(tuned), tmp_path / "wrong", ExportOptions(
        to="gguf-adapter", over=str(other.gguf(tmp_path / "other.gguf"))))  # fmt: skip
    assert wrong.passed is False
    assert "llama.cpp does not load" in wrong.results["mine-adapter.gguf"].failures[0]


@needs_writer
@needs_llama_cpp
def test_ollama_merged_or_over_its_own_model(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = export(subject(tuned, system="Be brief."), tmp_path / "merged", ExportOptions(to="ollama"))
    assert passed(report)
    text = (tmp_path / "merged" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'SYSTEM "Be brief."' in text
    assert report.exported[0].command == (
        f"ollama create mine -f {tmp_path / 'merged' / 'Modelfile'} && ollama run mine"
    )
    base = tmp_path / "base.gguf"
    write_gguf(families.transformers.AutoModelForCausalLM.from_pretrained(tuned.base), base,
               vocabulary=vocabulary(tuned.template.source))  # fmt: skip
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    add_model(
        tmp_path / "store",
        "registry.ollama.ai/library/tiny/1b",
        [("model", base.read_bytes()), ("system", b"You are tiny."), ("params", b'{"stop": ["STOP"]}')],
    )
    over = export(subject(tuned, "ollama:tiny:1b"), tmp_path / "over", ExportOptions(to="ollama"))
    assert passed(over)
    text = (tmp_path / "over" / "Modelfile").read_text()
    assert text.startswith("FROM tiny:1b\nADAPTER ./adapter.gguf\n")
    assert 'PARAMETER stop "STOP"' in text
    assert 'SYSTEM "You are tiny."' in text
    assert (tmp_path / "over" / "adapter.gguf").is_file()


def passed(report: ExportReport) -> bool:
    assert report.passed is not None, [result.skipped for result in report.results.values()]
    assert report.passed, [result.failures for result in report.results.values()]
    return True
