"""Reports that hypothesis makes up: valid ones, with anything in them that a report may have."""

from typing import Any

from hypothesis import strategies as st

from halfbyte.compare.schema import Unit
from tests.compare.extremes import NASTY

UNITS = list(Unit.__args__)
TEXT = st.one_of(
    st.text(st.characters(), max_size=12), st.sampled_from([NASTY, "", " ", "1. a", "<b>x</b>", "]]>", "|", "\n```\n"])
)
NUMBER = st.one_of(
    st.floats(-1e18, 1e18),
    st.floats(-10, 10),
    st.integers(-(10**18), 10**18),
    st.sampled_from([0, 0.0, -0.0, 1e-320, 1e18, 0.5]),
)
COUNT = st.integers(0, 10**18)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


FIGURE = st.fixed_dictionaries(
    {"mean": NUMBER, "low": maybe(NUMBER), "high": maybe(NUMBER), "n": COUNT, "values": st.lists(NUMBER, max_size=3)}
)
RANGE = st.fixed_dictionaries({"p50": NUMBER, "p95": NUMBER})
POINT = st.fixed_dictionaries(
    {"supervised_tokens": NUMBER, "seconds": maybe(NUMBER), "mean": NUMBER, "low": maybe(NUMBER), "high": maybe(NUMBER)}
)
CURVE = st.lists(POINT, max_size=8)
KEYS = ["eval_loss", "peak_memory_bytes", "tokens_per_second", "seconds", "accuracy", "cost"]


def _variant(key: str, metrics: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    against = st.fixed_dictionaries({"metric": st.sampled_from(metrics), "share": FIGURE}) if metrics else st.none()
    return st.fixed_dictionaries(
        {
            "key": st.just(key),
            "label": TEXT,
            "method_name": TEXT,
            "command": TEXT,
            "figures": st.dictionaries(st.sampled_from(metrics), maybe(FIGURE)) if metrics else st.just({}),
            "against_full": maybe(against),
            "components": st.dictionaries(TEXT, NUMBER, max_size=10),
            "predicted": st.fixed_dictionaries(
                {}, optional={"peak_memory_bytes": maybe(RANGE), "seconds": maybe(RANGE)}
            ),
            "curves": st.fixed_dictionaries({"train": CURVE, "eval": CURVE}),
            "hardware": st.lists(TEXT, max_size=2),
            "precision": maybe(TEXT),
            "double_quant": maybe(st.booleans()),
            "notes": st.lists(TEXT, max_size=2),
        }
    )


@st.composite
def reports(draw: st.DrawFn) -> dict[str, Any]:
    metrics = draw(st.lists(st.sampled_from(KEYS), unique=True))
    keys = draw(st.lists(TEXT, unique=True, max_size=3))
    report: dict[str, Any] = {name: draw(TEXT) for name in ("created", "command", "title", "sentence")}
    report["model"] = {"name": draw(TEXT), "quantized_source": draw(maybe(TEXT)), "parameters": draw(maybe(COUNT))}
    report["data"] = [{"name": draw(TEXT), "rows": draw(maybe(COUNT))}]
    report["machine"] = {"processor": draw(maybe(TEXT)), "memory_bytes": draw(maybe(NUMBER))}
    report["versions"] = draw(st.dictionaries(TEXT, maybe(TEXT), max_size=2))
    report["settings"] = {"seeds": draw(st.lists(st.integers(-5, 5), max_size=3)), "steps": draw(maybe(COUNT))}
    report["metrics"] = [
        {
            "key": key,
            "label": draw(TEXT),
            "better": draw(st.sampled_from(["lower", "higher"])),
            "unit": draw(st.sampled_from(UNITS)),
            "quality": draw(st.booleans()),
        }
        for key in metrics
    ]
    report["variants"] = [draw(_variant(key, metrics)) for key in keys]
    report["notes"], report["warnings"] = draw(st.lists(TEXT, max_size=2)), draw(st.lists(TEXT, max_size=2))
    report["plan"] = draw(maybe(st.fixed_dictionaries({"seconds": maybe(RANGE)})))
    if keys:
        report |= _about(draw, keys, metrics)
    return report


def _about(draw: st.DrawFn, keys: list[str], metrics: list[str]) -> dict[str, Any]:
    """What refers to variants and metrics."""
    key = st.sampled_from(keys)
    reached = {"variant": key, "reached": COUNT, "at_first": COUNT, "supervised_tokens": maybe(FIGURE),
               "seconds": maybe(FIGURE)}  # fmt: skip
    target = st.fixed_dictionaries({"loss": NUMBER, "rows": st.lists(st.fixed_dictionaries(reached), max_size=3)})
    status = st.sampled_from(["done", "failed", "missing"])
    cells = [
        {
            "id": f"cell {i}",
            "variant": draw(key),
            "seed": i,
            "path": draw(maybe(TEXT)),
            "status": draw(status),
            "origin": draw(TEXT),
        }
        for i in range(draw(st.integers(0, 3)))
    ]
    out: dict[str, Any] = {"convergence": draw(st.lists(target, max_size=2)), "cells": cells}
    if not metrics:
        return out
    metric = st.sampled_from(metrics)
    comparison = {
        "a": key,
        "b": key,
        "metric": metric,
        "difference": st.fixed_dictionaries({"mean": NUMBER, "low": maybe(NUMBER), "high": maybe(NUMBER)}),
        "detectable": maybe(NUMBER),
        "verdict": st.sampled_from(["a better", "b better", "no difference found"]),
        "paired_by": st.sampled_from(["seed", "seed and row"]),
        "sentence": TEXT,
    }
    point = {
        "variant": key,
        "quality": maybe(NUMBER),
        "memory": maybe(NUMBER),
        "seconds": maybe(NUMBER),
        "on_front": st.booleans(),
    }
    front = st.fixed_dictionaries(
        {"quality_metric": metric, "points": st.lists(st.fixed_dictionaries(point), max_size=9)}
    )
    out["comparisons"] = draw(st.lists(st.fixed_dictionaries(comparison), max_size=3))
    out["pareto"] = draw(st.lists(front, max_size=2))
    out["baselines"] = draw(st.dictionaries(metric, st.fixed_dictionaries({"base": maybe(NUMBER)}), max_size=2))
    return out
