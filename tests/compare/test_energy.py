from pathlib import Path

import pytest

from halfbyte.compare.energy import Counter, Meter, joules, read


def write(root: Path, package: int, value: int) -> None:
    zone = root / f"intel-rapl:{package}"
    zone.mkdir(exist_ok=True, parents=True)
    (zone / "energy_uj").write_text(f"{value}\n")
    (zone / "max_energy_range_uj").write_text("999999\n")
    part = root / f"intel-rapl:{package}:0"
    part.mkdir(exist_ok=True)
    (part / "energy_uj").write_text("1\n")


def test_packages_are_added_up_and_wraps_are_seen(tmp_path: Path) -> None:
    write(tmp_path, 0, 500_000)
    write(tmp_path, 1, 900_000)
    assert read(tmp_path) == [Counter(500_000, 999_999), Counter(900_000, 999_999)]
    meter = Meter(tmp_path)
    write(tmp_path, 0, 700_000)
    meter.tick()
    write(tmp_path, 1, 100_000)  # it began again
    meter.tick()
    assert meter.joules == pytest.approx(0.2 + 0.2)


def test_a_machine_without_counters_has_no_figure(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    meter = Meter(tmp_path)
    meter.tick()
    assert meter.joules is None
    write(tmp_path, 0, 5)
    meter = Meter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("nonsense")
    meter.tick()
    assert meter.joules is None
    assert joules([Counter(1, 9)], []) is None
