"""The table of formats: its pieces, and the whole of it on a tiny model, stopped and gone on with."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.ops import levels
from halfbyte.quant import BlockWeight


@pytest.fixture
def script(scripts: dict[str, ModuleType]) -> Any:
    return scripts["quant_table"]


@pytest.fixture
def formats(scripts: dict[str, ModuleType]) -> Any:
    return scripts["quant_formats"]


@pytest.fixture
def report(scripts: dict[str, ModuleType]) -> Any:
    return scripts["quant_report"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Article {i}. " + "Words in a row, and more of them. " * 6 + "\n" for i in range(6)))
    return path


# -- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"), [("nf4", 0.0728), ("nf4+dq", 0.0728), ("e2m1", 0.0803), ("int4", 0.0914), ("fp4", 0.0966)]
)
def test_errors_on_normal_weights_are_those_that_are_known(formats: Any, name: str, expected: float) -> None:
    assert formats.normal_error(formats.FORMATS[name], 64, side=1024) == pytest.approx(expected, abs=2e-4)


def test_nearest_levels_is_what_the_operators_do(formats: Any) -> None:
    for name in ("nf4", "int4"):  # their codes are ranks, too
        for shape in ((64, 96), (5, 32), (1, 64)):
            x = torch.randn(shape).bfloat16()
            weight = formats.quantize_as(x, formats.FORMATS[name], 32)
            codes, absmax = formats.nearest_levels(x, levels.levels(name), 32)
            assert torch.equal(codes, weight.codes)
            assert torch.equal(absmax, weight.absmax)


def test_e2m1_is_the_nearest_of_its_levels(formats: Any) -> None:
    x = torch.randn(33, 50)  # a last block that is not full, rows across blocks
    weight = formats.quantize_as(x, formats.FORMATS["e2m1"], 64)
    assert weight.codes.numel() == 33 * 50 // 2
    assert {round(6 * abs(level), 3) for level in weight.table.tolist()} == {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 64)).view(-1, 64)
    grid = blocks.abs().amax(dim=1)[:, None] * weight.table
    best = (blocks[:, :, None] - grid[:, None]).abs().amin(dim=2).flatten()[: x.numel()]
    error = (weight.dequantize(torch.float32) - x).abs().flatten()
    torch.testing.assert_close(error, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["nf4", "nf4+dq", "fp4", "e2m1", "int4"])
def test_bits_come_from_the_file(formats: Any, tmp_path: Path, name: str) -> None:
    weights = {f"layer.{i}.weight": torch.randn(256, 512).bfloat16() for i in range(2)}
    made = {key: formats.quantize_as(x, formats.FORMATS[name], 64) for key, x in weights.items()}
    tensors = {k: t for key, weight in made.items() for k, t in formats.stored(weight, key).items()}
    path = tmp_path / "file.safetensors"
    assert formats.write(path, tensors) == path.stat().st_size
    found = formats.count(path, weights, 2 * 256 * 512)
    assert found.values == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) if name == "nf4+dq" else 4.5, abs=1e-9)
    assert found.values < found.tensors < found.file
    assert found.file_bytes == path.stat().st_size
    assert found.metadata == pytest.approx((found.file - found.values) * 256 * 512 / 8)
    # What was written means the same weight, whatever the format is called there.
    again = BlockWeight.from_bnb(tensors, "layer.1.weight")
    assert torch.equal(again.dequantize(torch.bfloat16), made["layer.1.weight"].dequantize(torch.bfloat16))


# -- text and perplexity ---------------------------------------------------------------------------------------------


def test_windows_are_every_third_article_in_a_fixed_order(
    script: Any, model_folder: Path, text: Path, tmp_path: Path
) -> None:
    tokenizer = load_model(ModelOptions(model=str(model_folder), dtype="float32")).tokenizer
    found = script.windows(text, tokenizer, 3, 16)
    said = tokenizer.decode(found.flatten().tolist())
    assert found.shape[1] == 16
    assert torch.equal(found, script.windows(text, tokenizer, 3, 16))
    everything = script.windows(text, tokenizer, 1, 16)
    assert len(everything) > 2 * len(found) > 4
    assert "Words in a row" in said
    short = tmp_path / "short.txt"
    short.write_text(text.read_text().splitlines()[2])
    assert len(script.windows(short, tokenizer, 1, 16)) < len(found)


def test_nll_is_transformers_own(script: Any, model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = load_model(ModelOptions(model=str(model_folder), dtype="float32")).model
    other = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = torch.randint(3, model.spec.vocab_size, (5, 12), generator=torch.Generator().manual_seed(0))
    found = script.window_nll(model, ids)
    with torch.no_grad():
        logits = other(ids).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(2, ids[:, 1:, None])[..., 0].sum(1)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-3)


def test_a_change_is_paired_over_windows(report: Any) -> None:
    base = {"nll": [10.0, 20.0, 90.0, 5.0]}
    same = report.change({"nll": [value + 0.31 for value in base["nll"]]}, base, 32, 4)
    assert same == pytest.approx([math.expm1(0.01)] * 3)  # the windows differ widely, their difference does not
    share, low, high = report.change({"nll": [11.0, 20.0, 91.0, 5.0]}, base, 2, 4)
    assert share == pytest.approx(math.expm1(0.5))
    assert low < share < high
    assert report.change({"nll": [10.31]}, base, 32, 1)[0] == pytest.approx(math.expm1(0.01))
    assert report.perplexity(base, 11, 2) == pytest.approx(math.exp(30 / 20))


def test_a_table_half_extended_is_over_the_windows_that_all_cells_have(report: Any) -> None:
    cells = [
        {"format": "16bit", "blocksize": None, "nll": [31.0, 62.0, 93.0]},
        {"format": "nf4", "blocksize": 64, "nll": [31.31, 62.31]},
    ]
    model = {"name": "m", "length": 32, "of_windows": 9, "dtype": "float32", "note": "", "cells": cells}
    shown = report._perplexities(model)
    assert "2 of 9 windows of 32 tokens, 62 predicted" in shown
    assert f"16 bits {math.exp(1.5):.3f}" in shown
    assert f"| 64 | {math.exp(1.51):.3f} (+1.01 %: +1.01 to +1.01) |" in shown
    cells.append({"format": "int4", "blocksize": 64, "nll": [31.93, 62.93, 5.0]})
    assert "+2.02 % (+2.02 to +2.02)" in report._pairs(model)


# -- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fewer(script: Any, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two block sizes, a small sample for the errors."""
    monkeypatch.setattr(script, "CELLS", [cell for cell in script.CELLS if cell.blocksize in (None, 32, 64)])
    monkeypatch.setattr(report, "BLOCKSIZES", (32, 64))
    monkeypatch.setattr(script, "normal_error", lambda chosen, size: 0.5)


@pytest.mark.usefixtures("fewer")
def test_a_table_that_was_stopped_goes_on(
    script: Any, model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    words = [str(out), str(model_folder), "--text", str(text), "--length", "16", "--windows", "3", "--name", "tiny"]
    made: list[str] = []
    make = script.make_cell

    def stop_after_four(model: Any, cell: Any) -> Any:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(cell.name)
        return make(model, cell)

    monkeypatch.setattr(script, "make_cell", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        script.main(words)
    assert made == ["16bit", "nf4-64", "nf4+dq-64", "fp4-64"]
    monkeypatch.setattr(script, "make_cell", lambda model, cell: (made.append(cell.name), make(model, cell))[1])
    script.main(words)
    assert sorted(made) == sorted(cell.name for cell in script.CELLS)
    assert len(made) == 11  # none twice
    folder = out / "tiny"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*(f"{name}.json" for name in made), "model.json"])

    script.main([*words[:-4], "--windows", "5", "--name", "tiny"])  # only the two windows more
    cell = json.loads((folder / "nf4-64.json").read_text())
    assert len(cell["nll"]) == 5
    found = json.loads((out / "table.json").read_text())
    assert len(found["models"][0]["cells"]) == 11
    assert found["models"][0]["rest_bytes"] > 0
    shown = (out / "table.md").read_text()
    assert shown in capsys.readouterr().out
    assert "**tiny**: 16 bits" in shown
    assert "5 of" in shown
    for table in shown.split("\n\n"):
        if table.startswith("|"):
            rows = table.strip().splitlines()
            assert len({row.count("|") for row in rows}) == 1
            assert len(rows) == 4

    with pytest.raises(SystemExit, match="other settings"):
        script.main([*words, "--length", "24"])


@pytest.mark.usefixtures("fewer")
def test_it_waits_while_a_file_is_there(
    script: Any, model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = tmp_path / "busy"
    busy.touch()
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            busy.unlink()

    monkeypatch.setattr(script.time, "sleep", sleep)
    words = [str(tmp_path / "out"), str(model_folder), "--text", str(text), "--length", "16", "--windows", "1"]
    script.main([*words, "--wait-while", str(busy)])
    assert len(waited) == 3


def test_a_model_without_a_text_is_an_error(script: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), "model"])
