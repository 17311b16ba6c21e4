"""Figures in words, for the sentences of a report."""

from typing import Any


def amount(value: float, metric: dict[str, Any]) -> str:
    """A figure of a metric with its unit: 1.23 GB, 4 min, 91.2 %, 0.0123."""
    unit = metric["unit"]
    if unit == "bytes":
        return nbytes(value)
    if unit == "seconds":
        return seconds(value)
    if unit == "share":
        return f"{value:.1%}"
    if unit in ("count", "supervised tokens"):
        return f"{value:,.0f}"
    if unit == "tokens/s":
        return f"{value:,.0f} tokens/s"
    if unit == "money":
        return f"{digits(value)} {metric.get('currency', '')}".strip()
    if unit == "joules":
        return f"{value / 1000:.2f} kJ" if abs(value) >= 1000 else f"{value:.1f} J"
    return digits(value)


def difference(value: float, metric: dict[str, Any]) -> str:
    """The size of a difference: of shares in points."""
    return f"{abs(value) * 100:.2f} points" if metric["unit"] == "share" else amount(abs(value), metric)


def digits(value: float) -> str:
    """Four digits after the point, or as many significant ones where that shows nothing."""
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"


def nbytes(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} bytes"


def seconds(value: float) -> str:
    if abs(value) < 1:
        return f"{value * 1000:.1f} ms"
    if abs(value) < 90:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if abs(value) < 5400 else f"{value / 3600:.2f} h"


def names(words: list[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
