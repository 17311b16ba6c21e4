"""A comparison to send on: its report and the cells' small files, without this machine's paths (`--pack FOLDER`).

Whoever gets it has the pages, can make them again, and can give the folder to `--accept`: a run is recognized by
fingerprints, not by paths. Absolute paths are cut to their last name, in every file; relative ones stay.
"""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from halfbyte.compare import report_data
from halfbyte.compare.cells import SMALL
from halfbyte.compare.render import write_report
from halfbyte.errors import UsageError
from halfbyte.export.folder import new_folder
from halfbyte.run.folder import read_json

_WHOLE = re.compile(r"(?:/|~/|[A-Za-z]:[\\/])\S.*", re.DOTALL)
_INSIDE = re.compile(r"(?<![\w./~:-])(?:~|[A-Za-z]:)?(?:[\\/][\w.+@%=~ -]*[\w.+@%=~-]){2,}[\\/]?")


def pack(root: Path, out: Path) -> list[Path]:
    """Write the folder `out`, whole or not at all; returns its files. UsageError where it holds something already."""
    if not (root / report_data.FILE).is_file():
        raise UsageError(f"{root} holds no comparison to pack")
    if "cells" not in read_json(root / report_data.FILE):
        raise UsageError(f"{root}: its comparison stopped before its first run: start it again, then pack it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--pack {out}: it is there already: choose another folder")
    with new_folder(out) as part:
        for file in _small_files(root):
            place = part / file.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(without_paths(file), encoding="utf-8")
        write_report(report_data.build(part), part)
    return sorted(path for path in out.rglob("*") if path.is_file())


def _small_files(root: Path) -> Iterator[Path]:
    said = read_json(root / report_data.FILE)
    searched = (said.get("tune") or {}).get("cells", {})
    wanted = {cell["id"] for cell in said["cells"]}.union(*searched.values())
    for name in (report_data.FILE, report_data.BASELINE):
        if (root / name).is_file():
            yield root / name
    for cell in sorted(wanted):
        yield from (root / "cells" / cell / name for name in SMALL if (root / "cells" / cell / name).is_file())


def without_paths(file: Path) -> str:
    """The text of a YAML, JSON or JSON Lines file with absolute paths cut to their last name."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".yaml":
        return yaml.safe_dump(cut(yaml.safe_load(text)), sort_keys=False, allow_unicode=True, width=1000)
    if file.suffix == ".jsonl":
        lines = [json.dumps(cut(json.loads(line)), ensure_ascii=False) for line in text.splitlines()]
        return "".join(f"{line}\n" for line in lines)
    return json.dumps(cut(json.loads(text)), indent=1, ensure_ascii=False) + "\n"


def cut(value: Any) -> Any:
    """The value with every absolute path in its strings cut, at any depth; commands stay commands."""
    if isinstance(value, dict):
        return {cut(key): cut(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cut(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("halfbyte "):
        return shlex.join(_name(word) if _WHOLE.fullmatch(word) else word for word in shlex.split(value))
    if _WHOLE.fullmatch(value) and "\n" not in value and value.count(" ") < 4:
        return _name(value)
    return _INSIDE.sub(lambda found: _name(found[0]), value)


def _name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
