"""The two claims about memory that no comparison of runs decides: what `benchmarks/claims_memory.py` found of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.compare.claim_rules import CONFIRMED, OPEN, PARTLY, REFUTED, Said, all_of
from halfbyte.compare.statistics import mean_interval
from halfbyte.run.folder import read_json

FILE = "memory-claims.json"
PAGED, LAYERS = 10, 38
HALFBYTE, STOCK = "halfbyte", "transformers and bitsandbytes"


@dataclass(frozen=True)
class Record:
    """A memory-claims.json."""

    path: Path
    data: Mapping[str, Any]


def load_records(folders: Sequence[Path]) -> list[Record]:
    """Every memory-claims.json below the folders; there may be none."""
    paths = [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob(FILE))]
    return [Record(path, read_json(path)) for path in paths]


def paged_prevents_crashes(record: Record) -> Said:
    """Under a limit that AdamW's state exceeds paging must save the run; where activations are short it cannot."""
    found = record.data["paged"]
    state, activations = found["state_is_short"], found["activations"]
    limit = f"{found['model']}, full fine-tuning under a limit of {found['limit'] / 1e9:.2f} GB"
    needed = {name: f"{one['data_bytes'] / 1e9:.2f}" for name, one in found["needed"].items()}
    needs = f"AdamW needs {needed['adamw']} GB, paged AdamW {needed['paged_adamw']}"
    if state["adamw"]["finished"]:
        return Said(OPEN, f"{limit}: AdamW finished as well, so that paging was not asked for ({needs})")
    if not state["paged_adamw"]["finished"]:
        return Said(REFUTED, f"{limit}: both ran out of memory ({needs})")
    text = f"{limit}: AdamW runs out of memory and paged AdamW finishes, with the same loss ({needs})"
    if state["paged_adamw"]["loss"] != found["needed"]["adamw"]["loss"]:
        text = text.replace(", with the same loss", "")
    if activations["paged_adamw"]["finished"]:
        return Said(CONFIRMED, text)
    return Said(PARTLY, f"{text}; with rows so long that activations are what is short, both run out of memory")


def one_layer_at_a_time(record: Record) -> Said:
    """Decoded weights at the peak, in decoder layers: at most one, in both programs."""
    found = record.data["layers"]
    parts = []
    for name in (HALFBYTE, STOCK):
        figure = mean_interval([one / found["layer_bytes"] for one in found[name]])
        shown = f"{name}: {figure.mean:.2f} of a decoder layer's 16-bit weights"
        if figure.low is None or figure.high is None:
            parts.append(Said(OPEN, f"{shown}, measured once", figure.mean, unit="layers"))
            continue
        verdict = CONFIRMED if figure.high <= 1 else REFUTED if figure.low > 1 else OPEN
        shown += f" ({figure.low:.2f} to {figure.high:.2f})"
        parts.append(Said(verdict, shown, figure.mean, figure.low, figure.high, "layers"))
    linear = found["largest_linear_bytes"] / found["layer_bytes"]
    said = all_of(parts)
    text = f"{found['model']}, at the peak of a pass beyond the same model in 16 bits. {said.sentence}"
    return Said(said.verdict, f"{text} Its largest matrix is {linear:.2f}", said.figure, said.low, said.high, said.unit)


TESTS = {PAGED: paged_prevents_crashes, LAYERS: one_layer_at_a_time}
