"""What became of the rows, as plain values: what `halfbyte data check` shows and `prepare` reports."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from halfbyte.data.examples import Encoded, Example
from halfbyte.data.records import BadRow
from halfbyte.errors import UsageError

HISTOGRAM_BINS = 12


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens a row: extremes, quantiles, and a histogram (`edges` has one entry more than `counts`)."""

    shortest: int
    median: int
    p95: int
    longest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        values = np.asarray(lengths, dtype=np.int64)
        low, high = int(values.min()), int(values.max())
        bins = min(HISTOGRAM_BINS, high - low + 1)
        edges = np.unique(np.linspace(low, high + 1, bins + 1).round().astype(np.int64))
        counts, _ = np.histogram(values, edges)
        median, p95 = np.quantile(values, [0.5, 0.95], method="nearest")
        return cls(low, int(median), int(p95), high, tuple(edges.tolist()), tuple(counts.tolist()))


@dataclass(frozen=True)
class Audit:
    """Counts over training and held-out rows. Rows are examples: of a long `text`, every window is one.

    duplicates   training or held-out rows with the same tokens as an earlier row of the data
    leaked       training rows that are also in `eval_data`
    The other counts are explained at `examples.Encoded`.
    """

    data_format: str
    template: str
    rows_train: int
    rows_eval: int
    tokens_train: int
    supervised_train: int
    lengths: Lengths
    truncated: int
    tokens_cut: int
    duplicates: int
    leaked: int
    double_bos: int
    missing_bos: int
    unsupervised_eos: int
    prompt_mismatch: int
    specials_in_text: int
    glued: int
    labels: dict[str, int] = field(default_factory=dict)
    bad: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values, with the warnings in words."""
        return asdict(self) | {"warnings": self.warnings()}

    def warnings(self) -> list[str]:
        """What a user should look at before training, a line each."""
        cases = [
            (len(self.bad), "set aside as unusable"),
            (self.truncated, f"cut to max_seq_length ({self.tokens_cut:,} tokens lost)"),
            (self.unsupervised_eos, "answers not ended by a special token: the model does not learn to stop there"),
            (self.double_bos, "began with two BOS tokens; one was dropped"),
            (self.missing_bos, "without the BOS that this tokenizer puts first: the chat template does not print it"),
            (self.prompt_mismatch, "trained after another prompt than the template gives at inference"),
            (self.specials_in_text, "with text that spells out a special token, which becomes the real one"),
            (self.glued, "with no space or newline between prompt and completion"),
            (self.duplicates, "the same as an earlier row"),
            (self.leaked, "of the training data are also in eval_data"),
        ]
        return [f"{count:,} row{'' if count == 1 else 's'}: {text}" for count, text in cases if count]


def audit(
    train: Sequence[Example],
    held_out: Sequence[Example],
    encoded: Sequence[Encoded],
    *,
    words: Sequence[str],
    leaked: int,
    duplicates: int,
    data_format: str,
    template: str,
    notes: Sequence[str],
    bad: Sequence[BadRow],
) -> Audit:
    """Count. Raises UsageError if nothing is supervised."""
    rows = [*train, *held_out]
    supervised = sum(example.supervised_tokens for example in train)
    if not supervised:
        raise UsageError("nothing in this data set is supervised, so there is nothing to learn")
    labels = Counter(words[example.label] for example in rows if example.label is not None)

    def total(name: str) -> int:
        return sum(getattr(part, name) for part in encoded)

    return Audit(
        data_format=data_format,
        template=template,
        rows_train=len(train),
        rows_eval=len(held_out),
        tokens_train=sum(map(len, train)),
        supervised_train=supervised,
        lengths=Lengths.of([len(example) for example in rows]),
        truncated=sum(example.truncated > 0 for example in rows),
        tokens_cut=sum(example.truncated for example in rows),
        duplicates=duplicates,
        leaked=leaked,
        double_bos=total("double_bos"),
        missing_bos=total("missing_bos"),
        unsupervised_eos=total("unsupervised_eos"),
        prompt_mismatch=total("prompt_mismatch"),
        specials_in_text=total("specials_in_text"),
        glued=total("glued"),
        labels=dict(sorted(labels.items())),
        bad=tuple(bad),
        notes=tuple(notes),
    )
