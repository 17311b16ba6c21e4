"""The audit's numbers and what `data check` prints."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from halfbyte.data import Audit, DataOptions, Prepared, prepare, render_check
from halfbyte.data.audit import Lengths, audit
from halfbyte.data.check import token_text
from halfbyte.errors import UsageError
from tests.data.conftest import make_bpe
from tests.data.test_packing import example

WriteRows = Callable[..., Path]


def ready(path: Path, **options: Any) -> Prepared:
    return prepare(DataOptions.model_validate({"data": str(path)} | options), make_bpe(), 42)


def shown(prepared: Prepared, **console: Any) -> str:
    buffer = io.StringIO()
    render_check(prepared, make_bpe(), Console(file=buffer, width=100, **console))
    return buffer.getvalue()


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_the_histogram_counts_every_row(values: list[int]) -> None:
    lengths = Lengths.of(values)
    assert (lengths.shortest, lengths.longest) == (min(values), max(values))
    assert len(lengths.edges) == len(lengths.counts) + 1
    expected = [
        sum(low <= value < high for value in values)
        for low, high in zip(lengths.edges, lengths.edges[1:], strict=False)
    ]
    assert list(lengths.counts) == expected
    assert sum(lengths.counts) == len(values)
    assert lengths.shortest <= lengths.median <= lengths.p95 <= lengths.longest


def test_counts_agree_with_the_batches(write_rows: WriteRows) -> None:
    rows = [{"instruction": f"q {number}", "output": "a" * number} for number in range(1, 30)]
    found = ready(write_rows([*rows, rows[0], rows[1]]), max_seq_length=40)
    report = found.audit
    assert report.rows_train + report.rows_eval == 31
    assert report.tokens_train == sum(map(len, found.train))
    assert report.supervised_train == sum(int(np.sum(item.supervised)) for item in found.train)
    assert report.duplicates == 2
    assert report.truncated == sum(item.truncated > 0 for item in [*found.train, *found.eval])
    assert any(line.startswith("2 rows: the same as an earlier row") for line in report.warnings())


def test_an_audit_is_json(write_rows: WriteRows) -> None:
    found = ready(write_rows([*[{"prompt": f"p{n}", "completion": "c"} for n in range(40)], "{"]))
    value = json.loads(json.dumps(found.audit.as_dict()))
    assert value["glued"] == 40
    assert value["bad"][0]["line"] == 41
    assert "40 rows: with no space or newline between prompt and completion" in value["warnings"]


def test_nothing_supervised_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing in this data set is supervised"):
        audit(
            [example([1, 2], [False, False])],
            [],
            [],
            words=[],
            leaked=0,
            duplicates=0,
            data_format="text",
            template="none",
            notes=[],
            bad=[],
        )


def test_without_colours_supervised_tokens_stand_in_brackets(write_rows: WriteRows) -> None:
    rows: list[Any] = [{"instruction": f"What is {n}?", "output": f"It is\n{n}."} for n in range(40)]
    text = shown(ready(write_rows([*rows, "{"]), eval_split=1))
    assert "alpaca" in text
    assert "plain (the default: the tokenizer has no template of its own)" in text
    assert "39 to train on, 1 held out" in text
    assert "⟦It is⏎" in text
    assert ".<|im_end|>⟧" in text
    assert "rows.jsonl:41: not valid JSON" in text.replace("\n", "")
    assert text.count("supervised ─") == 3
    assert "█" in text


def test_with_colours_there_are_no_brackets(write_rows: WriteRows) -> None:
    rows = [{"instruction": f"[bold]{n}[/bold]", "output": "yes"} for n in range(10)]
    text = shown(ready(write_rows(rows)), force_terminal=True, color_system="standard")
    assert "⟦" not in text
    styled = re.findall(r"\x1b\[30;(?:42|102)m(.*?)\x1b", text)
    assert "".join(styled) == "yes<|im_end|>" * 3
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "[bold]0[/bold]⏎" in plain  # a row's own brackets are text, not markup


def test_what_a_terminal_would_act_upon_is_spelled_out(write_rows: WriteRows) -> None:
    rows = [{"instruction": f"q{n}", "output": "a\x1b[31mred\x07\r"} for n in range(10)]
    text = shown(ready(write_rows(rows)))
    assert "\x1b" not in text
    assert r"a\x1b[31mred\x07\r" in text


def test_words_keep_their_spaces(write_rows: WriteRows, sp: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"q{n} and the answer", "completion": " is positive"} for n in range(10)]
    found = prepare(DataOptions(data=str(write_rows(rows))), sp, 42)
    assert token_text(found.train[0], sp, coloured=False).plain.startswith("<s> q0 and the answer⟦ is positive</s>⟧")


def test_long_rows_are_cut_on_the_screen(write_rows: WriteRows) -> None:
    rows = [{"instruction": f"q{n}", "output": "é?" * 600} for n in range(3)]
    text = shown(ready(write_rows(rows)))
    assert "more tokens" in text
    assert len(text) < 15_000


def test_warnings_are_empty_for_clean_data() -> None:
    counts = dict.fromkeys(
        ["truncated", "tokens_cut", "duplicates", "leaked", "double_bos", "missing_bos", "unsupervised_eos",
         "prompt_mismatch", "specials_in_text", "glued"], 0,
    )  # fmt: skip
    clean = Audit("text", "none", 1, 0, 2, 1, Lengths.of([2]), **counts)
    assert clean.warnings() == []
