"""The scripts under benchmarks/ as modules: they lie side by side and are no package."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from tests.run.conftest import model_folder

__all__ = ["model_folder"]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def scripts() -> Iterator[dict[str, ModuleType]]:
    names = (
        "compare",
        "compare_loop",
        "comparison_table",
        "gemm_rate",
        "machine",
        "merge_study",
        "methods_study",
        "operators",
        "operator_cases",
        "quant_formats",
        "quant_report",
        "quant_table",
        "small_model",
    )
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: import_module(name) for name in names}
    sys.path.remove(str(BENCHMARKS))
