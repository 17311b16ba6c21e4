"""The tables of docs/methods.md are read here, and every cell is run: what it says is what happens.

A cell that says yes is two updates of a tiny model, saved after each. The run is cut back to its first checkpoint and
resumed: the trained tensors are the same bit for bit. Loaded again it has the loss that it ended with, and so has
transformers' own model of it, merged (full: as it lies). A cell with a number is refused with one line before a run's
folder is made. The fast tests take one base and one optimizer of every kind for each method; the slow ones take every
cell, method x base x optimizer.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import halfbyte as hb
from halfbyte.errors import UsageError
from halfbyte.export.awq import AwqOptions, write_awq_folder
from halfbyte.export.gguf_writer import write_gguf
from halfbyte.export.gptq import GptqOptions, write_gptq_folder
from halfbyte.export.merge import MergeOptions
from halfbyte.run.folder import read_config
from halfbyte.run.methods import PRESETS
from halfbyte.run.planning import survey
from halfbyte.run.run import resume
from halfbyte.run.target import find, merge_target
from tests.export.int4_models import GROUP, SIZES, documents, open_tiny
from tests.export.served_models import VOCAB, tokenizer
from tests.models import families
from tests.run.conftest import _no_measuring, _own_cache, rows, write_rows

__all__ = ["_no_measuring", "_own_cache"]

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
QUANT_TYPES = {"NF4": "nf4", "FP4": "fp4", "INT4": "int4", "INT8": "int8"}
REFUSALS = {"1": r"requantize", "2": r"galore.*full|full.*galore"}


def read_table(heading: str) -> dict[tuple[str, str], str]:
    """(row, column) -> cell of the first table below a heading of the page."""
    text = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], column): cell for row in body for column, cell in zip(head[1:], row[1:], strict=True)}


BASES, OPTIMIZERS = read_table("Method and base"), read_table("Method and optimizer")


def test_every_method_is_a_row() -> None:
    assert list(dict.fromkeys(row for row, _ in BASES)) == list(PRESETS)
    assert {row for row, _ in OPTIMIZERS} == set(PRESETS)
    for name, preset in PRESETS.items():
        assert re.search(rf"^\| `{name}` \| {re.escape(preset.summary)} \|", PAGE.read_text(), re.MULTILINE), name
    assert set(BASES.values()) | set(OPTIMIZERS.values()) <= {"yes", "-", *REFUSALS}


# -- bases ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    config = families.config("codellama")  # grouped queries, and no scaled RoPE for the GGUF file
    for key, value in {**SIZES, "vocab_size": VOCAB, "num_hidden_layers": 2}.items():
        setattr(config, key, value)
    families.make_model(config).to(torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bases(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """column of the table -> a model of that kind, made once."""
    root = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {}

    def bitsandbytes() -> Path:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        out = root / "bnb"
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=quant, dtype=torch.float32).save_pretrained(out)
        tokenizer().save_pretrained(out)
        return out

    def int4(write: Any, options: Any, name: str) -> Path:
        tiny, out = open_tiny(dense), root / name
        out.mkdir()
        write(out, tiny.source, tiny.planned, documents(vocab=VOCAB), options, dtype=torch.float32)
        return out

    def gguf_file() -> Path:
        tiny = open_tiny(dense)
        write_gguf(root / "tiny.gguf", tiny.planned, tiny.source, "q4_0", None)
        return root / "tiny.gguf"

    makers = {
        "bitsandbytes": bitsandbytes,
        "GPTQ": lambda: int4(write_gptq_folder, GptqOptions(group_size=GROUP), "gptq"),
        "AWQ": lambda: int4(write_awq_folder, AwqOptions(group_size=GROUP), "awq"),
        "GGUF": gguf_file,
    }

    def base(column: str) -> Path:
        if column not in makers:
            return dense
        if column not in made:
            made[column] = makers[column]()
        return made[column]

    return base


# -- a cell -----------------------------------------------------------------------------------------------------------


def settings(method: str, model: Path, column: str, optim: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": str(model),
        "data": str(write_rows(folder / "rows.jsonl", rows(16))),
        "method": method,
        "optim": optim,
        "max_steps": 2,
        "save_steps": 1,
        "save_total_limit": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "eval_split": 4,
        "max_seq_length": 64,
        "dtype": "float32",
        "learning_rate": 1e-3,
    }
    if PRESETS[method].method != "full":
        found |= {"lora_r": 4}
    if optim.startswith("galore"):
        found |= {"galore_rank": 4}
    if column in QUANT_TYPES:
        found |= {"quant_type": QUANT_TYPES[column]}
    return found


def trained(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}" / "trainable.safetensors")


def run_cell(method: str, model: Path, column: str, optim: str, folder: Path) -> None:
    config = settings(method, model, column, optim, folder)
    whole, part = folder / "whole", folder / "part"
    result = hb.train(**config, output_dir=whole).result
    assert result["method_name"] == method or optim.startswith("galore")
    one, two = trained(whole, 1), trained(whole, 2)
    assert one.keys() == two.keys()
    moved = [name for name in two if not torch.equal(one[name], two[name])]
    assert len(moved) > len(two) / 2, "nothing is learnt"

    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-2")
    (part / "result.json").unlink()
    resume(part)
    again = trained(part, 2)
    assert all(torch.equal(again[name], two[name]) for name in two), "resumed, it is not the same run"

    scores = hb.evaluate(str(whole))
    assert getattr(scores, "tuned", scores).loss == pytest.approx(result["eval_loss"], rel=1e-4)
    if PRESETS[method].method == "full":
        merged = whole
    else:
        merged = folder / "merged"
        base = "dequantized" if PRESETS[method].method == "qlora" else None
        merge_target(find(str(whole)), merged, MergeOptions(base=base, merge_dtype="float32"))
    assert transformers_loss(merged, whole) == pytest.approx(result["eval_loss"], rel=2e-3)


def transformers_loss(model: Path, run: Path) -> float:
    """The mean loss of the held-out rows by transformers' own model of a folder."""
    from transformers import AutoModelForCausalLM

    config, _ = read_config(run)
    prepared = survey(config).prepared
    assert prepared is not None
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for example in prepared.eval:
        ids = torch.tensor(example.input_ids)
        with torch.no_grad():
            logprobs = theirs(ids[None]).logits[0].log_softmax(-1)
        supervised = torch.tensor(example.supervised)
        for place in supervised.nonzero()[:, 0].tolist():
            if place:
                total -= float(logprobs[place - 1, ids[place]])
                count += 1
    return total / count


def check(method: str, model: Path, column: str, optim: str, cell: str, folder: Path) -> None:
    if cell == "yes":
        run_cell(method, model, column, optim, folder)
        return
    with pytest.raises(UsageError, match=REFUSALS[cell]) as refused:
        hb.train(**settings(method, model, column, optim, folder), output_dir=folder / "run")
    assert "\n" not in str(refused.value)
    assert not (folder / "run").exists()


def cells(table: dict[tuple[str, str], str]) -> Iterator[tuple[str, str, str]]:
    return ((row, column, cell) for (row, column), cell in table.items() if cell != "-")


def sample(table: dict[tuple[str, str], str]) -> list[tuple[str, str, str]]:
    """For every method one cell of each kind (yes, refused); columns take turns, so that each is there."""
    found, turn = [], 0
    for method in PRESETS:
        for kind in ("yes", *REFUSALS):
            mine = [entry for entry in cells(table) if entry[0] == method and entry[2] == kind]
            if mine:
                found.append(mine[turn % len(mine)])
                turn += 1
    return found


def default_optim(method: str) -> str:
    return str(PRESETS[method].fields.get("optim", "adamw"))


def default_column(method: str) -> str:
    return "NF4" if PRESETS[method].method == "qlora" else "16 bits"


@pytest.mark.parametrize(("method", "column", "cell"), sample(BASES))
def test_bases(method: str, column: str, cell: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    check(method, bases(column), column, default_optim(method), cell, tmp_path)


@pytest.mark.parametrize(("method", "optim", "cell"), sample(OPTIMIZERS))
def test_optimizers(method: str, optim: str, cell: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    column = default_column(method)
    check(method, bases(column), column, optim, cell, tmp_path)


def every_cell() -> list[tuple[str, str, str, str]]:
    """Method x base x optimizer: refused where one of the tables refuses, the optimizer first: it needs no file."""
    return [
        (method, column, optim, next((cell for cell in (optimizer, base) if cell != "yes"), "yes"))
        for method, column, base in cells(BASES)
        for _, optim, optimizer in (entry for entry in cells(OPTIMIZERS) if entry[0] == method)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "column", "optim", "cell"), every_cell())
def test_every_cell(
    method: str, column: str, optim: str, cell: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    check(method, bases(column), column, optim, cell, tmp_path)
