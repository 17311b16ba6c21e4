"""What is said of claims 10 and 38 for every outcome of the programs that try them."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.compare.claims import judge, judge_all
from halfbyte.compare.memory_claims import FILE, Record, load_records

from .test_claims import report


def outcome(finished: bool, loss: float = 2.5) -> dict[str, Any]:
    return {"finished": True, "data_bytes": 3e9, "loss": loss} if finished else {"finished": False, "message": "no"}


def record(
    adamw: bool = False,
    paged: bool = True,
    long: bool = False,
    loss: float = 2.5,
    layers: tuple[float, ...] = (0.5, 0.6),
) -> Record:
    measured = [100.0 * one for one in layers]
    return Record(Path("m") / FILE, {
        "paged": {
            "model": "tiny", "limit": 2.5e9, "needed": {"adamw": outcome(True), "paged_adamw": outcome(True)},
            "state_is_short": {"adamw": outcome(adamw), "paged_adamw": outcome(paged, loss)},
            "activations": {"adamw": outcome(False), "paged_adamw": outcome(long)},
        },
        "layers": {"model": "tiny", "layer_bytes": 100, "largest_linear_bytes": 30, "halfbyte": measured,
                   "transformers and bitsandbytes": [10.0, 11.0, 12.0]},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("given", "verdict", "words"),
    [
        (record(), "partly", "AdamW runs out of memory and paged AdamW finishes, with the same loss"),
        (record(long=True), "confirmed", "paged AdamW finishes"),
        (record(paged=False), "refuted", "both ran out of memory"),
        (record(adamw=True), "not testable here", "AdamW finished as well"),
    ],
)
def test_paged_optimizers(given: Record, verdict: str, words: str) -> None:
    made = judge(10, [], [given])
    assert made.verdict == verdict
    assert words in made.sentence
    assert made.evidence == str(given.path)


def test_another_loss_is_not_called_the_same() -> None:
    assert "the same loss" not in judge(10, [], [record(loss=2.6)]).sentence


@pytest.mark.parametrize(
    ("layers", "verdict"),
    [
        ((0.5, 0.51, 0.52), "confirmed"),
        ((1.8, 1.9, 2.0), "partly"),  # the other program's are at most one
        ((0.5, 1.5, 1.1), "partly"),
        ((0.5,), "partly"),
    ],
)
def test_decoded_layers(layers: tuple[float, ...], verdict: str) -> None:
    made = judge(38, [], [record(layers=layers)])
    assert made.verdict == verdict
    assert "largest matrix is 0.30" in made.sentence


def test_without_a_record_it_says_what_is_needed(tmp_path: Path) -> None:
    assert judge(38, [], []).sentence.startswith("it needs memory-claims.json")
    assert judge(38, [], []).verdict == "not testable here"
    assert load_records([tmp_path]) == []


def test_records_are_found_below_a_folder(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / FILE).write_text(json.dumps(dict(record().data)))
    (tmp_path / "report.json").write_text(json.dumps(dict(report().data)))
    found = {made.claim: made for made in judge_all([tmp_path])}
    assert found[10].verdict == "partly"
    assert found[10].evidence.endswith(FILE)
