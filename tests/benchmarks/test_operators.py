"""`make bench-kernels` and the GEMM rate: bytes and operations are the ones that the formats and shapes imply."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from halfbyte.models.spec import ModelSpec
from tests.benchmarks.conftest import BENCHMARKS
from tests.models import families


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dequantize nf4 to bf16", 6400 // 2 + 4 * 100 + 2 * 6400),
        ("dequantize nf4, nested, to bf16", 6400 // 2 + 100 + 4 + 2 * 6400),
        ("dequantize int8 to bf16", 6400 + 4 * 100 + 2 * 6400),
        ("quantize bf16 to nf4", 2 * 6400 + 6400 // 2 + 4 * 100),
        ("quantize fp32 to dynamic 8-bit", 4 * 6400 + 6400 + 4 * 25),
    ],
)
def test_the_bytes_of_a_case(scripts: dict[str, ModuleType], name: str, expected: int) -> None:
    cases: Any = scripts["operators"].CASES
    work = cases[name](6400)
    work.call()
    # The nested case has 100 constants in one block of 256.
    assert work.bytes == expected


def test_every_case_is_measured_against_its_roof(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "operators.py"), "--elements", "4160", "--seconds", "0.001"]
    command += ["--threads", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads((tmp_path / "out.json").read_text())
    cases: Any = scripts["operators"].CASES
    assert [m["name"] for m in figures["operators"]] == list(cases)
    assert all(m["seconds"] > 0 and m["of_copy"] > 0 for m in figures["operators"])
    assert all(f"| {name} |" in done.stdout for name in cases)
    refused = subprocess.run([*command, "--match", "nothing"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "no operator's name contains 'nothing'" in refused.stderr


def test_operations_are_measured_against_products(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    operators: Any = scripts["operators"]
    a = torch.ones(64, 64)
    monkeypatch.setitem(
        operators.CASES, "product", lambda n: operators.Work(lambda: a @ a, 3 * 4 * 64**2, operations=2 * 64**3)
    )
    measured = operators.measure("product", 1, 0.001)
    assert measured.operations_per_second == pytest.approx(2 * 64**3 / measured.seconds)
    assert measured.of_products > 0
    assert operators.table([measured]).splitlines()[-1].count("%") == 2


def test_the_gemm_rate_counts_every_weight_once(scripts: dict[str, ModuleType]) -> None:
    gemm: Any = scripts["gemm_rate"]
    spec = ModelSpec.from_config(families.config("gemma3-small").to_dict())
    shapes = gemm.shapes(spec)
    assert sum(out * width * n for (out, width), n in shapes.items()) == spec.matmul_parameters()
    assert gemm.step_operations(spec, 7) == 4 * 7 * spec.matmul_parameters()
    assert gemm.rate(spec, 7, torch.float32, repeats=1) > 0
