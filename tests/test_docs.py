"""The pages under docs/ are executed: a page a verb, its commands run on a tiny model, its flags the verb's own."""

import io
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.cli import VERBS, load, main
from halfbyte.export.gguf_writer import write_gguf
from halfbyte.export.merge import plan_tensors
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from halfbyte.run import reference
from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.run import run
from tests.evaluate.conftest import VOCAB, byte_tokenizer
from tests.models import families
from tests.run.conftest import _no_measuring, _own_cache, data_file, model_folder, rows, write_rows

__all__ = ["_no_measuring", "_own_cache", "data_file", "model_folder"]

DOCS = Path(__file__).parents[1] / "docs"
WITHOUT_A_PAGE = {"demo"}  # the README's first command
PAGES = {verb: DOCS / f"{verb}.md" for verb in VERBS if verb not in WITHOUT_A_PAGE}
EXECUTED = [*PAGES.values(), DOCS / "config.md", DOCS / "optimizers.md", DOCS / "history.md"]
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def finished(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config(model=str(model_folder), data=str(data_file), lora_r=4, max_steps=4, eval_split=0.1,
                         output_dir=tmp_path_factory.mktemp("finished") / "mine", dtype="float32",
                         method="qlora")  # fmt: skip
    return run(config).path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in blocks of 8 bits."""
    folder = tmp_path_factory.mktemp("gguf")
    config = families.config("qwen2")
    config.vocab_size, config.hidden_size, config.intermediate_size = VOCAB, 64, 96
    families.make_model(config).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    source = open_source(str(folder / "model"))
    planned = plan_tensors(ModelOptions(model=str(folder / "model")), source, {}, None, torch.float32)
    write_gguf(folder / "my-model.gguf", planned, source, "q8_0", None)
    return folder / "my-model.gguf"


@pytest.fixture
def place(
    model_folder: Path,
    gguf_file: Path,
    data_file: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """What the pages speak of: my-model, my-model.gguf, rows and prompts, and (but for train) runs/mine."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "my-model")
    shutil.copy(gguf_file, "my-model.gguf")
    shutil.copy(data_file, "rows.jsonl")
    write_rows(Path("heldout.jsonl"), rows(70)[60:])
    Path("prompts.txt").write_text("say 1:\nsay 2:\n")
    shutil.copytree(finished, "runs/mine")
    Path("elsewhere").mkdir()
    return tmp_path


def commands(page: Path) -> Iterator[tuple[list[str], str | None, int]]:
    """(words of a halfbyte command, text piped into it, expected exit code) of a page's shell blocks."""
    for language, block in FENCE.findall(page.read_text()):
        if language != "sh":
            continue
        for line in block.splitlines():
            command, _, comment = line.partition(" # ")
            code = int(found[1]) if (found := re.search(r"exits (\d)", comment)) else 0
            before, _, after = command.rpartition(" | ")
            words = shlex.split(after or command)
            assert words[0] == "halfbyte", line
            yield words[1:], " ".join(shlex.split(before)[1:]) if before else None, code


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    place: Path, page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page.name == "train.md":
        shutil.rmtree("runs/mine")
    ran = 0
    for words, piped, expected in commands(page):
        if piped is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(piped + "\n"))
        try:
            main(words)
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        printed = capsys.readouterr()
        assert code == expected, f"halfbyte {' '.join(words)}: {code}\n{printed.err}"
        ran += 1
    assert ran


def test_the_python_page_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for language, block in FENCE.findall((DOCS / "python.md").read_text()):
        if language == "python":
            (place / "block.py").write_text(block)
            runpy.run_path(str(place / "block.py"))
    assert "qlora" in capsys.readouterr().out


def test_the_python_of_the_page_about_optimizers_runs(place: Path) -> None:
    (block,) = [
        block for language, block in FENCE.findall((DOCS / "optimizers.md").read_text()) if language == "python"
    ]
    (place / "block.py").write_text(block)
    runpy.run_path(str(place / "block.py"))


def own_flags(verb: str) -> set[str]:
    """The flags of a verb that no config field explains; aliases of other tools are hidden and not meant."""
    command: Any = load(verb)
    while hasattr(command, "commands"):
        (command,) = command.commands.values()
    shared = {name.replace("_", "-") for name in RunConfig.model_fields} | {"help"}
    names = {p.opts[0].removeprefix("--") for p in command.params if p.param_type_name == "option" and not p.hidden}
    return names - shared


@pytest.mark.parametrize("verb", PAGES)
def test_every_flag_of_a_verb_is_on_its_page(verb: str) -> None:
    text = PAGES[verb].read_text()
    missing = {flag for flag in own_flags(verb) if f"--{flag}" not in text and f"--no-{flag}" not in text}
    assert not missing


def test_every_option_is_on_the_config_page_which_is_made_from_the_fields() -> None:
    text = (DOCS / "config.md").read_text()
    assert text == reference.page(), "python -m halfbyte.run.reference > docs/config.md"
    assert all(f"| `{name}` |" in text for name in RunConfig.model_fields)
