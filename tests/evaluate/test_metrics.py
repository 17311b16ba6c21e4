"""Metrics against hand-computed cases and the values that rouge-score and SQuAD's script print."""

import random
from pathlib import Path

import pytest

from halfbyte.errors import UsageError
from halfbyte.evaluate.metrics import (
    Metric,
    accuracy,
    exact_match,
    find_metric,
    find_metrics,
    load_metric,
    rouge_l,
    rouge_tokens,
    token_f1,
)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ('{"a": 1}\n', '{"a": 1}', 1.0),
        ('{"a": 1}', '{"a":1}', 0.0),
        ("Paris", "paris", 0.0),
        ("", " ", 1.0),
    ],
)
def test_exact_match(prediction: str, reference: str, expected: float) -> None:
    assert exact_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("in Paris", "Paris", 2 / 3),  # P = 1/2, R = 1
        ("a b c d", "b c x", 4 / 6),  # "a" is an article: 2 of 3 predicted, 2 of 3 expected
        ("red red blue", "red green", 0.4),  # one red counts: P = 1/3, R = 1/2
        ("the", "an", 1.0),  # nothing left on either side
        ("the", "cat", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_token_f1_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected)


# Values of `compute_f1` in transformers 4.46.3's copy of SQuAD 2.0's script (3,000 random pairs agreed when written).
@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("3.14 mat, sat. U.S. mat, 3.14", "-- A cat's sat.", 0.25),
        ("cat's A 3.14 Zürich the -- sat.", "3.14 mat,", 0.3333333333333333),
        ("mat, U.S. the -- -- cat cat's", "", 0.0),
        ("--", "cat an Zürich an 3.14 U.S. --", 0.0),
        ("A 3.14", "-- U.S. Zürich an", 0.0),
    ],
)
def test_token_f1_is_squads(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected)


# Values printed by rouge-score 0.1.2, RougeScorer(["rougeL"], use_stemmer=False); the two "police" rows are Lin 2004's.
@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat on the mat", "the cat was on a mat", 0.6666666666666666),
        ("The quick-brown fox, jumps!", "a quick brown fox jumped over", 0.5454545454545454),
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("a b c d e f g", "g f e d c b a", 0.14285714285714285),
        ("x", "", 0.0),
        ("hello_world 42nd", "hello world 42nd st.", 0.8571428571428571),
        ("one one one", "one", 0.5),
        ("The answer is 3.14159", "3.14159 is the answer", 0.4000000000000001),
    ],
)
def test_rouge_l_is_rouge_score(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_reads_other_scripts() -> None:
    assert rouge_tokens("Grüße, 東京タワー") == ["grüße", "東", "京", "タ", "ワ", "ー"]
    assert rouge_l("東京", "東京都") == pytest.approx(0.8)  # P = 1, R = 2/3


def test_lcs_against_the_quadratic_table() -> None:
    draw = random.Random(1)
    for _ in range(200):
        a, b = (draw.choices("abcd", k=draw.randint(1, 90)) for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        expected = 2 * table[-1][-1] / (len(a) + len(b))  # F = 2 LCS / (|a| + |b|)
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_accuracy() -> None:
    assert accuracy(["a", "b", "b"], ["a", "b", "a"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no rows"):
        accuracy([], [])


def write(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def test_own_metric_row_by_row(tmp_path: Path) -> None:
    path = write(tmp_path, "def length(prediction, reference):\n    return len(prediction) == len(reference)\n")
    metric = find_metric(f"{path}:length")
    assert (metric.name, metric.corpus) == ("length", False)
    assert metric.score("abc", "xyz", "row 1") == 1.0


def test_own_metric_over_the_data_set(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "from dataclasses import dataclass\n@dataclass\nclass Counts:\n    right: int\n"
        "def share(predictions, references):\n"
        "    return Counts(sum(map(str.__eq__, predictions, references))).right / len(predictions)\n",
    )
    metric = load_metric(f"{path}:share")
    assert metric.corpus
    assert metric.score_all(["a", "b"], ["a", "c"]) == 0.5


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("def f(a, b): return 1", ":g", "has no function 'g': it has f"),
        ("x = 3", ":g", "it has no functions"),
        ("x = 3", ":x", "'x' in .* is not a function"),
        ("def f(a): return 1", ":f", "must take two arguments"),
        ("def f(a, b, c): return 1", ":f", "must take two arguments"),
        ("def f(a, b) return 1", ":f", r"failed to load \(line 1\): SyntaxError"),
        ("import no_such_module_at_all", ":f", "failed to load: ModuleNotFoundError"),
        ("", "", "not of the form file.py:function"),
        ("", ":", "not of the form file.py:function"),
    ],
)
def test_own_metric_that_does_not_load(tmp_path: Path, text: str, suffix: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_metric(write(tmp_path, text) + suffix)


def test_names_of_results_are_not_taken_twice(tmp_path: Path) -> None:
    path = write(tmp_path, "def f(a, b): return 1\ndef loss(a, b): return 1\ndef rouge_l(a, b): return 1\n")
    assert [m.name for m in find_metrics(["rouge_l", "accuracy", f"{path}:f", "rouge_l"])] == ["rouge_l", "f"]
    for name in ("loss", "rouge_l"):
        with pytest.raises(UsageError, match=f"the name '{name}' is taken"):
            find_metrics([f"{path}:{name}"])
    (tmp_path / "b.py").write_text("def f(a, b): return 2")
    with pytest.raises(UsageError, match="the name 'f' is taken"):
        find_metrics([f"{path}:f", f"{tmp_path / 'b.py'}:f"])


def test_missing_metric_file_and_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        find_metric(f"{tmp_path / 'nowhere.py'}:f")
    with pytest.raises(UsageError, match="unknown metric 'bleu': choose from exact_match, token_f1, rouge_l, accuracy"):
        find_metric("bleu")
    (tmp_path / "metric.txt").write_text("def f(a, b): return 1")
    with pytest.raises(UsageError, match=r"name must end in \.py"):
        find_metric(f"{tmp_path / 'metric.txt'}:f")


@pytest.mark.parametrize(
    ("result", "message"),
    [("'high'", "returned 'high' on row 7"), ("float('nan')", "returned nan on row 7"), ("1 / 0", "ZeroDivisionError")],
)
def test_own_metric_that_fails_names_the_row(tmp_path: Path, result: str, message: str) -> None:
    metric = load_metric(write(tmp_path, f"def f(prediction, reference):\n    return {result}\n") + ":f")
    with pytest.raises(UsageError, match=message):
        metric.score("a", "b", "row 7")


def test_a_metric_is_a_value() -> None:
    assert Metric("exact_match", exact_match) == find_metric("exact_match")
