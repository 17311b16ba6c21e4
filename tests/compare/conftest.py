"""A comparison of a tiny random model on a few rows, run once with real processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from halfbyte.compare.compare import Comparison, compare
from halfbyte.compare.options import CompareOptions, Request, load_request
from tests.run.conftest import _no_measuring, _own_cache, data_file, model_folder

__all__ = ["_no_measuring", "_own_cache", "data_file", "model_folder"]

SHORT: dict[str, Any] = {
    "max_steps": 6, "lora_r": 4, "eval_split": 0.2, "dtype": "float32", "learning_rate": 1e-2, "max_seq_length": 64,
    "eval_steps": 3,
}  # fmt: skip


def request_of(model: Path, data: Path, output: Path, **changes: Any) -> Request:
    """Two methods, two seeds, six quick steps; options of the comparison and fields of the runs may be changed."""
    fields: Mapping[str, Any] = {"model": str(model), "data": str(data), **SHORT}
    options: dict[str, Any] = {"methods": "lora,qlora", "seeds": 2, "output": output}
    for name, value in changes.items():
        if name in CompareOptions.model_fields:
            options[name] = value
        else:
            fields = {**fields, name: value}
    return load_request(None, fields, options)


@pytest.fixture(scope="session")
def whole(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A finished comparison that nothing interrupted. Tests must not write into it."""
    return compare(request_of(model_folder, data_file, tmp_path_factory.mktemp("whole") / "comparison"))
