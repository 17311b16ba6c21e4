"""Defaults, the batch of 16, and how long a run is."""

import pytest
from pydantic import ValidationError

from halfbyte.train import TrainOptions, batch_rows, count_steps


def test_the_defaults_are_the_printed_ones() -> None:
    options = TrainOptions()
    assert (options.num_train_epochs, options.save_minutes, options.save_total_limit, options.seed) == (3, 15, 2, 42)
    assert (options.per_device_train_batch_size, options.gradient_accumulation_steps) == (None, None)
    assert options.report_to == ()
    assert all(field.description for field in TrainOptions.model_fields.values())


@pytest.mark.parametrize(
    ("per_device", "accumulation", "fits", "expected"),
    [
        (None, None, 16, (16, 1)),
        (None, None, 4, (4, 4)),
        (None, None, 3, (2, 8)),
        (None, None, 0, (1, 16)),
        (None, 4, 16, (4, 4)),
        (None, 4, 2, (2, 4)),
        (None, 32, 16, (1, 32)),
        (4, None, 1, (4, 4)),
        (16, None, 16, (16, 1)),
        (64, None, 16, (64, 1)),
        (3, None, 16, (3, 5)),
        (2, 3, 16, (2, 3)),
    ],
)
def test_what_is_open_is_filled_to_sixteen(
    per_device: int | None, accumulation: int | None, fits: int, expected: tuple[int, int]
) -> None:
    options = TrainOptions(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)
    assert batch_rows(options, fits) == expected


@pytest.mark.parametrize(
    ("rows", "epochs", "max_steps", "expected"),
    [
        (32, 3.0, None, (2, 6)),
        (33, 3.0, None, (3, 9)),
        (5, 3.0, None, (1, 3)),
        (160, 0.5, None, (10, 5)),
        (160, 0.01, None, (10, 1)),
        (160, 3.0, 7, (10, 7)),
        (480, 0.1, None, (30, 3)),
    ],
)
def test_steps(rows: int, epochs: float, max_steps: int | None, expected: tuple[int, int]) -> None:
    assert count_steps(rows, 16, TrainOptions(num_train_epochs=epochs, max_steps=max_steps)) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ()),
        ("none", ()),
        ("wandb", ("wandb",)),
        ("wandb, mlflow", ("wandb", "mlflow")),
        (["trackio"], ("trackio",)),
    ],
)
def test_report_to_takes_what_people_write(given: object, expected: tuple[str, ...]) -> None:
    assert TrainOptions(report_to=given).report_to == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", [{"report_to": "clearml"}, {"num_train_epochs": 0}, {"max_steps": 0}, {"seed": -1}, {"batch": 1}]
)
def test_bad_values_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainOptions(**bad)  # type: ignore[arg-type]


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        count_steps(0, 16, TrainOptions())
