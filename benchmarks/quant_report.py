"""What `quant_table.py` found, as Markdown: error on normal weights, bits a parameter, perplexity a model."""

import math
from collections.abc import Mapping
from typing import Any

from quant_formats import BLOCKSIZES, FORMATS

from halfbyte.evaluate.intervals import ratio_interval


def perplexity(cell: dict[str, Any], length: int, count: int) -> float:
    """Of the first `count` windows."""
    return math.exp(sum(cell["nll"][:count]) / (count * (length - 1)))


def change(cell: dict[str, Any], base: dict[str, Any], length: int, count: int) -> tuple[float, float, float]:
    """The perplexity over the base's, minus 1, and its 95 % interval: windows are drawn, differences paired."""
    difference = [cell["nll"][i] - base["nll"][i] for i in range(count)]
    tokens = [length - 1.0] * count
    low, high = ratio_interval(difference, tokens)
    return math.expm1(sum(difference) / sum(tokens)), math.expm1(low), math.expm1(high)


PAIRS = (("nf4+dq", "nf4"), ("e2m1", "nf4"), ("int4", "nf4"), ("fp4", "nf4"), ("int4", "e2m1"), ("int4", "fp4"))


def markdown(found: dict[str, Any]) -> str:
    parts = []
    if found["normal"]:
        parts.append(_normal(found["normal"]))
    for model in found["models"]:
        parts += [_perplexities(model), _pairs(model), _bits(model)]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body])


def _normal(errors: dict[str, float]) -> str:
    rows = [["blocks of", *(chosen.title for chosen in FORMATS.values())]]
    for size in BLOCKSIZES:
        rows.append([f"{size:,}", *(f"{errors[f'{name}-{size}']:.4f}" for name in FORMATS)])
    return "Mean |error| on normal random weights.\n\n" + _table(rows)


def _cells(model: dict[str, Any]) -> dict[tuple[str, int | None], dict[str, Any]]:
    return {(cell["format"], cell["blocksize"]): cell for cell in model["cells"]}


def _perplexities(model: dict[str, Any]) -> str:
    cells, length = _cells(model), model["length"]
    base = cells.get(("16bit", None))
    if base is None:
        return f"**{model['name']}**: nothing yet."
    count = _windows(cells)
    rows = [["blocks of", *(chosen.title for chosen in FORMATS.values())]]
    for size in BLOCKSIZES:
        row = [f"{size:,}"]
        for name in FORMATS:
            cell = cells.get((name, size))
            if cell is None:
                row.append("")
                continue
            share, low, high = (100 * value for value in change(cell, base, length, count))
            row.append(f"{perplexity(cell, length, count):.3f} ({share:+.2f} %: {low:+.2f} to {high:+.2f})")
        rows.append(row)
    said = (
        f"**{model['name']}**: 16 bits {perplexity(base, length, count):.3f}; {count} of {model['of_windows']} windows "
        f"of {length} tokens, {count * (length - 1):,} predicted; computed in {model['dtype']}."
    )
    return said + (f" {model['note']}" if model["note"] else "") + "\n\n" + _table(rows)


def _windows(cells: Mapping[tuple[str, int | None], dict[str, Any]]) -> int:
    """How many windows all cells have: every figure is over the same ones."""
    return min(len(cell["nll"]) for cell in cells.values())


def _pairs(model: dict[str, Any]) -> str:
    """One format's perplexity over another's: far tighter than two intervals against 16 bits side by side."""
    cells = _cells(model)
    rows = [["blocks of", *(f"{FORMATS[one].title} over {FORMATS[other].title}" for one, other in PAIRS)]]
    for size in BLOCKSIZES:
        row = [f"{size:,}"]
        for pair in PAIRS:
            one, other = (cells.get((name, size)) for name in pair)
            if one is None or other is None:
                row.append("")
                continue
            share, low, high = (100 * value for value in change(one, other, model["length"], _windows(cells)))
            row.append(f"{share:+.2f} % ({low:+.2f} to {high:+.2f})")
        rows.append(row)
    return f"{model['name']}, one format's perplexity over another's, windows paired.\n\n" + _table(rows)


def _bits(model: dict[str, Any]) -> str:
    cells = _cells(model)
    rows = [["blocks of", *(f"{kind}: {part}" for kind in ("NF4", "NF4+DQ") for part in ("values", "file", "whole"))]]
    metadata = []
    for size in BLOCKSIZES:
        row = [f"{size:,}"]
        for name in ("nf4", "nf4+dq"):
            cell = cells.get((name, size))
            if cell is None:
                row += ["", "", ""]
                continue
            bits = cell["bits"]
            whole = 8 * (bits["file_bytes"] + model["rest_bytes"]) / model["parameters"]
            row += [f"{bits['values']:.4f}", f"{bits['file']:.4f}", f"{whole:.3f}"]
            metadata.append(bits["metadata"])
        rows.append(row)
    largest = f"{max(metadata):,.0f}" if metadata else "-"
    said = (
        f"Bits a parameter, {model['name']}, from the files: codes and constants of the {model['linears']} quantized "
        f"matrices ({model['linear_parameters']:,} parameters), their file (at most {largest} bytes a matrix more), "
        f"and the whole model ({model['parameters']:,} parameters, embedding and norms as they were)."
    )
    return said + "\n\n" + _table(rows)
