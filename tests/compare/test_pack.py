import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.compare.compare import Comparison, compare
from halfbyte.compare.pack import cut, pack
from halfbyte.errors import UsageError
from tests.compare.conftest import request_of


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/models/gemma.gguf", "gemma.gguf"),
        ("/home/me/my models/gemma 3.gguf", "gemma 3.gguf"),
        ("~/models/gemma", "gemma"),
        ("C:\\models\\gemma", "gemma"),
        ("models/gemma", "models/gemma"),
        ("google/gemma-3-270m", "google/gemma-3-270m"),
        ("100 tokens/s and 3 of 4", "100 tokens/s and 3 of 4"),
        ("failed: /data/x/rows.jsonl:3: no text", "failed: rows.jsonl:3: no text"),
        ("halfbyte train --model '/a b/c d' -d r.jsonl -o /x/y", "halfbyte train --model 'c d' -d r.jsonl -o y"),
        ("control group limit /sys/fs/cgroup/memory.max", "control group limit memory.max"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        (7, 7),
        ({"a": ["/x/y/z", None]}, {"a": ["z", None]}),
    ],
)  # fmt: skip
def test_paths_are_cut(text: Any, left: Any) -> None:
    assert cut(text) == left
    assert cut(left) == left


def test_a_packed_comparison_says_the_same_and_is_accepted(
    whole: Comparison, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    files = pack(whole.path, tmp_path / "packed")
    assert {"report.html", "report.md", "report.json", "comparison.json", "run.yaml"} <= {file.name for file in files}
    assert not any(file.name.startswith("adapter") for file in files)
    for file in files:
        assert str(model_folder.parent) not in file.read_text(encoding="utf-8")
        assert str(whole.path) not in file.read_text(encoding="utf-8")
    report = json.loads((tmp_path / "packed" / "report.json").read_text())
    assert whole.report is not None
    for name in ("sentence", "comparisons", "convergence", "pareto", "baselines", "cells"):
        assert report[name] == whole.report[name]
    begun: list[Any] = []

    def listen(event: dict[str, Any]) -> None:
        begun.extend([event] if event["event"] == "cell" else [])

    again = compare(request_of(model_folder, data_file, tmp_path / "new", accept=(tmp_path / "packed",)), listen)
    assert begun == []
    assert again.report is not None
    assert again.report["comparisons"] == whole.report["comparisons"]
    with pytest.raises(UsageError, match="it is there already"):
        pack(whole.path, tmp_path / "packed")
    with pytest.raises(UsageError, match="holds no comparison"):
        pack(tmp_path, tmp_path / "other")
