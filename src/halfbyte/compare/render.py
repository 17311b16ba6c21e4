"""A comparison's report, written: report.html, report.md and report.json.

`compare.schema` says what goes in; `compare.page` what the pages say and how they are written down.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.compare.page import contents, html, markdown
from halfbyte.compare.schema import Report
from halfbyte.files import new_files


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Check `report` against `schema.Report` and write its pages into `folder`. Same data, same bytes.

    Each file is whole or not there; a process killed between them leaves new ones beside old ones. Raises pydantic's
    ValidationError where it is not such a report, before anything is written, and `HalfbyteError` where the disk
    refuses.
    """
    files = rendered(report)
    with new_files(folder) as part:
        for name, text in files.items():
            (part / name).write_text(text, encoding="utf-8", newline="\n")


def rendered(report: Mapping[str, Any]) -> dict[str, str]:
    """The pages by their file's name."""
    checked = Report.model_validate(report)
    document = contents.document(checked)
    data = json.dumps(checked.model_dump(), indent=1, allow_nan=False)
    return {"report.html": html.page(document), "report.md": markdown.page(document), "report.json": data + "\n"}
