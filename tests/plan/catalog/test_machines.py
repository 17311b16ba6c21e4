"""Machines: what ships is complete and says what is assumed; a user's file extends it; wrong entries are one line."""

from pathlib import Path

import pytest
import yaml

from halfbyte.errors import UsageError
from halfbyte.plan.catalog import find_machine, machines, user_file
from halfbyte.plan.catalog.machines import FILE
from halfbyte.plan.price import Price

ASKED = """
    rtx-3060 rtx-3090 rtx-4060-ti-16g rtx-4070 rtx-4090 rtx-5090 t4 l4 a10g a40 rtx-a6000 v100-16g v100-32g a100-40g
    a100-80g l40s h100 h200 mi300x
"""
NEW = """
my-box:
  kind: gpu
  memory: 8GB
  bandwidth: 100e9
  gemm: {bfloat16: 10e12, float32: 5e12}
"""


@pytest.fixture(autouse=True)
def no_file_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_what_people_ask_for_is_there() -> None:
    assert set(ASKED.split()) <= set(machines())
    assert any(machine.kind == "cpu" for machine in machines().values())


@pytest.mark.parametrize("name", list(machines()))
def test_every_entry_is_complete_and_sane(name: str) -> None:
    machine = machines()[name]
    assert machine.title != name
    assert 0.9 * machine.memory < machine.usable < machine.memory - 100_000_000 or machine.kind == "cpu"
    assert 4e9 < machine.usable < 300e9
    assert 30e9 < machine.bandwidth < 10e12
    assert 0.1 <= machine.reachable <= 0.8
    assert machine.price is None, "no price ships"
    assert {"float32", machine.dtype} <= set(machine.gemm)
    assert max(machine.gemm.values()) == machine.gemm[machine.dtype]


def test_assumptions_are_said_in_the_file() -> None:
    text = FILE.read_text()
    for field in ("reserved", "reachable", "reachable_bandwidth"):
        assert f"# {field}" in text
    assert text.count("ASSUMED, UNMEASURED") == 3


def test_a_machine_is_what_a_plan_takes() -> None:
    card = find_machine("rtx-4090")
    hardware, rates = card.hardware(), card.rates()
    assert hardware.device == rates.device == card.device == "cuda"
    assert hardware.gpus[0].free == card.usable < hardware.gpus[0].memory == 24564 * 2**20
    assert rates.gemm["bfloat16"] == pytest.approx(0.7 * 165.2e12)
    assert rates.bandwidth == pytest.approx(0.8 * 1008e9)
    assert rates.dequantize == pytest.approx(rates.bandwidth / 2.5)
    box = find_machine("ryzen-5600-16g")
    assert (box.hardware().device, box.hardware().cores, box.dtype) == ("cpu", 6, "float32")
    assert box.hardware().memory_available == box.usable == 16 * 2**30 - 2 * 10**9
    assert find_machine("t4").dtype == "float16"


@pytest.mark.parametrize("name", ["RTX 4090", "rtx_4090", " rtx-4090 "])
def test_names_may_be_spelled_in_many_ways(name: str) -> None:
    assert find_machine(name).name == "rtx-4090"


def test_an_unknown_machine_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'rtx-3090ti' is not a machine of the catalogue: did you mean rtx-3090"):
        find_machine("rtx-3090ti")
    with pytest.raises(UsageError, match=r"did you mean a100-40g, a100-80g"):
        find_machine("a100")
    with pytest.raises(UsageError, match=r"known are a100-40g, a100-80g"):
        find_machine("toaster")


def test_a_users_file_adds_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, NEW + "RTX-4090:\n  price: 0.34 EUR/h\n")
    found = machines(path)
    assert found["my-box"].memory == 8_000_000_000
    assert found["my-box"].usable == 8_000_000_000
    assert found["rtx-4090"].price == Price(0.34, "EUR")
    assert found["rtx-4090"].memory == machines()["rtx-4090"].memory
    assert "RTX-4090" not in found


def test_the_users_own_file_is_found(tmp_path: Path) -> None:
    assert "my-box" not in machines()
    user_file().parent.mkdir(parents=True)
    user_file().write_text(NEW)
    assert user_file() == tmp_path / "config/halfbyte/machines.yaml"
    assert find_machine("my-box").title == "my-box"


def without(field: str) -> str:
    entry = yaml.safe_load(NEW)
    del entry["my-box"][field]
    return yaml.safe_dump(entry)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rtx-4090: {price: 0.34}", r":1: rtx-4090: price: .*no currency"),
        ("\nrtx-4090: {price: 0.34 EUR/h, memry: 3}", r":2: rtx-4090: memry is not a field .*did you mean memory"),
        ("rtx-4090: {memory: lots}", r":1: rtx-4090: memory: a size is a number and a unit"),
        ("rtx-4090: {memory: -3}", r":1: rtx-4090: memory: .*greater than 0"),
        ("rtx-4090: {memory: 1e30}", r":1: rtx-4090: memory"),
        ("rtx-4090: {bandwidth: -1}", r":1: rtx-4090: bandwidth: .*greater than 0, not -1"),
        ("rtx-4090: {bandwidth: .nan}", r":1: rtx-4090: bandwidth"),
        (
            "rtx-4090: {gemm: {fp16: 1e12, float32: 1e12}}",
            r"rtx-4090: gemm.fp16 is not a field .*did you mean .*float16",
        ),
        ("rtx-4090: {gemm: {float32: 1e12}}", r"rtx-4090: gemm has no rate for bfloat16"),
        ("rtx-4090: {gemm: 3}", r"rtx-4090: gemm: "),
        ("rtx-4090: {kind: tpu}", r"rtx-4090: kind: .*'gpu' or 'cpu', not 'tpu'"),
        ("rtx-4090: {reachable: 1.5}", r"rtx-4090: reachable: .*less than or equal to 1"),
        ("rtx-4090: {reserved: 99GB}", r"rtx-4090: reserved leaves nothing"),
        ("rtx-4090: 3", r":1: rtx-4090 should have fields"),
        ("rtx-4090: {}\nrtx-4090: {}", r":2: rtx-4090 was already given"),
        ("rtx-4090: {}\nRTX 4090: {}", r":2: RTX 4090 was already given"),
        ("- rtx-4090", r":1: expected `key: value` lines"),
        ("rtx-4090: [", r"not valid YAML"),
        (without("gemm"), r"my-box: gemm is missing \(a new machine needs"),
        (without("kind"), r"my-box: kind is missing"),
    ],
)
def test_a_wrong_entry_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=said) as caught:
        machines(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.yaml: no such file of machines"):
        machines(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        machines(tmp_path)


def test_the_catalogue_is_part_of_the_package() -> None:
    """Beside its module, where a wheel and an editable installation have it."""
    from importlib import resources

    names = {file.name for file in resources.files("halfbyte.plan.catalog").iterdir()}
    assert {"machines.yaml", "models.yaml"} <= names
