import json
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from halfbyte.plan import hardware
from halfbyte.plan.hardware import Hardware, Rates, detect, measure


def test_detects_this_machine() -> None:
    found = detect()
    assert 1 <= found.cores <= (psutil.cpu_count() or 1)
    assert 0 < found.memory_available <= found.memory_total <= psutil.virtual_memory().total
    assert 0 < found.usable < found.memory_total
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert json.loads(json.dumps(found.as_dict()))["usable"] == found.usable


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_control_group_v2_limits_of_ancestors_count(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/outer/inner\n")
    base = tmp_path / "sys/fs/cgroup"
    write(base / "outer/inner/memory.max", "max\n")
    write(base / "outer/inner/memory.current", "500\n")
    write(base / "outer/inner/memory.stat", "anon 400\ninactive_file 100\n")
    write(base / "outer/memory.max", "8000000000\n")
    write(base / "outer/memory.current", "3000000000\n")
    write(base / "outer/memory.stat", "anon 1\ninactive_file 1000000000\n")
    found = hardware._cgroup_memory(tmp_path)
    assert [(limit, used) for _, limit, used in found] == [(8_000_000_000, 2_000_000_000)]


def test_control_group_v1_and_no_limit(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    base = tmp_path / "sys/fs/cgroup/memory"
    write(base / "memory.limit_in_bytes", "2000000000\n")
    write(base / "memory.usage_in_bytes", "700\n")
    write(base / "memory.stat", "cache 5\n")
    assert [x[1:] for x in hardware._cgroup_memory(tmp_path)] == [(2_000_000_000, 700)]
    write(base / "memory.limit_in_bytes", "9223372036854771712\n")
    assert hardware._cgroup_memory(tmp_path) == []
    assert hardware._cgroup_memory(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 2), ("max 100000", None), ("50000 100000", 1)])
def test_cpu_quota_rounds_up(tmp_path: Path, text: str, cores: int | None) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/x\n")
    write(tmp_path / "sys/fs/cgroup/x/cpu.max", text + "\n")
    everything = hardware.usable_cores(tmp_path / "elsewhere")
    assert hardware.usable_cores(tmp_path) == min(everything, cores or everything)


def test_measurement_is_kept_and_a_damaged_cache_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    wanted = Rates("cpu", {"float32": 1e11, "bfloat16": 2e11}, 5e9, 7e8)
    monkeypatch.setattr(hardware, "_measure", lambda machine: calls.append(machine) or wanted)
    machine = detect()
    assert measure(machine, tmp_path) == wanted == measure(machine, tmp_path)
    assert len(calls) == 1
    (file,) = tmp_path.glob("rates-*.json")
    assert json.loads(file.read_text())["schema_version"] == 1
    file.write_text('{"device": ')
    assert measure(machine, tmp_path) == wanted
    file.write_text('{"device": "cpu", "gemm": 3}')
    assert measure(machine, tmp_path) == wanted
    assert len(calls) == 3
    measure(machine, tmp_path, refresh=True)
    assert len(calls) == 4


def test_an_unwritable_cache_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_measure", lambda machine: Rates("cpu", {"float32": 1.0}, 1.0, 1.0))
    (tmp_path / "file").write_text("")
    assert measure(detect(), tmp_path / "file").gemm == {"float32": 1.0}


def test_real_measurement_is_plausible() -> None:
    rates = hardware._measure(detect())
    assert {"float32", "bfloat16"} <= rates.gemm.keys()
    assert all(1e8 < value < 1e16 for value in rates.gemm.values())
    assert 1e8 < rates.bandwidth < 1e14
    assert 1e5 < rates.dequantize < 1e14


def test_the_device_is_the_gpu_where_there_is_one() -> None:
    gpu = hardware.Gpu(0, "card", 8_000_000_000, 7_000_000_000, "8.9", True)
    machine = Hardware("Linux", "cpu", 8, 64, 32, "physical memory", (), (gpu,))
    assert machine.device == "cuda"
    assert machine.usable == 6_300_000_000


def test_the_reference_product_is_timed_now() -> None:
    started = time.perf_counter()
    rate = hardware.reference_gemm(0.05)
    assert time.perf_counter() - started < 5
    assert 1e8 < rate < 1e14


def test_the_key_of_a_machine_changes_with_what_changes_its_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = detect()
    key = hardware.machine_key(machine)
    assert key == hardware.machine_key(replace(machine, memory_available=1, system="another"))
    assert key != hardware.machine_key(replace(machine, cores=machine.cores + 1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert key != hardware.machine_key(machine)


def test_a_machine_that_was_busy_when_it_was_measured_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = hardware.Rates("cpu", {"float32": 1e6, "bfloat16": 9e15}, 1e6, 9e15, {"float32": {"loss": 1e6}})
    quick = hardware.Rates("cpu", {"float32": 1e10, "bfloat16": 1e10}, 1e10, 1e10, {"float32": {"loss": 1e10}})
    found = hardware.detect()
    monkeypatch.setattr(hardware, "_measure", lambda machine: slow)
    assert hardware.measure(found, tmp_path) == slow
    monkeypatch.setattr(hardware, "_measure", lambda machine: quick)
    both = hardware.Rates("cpu", {"float32": 1e10, "bfloat16": 9e15}, 1e10, 9e15, {"float32": {"loss": 1e10}})
    assert hardware.measure(found, tmp_path) == both
    monkeypatch.setattr(hardware, "_gemm_rate", lambda *args, **kwargs: 1.2e10)
    assert hardware.measure(found, tmp_path) == both  # a little faster is noise
