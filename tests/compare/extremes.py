"""Reports at the edges of what a report can be. Every figure is invented, as in `invented`."""

from typing import Any

from tests.compare.invented import comparison, five, one_seed_base

NASTY = (
    "<script>alert(1)</script> \"quoted\" 'single' | pipe `tick` *star* _low_ &amp; \u202ereversed\x00\ud800 "
    + "long" * 60
)
"""Markup of three kinds, characters that cannot be printed, and a word that is wider than any page."""


def nasty() -> dict[str, Any]:
    """Names, paths and messages that try to be markup, break a table, or are far too long; runs that failed."""
    report = five()
    for key in ("title", "sentence", "command"):
        report[key] = f"{key} {NASTY}"
    report["model"]["name"] = report["data"][0]["name"] = report["machine"]["processor"] = NASTY
    report["versions"] = {NASTY: NASTY}
    for variant in report["variants"]:
        variant["label"] = f"{variant['key']} {NASTY}"
        variant["components"] = {f"{name} {NASTY}": size for name, size in variant["components"].items()}
        variant["hardware"] = [NASTY]
        variant["command"] = f"halfbyte train {NASTY}\n```\n# not a heading"
    for metric in report["metrics"]:
        metric["label"] = f"{metric['key']} {NASTY}"
    for compared in report["comparisons"]:
        compared["sentence"] = NASTY
    for cell in report["cells"]:
        cell |= {"path": NASTY, "origin": f"another machine: {NASTY}", "message": NASTY}
    report["cells"][0]["status"], report["cells"][1]["status"] = "failed", "missing"
    report["notes"], report["warnings"] = [NASTY, "1. no list", "# no heading"], [NASTY]
    report["plan"]["cost"]["currency"] = NASTY
    return report


def empty() -> dict[str, Any]:
    """Nothing ran."""
    report = one_seed_base()
    report["data"], report["versions"] = [], {}
    report["machine"] = dict.fromkeys(report["machine"], None) | {"instruction_sets": []}
    report["model"] |= dict.fromkeys(set(report["model"]) - {"name"}, None)
    report["settings"] = {"seeds": [], "steps": None, "supervised_tokens": None, "tune_lr": None, "side_by_side": True}
    return report


def single() -> dict[str, Any]:
    """One method, one seed."""
    return _only(five(seeds=1), ["qlora"])


def _only(report: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    report["variants"] = [variant for variant in report["variants"] if variant["key"] in keys]
    report["comparisons"] = [c for c in report["comparisons"] if c["a"] in keys and c["b"] in keys]
    report["cells"] = [cell for cell in report["cells"] if cell["variant"] in keys]
    for row in report["convergence"]:
        row["rows"] = [at for at in row["rows"] if at["variant"] in keys]
    for pareto in report["pareto"]:
        pareto["points"] = [point for point in pareto["points"] if point["variant"] in keys]
    return report


def failed() -> dict[str, Any]:
    """Two methods of which one never finished: it has no figures, curves or components."""
    report = _only(five(), ["lora", "qlora"])
    report["variants"][1] |= {
        "figures": {},
        "against_full": None,
        "components": {},
        "peak_phase": None,
        "predicted": {},
        "curves": {"train": [], "eval": []},
        "double_quant": None,
        "paged": None,
        "hardware": [],
    }
    report["comparisons"] = []
    for row in report["convergence"]:
        row["rows"][1] |= {"reached": 0, "supervised_tokens": None, "seconds": None}
    for pareto in report["pareto"]:
        pareto["points"][1] |= {"quality": None, "memory": None, "seconds": None, "on_front": False}
    for cell in report["cells"]:
        if cell["variant"] == "qlora":
            cell |= {"status": "failed", "seconds": None, "message": "killed: it needed more memory than there is"}
    return report


def many() -> dict[str, Any]:
    """Twenty methods, more than there are colours, and every pair compared."""
    report = five()
    variants = []
    for i in range(20):
        original = report["variants"][i % 5]
        variants.append(
            original
            | {"key": f"{original['key']}{i}", "label": f"{original['label']}, rank {2 ** (i // 5 + 2)}", "cells": []}
        )
    report["variants"] = variants
    keys = [variant["key"] for variant in variants]
    report["settings"]["tune_lr"] = None
    report["cells"] = []
    report["comparisons"] = [
        comparison(a, b, "eval_loss", 0.001 * (i - 5), 0.004, "lower") for i, a in enumerate(keys) for b in keys[:i]
    ]
    for row in report["convergence"]:
        row["rows"] = [row["rows"][i % 5] | {"variant": key} for i, key in enumerate(keys)]
    for pareto in report["pareto"]:
        points = [pareto["points"][i % 5] for i in range(20)]
        pareto["points"] = [
            point | {"variant": key, "memory": point["memory"] * (1 + i / 50)}
            for i, (key, point) in enumerate(zip(keys, points, strict=True))
        ]
    return report


ALL = {"five": five, "nasty": nasty, "empty": empty, "single": single, "failed": failed, "many": many}
