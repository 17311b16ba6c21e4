"""Reports for the tests of the pages. EVERY FIGURE IN HERE IS INVENTED: nothing was run, and none may be quoted."""

import math
import random
from typing import Any

SEEDS = [0, 1, 2]
_METHODS = {
    "full": ("full", "full", "bf16", None, 4.1e9, 1010, 0.298, 0.921, 268_098_176),
    "lora": ("LoRA", "lora", "bf16", None, 1.62e9, 1240, 0.312, 0.912, 3_796_992),
    "qlora": ("QLoRA", "qlora", "4-bit", "nf4", 1.21e9, 1205, 0.321, 0.908, 3_796_992),
    "qdora": ("QDoRA", "qlora", "4-bit", "nf4", 1.36e9, 870, 0.318, 0.909, 4_028_416),
    "loftq": ("LoftQ", "qlora", "4-bit", "nf4", 1.22e9, 1198, 0.314, 0.911, 3_796_992),
}
_METRICS = [
    ("eval_loss", "Held-out loss", "lower", "loss", True),
    ("accuracy", "Accuracy", "higher", "share", True),
    ("peak_memory_bytes", "Peak memory", "lower", "bytes", False),
    ("tokens_per_second", "Speed", "higher", "tokens/s", False),
    ("step_seconds", "Step", "lower", "seconds", False),
    ("seconds", "Time", "lower", "seconds", False),
    ("warmup_seconds", "Warm-up", "lower", "seconds", False),
    ("trainable_parameters", "Trainable parameters", "lower", "count", False),
    ("adapter_bytes", "Adapter", "lower", "bytes", False),
    ("checkpoint_bytes", "Checkpoint", "lower", "bytes", False),
    ("merge_loss", "Loss lost by merging", "lower", "loss", False),
    ("energy_joules", "Energy", "lower", "joules", False),
    ("cost", "cost of a run (EUR)", "lower", "money", False),
]
TOKENS = 480_000


def figure(mean: float, spread: float, rng: random.Random, seeds: int = 3) -> dict[str, Any]:
    """A figure of that many seeds around `mean`, relative spread `spread`."""
    values = [mean * (1 + rng.gauss(0, spread)) for _ in range(seeds)]
    if isinstance(mean, int):
        values = [mean] * seeds
    middle = sum(values) / seeds
    if seeds == 1:
        return {"mean": middle, "low": None, "high": None, "n": 1, "values": values}
    half = 4.303 * math.sqrt(sum((value - middle) ** 2 for value in values) / (seeds - 1) / seeds)
    return {"mean": middle, "low": middle - half, "high": middle + half, "n": seeds, "values": values}


def _curve(end: float, start: float, rate: float, points: int, bands: bool, rng: random.Random) -> list[dict[str, Any]]:
    out = []
    for i in range(points):
        share = (i + 1) / points
        mean = end + (start - end) * math.exp(-5 * share) + rng.gauss(0, 0.002)
        half = 0.012 + 0.03 * math.exp(-4 * share)
        tokens = round(TOKENS * share)
        low, high = (mean - half, mean + half) if bands else (None, None)
        out.append({"supervised_tokens": tokens, "seconds": tokens / rate, "mean": mean, "low": low, "high": high})
    return out


def _components(memory: float, trained: int, quantized: bool) -> dict[str, float]:
    weights = 0.62e9 if quantized else 0.54e9
    full = trained > 1e8
    parts = {"base weights": weights, "adapters": 0.0 if full else trained * 4.0}
    parts |= {"gradients": trained * (2.0 if full else 4.0), "optimizer state": trained * 8.0}
    rest = memory - sum(parts.values()) - 0.21e9
    return {
        name: float(round(size))
        for name, size in (parts | {"activations": max(rest, 0.1e9), "process": 0.21e9}).items()
    }


def _variant(key: str, seeds: int, rng: random.Random) -> dict[str, Any]:
    label, method, precision, quant, memory, rate, loss, accuracy, trained = _METHODS[key]
    bits = quant is not None
    seconds = TOKENS * 1.9 / rate
    means = {
        "eval_loss": (loss, 0.006),
        "accuracy": (accuracy, 0.003),
        "peak_memory_bytes": (memory, 0.004),
        "tokens_per_second": (float(rate), 0.012),
        "step_seconds": (1900 / rate, 0.012),
        "seconds": (seconds, 0.01),
        "warmup_seconds": (4.1 if bits else 3.2, 0.06),
        "trainable_parameters": (trained, 0),
        "energy_joules": (seconds * 41, 0.02),
        "adapter_bytes": (trained * (2 if key == "full" else 4), 0),
        "checkpoint_bytes": (trained * 12, 0),
        "cost": (seconds * 4e-5, 0.01),
    }
    if key != "full":
        means["merge_loss"] = (0.0004 if bits else 0.00002, 0.3)
    return {
        "key": key,
        "label": label,
        "method_name": method,
        "fields": {"method": method},
        "precision": precision,
        "quant_type": quant,
        "blocksize": 64 if bits else None,
        "double_quant": bits or None,
        "paged": False,
        "optim": "adamw",
        "lora_r": None if key == "full" else 16,
        "target_modules": None if key == "full" else "all-linear",
        "learning_rate": 2e-5 if key == "full" else 2e-4,
        "hardware": ["rtx-3060", *(["laptop-8gb"] if key != "full" else []), *(["gtx-1650"] if bits else [])],
        "command": f"halfbyte train -m gemma-3-270m.gguf -d sst2 --method {key} --seed 0 -o REPORT/cells/{key}-0",
        "figures": {name: figure(mean, spread, rng, seeds) for name, (mean, spread) in means.items()},
        "against_full": {"metric": "accuracy", "share": figure(accuracy / 0.921, 0.003, rng, seeds)},
        "components": _components(memory, trained, bits),
        "components_measured": key != "loftq",
        "peak_phase": "backward",
        "predicted": {
            "peak_memory_bytes": {"p50": memory * 0.97, "p95": memory * 1.06},
            "seconds": {"p50": seconds * 1.04, "p95": seconds * 1.22},
        },
        "curves": {
            "train": _curve(loss * 0.9, 1.4, rate / 1.9, 60, seeds > 1, rng),
            "eval": _curve(loss, 1.2, rate / 1.9, 12, seeds > 1, rng),
        },
        "cells": [f"{key}-{seed}" for seed in SEEDS[:seeds]],
        "notes": ["two iterations of LoftQ before the first step"] if key == "loftq" else [],
    }


def comparison(a: str, b: str, metric: str, mean: float, half: float, better: str) -> dict[str, Any]:
    found = abs(mean) > half
    first = (mean < 0) == (better == "lower")
    verdict = ("a better" if first else "b better") if found else "no difference found"
    return {
        "a": a,
        "b": b,
        "metric": metric,
        "difference": {"mean": mean, "low": mean - half, "high": mean + half},
        "detectable": half * 1.4,
        "verdict": verdict,
        "paired_by": "seed and row" if metric == "accuracy" else "seed",
        "sentence": f"{a} against {b} in {metric}: {verdict}.",
    }


def five(seeds: int = 3) -> dict[str, Any]:
    """Five methods on one model, with everything that a report can have."""
    rng = random.Random(7)
    variants = [_variant(key, seeds, rng) for key in _METHODS]
    report = one_seed_base(seeds)
    report["metrics"] = [
        dict(zip(("key", "label", "better", "unit", "quality"), metric, strict=True)) for metric in _METRICS
    ]
    report["variants"] = variants
    report["baselines"] = {
        "accuracy": {"base": 0.534, "majority": 0.509},
        "eval_loss": {"base": 1.31, "majority": None},
    }
    by = {variant["key"]: variant["figures"] for variant in variants}
    if seeds > 1:
        report["comparisons"] = [
            comparison("qlora", "lora", "eval_loss", 0.009, 0.0061, "lower"),
            comparison("loftq", "qlora", "eval_loss", -0.0068, 0.0075, "lower"),
            comparison("qdora", "qlora", "eval_loss", -0.0031, 0.0082, "lower"),
            comparison("lora", "full", "eval_loss", 0.0142, 0.0079, "lower"),
            comparison("qlora", "lora", "accuracy", -0.004, 0.0105, "higher"),
            comparison("lora", "full", "accuracy", -0.009, 0.0098, "higher"),
            comparison("qlora", "lora", "peak_memory_bytes", -0.41e9, 0.012e9, "lower"),
            comparison("qlora", "lora", "tokens_per_second", -35.0, 21.0, "higher"),
        ]
    report["convergence"] = [
        {
            "loss": loss,
            "rows": [
                {
                    "variant": key,
                    "reached": 0 if loss < 0.32 and key == "qlora" else seeds,
                    "at_first": 0,
                    "supervised_tokens": None
                    if loss < 0.32 and key == "qlora"
                    else figure(tokens * (1 + 0.05 * i), 0.03, rng, seeds),
                    "seconds": None
                    if loss < 0.32 and key == "qlora"
                    else figure(tokens * 1.9 / _METHODS[key][5], 0.03, rng, seeds),
                }
                for i, key in enumerate(_METHODS)
            ],
        }
        for loss, tokens in ((0.5, 180_000.0), (0.319, 410_000.0))
    ]
    report["convergence"][1]["rows"][2] = {
        "variant": "qlora",
        "reached": 0,
        "at_first": 0,
        "supervised_tokens": None,
        "seconds": None,
    }
    report["pareto"] = [
        {
            "quality_metric": metric,
            "points": [
                {
                    "variant": key,
                    "quality": by[key][metric]["mean"],
                    "memory": by[key]["peak_memory_bytes"]["mean"],
                    "seconds": by[key]["seconds"]["mean"],
                    "on_front": key != "qdora",
                }
                for key in _METHODS
            ],
        }
        for metric in ("accuracy", "eval_loss")
    ]
    report["plan"] = {
        "seconds": {"p50": 11_900.0, "p95": 14_300.0}, "cost": {"amount": 0.48, "currency": "EUR"},
        "without": ["answers", "merges"],
    }  # fmt: skip
    report["cells"] = [
        {
            "id": f"{key}-{seed}",
            "variant": key,
            "seed": seed,
            "path": f"cells/{key}-{seed}",
            "status": "done",
            "origin": "another machine: workshop" if key == "full" else "this comparison",
            "seconds": TOKENS * 1.9 / _METHODS[key][5],
            "others_share": 0.01,
            "message": None,
        }
        for key in _METHODS
        for seed in SEEDS[:seeds]
    ]
    report["cells"][seeds]["origin"] = "an earlier run"
    report["commands"] = [variant["command"] for variant in variants]
    report["notes"] = ["Memory is the process's peak resident set, as the operating system counts it."]
    report["warnings"] = ["full ran on another machine: its speed is not compared with the others'."]
    return report


def one_seed_base(seeds: int = 1) -> dict[str, Any]:
    """A report in which nothing was compared yet: what is left when all that may be empty is."""
    return {
        "schema_version": 1,
        "created": "2026-01-01T12:00:00+00:00",
        "title": "Invented: Gemma 3 270M on SST-2",
        "command": "halfbyte compare -m gemma-3-270m.gguf -d sst2 --methods full,lora,qlora,qdora,loftq -o REPORT",
        "sentence": "Use QLoRA here: it needs 1.21 GB where LoRA needs 1.62 GB, and costs 3 % of LoRA's speed; no "
        "difference in accuracy was found, and one of 1.5 percentage points could have been seen.",
        "model": {
            "name": "gemma-3-270m",
            "family": "gemma3",
            "parameters": 268_098_176,
            "dtype": "bfloat16",
            "fingerprint": "sha256:5f2a…c41d",
            "quantized_source": "Q4_K_M GGUF: the 16-bit weights were quantized once already",
        },
        "data": [
            {
                "name": "sst2",
                "fingerprint": "sha256:90b1…77e0",
                "rows": 4000,
                "eval_rows": 500,
                "tokens": 912_000,
                "supervised_tokens": TOKENS,
            }
        ],
        "machine": {
            "processor": "Example Processor 9000",
            "cores": 8,
            "memory_bytes": 33_500_000_000,
            "gpu": None,
            "instruction_sets": ["AVX2", "AVX-512", "AMX"],
            "system": "Linux 6.1",
        },
        "versions": {
            "halfbyte": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "bitsandbytes": None,
        },
        "settings": {
            "seeds": SEEDS[:seeds],
            "steps": 1200,
            "supervised_tokens": TOKENS,
            "side_by_side": False,
            "tune_lr": {
                "grid": {"full": [1e-5, 2e-5, 4e-5], "lora": [1e-4, 2e-4, 4e-4], "qlora": [1e-4, 2e-4, 4e-4]},
                "chosen": {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4},
                "steps": 200,
            },
        },
        "metrics": [],
        "variants": [],
        "baselines": {},
        "comparisons": [],
        "convergence": [],
        "pareto": [],
        "plan": None,
        "cells": [],
        "commands": [],
        "notes": [],
        "warnings": [],
    }
