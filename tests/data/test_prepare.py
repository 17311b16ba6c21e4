"""From options to examples: what is held out, what is counted, what stops the run, and what the fingerprint covers."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from halfbyte.data import DataOptions, Prepared, load_rows, prepare
from halfbyte.data.prepare import hold_out
from halfbyte.data.records import Preference
from halfbyte.errors import UsageError
from tests.data.conftest import make_bpe
from tests.data.test_packing import example

WriteRows = Callable[..., Path]


def qa(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"question {number}", "output": f"answer {number}"} for number in range(count)]


def labelled(count: int, **extra: Any) -> list[dict[str, Any]]:
    return [{"sentence": f"film {number}", "label": number % 2, **extra} for number in range(count)]


def ready(path: Path | None, seed: int = 42, **options: Any) -> Prepared:
    data = {} if path is None else {"data": str(path)}
    return prepare(DataOptions.model_validate(data | options), make_bpe(), seed)


def stopped(path: Path | None, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        ready(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def origins(examples: Iterable[Any]) -> list[int]:
    return [item.origin.line for item in examples]


# ---------------------------------------------------------------- held-out rows


def test_five_percent_are_held_out(write_rows: WriteRows) -> None:
    found = ready(write_rows(qa(100)))
    assert (len(found.train), len(found.eval)) == (95, 5)
    assert sorted(origins(found.train) + origins(found.eval)) == list(range(1, 101))
    assert [item.index for item in found.train] == list(range(95))
    assert origins(found.train) == sorted(origins(found.train))


@pytest.mark.parametrize(
    ("count", "options", "held_out"),
    [
        (3, {}, 1),
        (100, {"eval_split": 0.5, "eval_max_rows": 7}, 7),
        (100, {"eval_split": 12}, 12),
        (10, {"eval_split": 0}, 0),
    ],
)
def test_how_many_rows_are_held_out(write_rows: WriteRows, count: int, options: dict[str, Any], held_out: int) -> None:
    found = ready(write_rows(qa(count)), **options)
    assert (len(found.train), len(found.eval)) == (count - held_out, held_out)


def test_the_split_depends_on_seed_and_content_alone(write_rows: WriteRows) -> None:
    rows = qa(60)
    texts = [
        {item.completion for item in found.eval}
        for found in (
            ready(write_rows(rows), eval_split=10),
            ready(write_rows(rows[::-1]), eval_split=10),
            ready(write_rows(rows), seed=7, eval_split=10),
        )
    ]
    assert texts[0] == texts[1] != texts[2]


tokens = st.lists(st.integers(0, 3), min_size=2, max_size=3)


@given(st.lists(tokens, min_size=2, max_size=30), st.floats(0.01, 0.9), st.integers(0, 9))
def test_equal_rows_stay_on_one_side(rows: list[list[int]], share: float, seed: int) -> None:
    examples = [example(ids, [False] + [True] * (len(ids) - 1), index) for index, ids in enumerate(rows)]
    if len(set(map(tuple, rows))) < 2:
        return
    train, held_out = hold_out(examples, share, 500, seed)
    assert train
    assert held_out
    assert sorted(item.index for item in [*train, *held_out]) == list(range(len(rows)))
    left, right = ({tuple(item.input_ids.tolist()) for item in side} for side in (train, held_out))
    assert not left & right


@pytest.mark.parametrize("rows", [qa(1), qa(1) * 5])
def test_a_split_that_cannot_be(write_rows: WriteRows, rows: list[dict[str, Any]]) -> None:
    assert "set eval_split: 0" in stopped(write_rows(rows))


def test_evaluation_data_of_its_own(write_rows: WriteRows, tmp_path: Path) -> None:
    train = write_rows(qa(20))
    held_out = write_rows(qa(22)[18:], "eval.jsonl")
    found = ready(train, eval_data=str(held_out))
    assert (len(found.train), len(found.eval)) == (20, 4)
    assert (found.audit.leaked, found.audit.duplicates) == (2, 0)
    assert any("2 rows: of the training data are also in eval_data" in line for line in found.audit.warnings())


# ---------------------------------------------------------------- bad rows


def test_a_few_bad_rows_are_named_and_set_aside(write_rows: WriteRows) -> None:
    rows: list[Any] = qa(98)
    rows.insert(10, '{"instruction": "half')
    rows.insert(50, {"instruction": "no answer", "output": ""})
    found = ready(write_rows(rows))
    assert [(bad.line, bad.reason) for bad in found.audit.bad] == [
        (11, "not valid JSON (unterminated string starting at, column 17)"),
        (51, "'output' is empty"),
    ]
    assert len(found.train) + len(found.eval) == 98


def test_too_many_bad_rows_stop_the_run(write_rows: WriteRows) -> None:
    path = write_rows([*qa(90), *[{"instruction": "x"}] * 10])
    message = stopped(path)
    assert message.startswith("10 of 100 rows are unusable (max_bad_share allows 5%)")
    assert f"{path}:91: 'output' is missing (alpaca row); {path}:92" in message
    assert len(ready(path, max_bad_share=0.1).audit.bad) == 10


def test_rows_without_room_for_the_answer_count_as_bad(write_rows: WriteRows) -> None:
    rows = [*qa(9), {"instruction": "long " * 100, "output": "x"}]
    assert "nothing is left to learn" in stopped(write_rows(rows), max_seq_length=64)
    found = ready(write_rows(rows), max_seq_length=64, max_bad_share=0.2)
    assert [bad.line for bad in found.audit.bad] == [10]


def test_only_bad_rows(write_rows: WriteRows) -> None:
    assert "3 of 3 rows are unusable: " in stopped(write_rows(["{", "[", "x"]), max_bad_share=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no data given"),
        ({"data": "missing.jsonl"}, "missing.jsonl: no such file"),
    ],
)
def test_no_data(options: dict[str, Any], message: str) -> None:
    assert message in stopped(None, **options)


# ---------------------------------------------------------------- formats


def test_the_format_is_reported(write_rows: WriteRows) -> None:
    path = write_rows(qa(10))
    found = ready(path)
    assert found.data_format == "alpaca"
    assert f"{path}: the row format is alpaca (from its columns)" in found.audit.notes
    assert not any("row format" in note for note in ready(path, data_format="alpaca").audit.notes)


def test_a_format_that_is_not_there(write_rows: WriteRows) -> None:
    message = stopped(write_rows(qa(10)), data_format="messages")
    assert message.endswith("no row has the columns of data_format messages; it has instruction, output")


def test_mapped_columns(write_rows: WriteRows) -> None:
    rows = [{"question": f"q{number}?", "answer": f" a{number}"} for number in range(5)]
    raw = ready(write_rows(rows), columns={"prompt": "question", "completion": "answer"}, eval_split=0)
    assert (raw.data_format, raw.template, raw.train[0].prompt) == ("prompt_completion", None, "q0?")
    chat = ready(write_rows(rows), columns={"instruction": "question", "output": "answer"}, eval_split=0)
    assert chat.template is not None
    assert (chat.data_format, chat.train[0].completion) == ("alpaca", " a0")


def preferred(count: int, better: str = "yes, it is", worse: str = "no") -> list[dict[str, Any]]:
    return [{"prompt": f"question {number}", "chosen": better, "rejected": worse} for number in range(count)]


def test_pairs_of_answers(write_rows: WriteRows) -> None:
    """Both answers follow the very same prompt; only their own tokens are learned, the one that ends them included."""
    path = write_rows(preferred(20))
    (part,) = load_rows(DataOptions(data=str(path)))
    assert all(isinstance(row, Preference) for row in part.rows)
    found = ready(path)
    assert found.pairs
    assert (found.data_format, len(found.train), len(found.eval)) == ("preference", 19, 1)
    assert any("pairs of answers select task dpo" in note for note in found.audit.notes)
    assert not any("task dpo" in note for note in ready(path, task="dpo").audit.notes)
    tokenizer = make_bpe()
    for pair in found.train:
        chosen, rejected = pair.documents
        assert rejected is pair.rejected
        assert chosen.prompt_ids.tolist() == rejected.prompt_ids.tolist()
        assert tokenizer.decode(chosen.input_ids[chosen.supervised]).startswith("yes, it is")
        assert tokenizer.decode(rejected.input_ids[rejected.supervised]).startswith("no")
        assert not chosen.supervised[: chosen.prompt_length].any()
        assert len(pair) == len(chosen.input_ids) + len(rejected.input_ids)
        assert pair.supervised_tokens == int(chosen.supervised.sum() + rejected.supervised.sum())
    assert found.audit.tokens_train == sum(map(len, found.train))
    better = ready(path, data_format="prompt_completion", columns={"completion": "chosen"})
    assert better.train[0].completion == "yes, it is"
    assert better.train[0].rejected is None


def test_whole_conversations_share_an_implied_prompt(write_rows: WriteRows) -> None:
    """As the Hub's binarized UltraFeedback has them, with and without the prompt beside them."""
    asked = {"role": "user", "content": "question"}
    rows = [
        {
            name: [{**asked, "content": f"q{n}"}, {"role": "assistant", "content": name}]
            for name in ("chosen", "rejected")
        }
        for n in range(8)
    ]
    implied = ready(write_rows(rows), eval_split=0)
    given = ready(write_rows([{"prompt": f"q{n}", **row} for n, row in enumerate(rows)], "g.jsonl"), eval_split=0)
    strings = [{"prompt": f"q{n}", "chosen": "chosen", "rejected": "rejected"} for n in range(8)]
    plain = ready(write_rows(strings, "s.jsonl"), eval_split=0)
    for one, two, three in zip(implied.train, given.train, plain.train, strict=True):
        for documents in zip(one.documents, two.documents, three.documents, strict=True):
            assert len({tuple(document.input_ids.tolist()) for document in documents}) == 1
            assert len({tuple(document.supervised.tolist()) for document in documents}) == 1
    # The Hub's set has the better conversation once more, under another format's name.
    beside = write_rows([{**row, "messages": row["chosen"]} for row in rows], "messages.jsonl")
    assert "choose with data_format: messages or preference" in stopped(beside)
    assert ready(beside, task="dpo", eval_split=0).pairs
    asked_for = ready(write_rows(rows), eval_split=0, system_prompt="be brief")
    assert all("be brief" in make_bpe().decode(d.prompt_ids) for d in asked_for.train[0].documents)


def test_pairs_that_differ_only_in_the_worse_answer_are_two_rows(write_rows: WriteRows) -> None:
    rows = preferred(6) + preferred(6, worse="nay")
    found = ready(write_rows(rows), eval_split=4)
    assert found.audit.duplicates == 0
    assert (len(found.train), len(found.eval)) == (8, 4)
    assert ready(write_rows(rows + preferred(2)), eval_split=0).audit.duplicates == 2


def test_long_pairs(write_rows: WriteRows) -> None:
    """Answers are cut at the end; a row is set aside where that leaves no answer, or two that are the same."""
    rows = preferred(40) + preferred(1, better="yes " * 80)
    rows += [{"prompt": "why " * 80, "chosen": "a", "rejected": "b"}]
    rows += [{"prompt": "q", "chosen": "no " * 80 + "yes", "rejected": "no " * 80 + "never"}]
    found = ready(write_rows(rows), max_seq_length=48, eval_split=0)
    assert len(found.train) == 41
    assert found.audit.truncated == 1
    assert found.train[-1].truncated > 0
    assert max(len(document.input_ids) for pair in found.train for document in pair.documents) <= 48
    reasons = [bad.reason for bad in found.audit.bad]
    assert "nothing is left to learn" in reasons[0]
    assert "nothing tells the two answers apart within max_seq_length (48 tokens)" in reasons[1]


@pytest.mark.parametrize("task", ["causal", "classification", "seq2seq"])
def test_another_task_for_pairs(write_rows: WriteRows, task: str) -> None:
    message = stopped(write_rows(preferred(9)), task=task)
    assert f"are for task dpo, not {task}" in message
    assert "columns: {completion: chosen}" in message


def test_dpo_without_pairs(write_rows: WriteRows) -> None:
    path, pairs = write_rows(qa(20)), write_rows(preferred(20), "pairs.jsonl")
    assert "task dpo needs pairs of answers" in stopped(path, task="dpo")
    assert "one after the other" in stopped(None, data=[str(path), str(pairs)])
    assert "train_on_inputs has no effect on preference rows" in stopped(pairs, train_on_inputs=True)
    # Whoever evaluates a tuned model may do it on other rows.
    held_out = ready(pairs, task="dpo", eval_data=str(path))
    assert held_out.pairs
    assert held_out.eval[0].rejected is None


def test_labels_as_numbers_and_as_words(write_rows: WriteRows) -> None:
    path = write_rows(labelled(40))
    numbers = ready(path)
    assert [choice.word for choice in numbers.labels] == ["0", "1"]
    assert any("label_names gives them words" in note for note in numbers.audit.notes)
    words = ready(path, label_names=["negative", "positive"])
    assert words.audit.labels == {"negative": 20, "positive": 20}
    first = words.train[0]
    assert first.completion == words.labels[first.label or 0].word
    assert tuple(first.input_ids[first.prompt_length :].tolist()) == words.labels[first.label or 0].input_ids
    assert numbers.fingerprint != words.fingerprint
    named = ready(write_rows([{"text": f"t{n}", "label": ["no", "yes"][n % 2]} for n in range(20)]))
    assert [choice.value for choice in named.labels] == ["no", "yes"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (labelled(20), {"label_names": ["only", "only"]}, "every name must be different"),
        ([{"text": f"t{n}", "label": 1} for n in range(20)], {}, "at least two classes; every label here is '1'"),
        (labelled(20), {"label_names": ["negative"]}, "at least two classes"),
        ([{"text": f"t{n}", "label": n % 3} for n in range(20)], {"label_names": ["a", "b"]}, "not among label_names"),
        (qa(20), {"columns": {"prompt": "instruction", "completion": "output"}, "system_prompt": "x"}, "no effect"),
        (labelled(20), {"chat_template": "chatml"}, "chat_template has no effect"),
    ],
)
def test_options_that_do_not_fit_the_data(
    write_rows: WriteRows, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    assert message in stopped(write_rows(rows), **options)


def test_text_is_split_into_windows(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {number} " + "word " * 30 for number in range(20)))
    found = ready(path, max_seq_length=32)
    assert found.data_format == "text"
    assert found.audit.truncated == 0
    assert max(map(len, found.train)) <= 32
    assert len(found.train) + len(found.eval) > 20


# ---------------------------------------------------------------- mixtures


def test_a_weighted_mixture(write_rows: WriteRows) -> None:
    first, second = write_rows(qa(30), "a.jsonl"), write_rows(labelled(10), "b.jsonl")
    data = [{"path": str(first), "weight": 1}, {"path": str(second), "weight": 3}]
    found = ready(None, data=data, eval_split=4)
    assert found.data_format == "alpaca + classification"
    assert found.weights == (1.0, 3.0)
    assert sum(found.sizes) == len(found.train) == 36
    sources = [found.train[row].source for row in found.sampler(1).order(0)]
    assert (sources.count(0), sources.count(1)) == (9, 27)
    assert found.fingerprint != ready(None, data=[{**data[0], "weight": 2}, data[1]], eval_split=4).fingerprint


def test_sources_without_weights_are_one_pool(write_rows: WriteRows) -> None:
    found = ready(None, data=[str(write_rows(qa(5), "a.jsonl")), str(write_rows(qa(9)[5:], "b.jsonl"))], eval_split=0)
    assert (found.sizes, found.weights) == ((5, 4), None)
    assert sorted(found.sampler(3).order(0).tolist()) == list(range(9))


# ---------------------------------------------------------------- fingerprint


def test_the_fingerprint_covers_rows_and_options_not_places(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = qa(20)
    base = ready(write_rows(rows))
    array = tmp_path / "same.json"
    array.write_text(json.dumps(rows))
    assert ready(array).fingerprint == base.fingerprint
    assert ready(write_rows(rows), packing=False, seed=3).fingerprint == base.fingerprint
    changed = [
        ready(write_rows([*rows[:-1], {"instruction": "question 19", "output": "another"}])),
        ready(write_rows(rows[::-1])),
        ready(write_rows(rows), max_seq_length=64),
        ready(write_rows(rows), train_on_inputs=True),
        ready(write_rows(rows), system_prompt="Be kind."),
        ready(write_rows(rows), chat_template="alpaca"),
        ready(write_rows(rows), chat_template_date="2025-01-01"),
        ready(write_rows(rows), eval_split=3),
    ]
    assert len({base.fingerprint, *(found.fingerprint for found in changed)}) == 1 + len(changed)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=20))
def test_every_row_becomes_an_example_or_a_bad_row(tmp_path_factory: Any, rows: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": a, "completion": b}) for a, b in rows))
    try:
        found = ready(path, eval_split=0, max_bad_share=1)
    except UsageError as error:
        assert f"{len(rows):,} of {len(rows):,} rows are unusable" in str(error)  # noqa: PT017
        return
    assert sorted(origins(found.train) + [bad.line for bad in found.audit.bad]) == list(range(1, len(rows) + 1))


def test_the_same_twice(write_rows: WriteRows, sp: PreTrainedTokenizerFast) -> None:
    options = DataOptions(data=str(write_rows(qa(50))))
    first, second = prepare(options, sp, 1), prepare(options, sp, 1)
    assert first.fingerprint == second.fingerprint
    assert [item.input_ids.tolist() for item in first.train] == [item.input_ids.tolist() for item in second.train]
    assert first.audit == second.audit
    assert first.stop_ids == (sp.eos_token_id,)
