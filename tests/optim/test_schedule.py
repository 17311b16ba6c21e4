"""The learning rate against transformers' schedules."""

import pytest
import torch
from pydantic import ValidationError
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from halfbyte.optim import OptimOptions, learning_rate_at, warmup_steps


def reference(kind: str, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    make = get_cosine_schedule_with_warmup if kind == "cosine" else get_linear_schedule_with_warmup
    scheduler = make(optimizer, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 40), (40, 40), (1, 1)])
def test_equals_transformers_after_the_warmup(kind: str, warmup: int, total: int) -> None:
    options = OptimOptions(learning_rate=3e-4, lr_scheduler_type=kind, warmup_steps=warmup)  # type: ignore[arg-type]
    rates = [learning_rate_at(step, total, options) for step in range(1, total + 1)]
    assert rates[warmup:] == pytest.approx(reference(kind, warmup, total)[warmup:], rel=1e-12)
    assert rates[:warmup] == pytest.approx([3e-4 * step / warmup for step in range(1, warmup + 1)])
    assert min(rates) > 0


def test_constant_and_beyond_the_end() -> None:
    constant = OptimOptions(learning_rate=1.0, lr_scheduler_type="constant", warmup_steps=2)
    assert [learning_rate_at(step, 4, constant) for step in (1, 2, 3, 99)] == [0.5, 1.0, 1.0, 1.0]
    cosine = OptimOptions(learning_rate=1.0)
    assert learning_rate_at(99, 4, cosine) == 0.0


def test_warmup_ratio_rounds_up() -> None:
    assert warmup_steps(100, OptimOptions()) == 3
    assert warmup_steps(101, OptimOptions()) == 4
    assert warmup_steps(100, OptimOptions(warmup_steps=0)) == 0


def test_bad_calls_and_options() -> None:
    with pytest.raises(ValueError, match="count from 1"):
        learning_rate_at(0, 4, OptimOptions(learning_rate=1.0))
    with pytest.raises(ValueError, match="resolved"):
        learning_rate_at(1, 4, OptimOptions())
    for bad in ({"learning_rate": -1}, {"warmup_ratio": 2}, {"optim": "sgd"}, {"adam_beta1": 1.0}, {"lr": 1}):
        with pytest.raises(ValidationError):
            OptimOptions(**bad)


def test_every_option_has_a_description() -> None:
    assert all(field.description for field in OptimOptions.model_fields.values())
