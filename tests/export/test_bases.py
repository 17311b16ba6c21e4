"""Candidates for a merge: scored as the written folder would be, one model at a time."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import DoesNotFit
from halfbyte.export import bases
from halfbyte.export.bases import Candidate, Merging, NotAsTrained, ScoreTable, score_candidates, unmerged_says
from halfbyte.export.deltas import read_deltas
from halfbyte.export.merge import MergeOptions, merge
from halfbyte.export.score import HeldOut, compare, listen
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from halfbyte.quant import QuantOptions
from tests.export.conftest import Trained, make_adapter, make_trained, save_base

NF4 = QuantOptions(quant_type="nf4", blocksize=64, double_quant=False)
COARSE = QuantOptions(quant_type="int4", blocksize=4096, double_quant=False)
ALL = [Candidate(base, again) for again in (False, True) for base in ("16bit", "dequantized")]


def merging(trained: Trained, quant: QuantOptions | None, dtype: torch.dtype = torch.bfloat16) -> Merging:
    options = ModelOptions(model=str(trained.folder), dtype="float32")
    return Merging(options, open_source(options.model), quant, read_deltas(trained.adapter), dtype)


def scored(made: Merging, rows: HeldOut, candidates: list[Candidate] = ALL, max_kl: float = 0.05) -> ScoreTable:
    return score_candidates(made, rows, candidates, max_kl, answer_tokens=6)


@pytest.mark.parametrize("name", ["llama3-gqa", "gemma3-small", "gpt2"])
def test_a_score_is_that_of_the_written_folder(name: str, tmp_path: Path, rows: HeldOut) -> None:
    trained = make_trained(name, tmp_path, COARSE)
    made = merging(trained, COARSE)
    table = scored(made, rows)
    unmerged = unmerged_says(made, lambda model, tokenizer: listen(model, tokenizer, rows, 6))
    for candidate, score in table.scores:
        folder = tmp_path / candidate.base
        if not folder.exists():
            options = MergeOptions(base=candidate.base, verify=False)
            merge(made.model, trained.adapter, folder, COARSE, options)
        quant = COARSE if candidate.requantized else None
        loaded: Any = load_model(ModelOptions(model=str(folder)), quant, torch.float32, "cpu")
        said = listen(loaded.model, loaded.tokenizer, rows, 6)
        expected = compare(candidate.name, said, unmerged, rows)
        assert score.kl == pytest.approx(expected.kl, abs=1e-9), candidate
        assert (score.perplexity, score.same_answers) == (expected.perplexity, expected.same_answers)


def test_the_base_that_was_trained_on_is_nearest(llama: Trained, rows: HeldOut) -> None:
    table = scored(merging(llama, COARSE, torch.float32), rows, ALL[:2])
    found = {candidate.name: score for candidate, score in table.scores}
    assert found["dequantized"].kl < 1e-6
    assert found["dequantized"].same_answers == 1
    assert found["16bit"].kl > 0.05  # what was quantized so coarsely is another model
    assert table.chosen == Candidate("dequantized")
    assert table.unmerged.kl == 0
    assert found["dequantized"].model_bytes > 2 * table.unmerged.model_bytes
    table.require_close()


def test_what_is_served_in_4_bits_decides_where_it_is_asked_for(llama: Trained, rows: HeldOut) -> None:
    table = scored(merging(llama, COARSE), rows)
    assert table.chosen.requantized
    assert table.best.kl == min(score.kl for candidate, score in table.scores if candidate.requantized)
    with pytest.raises(NotAsTrained, match=r"requantized\) .*KL .* nats a token on 8 held-out rows, and 0\.05 is"):
        table.require_close()
    assert [candidate["name"] for candidate in table.to_json()["candidates"]] == [c.name for c in ALL]
    assert json.loads(json.dumps(table.to_json()))["chosen"] == table.chosen.name


def test_quantizing_again_erases_a_small_update_from_the_dequantized_base(tmp_path: Path, rows: HeldOut) -> None:
    reference = save_base("llama3-gqa", tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", NF4, size=0.005)  # about 1 % of the weights
    made = merging(Trained(tmp_path / "base", reference, adapter), NF4, torch.float32)
    found = {candidate.name: score.kl for candidate, score in scored(made, rows).scores}
    tuned = unmerged_says(made, lambda model, tokenizer: listen(model, tokenizer, rows, 6))
    bare = unmerged_says(replace(made, deltas={}), lambda model, tokenizer: listen(model, tokenizer, rows, 6))
    untuned = compare("untuned", bare, tuned, rows).kl
    assert found["dequantized"] < 0.05 * untuned
    assert found["dequantized, requantized"] > 0.5 * untuned


def test_models_are_in_memory_one_at_a_time(llama: Trained, rows: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def load(*args: Any, **keywords: Any) -> Any:
        assert not [ref for ref in alive if ref() is not None], "another model is still held"
        loaded = load_model(*args, **keywords)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(bases, "load_model", load)
    scored(merging(llama, COARSE), rows)
    assert len(alive) == 5


def test_too_little_memory_is_said_before_anything_is_loaded(
    llama: Trained, rows: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(bases.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(DoesNotFit, match="give --base dequantized to merge without scores"):
        scored(merging(llama, COARSE), rows)
