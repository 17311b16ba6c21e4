"""Batches and micro-batches: shifts inside documents, and packing that loses and doubles nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.batch import IGNORE
from halfbyte.data import Example, Origin, collate, plan_micro_batches


def example(ids: list[int], supervised: list[bool], index: int = 0) -> Example:
    return Example(np.array(ids, dtype=np.int32), np.array(supervised), Origin("f", index + 1), index=index)


documents = st.lists(
    st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=8), min_size=1, max_size=5
)


@given(documents)
def test_collate_against_a_naive_reference(found: list[list[tuple[int, bool]]]) -> None:
    examples = [
        example([token for token, _ in doc], [learn and number > 0 for number, (_, learn) in enumerate(doc)], index)
        for index, doc in enumerate(found)
    ]
    batch = collate(examples)
    ids, positions, targets = [], [], []
    for doc in found:
        for number, (token, _) in enumerate(doc):
            ids.append(token)
            positions.append(number)
            after = doc[number + 1] if number + 1 < len(doc) else (0, False)
            targets.append(after[0] if after[1] else IGNORE)
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert batch.targets.tolist() == targets
    assert batch.lengths == tuple(map(len, found))
    assert batch.rows == tuple(range(len(found)))
    assert batch.supervised_tokens == sum(item.supervised_tokens for item in examples)
    assert {batch.input_ids.dtype, batch.position_ids.dtype, batch.targets.dtype} == {torch.int64}


def test_a_batch_needs_an_example() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 8), st.integers(1, 80))
def test_packing_is_a_partition_within_the_budget(lengths: list[int], rows: int, budget: int) -> None:
    plan = plan_micro_batches(lengths, rows, packing=True, max_tokens=budget)
    assert sorted(index for members in plan for index in members) == list(range(len(lengths)))
    assert all(members == sorted(members) for members in plan)
    totals = [sum(lengths[index] for index in members) for members in plan]
    assert all(total <= budget or len(members) == 1 for total, members in zip(totals, plan, strict=True))
    # First-fit: any two micro-batches together would not fit into one.
    assert all(a + b > budget for i, a in enumerate(totals) for b in totals[:i])
    assert plan == plan_micro_batches(lengths, rows, packing=True, max_tokens=budget)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 8))
def test_without_packing_rows_are_counted(lengths: list[int], rows: int) -> None:
    plan = plan_micro_batches(lengths, rows, packing=False, max_tokens=1)
    assert [index for members in plan for index in members] == list(range(len(lengths)))
    assert all(len(members) == rows for members in plan[:-1])


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan_micro_batches([1], 0, packing=False, max_tokens=1)
