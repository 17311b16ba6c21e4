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
from halfbyte.ops import native
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
    command += ["--match", "quantize"]
    command += ["--threads", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads((tmp_path / "out.json").read_text())
    cases: Any = [name for name in scripts["operators"].CASES if "quantize" in name]
    assert [m["name"] for m in figures["operators"]] == list(cases)
    assert all(m["seconds"] > 0 and m["of_copy"] > 0 for m in figures["operators"])
    assert all(f"| {name} |" in done.stdout for name in cases)
    refused = subprocess.run([*command, "--match", "nothing"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "no operator's name contains 'nothing'" in refused.stderr


@pytest.mark.skipif(not native.multiplies(torch.bfloat16), reason="no bfloat16 products on this processor")
def test_the_work_of_training(scripts: dict[str, ModuleType]) -> None:
    """Small shapes: every case runs, and moves and computes what its arithmetic says."""
    cases: Any = scripts["operator_cases"]
    linear, rank = (24, 64, (32, 96)), 16
    base, update = 2 * 24 * 64 * 128, 2 * 24 * rank * (2 * 64 + 128)
    factors = 4 * rank * (2 * 64 + 128)
    activations, low = 2 * 24 * (64 + 128), 2 * 24 * 2 * rank
    works = {
        "forward": (cases.linear_forward(*linear, "bf16"), 2 * 64 * 128 + factors + activations + low, base + update),
        "backward": (
            cases.linear_backward(*linear, "bf16"),
            2 * 64 * 128 + 2 * factors + activations + 2 * 24 * 64 + low,
            base + 2 * update,
        ),
        "loss": (cases.cross_entropy(10, 64, 300), 2 * 64 * (300 + 2 * 10) + 12 * 10, 4 * 10 * 64 * 300),
        "attention": (
            cases.attention((5, 7), 4, 2, 16, False),
            2 * 12 * 16 * (4 + 2 * 2 + 4) + 4 * 4 * 12,
            4 * 4 * 16 * (15 + 28),
        ),
        "attention's gradients": (
            cases.attention((5, 7), 4, 2, 16, True),
            2 * 12 * 16 * (2 * (4 + 2 * 2) + 4 + 4) + 4 * 4 * 12,
            10 * 4 * 16 * (15 + 28),
        ),
        "norm": (cases.norm(5, 32, False), 2 * 4 * 5 * 32 + 4 * 32 + 4 * 5, 0),
        "norm's gradient": (cases.norm(5, 32, True), 2 * 4 * 5 * 32 + 4 * 32 + 4 * 5, 0),
        "unit": (cases.gated_unit(5, 32, False), 2 * 5 * 32 * 3, 0),
        "unit's gradient": (cases.gated_unit(5, 32, True), 2 * 5 * 32 * 5, 0),
        "heads": (cases.heads(5, 2, 32, False), 2 * 5 * 32 * (2 + 2 + 1) + 4 * 32 + 4 * 10, 0),
        "heads' gradient": (cases.heads(5, 2, 32, True), 2 * 5 * 32 * (3 * 2 + 1) + 4 * 32 + 4 * 10, 0),
        "optimizer": (cases.optimizer_step("adamw", 1), 4 * 210_944 * 7, 0),
    }
    for name, (work, moved, operations) in works.items():
        work.call()
        assert (work.bytes, work.operations) == (moved, operations), name
    quantized = cases.linear_forward(*linear, "nf4+dq")
    quantized.call()
    assert quantized.bytes < works["forward"][0].bytes
    eight = cases.optimizer_step("adamw_8bit", 1)
    eight.call()
    assert eight.bytes < works["optimizer"][0].bytes


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
    monkeypatch.setitem(operators.CASES, "product", lambda n: None)
    assert operators.measure("product", 1, 0.001) is None


def test_the_gemm_rate_counts_every_weight_once(scripts: dict[str, ModuleType]) -> None:
    gemm: Any = scripts["gemm_rate"]
    spec = ModelSpec.from_config(families.config("gemma3-small").to_dict())
    shapes = gemm.shapes(spec)
    assert sum(out * width * n for (out, width), n in shapes.items()) == spec.matmul_parameters()
    assert gemm.step_operations(spec, 7) == 4 * 7 * spec.matmul_parameters()
    assert gemm.rate(spec, 7, torch.float32, repeats=1) > 0
