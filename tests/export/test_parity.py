"""The gate: what behaves as trained passes, and whatever is broken on purpose fails and says why."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from halfbyte.data import LabelChoice
from halfbyte.evaluate.metrics import find_metrics
from halfbyte.export import parity
from halfbyte.export.card import parity_section
from halfbyte.export.parity import BOUNDS, HeldOutRow, ParityReport, bounds_of, check, describe_difference
from halfbyte.export.servers import LlamaCppServer, TrainedModel
from tests.export.served_models import BOS, EOS, Tuned, make_tuned, one_thread, tokenizer

__all__ = ["one_thread"]

pytest.importorskip("llama_cpp", reason="llama-cpp-python is the `parity` extra")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return make_tuned(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def model(tuned: Tuned) -> TrainedModel:
    return tuned.model()


def in_llama_cpp(tuned: Tuned, model: TrainedModel, path: Path, kind: str = "f32", rows: int = 6) -> ParityReport:
    served = LlamaCppServer(path, 256)
    try:
        return check(model, served, tuned.rows(rows), tuned.question, kind)
    finally:
        served.close()


def test_the_same_model_passes(tuned: Tuned, model: TrainedModel, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    served = LlamaCppServer(tuned.gguf(tmp_path / "m.gguf"), 256)
    question = replace(tuned.question, metrics=find_metrics(["exact_match", "token_f1"]))
    report = check(model, served, tuned.rows(), question, "f32", on_progress=lambda *args: heard.append(args))
    served.close()
    assert report.passed is True
    assert (report.prompts, report.same_prompts, report.difference) == (6, 6, "")
    assert report.tokens == sum(map(sum, (row.supervised for row in tuned.rows())))
    assert 0 <= report.mean_kl <= report.max_kl < 1e-5
    assert report.served_loss == pytest.approx(report.trained_loss, abs=1e-5)
    assert report.strength == pytest.approx(1, abs=1e-3)
    assert report.base_kl is not None
    assert report.base_kl > 0.1
    assert (report.answers, report.same_answers, report.agreement) == (6, 6, 1.0)
    assert set(report.metrics) == {"exact_match", "token_f1"}
    assert {what for what, _, _ in heard} == {"prompts", "log-probabilities", "answers"}
    assert report.lines()[0].startswith("passed: compared with the trained model in llama.cpp")
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["passed"] is True
    assert written["bounds"]["kl"] == 1e-4
    assert written["trained_perplexity"] == pytest.approx(written["served_perplexity"], rel=1e-4)


def test_16_bit_weights_pass_as_such_and_not_as_exact(tuned: Tuned, model: TrainedModel, tmp_path: Path) -> None:
    path = tuned.gguf(tmp_path / "m.gguf", kind="BF16")
    assert in_llama_cpp(tuned, model, path, "bf16").passed
    report = in_llama_cpp(tuned, model, path, "f32")
    assert report.passed is False
    assert any("KL" in failure for failure in report.failures)


def test_a_second_bos_in_the_template_fails(tuned: Tuned, model: TrainedModel, tmp_path: Path) -> None:
    path = tuned.gguf(tmp_path / "m.gguf", template="{{ bos_token }}" + tuned.template.source)
    report = in_llama_cpp(tuned, model, path)
    assert report.passed is False
    (failure,) = report.failures
    assert "6 of 6 prompts" in failure
    assert "rows.jsonl:1: the served prompt begins with BOS twice, the trained one once" in failure
    assert report.mean_kl < 1e-5  # the weights are right: they are compared on the trained ids


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no') }}", "cannot render it: no"),
        ("{{ messages[-1].content }}", "another text from token 1 on: trained with '<|im_start|>user"),
    ],
)
def test_another_template_fails(
    tuned: Tuned, model: TrainedModel, tmp_path: Path, template: str | None, message: str
) -> None:
    report = in_llama_cpp(tuned, model, tuned.gguf(tmp_path / "m.gguf", template=template), rows=2)
    assert report.passed is False
    assert message in report.failures[0]


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["f32", "q4_k_m"])
def test_a_wrong_scale_of_the_adapter_fails_even_at_4_bits(
    tuned: Tuned, model: TrainedModel, tmp_path: Path, scale: float, kind: str
) -> None:
    report = in_llama_cpp(tuned, model, tuned.gguf(tmp_path / "m.gguf", scale=scale), kind)
    assert report.passed is False
    assert any("its scale is wrong, or a part of it is missing" in failure for failure in report.failures)
    assert report.strength is not None
    assert (report.strength < 0.8) if scale < 1 else (report.strength > 1.2)


def test_the_untuned_base_is_as_far_away_as_it_is(tuned: Tuned, model: TrainedModel, tmp_path: Path) -> None:
    report = in_llama_cpp(tuned, model, tuned.gguf(tmp_path / "m.gguf", scale=0.0))
    assert report.base_kl == pytest.approx(report.mean_kl, rel=1e-3)
    assert any("have lost what was learned" in failure for failure in report.failures) == (
        report.mean_kl >= report.base_kl
    )


def test_other_weights_fail(tuned: Tuned, model: TrainedModel, tmp_path: Path) -> None:
    other = make_tuned(tmp_path / "other", "qwen2-tied")
    report = in_llama_cpp(tuned, model, other.gguf(tmp_path / "m.gguf"), "q4_0")
    assert report.passed is False
    assert any(failure.startswith("the answers' tokens have a KL") for failure in report.failures)
    assert any("greedy answers agree on" in failure for failure in report.failures)


def test_classification_is_compared_by_labels(tuned: Tuned, model: TrainedModel, tmp_path: Path) -> None:
    words = (" a", " be")
    labels = [
        LabelChoice(i, word, (*tokenizer()(word, add_special_tokens=False)["input_ids"], EOS))
        for i, word in enumerate(words)
    ]
    rows = [replace(row, prompt=f"text {i}\nLabel:", label=i % 2) for i, row in enumerate(tuned.rows(4))]
    served = LlamaCppServer(tuned.gguf(tmp_path / "m.gguf"), 256)
    report = check(model, served, rows, replace(tuned.question, labels=labels), "f32")
    single = [replace(label, input_ids=label.input_ids[1:2]) for label in labels]
    quick = check(model, served, rows, replace(tuned.question, labels=single), "f32")
    served.close()
    for found in (report, quick):
        assert found.passed
        assert (found.answers, found.same_answers) == (4, 4)
        assert found.metrics["accuracy"][0] == found.metrics["accuracy"][1]


def test_rows_of_plain_text_have_no_prompt(tuned: Tuned, model: TrainedModel, tmp_path: Path) -> None:
    rows = [HeldOutRow("a:1", None, None, [BOS, *range(40, 80)], [False] + [True] * 40)]
    served = LlamaCppServer(tuned.gguf(tmp_path / "m.gguf"), 256)
    report = check(model, served, rows, tuned.question, "f32")
    nothing = check(model, served, [], tuned.question, "f32")
    unlearned = check(model, served, [replace(rows[0], supervised=[False] * 41)], tuned.question, "f32")
    served.close()
    assert report.passed
    assert (report.prompts, report.answers, report.tokens) == (0, 0, 40)
    assert nothing.passed is None
    assert nothing.lines() == ["not compared: there are no held-out rows"]
    assert unlearned.tokens == 0


def test_only_the_last_tokens_of_a_long_row_are_compared(
    tuned: Tuned, model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "MAX_POSITIONS", 10)
    rows = [HeldOutRow("a:1", None, None, [BOS, *range(40, 80)], [False] + [True, False] * 20)]
    served = LlamaCppServer(tuned.gguf(tmp_path / "m.gguf"), 256)
    report = check(model, served, rows, tuned.question, "f32")
    served.close()
    assert report.tokens == 6  # of the last 10 positions, those that are learned
    assert report.passed


def test_differences_have_names() -> None:
    words = tokenizer()

    def ids(text: str) -> list[int]:
        return list(words(text, add_special_tokens=False)["input_ids"])

    for ours, theirs, message in (
        ("<bos>a", "<bos><bos>a", "begins with BOS twice"),
        ("a", "<bos>a", "the served prompt begins with BOS, the trained one does not"),
        ("<bos>a", "a", "the trained prompt begins with BOS, the served one does not"),
        ("ab<eos>", "ab", "lacks the trained one's end, '<eos>'"),
        ("ab", "ab<eos>", "goes on behind the trained one's end with '<eos>'"),
        ("user: hi", "USER: hi", "another text from token 0 on: trained with 'user: hi', served 'USER: hi'"),
    ):
        assert message in describe_difference(ids(ours), ids(theirs), words)
    words.add_tokens(["hi"])
    assert "the same text is tokenized otherwise from token 1 on" in describe_difference(
        ids("-hi"), [12, 71, 72], words
    )


def test_bounds_grow_with_what_is_lost() -> None:
    order = [bounds_of(name) for name in ("f32", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")]
    for tight, loose in pairwise(order):
        assert tight.kl < loose.kl
        assert tight.loss < loose.loss
        assert tight.strength < loose.strength
        assert tight.greedy > loose.greedy
        assert tight.metric < loose.metric
    assert all(bounds.reason for bounds in BOUNDS.values())
    assert bounds_of("F32", exact_reference=False) == bounds_of("bf16")


def test_a_fall_of_the_metric_fails_but_for_one_row() -> None:
    report = ParityReport(
        kind="q8_0", answers=20, agreement=1.0, bounds=bounds_of("q8_0"), metrics={"exact_match": (0.9, 0.85)}
    )
    assert parity._judge(report) == []
    (failure,) = parity._judge(replace(report, metrics={"exact_match": (0.9, 0.8)}))
    assert failure == "exact_match falls from 0.9000 to 0.8000, more than 0.02 and one row"


def test_numbers_that_are_none_fail_and_are_valid_json(tuned: Tuned) -> None:
    report = ParityReport(kind="f32", mean_kl=float("nan"), served_loss=float("inf"), tokens=3, bounds=bounds_of("f32"))
    failures = parity._judge(report)
    assert len(failures) == 2
    written = json.dumps(replace(report, failures=tuple(failures)).to_json(), allow_nan=False)
    assert json.loads(written)["mean_kl"] is None


def test_the_card_says_what_was_found(tuned: Tuned, model: TrainedModel, tmp_path: Path) -> None:
    good = in_llama_cpp(tuned, model, tuned.gguf(tmp_path / "m.gguf"), rows=2)
    bad = replace(good, failures=("it differs",))
    skipped = ParityReport(kind="q4_0", skipped="no llama.cpp")
    files = [
        {"file": name, "kind": "f32", "command": "", "parity": found.to_json()}
        for name, found in (("a.gguf", good), ("b.gguf", bad), ("", skipped))
    ]
    text = parity_section({"files": files})
    assert "| a.gguf | f32 | passed | 2 of 2 |" in text
    assert "| b.gguf | f32 | **failed** |" in text
    assert "- b.gguf: it differs" in text
    assert "- this folder was not compared: no llama.cpp" in text


def test_a_tie_ends_the_comparison_of_an_answer(tuned: Tuned, model: TrainedModel) -> None:
    ids = list(tuned.row(0).input_ids[:20])
    order = model.logprobs(ids, 19)[0].sort(descending=True)
    first, second, last = (int(order.indices[i]) for i in (0, 1, -1))
    close = float(order.values[0] - order.values[1]) < parity.TIE
    assert parity._is_tie(model, ids, [first], [second], ()) == close
    assert not parity._is_tie(model, ids, [first], [last], ())
    assert parity._is_tie(model, ids, [first], [], {first})  # it ended with the likeliest token
    assert not parity._is_tie(model, ids, [first], [], {last})
    assert not parity._is_tie(model, ids, [first], [], ())
