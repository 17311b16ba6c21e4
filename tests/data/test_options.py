"""Options: the forms in which sources may be written, and what is refused."""

import pytest
from pydantic import ValidationError

from halfbyte.data.options import DataOptions, DataSource, sources_of


def test_every_field_is_described() -> None:
    for options in (DataOptions, DataSource):
        assert all(field.description for field in options.model_fields.values())


def test_defaults_are_the_documented_ones() -> None:
    options = DataOptions()
    assert (options.eval_split, options.eval_max_rows, options.max_seq_length) == (0.05, 500, 2048)
    assert options.packing
    assert not options.train_on_inputs
    assert (options.chat_template, options.max_bad_share) == ("auto", 0.05)


def test_sources_in_all_their_forms() -> None:
    assert sources_of(None) == ()
    assert sources_of(DataOptions(data="a.jsonl").data) == (DataSource(path="a.jsonl"),)
    mixed = DataOptions.model_validate({"data": ["a.jsonl", {"path": "b.csv", "data_format": "sharegpt"}]})
    assert sources_of(mixed.data) == (DataSource(path="a.jsonl"), DataSource(path="b.csv", data_format="conversations"))
    single = DataOptions.model_validate({"data": {"path": "c.json", "weight": 2}})
    assert sources_of(single.data) == (DataSource(path="c.json", weight=2.0),)


def test_options_survive_json() -> None:
    options = DataOptions.model_validate({"data": [{"path": "a", "weight": 1}], "label_names": ["no", "yes"]})
    assert DataOptions.model_validate(options.model_dump(mode="json")) == options


@pytest.mark.parametrize(
    "values",
    [
        {"data": [{"path": "a", "weight": 1}, {"path": "b"}]},
        {"data": [{"path": "a", "weight": 0}]},
        {"data": [{"path": "a", "weight": float("nan")}]},
        {"data_format": "parquet"},
        {"eval_split": -0.1},
        {"eval_split": 10.5},
        {"max_seq_length": 1},
        {"chat_template_date": "yesterday"},
        {"max_bad_share": 1.5},
        {"data": [{"path": "a", "wieght": 1}]},
    ],
)
def test_nonsense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataOptions.model_validate(values)
