"""Which base should a QLoRA adapter be merged into? A Markdown table a run: bases, KL, perplexity, task metric.

    python benchmarks/merge_study.py RUN ... [--rows 64] [--metrics token_f1] [--out study.json]

Each RUN is a finished QLoRA run of halfbyte. Every way to merge it is scored on its held-out rows against the unmerged
model (the adapter on the quantized base, as trained), and so is the base without the adapter, for the scale: that is
how much of the training a merge can lose. Above the table stand what the base's file held before halfbyte quantized it,
and how large the adapter's update is beside the error of the quantization (Frobenius norms over all adapted linears).

Weights that were never quantized: `small_model.py` trains a model from scratch.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from halfbyte.export.bases import Candidate, Merging, merged_says, unmerged_says
from halfbyte.export.card import already_quantized
from halfbyte.export.deltas import read_deltas
from halfbyte.export.score import HeldOut, Said, Score, compare, listen
from halfbyte.models.load import read_weight
from halfbyte.models.options import ModelOptions
from halfbyte.run.target import Target, find, held_out_rows

CANDIDATES = [Candidate(base, again) for again in (False, True) for base in ("16bit", "dequantized")]
UNTUNED = "base without the adapter"


def study(run: str, rows: int, metrics: Sequence[str], answer_tokens: int) -> dict[str, Any]:
    """Everything of one run as plain data."""
    target = find(run)
    assert target.adapter is not None
    held_out, source, why = held_out_rows(target, None, rows)
    if held_out is None or source is None or target.quant is None:
        raise SystemExit(f"{run}: {why or 'not a QLoRA run'}")
    merging = Merging(
        target.config.pick(ModelOptions), source, target.quant, read_deltas(target.adapter), torch.bfloat16
    )
    return {
        "run": Path(run).name,
        "base": Path(target.config.model).name,
        "quant": f"{target.quant.quant_type}, blocks of {target.quant.blocksize}"
        + (", double-quantized" if target.quant.double_quant else ""),
        "already_quantized": already_quantized(source),
        "rows": str(held_out),
        "compute_dtype": str(merging.compute_dtype).removeprefix("torch."),
        **norms(merging),
        "scores": [score.to_json() for score in scores(merging, target, held_out, metrics, answer_tokens)],
    }


def scores(merging: Merging, target: Target, rows: HeldOut, metrics: Sequence[str], answer_tokens: int) -> list[Score]:
    def listener(model: Any, tokenizer: Any) -> Said:
        return listen(model, tokenizer, rows, answer_tokens, metrics)

    reference = unmerged_says(merging, listener)
    bare = Merging(merging.model, merging.source, merging.quant, {}, merging.dtype)
    found = [compare("unmerged", reference, reference, rows)]
    found.append(compare(UNTUNED, unmerged_says(bare, listener), reference, rows))
    for candidate in CANDIDATES:
        print(f"{target.run}: {candidate.name}", flush=True)
        found.append(compare(candidate.name, merged_says(merging, candidate, listener), reference, rows))
    return found


def norms(merging: Merging) -> dict[str, float]:
    """Norms over all adapted linears, relative to the weights': the update, and what quantization did to the base."""
    total = {"weight": 0.0, "update": 0.0, "error": 0.0}
    for name, delta in merging.deltas.items():
        weight = merging.source.read(f"{name}.weight").float()
        held = read_weight(merging.source, f"{name}.weight", merging.quant, torch.float32, torch.device("cpu"))
        total["weight"] += float(weight.square().sum())
        total["error"] += float((held.dequantize(torch.float32) - weight).square().sum())
        total["update"] += float(delta.rows(0, delta.b.shape[0]).square().sum())
    return {name: math.sqrt(total[name] / total["weight"]) for name in ("update", "error")}


def markdown(found: dict[str, Any]) -> str:
    names = list(found["scores"][0]["metrics"])
    before = found["already_quantized"]
    lines = [
        f"**{found['run']}**: {found['base']} in {found['quant']}; {found['rows']}; computed in "
        f"{found['compute_dtype']}. "
        f"The update is {found['update']:.2%} of the weights, the quantization's error {found['error']:.2%}. "
        + (f"The base came from {before}: its 16-bit weights were quantized once already." if before else
           "The base's 16-bit weights were never quantized."),
        "",
        f"| merged into | KL, nats a token (95 %) | same top | perplexity | {''.join(f'{n} | ' for n in names)}"
        "same answers | same tokens |",
        f"|---|---|---|---|{'---|' * len(names)}---|---|",
    ]  # fmt: skip
    for score in found["scores"]:
        low, high = score["kl_interval"] or (0.0, 0.0)
        interval = "" if score["name"] == "unmerged" else f" ({low:.2g} to {high:.2g})"
        cells = [
            score["name"],
            f"{score['kl']:.3g}{interval}",
            f"{score['same_top']:.1%}",
            f"{score['perplexity']:.3f}",
            *(f"{score['metrics'][name]:.3f}" for name in names),
            *("" if score[key] is None else f"{score[key]:.1%}" for key in ("same_answers", "same_tokens")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--metrics", nargs="*", default=[])
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    everything = []
    for run in args.runs:
        everything.append(study(run, args.rows, args.metrics, args.answer_tokens))
        print(f"\n{markdown(everything[-1])}\n", flush=True)
        if args.out:
            args.out.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
