"""The study's reports as short Markdown tables, for docs/results.md.

    python benchmarks/compare_study/tables.py [--times] docs/study/gemma-sst2 docs/study/gemma-instruct …

Every figure is report.json's: a mean over seeds with its 95 % interval, and below the table the differences in the
metric that decides, as the report says them. Times only with --times: they are for runs that had the machine to
themselves.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN = ("merge_loss", "peak_memory_bytes")
TIMES = ("step_seconds", "tokens_per_second")
UNITS = {"bytes": (1e-9, " GB", 2), "seconds": (1.0, " s", 3), "tokens/s": (1.0, "", 0), "share": (100.0, " %", 1)}


def shown(figure: dict[str, Any] | None, unit: str) -> str:
    """Mean and interval; `-` where nothing was measured."""
    if figure is None:
        return "-"
    factor, suffix, decimals = UNITS.get(unit, (1.0, "", 4))
    values = [figure["mean"], figure["low"], figure["high"]]
    texts = [f"{value * factor:,.{decimals}f}" for value in values if value is not None]
    if len(texts) < 3 or texts[1] == texts[2]:
        return texts[0] + suffix
    return f"{texts[0]}{suffix} ({texts[1]} to {texts[2]})"


def table(report: dict[str, Any], shown_ones: Sequence[str]) -> list[str]:
    quality = [metric for metric in report["metrics"] if metric["quality"]]
    others = [metric for metric in report["metrics"] if metric["key"] in shown_ones]
    metrics = sorted(others, key=lambda metric: shown_ones.index(metric["key"]))
    rates = report["settings"]["tune_lr"]
    heads = ["", *(metric["label"] for metric in quality), *(["learning rate"] if rates else [])]
    heads += [metric["label"] for metric in metrics]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for variant in report["variants"]:
        cells = [shown(variant["figures"].get(metric["key"]), metric["unit"]) for metric in quality]
        cells += [f"{variant['learning_rate']:g}"] if rates else []
        cells += [shown(variant["figures"].get(metric["key"]), metric["unit"]) for metric in metrics]
        lines.append(f"| {variant['key']} | {' | '.join(cells)} |")
    known = report["baselines"]
    for name in ("base", "majority"):
        values = [known.get(metric["key"], {}).get(name) for metric in quality]
        if any(value is not None for value in values):
            units = [UNITS.get(metric["unit"], (1.0, "", 4)) for metric in quality]
            texts = [
                "-" if value is None else f"{value * factor:.{decimals}f}{suffix}"
                for value, (factor, suffix, decimals) in zip(values, units, strict=True)
            ]
            rest = "| " * (len(heads) - 1 - len(texts))
            title = "base, untrained" if name == "base" else "always the commonest label"
            lines.append(f"| {title} | {' | '.join(texts)} {rest}|")
    return lines


def main() -> None:
    folders = [word for word in sys.argv[1:] if word != "--times"]
    chosen = (*TIMES, *SHOWN) if "--times" in sys.argv else SHOWN
    for folder in folders:
        report = json.loads((Path(folder) / "report.json").read_text())
        settings = report["settings"]
        deciding = TIMES[1] if "--times" in sys.argv else report["metrics"][0]["key"]
        print(f"### {report['title']}\n\n{report['sentence']}\n")
        print("\n".join(table(report, chosen)))
        steps, tokens = settings["steps"], settings["supervised_tokens"]
        count = len(settings["seeds"])
        print(f"\n{count} seed{'s' * (count > 1)}, {steps} updates, {tokens:,} supervised tokens a run.\n")
        for made in report["comparisons"]:
            if made["metric"] == deciding:
                print(f"- {made['sentence']}")
        print()


if __name__ == "__main__":
    main()
