"""Hub data sets: through the real `datasets` where it is installed, and one clear line for each failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.data.hub import _choose_split, _explain, read_hub
from halfbyte.errors import UsageError


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"^owner/name: .*pip install 'halfbyte\[data\]'$"):
        read_hub("owner/name", None, None, False)


def test_the_real_package_reads_a_folder_like_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    Path("own/train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    Path("own/test.jsonl").write_text('{"text": "c"}\n')
    train = read_hub("./own", None, None, False)
    assert [str(record.origin) for record in train.records] == ["./own:train:1", "./own:train:2"]
    assert [record.values for record in read_hub("./own", None, None, True).records] == [{"text": "c"}]
    with pytest.raises(UsageError, match="no split 'dev'; it has 'train', 'test'"):
        read_hub("./own", None, "dev", False)


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"^owner/name-that-is-nowhere: "):
        read_hub("owner/name-that-is-nowhere", None, None, False)


def test_a_server_that_stands_in_for_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stand_in_hub.py"))],
        env=environment | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(done.stdout)
    rows = [["o/good:train:1", {"text": "a", "label": 0}], ["o/good:train:2", {"text": "b", "label": 1}]]
    assert found["o/good"] == [rows, ["bad", "good"]]
    assert found["o/gated"].startswith("o/gated: the Hub refuses access (gated or private)")
    assert found["o/missing"].startswith("o/missing: no such file or folder here, and no such data set on the Hub")
    assert "BuilderConfig 'other' not found" in found["o/good other"]


class DatasetNotFoundError(FileNotFoundError):
    """Named as in `datasets`."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), "no such data set"),
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "gated or private"),
        (ConnectionError("Couldn't reach the Hugging Face Hub"), "cannot be reached"),
        (ValueError("Config name is missing.\nPlease pick one among the available configs: ['a']"), "name one: data:"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "runs code of its own"),
        (ValueError("something\nelse"), "cannot be loaded (ValueError: something else)"),
    ],
)
def test_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = _explain(error)
    assert message in found
    assert "\n" not in found


def test_splits() -> None:
    assert _choose_split("d", ["train", "test"], None, False) == "train"
    assert _choose_split("d", ["train", "test"], None, True) == "test"
    assert _choose_split("d", ["train", "test", "validation"], None, True) == "validation"
    with pytest.raises(UsageError, match="d: no split 'train'; it has 'test'"):
        _choose_split("d", ["test"], None, False)
