"""`halfbyte compare` from the command line: which folder --claims and --pack are about."""

import json
from pathlib import Path

from tests.cli.conftest import Run
from tests.compare.test_claims import report, variant


def study(folder: Path) -> Path:
    """A study whose report lies in the folder that its file names."""
    one = report(
        variant("lora", tokens_per_second=[105.0, 106.0, 107.0]), variant("qlora", tokens_per_second=[100.0] * 3)
    )
    (folder / "mine").mkdir()
    (folder / "mine" / "report.json").write_text(json.dumps(one.data))
    file = folder / "study.yaml"
    file.write_text("model: m\ndata: rows.jsonl\noutput: mine\n")
    return file


def test_claims_are_held_against_the_output_that_the_file_names(halfbyte: Run, tmp_path: Path) -> None:
    file = study(tmp_path)
    done = halfbyte("compare", file, "--claims", "--json")
    assert done.code == 0, done.err
    assert {one["evidence"] for one in done.json if one["claim"] == 9} == {"mine/report.json"}
    refused = halfbyte("compare", file, "--claims", "-o", "elsewhere")
    assert (refused.code, refused.out) == (2, "")
    assert "no report.json in elsewhere" in refused.err


def test_what_is_packed_is_the_output_that_the_file_names(halfbyte: Run, tmp_path: Path) -> None:
    file = study(tmp_path)
    for words, root in ((("compare", file), "mine"), (("compare", file, "-o", "elsewhere"), "elsewhere"),
                        (("compare",), "comparison")):  # fmt: skip
        refused = halfbyte(*words, "--pack", "packed")
        assert (refused.code, refused.out) == (2, "")
        assert f"{root} holds no comparison to pack" in refused.err
