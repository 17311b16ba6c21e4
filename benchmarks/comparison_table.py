"""The tables of `compare.py`, from its stored results alone.

A cell is the median over the rounds, with the least and the greatest of them and how many there were. Ratios divide
medians: above 1, halfbyte is the faster or the leaner one.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "halfbyte"
PEERS = ("loop", "compile", "trl")  # what a user has without halfbyte
ORDER = (OURS, *PEERS, "loop+halfbyte")
NOTHING = ""


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; [] where there is none. A line cut off by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


@dataclass(frozen=True)
class Values:
    """One figure of one contender on one row, over the rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def show(self, unit: float, digits: int) -> str:
        shown = f"{self.median / unit:.{digits}f}"
        if len(self.values) == 1:
            return f"{shown} (1 run)"
        low, high = (f"{value / unit:.{digits}f}" for value in (min(self.values), max(self.values)))
        return f"{shown} ({low} to {high}, {len(self.values)} runs)"


class Results:
    """Records by row (its JSON, sorted keys) and contender."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        latest: dict[str, dict[str, Any]] = {}
        for record in records:
            name = json.dumps(record["key"])
            # A later success replaces a failure, a later failure nothing.
            if "result" in record or "result" not in latest.get(name, {}):
                latest[name] = record
        self.rows: dict[str, dict[str, Any]] = {}
        self._found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in latest.values():
            row, contender, _ = record["key"]
            name = json.dumps(row, sort_keys=True)
            self.rows[name] = row
            self._found.setdefault((name, contender), []).append(record)
        self.contenders = [name for name in ORDER if any(key[1] == name for key in self._found)]
        self.revisions = sorted({str(record["revision"]) for record in latest.values() if "result" in record})

    def values(self, row: str, contender: str, field: str) -> Values | None:
        records = [r["result"] for r in self._found.get((row, contender), []) if "result" in r]
        found = tuple(result[field] for result in records if result.get(field) is not None)
        return Values(found) if found else None

    def error(self, row: str, contender: str) -> str | None:
        errors = [record["error"] for record in self._found.get((row, contender), []) if "error" in record]
        return errors[-1] if errors else None

    def peers(self, row: str, field: str) -> dict[str, Values]:
        found = {peer: self.values(row, peer, field) for peer in PEERS}
        return {peer: values for peer, values in found.items() if values is not None}

    def other_method(self, row: str, method: str) -> str:
        return json.dumps({**self.rows[row], "method": method}, sort_keys=True)


def _ratio(ours: Values | None, theirs: Values | None, better_is_more: bool) -> str:
    if ours is None or theirs is None:
        return NOTHING
    ratio = ours.median / theirs.median
    return f"{ratio if better_is_more else 1 / ratio:.2f}"


def _title(row: dict[str, Any]) -> str:
    parts = [row["model"], f"{row['batch']}x{row['seq']}", row["method"], row["dtype"]]
    return " ".join(parts + (["checkpointing"] if row["checkpointing"] else []) + ([row["isa"]] if row["isa"] else []))


def _cells(results: Results, row: str, field: str, unit: float, digits: int) -> list[str]:
    cells = []
    for contender in results.contenders:
        values = results.values(row, contender, field)
        failed = "failed" if results.error(row, contender) else NOTHING
        cells.append(values.show(unit, digits) if values else failed)
    return cells


def _speed(results: Results, row: str) -> list[str]:
    field = "tokens_per_second"
    ours, peers = results.values(row, OURS, field), results.peers(row, field)
    fastest = max(peers.values(), key=lambda values: values.median, default=None)
    seconds = results.values(row, OURS, "seconds_per_step")
    lora = results.values(results.other_method(row, "lora"), OURS, "seconds_per_step")
    over_lora = NOTHING
    if results.rows[row]["method"] == "qlora" and seconds and lora:
        over_lora = f"{seconds.median / lora.median:.2f}"
    share, rate = (results.values(row, OURS, name) for name in ("gemm_share", "gemm_flops"))
    of_gemm = f"{share.median:.0%} of {rate.median / 1e12:.2f} TFLOP/s" if share and rate else NOTHING
    ratios = [_ratio(ours, fastest, True), _ratio(ours, peers.get("trl"), True)]
    return [*_cells(results, row, field, 1, 0), *ratios, over_lora, of_gemm]


def _memory(results: Results, row: str) -> list[str]:
    field = "peak_rss_bytes"
    ours, peers = results.values(row, OURS, field), results.peers(row, field)
    leanest = min(peers.values(), key=lambda values: values.median, default=None)
    load = results.values(row, OURS, "load_peak_rss_bytes")
    return [
        *_cells(results, row, field, 1e9, 2),
        _ratio(ours, leanest, False),
        load.show(1e9, 2) if load else NOTHING,
    ]


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _machine(path: Path) -> str:
    if not path.is_file():
        return "Machine: not recorded."
    found = json.loads(path.read_text())
    kinds = ", ".join(found["flags"]) or "none of those that matter here"
    lines = [
        f"Machine: {found['cpu']} ({found['cpu_family']}), {found['cores']} cores, {found['threads']} threads, "
        f"{found['memory_bytes'] / 1e9:.1f} GB; instruction sets: {kinds}.",
        f"{found['system']}, Python {found['python']}.",
    ]
    for name, title in (("versions", "halfbyte's side"), ("peer_versions", "The peers' side")):
        if found.get(name):
            lines.append(f"{title}: " + ", ".join(f"{package} {v}" for package, v in found[name].items()) + ".")
    return "\n".join(lines)


def make(folder: Path) -> str:
    """The Markdown of a results folder."""
    results = Results(read(folder / "results.jsonl"))
    if not results.rows:
        return f"No results in {folder}.\n"
    speed_head = [
        "tokens/s",
        *results.contenders,
        "/ fastest peer",
        "/ trl",
        "Q step / LoRA step",
        "share of GEMM rate",
    ]
    memory_head = ["peak memory, GB", *results.contenders, "leanest peer /", "halfbyte after loading"]
    parts = [
        _machine(folder / "machine.json"),
        _markdown(speed_head, ([_title(row), *_speed(results, name)] for name, row in results.rows.items())),
        _markdown(memory_head, ([_title(row), *_memory(results, name)] for name, row in results.rows.items())),
    ]
    failures = [
        f"- {_title(row)}, {contender}: {error}"
        for name, row in results.rows.items()
        for contender in results.contenders
        if (error := results.error(name, contender))
    ]
    if failures:
        parts.append("Failed:\n\n" + "\n".join(failures))
    if results.revisions:
        parts.append("halfbyte at " + ", ".join(results.revisions) + " (+: with uncommitted changes).")
    return "\n\n".join(parts) + "\n"
