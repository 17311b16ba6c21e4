"""What public pages say of LoRA and QLoRA, and what arithmetic and measurement say to it: one file, claims.yaml.

Each claim has a decision for each way of deciding it: by arithmetic (`plan.claim_arithmetic` computes it, nothing is
typed in), by measurement (`halfbyte compare --claims` brings it), or none, with the reason. docs/claims.md is made from
the file; with --decide the arithmetic is computed anew and written there first:

    python -m halfbyte.plan.claims [--decide] > docs/claims.md

    held = claims.load()
    held = held.with_verdict(9, "refuted", 0.97, 0.95, 0.99, "LoRA steps took as long as …", "runs/cmp/report.json")
    held.save(path)
    text = claims.page(held)
"""

import sys
from collections import Counter

from halfbyte.plan.claim_arithmetic import decided
from halfbyte.plan.claim_file import FILE, VERDICTS, Claim, Claims, Decision, load
from halfbyte.plan.claim_parts import spans

__all__ = ["FILE", "VERDICTS", "Claim", "Claims", "Decision", "decided", "load", "page"]

PAGES = {
    "P0": "a studio vendor's comparison",
    "P1": "a benchmark report",
    "P2": "a GPU pool's guide",
    "P3": "an explainer",
}

HEAD = """\
# What public pages say, and what holds

Four public pages compare LoRA with QLoRA. This page takes their claims one by one. **Arithmetic** decides what
follows from a model's shapes; every such verdict is computed by `plan/claim_arithmetic.py` from the planner's own
functions, and its arithmetic is shown so that it can be done again by hand. **Measurement** decides what small
models on a processor can show (`halfbyte compare --claims`). What needs a large GPU, or what nothing can test, is
said to be that.

Where memory depends on the run, two setups bound it: *lean*, one row of 512 tokens, and *large*, four rows of
2,048; both recompute activations and train float32 adapters of rank 16 on all linears with AdamW. The figures are
the stock stack's, transformers with PEFT and bitsandbytes, as modelled in
[published-memory.md](published-memory.md): what the driver shows, the CUDA context included. Where halfbyte's own
are given, they are arithmetic for a GPU that no GPU run has checked yet. A published range holds if, to the whole GB,
lean takes no more than its low end and large no less than its high end: it says what ordinary runs take, not what one
run does.

7B, 13B and 70B are Llama 2's shapes, 30B (32.5B parameters; some pages call it 33B) and 65B LLaMA's. 1 GB is 10⁹
bytes. A card has what its driver shows, less what display and driver take (assumed, in the catalogue of machines).
"""

FOOT = """\
<!-- Made by `python -m halfbyte.plan.claims > docs/claims.md` from claims.yaml; change neither by hand. -->
"""


def page(claims: Claims) -> str:
    """The whole page, in Markdown: a summary, then every claim by page."""
    counts = Counter(claim.verdict for claim in claims.claims)
    lines = [HEAD, "## Summary", "", "| verdict | claims | which |", "|---|---|---|"]
    for verdict in VERDICTS:
        which = ", ".join(str(c.id) for c in claims.claims if c.verdict == verdict)
        lines.append(f"| {verdict} | {counts[verdict]} | {which} |")
    lines += [
        "",
        f"{len(claims.claims)} claims in all. A claim of several parts counts by the parts that are decided.",
        "",
    ]
    for name, title in PAGES.items():
        own = [claim for claim in claims.claims if claim.page == name]
        held = Counter(claim.verdict for claim in own)
        tally = ", ".join(f"{held[verdict]} {verdict}" for verdict in VERDICTS if held[verdict])
        lines += [f"## {name}: {title}", "", f"{len(own)} claims: {tally}.", ""]
        for claim in own:
            lines += _section(claim)
    return "\n".join([*lines, *_spans(), FOOT])


def _spans() -> list[str]:
    """The peaks that the verdicts rest on, by component: a sum that a reader can check."""
    found = spans()
    names = list(dict.fromkeys(name for *_, parts in found for name in parts))
    lines = ["## The memory behind the verdicts", "", "Peak GB of the stock stack by component.", ""]
    lines += [f"| | {' | '.join(names)} | sum |", "|---" * (len(names) + 2) + "|"]
    for size, method, words, parts in found:
        cells = " | ".join(f"{parts[name] / 1e9:.2f}" if name in parts else "" for name in names)
        lines.append(f"| {size} {method}, {words} | {cells} | {sum(parts.values()) / 1e9:.2f} |")
    return [*lines, ""]


def _section(claim: Claim) -> list[str]:
    lines = [f"### {claim.id}. {claim.claim}", "", f"**{claim.verdict.capitalize()}.** Decided by: {claim.test}.", ""]
    for made in claim.decisions:
        label = {"arithmetic": "Arithmetic", "measurement": "Measurement", "none": "Open"}[made.by]
        lines.append(f"- {label}: {made.verdict}{_figure(made)}. {made.sentence}".rstrip())
        if made.working:
            lines.append(f"  `{made.working}`")
        if made.evidence:
            lines.append(f"  Evidence: {made.evidence}")
    return [*lines, ""]


def _figure(made: Decision) -> str:
    """The figure with its interval, in brackets."""
    if made.figure is None:
        return ""
    unit = f" {made.unit}" if made.unit else ""
    if made.low is None or made.high is None:
        return f" ({_number(made.figure)}{unit})"
    if made.by == "arithmetic" and made.figure in (made.low, made.high):
        return f" ({_number(made.low)} to {_number(made.high)}{unit})"
    return f" ({_number(made.figure)}{unit}, {_number(made.low)} to {_number(made.high)})"


def _number(value: float) -> str:
    """Three digits; whole numbers whole."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _main(arguments: list[str]) -> None:
    """Print the page; with --decide, compute the arithmetic anew and write it to claims.yaml first."""
    held = load()
    if arguments == ["--decide"]:
        held = decided(held)
        held.save()
    elif arguments:
        raise SystemExit("python -m halfbyte.plan.claims [--decide] > docs/claims.md")
    sys.stdout.write(page(held))


if __name__ == "__main__":
    _main(sys.argv[1:])
