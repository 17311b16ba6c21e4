"""The same small search for every variant's learning rate (`--tune-lr`).

Methods want different learning rates, and a comparison at one rate compares how well it suits them. Each variant is run
for a few updates at the same multiples of its own rate, with a seed that no cell has, and takes the one with the lowest
held-out loss. Where that is at an end of the grid a better one may lie beyond: the grid of that variant goes on there,
by the same rule for all, up to twice; what is at an end then is told. The held-out rows are the comparison's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.compare import identity
from halfbyte.compare.cells import is_finished
from halfbyte.compare.design import Cell, Design, PlannedVariant, cell_of
from halfbyte.compare.options import MAX_SEEDS, CompareOptions
from halfbyte.run.folder import read_json
from halfbyte.train.run_directory import RESULT

EXTENSIONS = 2
"""How often the grid of a variant goes on beyond its end."""


@dataclass(frozen=True)
class Search:
    """What is tried: by variant the rates and their cells."""

    seed: int
    steps: int
    rates: Mapping[str, tuple[float, ...]]
    cells: Mapping[str, tuple[Cell, ...]]

    def all_cells(self) -> list[Cell]:
        return list({cell.id: cell for cells in self.cells.values() for cell in cells}.values())


def search_of(design: Design, options: CompareOptions) -> Search:
    """The runs of the search. Variants that go on from another's adapter keep their rate."""
    first = design.variants[0]
    steps = options.tune_steps or max(1, math.ceil(first.work.steps / 3))
    seed = design.seeds[0] + MAX_SEEDS  # whatever the number of seeds: one more of them searches nothing again
    rates, cells = {}, {}
    for planned in design.variants:
        if planned.skipped is None and planned.variant.continue_from is None:
            own = identity.learning_rate(planned.config, planned.pairs)
            # Rounded, so that a config can be written down: 3 * 2e-4 is 0.0006000000000000001.
            rates[planned.key] = tuple(float(f"{own * multiple:.6g}") for multiple in options.tune_multiples)
            cells[planned.key] = tuple(_cell(planned, seed, rate, steps) for rate in rates[planned.key])
    return Search(seed, steps, rates, cells)


def _cell(planned: PlannedVariant, seed: int, rate: float, steps: int) -> Cell:
    return cell_of(planned, seed, kind="tune", learning_rate=rate, max_steps=steps, eval_steps=steps)


def chosen_rates(search: Search, cells: Path) -> tuple[dict[str, float], dict[str, list[float | None]]]:
    """(the rate of each variant, its held-out losses in the grid's order). A run that failed has no loss; where all of
    a variant's failed it keeps its own rate."""
    chosen, losses = {}, {}
    for key, runs in search.cells.items():
        losses[key] = [_loss(cells, cell) for cell in runs]
        known = [(loss, rate) for loss, rate in zip(losses[key], search.rates[key], strict=True) if loss is not None]
        if known:
            chosen[key] = min(known)[1]
    return chosen, losses


def _loss(cells: Path, cell: Cell) -> float | None:
    if not is_finished(cells, cell):
        return None
    loss = read_json(cells / cell.id / RESULT)["eval_loss"]
    return loss if loss is not None and math.isfinite(loss) else None


def beyond(search: Search, design: Design, losses: Mapping[str, Sequence[float | None]]) -> Search | None:
    """The search with one more rate for each variant whose best is at an end of its grid, as far beyond it as its
    neighbour is before it; None where there is no such variant."""
    rates, cells = dict(search.rates), dict(search.cells)
    for planned in design.variants:
        tried = search.rates.get(planned.key, ())
        known = [
            (loss, rate) for loss, rate in zip(losses.get(planned.key, ()), tried, strict=True) if loss is not None
        ]
        ordered = sorted(set(tried))
        if not known or len(ordered) < 2:
            continue
        best = min(known)[1]
        if best not in (ordered[0], ordered[-1]):
            continue
        neighbour = ordered[1] if best == ordered[0] else ordered[-2]
        rate = float(f"{best * best / neighbour:.6g}")
        rates[planned.key] = (*tried, rate)
        cells[planned.key] = (*search.cells[planned.key], _cell(planned, search.seed, rate, search.steps))
    return None if rates == dict(search.rates) else replace(search, rates=rates, cells=cells)


def so_far(design: Design, options: CompareOptions, cells: Path) -> tuple[Design, list[Cell]]:
    """(the design with the rates of the variants whose search is done already, the search's runs that are missing)."""
    search = search_of(design, options)
    for _ in range(EXTENSIONS):
        more = beyond(search, design, chosen_rates(search, cells)[1])
        if more is None:
            break
        search = more
    chosen, _ = chosen_rates(search, cells)
    missing = [cell for cell in search.all_cells() if not is_finished(cells, cell)]
    searching = {cell.variant for cell in missing}
    return with_rates(design, {key: rate for key, rate in chosen.items() if key not in searching}), missing


def with_rates(design: Design, chosen: Mapping[str, float]) -> Design:
    """The design with every variant at its chosen rate."""

    def changed(planned: PlannedVariant) -> PlannedVariant:
        rate = chosen.get(planned.key)
        return planned if rate is None else replace(planned, config=planned.config.replace(learning_rate=rate))

    return replace(design, variants=tuple(changed(planned) for planned in design.variants))


def as_dict(
    search: Search, chosen: Mapping[str, float], losses: Mapping[str, Sequence[float | None]]
) -> dict[str, Any]:
    """What the report says of the search."""
    return {
        "seed": search.seed,
        "steps": search.steps,
        "grid": {key: list(rates) for key, rates in search.rates.items()},
        "losses": {key: list(values) for key, values in losses.items()},
        "cells": {key: [cell.id for cell in runs] for key, runs in search.cells.items()},
        "chosen": dict(chosen),
    }
