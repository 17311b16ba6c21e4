"""`docs/published-memory.md`: other people's peaks (`plan.anchors`) beside what their stacks' arithmetic gives.

python -m halfbyte.plan.published > docs/published-memory.md
"""

import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from halfbyte.plan import stacks
from halfbyte.plan.anchors import GIB, UNITS, Result, Row, crossing, line_through, results, rows

HEAD = """\
# Other people's figures: peak memory that was published

No GPU is needed to check arithmetic. Others published what their stacks took on NVIDIA cards; this page predicts every
one of those figures from the model's shapes and the stack's habits, and says how far off it is.

**What this page does not say:** how much memory halfbyte's own engine takes on a GPU. Its constants for GPUs are
unmeasured until a run on a GPU has refitted them, and until then `halfbyte plan --device` gives wide intervals.

## How it is computed

A stack's habits are data (`src/halfbyte/plan/stacks.yaml`): what it keeps in float32, how many copies of the logits
are alive, what a layer keeps, where the optimizer's state is; each with the source file that it was read in. The
arithmetic (`plan/stacks.py`) is one sum:

    peak = fixed + factor x tokens x (activations and logits of the highest moment) + gradients

{constants} constants were not read anywhere. One activation factor a stack is fitted on every second of its rows, in
the order below; the other rows are held out. It says what measured activations are of the counted ones, and has to lie
between {low} and {high}: above 1 are the allocator's holes, below 1 a count that is too high. And the length of the
rows in the unpacked Alpaca runs, which their sources do not give, is taken as {alpaca:,} tokens for two rows.

Held out means held out of that fit. The habits themselves were read and counted by people who had seen all the figures,
so the errors below say how well the account holds together, not how well a stack would be predicted that nobody has
measured. In the tutorials' rows length and factor only count as a product: no row can tell them apart.

Units as published: GB is 10⁹ bytes, GiB is 2³⁰. A card of "24 GB" has 24 GiB. Llama 3.3 70B has the shapes of
Llama 3.1 70B.
"""


def summary(made: Iterable[Result]) -> dict[str, float]:
    """Number, median and largest error in bytes of the rows that have a figure."""
    errors = [abs(r.bytes_error) for r in made if r.bytes_error is not None]
    within = sum(error <= 0.10 for error in errors)
    return {"rows": len(errors), "median": statistics.median(errors), "largest": max(errors), "within 10 %": within}


def page() -> str:
    """The whole page, in Markdown."""
    made = results()
    held = stacks.constants()
    low, high = held["activation_factor"]["range"]
    among = {r.row.stack for r in made}
    used = [name for name in stacks.stacks() if name in among]
    head = HEAD.format(constants=len(used) + 1, low=low, high=high, alpaca=held["alpaca_tokens"]["value"])
    parts = [head, _summary(made, used), _rows(made), _remarks(made), _habits(used), FOOT]
    return re.sub(r"(\d)%", r"\1 %", "\n".join(parts))


def _summary(made: Sequence[Result], used: Sequence[str]) -> str:
    lines = ["## Summary", ""]
    lines += ["| stack | factor | calibrating: rows, median, largest error | held out: rows, median, largest error |"]
    lines += ["|---|---|---|---|"]
    for name in [*used, ""]:
        own = [r for r in made if name in ("", r.row.stack)]
        cells = [_of(summary(r for r in own if r.row.calibrates is kind)) for kind in (True, False)]
        title = stacks.find(name).title if name else "**all**"
        factor = f"{stacks.find(name).activation_factor:.2f}" if name else ""
        lines.append(f"| {title} | {factor} | {cells[0]} | {cells[1]} |")
    out = summary(r for r in made if not r.row.calibrates)
    none = [r for r in made if r.row.published is None]
    lines += [
        "",
        f"Errors are in bytes of peak memory. Of the {out['rows']} held-out figures, {out['within 10 %']} are",
    ]
    agreeing = sum(r.agrees for r in none)
    lines += [
        f"within 10 %. {_count(len(none))} more rows say that nothing fits; the prediction agrees on {agreeing}.",
        "",
    ]
    return "\n".join(lines)


def _of(found: dict[str, float]) -> str:
    return f"{found['rows']}, {found['median']:.1%}, {found['largest']:.1%}"


def _count(number: int) -> str:
    return {1: "One", 2: "Two", 3: "Three"}.get(number, str(number))


def _rows(made: Sequence[Result]) -> str:
    lines = ["## Every row", "", "`c` marks the calibrating rows."]
    block = ""
    for r in made:
        row = r.row
        if row.block != block:
            block = row.block
            lines += ["", f"### {block}", "", f"{row.source}; {_setup(row)}.", ""]
            if row.unit == "tokens":
                lines += [
                    "| row | published context | predicted | error | peak at the published context | card | error | |"
                ]
                lines += ["|---|---|---|---|---|---|---|---|"]
            else:
                lines += [f"| row | published, {row.unit} | predicted | error | |", "|---|---|---|---|---|"]
        lines.append(_line(r))
    notes = [f"- {r.row.block}, {r.row.name}: taken as {r.row.assumed}." for r in made if r.row.assumed]
    return "\n".join([*lines, "", "Not in the sources, and assumed:", "", *notes, ""])


def _line(r: Result) -> str:
    row, mark = r.row, "c" if r.row.calibrates else ""
    if row.unit != "tokens":
        return f"| {row.name} | {row.published:g} | {r.predicted:.1f} | {r.error:+.1%} | {mark} |"
    if row.published is None:
        verdict = "agrees" if r.agrees else "does not agree"
        return f"| {row.name} | none fits | {r.predicted:,.0f} | {verdict} | | {row.card} GiB | | {mark} |"
    peak = f"{r.predicted_bytes / GIB:.1f} GiB"
    return (
        f"| {row.name} | {row.published:,.0f} | {r.predicted:,.0f} | {r.error:+.1%} | {peak} | {row.card} GiB "
        f"| {r.bytes_error:+.1%} | {mark} |"
    )


def _setup(row: Row) -> str:
    """The block's model and stack, and what all its rows share, in words."""
    own = [r for r in rows() if r.block == row.block]
    shared = {key: value for key, value in vars(row.setup).items() if all(vars(r.setup)[key] == value for r in own)}
    known: dict[str, Any] = {key: shared[key] for key in ("method", "rank", "batch", "length") if key in shared}
    if row.unit == "tokens":
        known.pop("length", None)
    words = ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in known.items()
    )
    return f"{row.model}, {stacks.find(row.stack).title}" + (f" ({words})" if words else "")


def _remarks(made: Sequence[Result]) -> str:
    """What the rows say of themselves, computed."""
    lines = ["## What the published rows say of themselves", ""]
    for block in ("unsloth-benchmark-hf-8b", "unsloth-benchmark-8b"):
        own = [r.row for r in made if r.row.block == block and r.row.published is not None]
        line = line_through([(row.card, row.published or 0) for row in own])
        if line is not None:
            slope, intercept = line
            lines.append(
                f"- {block}: its {len(own)} figures lie on one line to the token ({slope:,.1f} tokens a GiB, "
                f"{-intercept / slope:.2f} GiB before the first token). They carry two measurements, not {len(own)}."
            )
    for block in ("llamafactory-hf-4bit", "llamafactory-unsloth-4bit"):
        own = [r.row for r in made if r.row.block == block]
        found = crossing([(row.setup.tokens, row.published or 0) for row in own], rounding=1.0)
        if found is not None:
            steep, flat = (f"{a:,.0f} to {b:,.0f}" for a, b in found)
            lines.append(
                f"- {block}: no straight line goes through its figures even if each was rounded to whole GB: from "
                f"{steep} tokens memory grows faster than from {flat}. Activations, logits and checkpoints grow in a "
                "straight line; what does not is the allocator, and no account of the stack explains these rows better "
                "than that."
            )
        else:
            lines.append(f"- {block}: a straight line goes through its figures as rounded.")
    lines.append(_gib_or_gb(made))
    spec = next(r.row.spec for r in made if r.row.model == "llama-2-7b")
    kept = 100_000 * spec.num_layers * spec.hidden_size * 2
    lines.append(
        f"- llamafactory-unsloth-4bit, 100,000 tokens: 16-bit checkpoints of all layers are 100,000 x "
        f"{spec.num_layers} x {spec.hidden_size:,} x 2 = {kept / 1e9:.1f} GB; with a layer at work beside them the run "
        "would not have fitted the 40 GB card. So the checkpoints were offloaded, though the page does not say so."
    )
    return "\n".join([*lines, *_differences(made), ""])


def _differences(made: Sequence[Result]) -> list[str]:
    """Differences of two published rows, in which every constant cancels."""
    of = {(r.row.block, r.row.name): r.row for r in made}

    def difference(block: str, name: str, other: str) -> float:
        return abs(of[block, name].published_bytes - of[block, other].published_bytes)

    tutorial, steps, lines = "torchtune-lora-tutorial", "torchtune-3b", []
    for name in ("q and v", "all layers"):
        low, high = of[tutorial, f"{name}, r 8"], of[tutorial, f"{name}, r 64"]
        more = stacks.trained(high.spec, high.setup) - stacks.trained(low.spec, low.setup)
        lines.append(
            f"- {tutorial}, {name}: rank 64 instead of 8 is {more:,} more parameters; weight, gradient and "
            f"moments of 2 bytes each are {8 * more / 1e9:.2f} GB, and "
            f"{difference(tutorial, low.name, high.name) / 1e9:.2f} GB were published."
        )
    eight, before = of[steps, "+ 8-bit AdamW"], of[steps, "+ activation offloading"]
    saved = 2 * stacks.trained(eight.spec, eight.setup) / GIB
    lines.append(
        f"- {steps}: moments of 8 instead of 16 bits save 2 bytes a parameter, {saved:.1f} GiB, but "
        f"{difference(steps, eight.name, before.name) / GIB:.1f} GiB were published. What stands in their place is not "
        "in the sources; the row is the largest error of its block."
    )
    return lines


def _gib_or_gb(made: Sequence[Result]) -> str:
    own = [r for r in made if r.row.unit == "GB" and r.row.block.startswith("llamafactory")]
    errors = {
        unit: statistics.median(abs(r.predicted_bytes / ((r.row.published or 1) * size) - 1) for r in own)
        for unit, size in UNITS.items()
    }
    return (
        f"- llamafactory: whole numbers, so each is known to half a GB, 10 % of the smallest. Read as GB the median "
        f"error is {errors['GB']:.1%}, read as GiB {errors['GiB']:.1%}: the page writes GB, and the rows cannot tell."
    )


def _habits(used: Sequence[str]) -> str:
    lines = ["## The habits and where they were read", ""]
    for name in used:
        stack = stacks.find(name)
        lines += [f"**{stack.title}** (`{name}`)", ""]
        lines += [f"- `{habit}`: {where}" for habit, where in stack.read.items()]
        lines += [f"- everything else as `{stack.like}`"] if stack.like else []
        lines.append("")
    return "\n".join(lines)


FOOT = """\
<!-- Made by `python -m halfbyte.plan.published > docs/published-memory.md`; change stacks.yaml or published.yaml. -->
"""


if __name__ == "__main__":
    sys.stdout.write(page())
