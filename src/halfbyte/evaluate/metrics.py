"""Scores of generated text against a reference: exact match, token F1, ROUGE-L, accuracy, and a user's own function.

Each metric is a plain function of one prediction and one reference with a result in [0, 1]; a data set's score is the
mean over its rows. Nothing is stemmed and nothing is downloaded.

- exact match: 1 where both texts are equal once surrounding white space is removed. Case, punctuation and inner white
  space count, because that is what a user means by "the same JSON" (SQuAD's lenient comparison is `token_f1` = 1).
- token F1: SQuAD (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250; rules of the official `evaluate-v2.0.py`).
- ROUGE-L: Lin 2004, https://aclanthology.org/W04-1013, sentence level, F-measure with equal weight (beta = 1), as
  Google's `rouge-score` computes it without stemming.
- accuracy: the share of equal labels.
- macro F1: the mean over labels of each label's F1.
"""

import importlib.util
import inspect
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from halfbyte.errors import UsageError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Kana and Han are written without spaces, so each character is a token; any other run of letters and digits is one.
_ROUGE_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


def exact_match(prediction: str, reference: str) -> float:
    """1.0 where the texts are equal after stripping surrounding white space, else 0.0."""
    return float(prediction.strip() == reference.strip())


def squad_normalize(text: str) -> str:
    """SQuAD's `normalize_answer`: lower case, no ASCII punctuation, no a/an/the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the two bags of SQuAD-normalized tokens.

    Where one side has no tokens left, the score is 1.0 if both have none, else 0.0 (SQuAD 2.0's no-answer rule).
    """
    predicted, expected = squad_normalize(prediction).split(), squad_normalize(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    same = sum((Counter(predicted) & Counter(expected)).values())
    return _f_measure(same / len(predicted), same / len(expected))


def rouge_tokens(text: str) -> list[str]:
    """Lower-cased runs of letters and digits; on ASCII text the same tokens as `rouge-score`'s default tokenizer.

    `rouge-score` drops every character outside a-z and 0-9, which empties most languages; here letters are Unicode's.
    """
    return _ROUGE_TOKEN.findall(text.lower())


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of tokens: P = LCS / |prediction|, R = LCS / |reference|."""
    predicted, expected = rouge_tokens(prediction), rouge_tokens(reference)
    if not predicted or not expected:
        return 0.0
    common = _lcs_length(predicted, expected)
    return _f_measure(common / len(predicted), common / len(expected))


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of rows whose predicted label equals the reference label."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions against {len(references)} references")
    if not predictions:
        raise ValueError("accuracy of no rows is undefined")
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(predictions)


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 over the labels that occur in either: 2 right / (said + there), 0 for one that is never right."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions against {len(references)} references")
    if not predictions:
        raise ValueError("F1 of no rows is undefined")
    said, there = Counter(predictions), Counter(references)
    right = Counter(p for p, r in zip(predictions, references, strict=True) if p == r)
    labels = sorted(said.keys() | there.keys())
    return sum(2 * right[label] / (said[label] + there[label]) for label in labels) / len(labels)


def _f_measure(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one bit per token of `a` in a Python integer.

    The bit-parallel recurrence V' = (V + (V & M)) | (V & ~M) of Crochemore et al. 2001 (Inf. Proc. Letters 80:279),
    whose zero bits count the matches: long answers cost microseconds where the quadratic table costs milliseconds.
    """
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        matched = row & positions.get(token, 0)
        row = (row + matched | row - matched) & full
    return len(a) - row.bit_count()


@dataclass(frozen=True)
class Metric:
    """A named score. `corpus` says that `function` takes all predictions and all references and returns one number."""

    name: str
    function: Callable[..., Any]
    corpus: bool = False
    where: str = ""

    def score(self, prediction: str, reference: str, row: str) -> float:
        """One row's score; `row` names the row in messages."""
        return self._call((prediction, reference), f" on {row}")

    def score_all(self, predictions: Sequence[str], references: Sequence[str]) -> float:
        """The score of the whole data set, for a corpus metric."""
        return self._call((list(predictions), list(references)), "")

    def _call(self, arguments: tuple[Any, Any], on: str) -> float:
        try:
            result = self.function(*arguments)
        except Exception as error:
            raise UsageError(f"metric {self.where or self.name} raised {_describe(error)}{on}") from error
        try:
            value = float(result)
        except (TypeError, ValueError):
            raise UsageError(
                f"metric {self.where or self.name} returned {result!r:.80}{on}: it must return a number"
            ) from None
        if not math.isfinite(value):
            raise UsageError(f"metric {self.where or self.name} returned {value}{on}: it must return a finite number")
        return value


EXACT_MATCH = Metric("exact_match", exact_match)
TOKEN_F1 = Metric("token_f1", token_f1)
ROUGE_L = Metric("rouge_l", rouge_l)
ACCURACY = "accuracy"
"""Not a function of two texts: the model's likeliest label against the row's (`halfbyte.evaluate.labels`)."""
PASS_AT_1 = "pass@1"
"""Not a function of two texts either: the answer is run with its row's tests (`halfbyte.evaluate.pass_at_1`)."""
MACRO_F1 = "macro_f1"
"""Of a classifier's classes (`halfbyte.evaluate.classify`)."""
BUILT_IN: dict[str, Metric] = {metric.name: metric for metric in (EXACT_MATCH, TOKEN_F1, ROUGE_L)}


# What `evaluate --json` has at its top level besides the metrics.
_TAKEN = {"loss", "perplexity", "supervised_tokens", "evaluated_rows", "intervals", "rows", "base", "gains"}


def find_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics that compare answers, by name or `file.py:function`; `accuracy` and `pass@1` are none and left out.

    Raises UsageError for an unknown one, and for a user's function whose name is taken: results go by that name.
    """
    found: dict[str, Metric] = {}
    for name in dict.fromkeys(names):
        if name in (ACCURACY, PASS_AT_1):
            continue
        metric = find_metric(name)
        if metric.where and (
            metric.name in found or metric.name in {*BUILT_IN, ACCURACY, MACRO_F1, PASS_AT_1, *_TAKEN}
        ):
            raise UsageError(f"metric '{name}': the name '{metric.name}' is taken, give the function another")
        found[metric.name] = metric
    return list(found.values())


def find_metric(name: str) -> Metric:
    """A built-in metric by its name, or a user's own by `file.py:function`.

    Raises UsageError for anything else, naming the choices.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" in name or name.endswith(".py"):
        return load_metric(name)
    raise UsageError(
        f"unknown metric '{name}': choose from {', '.join([*BUILT_IN, ACCURACY, PASS_AT_1])}, "
        "or give your own as file.py:function"
    )


def load_metric(spec: str) -> Metric:
    """The user's own metric from `file.py:function`. Runs that file, as asked, and nothing else.

    The function takes `(prediction, reference)` and returns a number a row, whose mean is reported; where its first
    parameter is called `predictions` it is called once, with two lists, and returns the data set's number.
    Raises UsageError where the file, the function or its parameters are not as described.
    """
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text).expanduser()
    if not path_text or not name.isidentifier():
        raise UsageError(f"metric '{spec}' is not of the form file.py:function")
    if not path.is_file():
        raise UsageError(f"metric '{spec}': there is no file {path}")
    module = _run_file(path)
    function = getattr(module, name, None)
    if function is None:
        choices = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        found = f"it has {', '.join(choices)}" if choices else "it has no functions"
        raise UsageError(f"{path} has no function '{name}': {found}")
    if not callable(function):
        raise UsageError(f"'{name}' in {path} is not a function")
    return Metric(name, function, corpus=_wants_lists(function, spec), where=spec)


def _run_file(path: Path) -> ModuleType:
    name = f"halfbyte_user_metric_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"metric file {path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look their module up by name while the file runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = f" (line {error.lineno})" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UsageError(f"metric file {path} failed to load{line}: {_describe(error)}") from error
    return module


def _wants_lists(function: Callable[..., Any], spec: str) -> bool:
    try:
        signature = inspect.signature(function)
        signature.bind("prediction", "reference")
    except (TypeError, ValueError):
        raise UsageError(
            f"metric '{spec}' must take two arguments: (prediction, reference) for one row, "
            "or (predictions, references) for the whole data set"
        ) from None
    return next(iter(signature.parameters), "") == "predictions"


def _describe(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
