"""Rows of an update: every row once an epoch, by the step alone, whatever the layout."""

from collections import Counter

from halfbyte.data.sampler import Sampler
from halfbyte.train.feed import Feed

from . import tiny


def feed(rows: int = 37, **changes: object) -> Feed:
    fields = {"rows_per_update": 8, "micro_batch": 3} | changes
    return Feed(tiny.examples(rows), Sampler(rows, seed=1), **fields)  # type: ignore[arg-type]


def test_an_epoch_is_every_row_once_and_the_next_is_another_order() -> None:
    source = feed()
    assert source.steps_per_epoch == 5
    first = [row for step in range(1, 6) for row in source.rows(step)]
    second = [row for step in range(6, 11) for row in source.rows(step)]
    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second
    assert [len(source.rows(step)) for step in range(1, 7)] == [8, 8, 8, 8, 5, 8]
    assert source.rows(7) == feed().rows(7)


def test_micro_batches_by_rows_and_by_tokens_hold_the_same_rows() -> None:
    by_rows, by_tokens = feed(), feed(packing=True, max_tokens=40)
    assert [len(batch.lengths) for batch in by_rows.batches_for_update(1)] == [3, 3, 2]
    for step in (1, 5):
        packed = by_tokens.batches_for_update(step)
        assert all(batch.tokens <= 40 for batch in packed)
        rows = [Counter(row for batch in b for row in batch.rows) for b in (packed, by_rows.batches_for_update(step))]
        assert rows[0] == rows[1] == Counter(by_rows.rows(step))


def test_tokens_and_places() -> None:
    source = feed()
    for steps in (0, 3, 5, 7, 10):
        batches = [batch for step in range(1, steps + 1) for batch in source.batches_for_update(step)]
        assert source.tokens(steps) == sum(batch.tokens for batch in batches)
    assert source.locate(4) == "rows.jsonl:5"
