"""benchmarks/compare_study/: every file is a comparison, and GSM8K's answers are read as its authors do."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from halfbyte.compare.options import load_request
from halfbyte.compare.variants import variants_of

STUDY = Path(__file__).parents[2] / "benchmarks" / "compare_study"


@pytest.mark.parametrize("file", sorted(STUDY.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_of_the_study_is_a_comparison(file: Path) -> None:
    request = load_request(file, {"model": "m.gguf", "data": "rows.jsonl"})
    made = variants_of(request)
    assert len(made) >= 2
    assert request.options.title
    shared = [v for v in made if "requantize" not in v.fields]
    assert len(shared) >= 2
    assert all(v.config.requantize == (v.config.method == "qlora") for v in shared)
    page = (STUDY.parents[1] / "docs" / "compare-study.md").read_text()
    assert f"benchmarks/compare_study/{file.name} " in page


@pytest.fixture
def gsm8k() -> Any:
    spec = importlib.util.spec_from_file_location("gsm8k", STUDY / "gsm8k.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("6 x 12 = 72\n#### 72", 1.0), ("#### 72.0", 1.0), ("#### $72", 1.0), ("#### 7\nno:\n####72", 1.0), ("72", 0.0),
        ("#### 1,072", 0.0), ("####", 0.0), ("", 0.0), ("#### -72", 0.0),
    ],
)  # fmt: skip
def test_the_final_answer_is_the_number_after_the_marks(gsm8k: Any, answer: str, score: float) -> None:
    assert gsm8k.gsm8k_exact_match(answer, "Half of 144 is <<144/2=72>>72.\n#### 72") == score
    assert gsm8k.final_answer("#### 1,072.5") == 1072.5
