"""Each native operator against the roof that bounds it: memory bandwidth or the rate of products.

    python benchmarks/operators.py [--elements 13762560] [--threads N] [--match nf4] [--seconds 0.3] [--json FILE]

An entry of `operator_cases.CASES` makes one operator's inputs and says which bytes it must move and how many
operations it must do, whatever the implementation does. Time is the best of the calls that fit into --seconds, after
one that warms up. The roofs are measured beside each case: a copy (`Tensor.copy_`) of as many bytes in all, read and
written, and, where there are operations, torch's product of two square matrices that stay in cache, in the operator's
type. Best against best: on a busy machine both fall, not always by the same factor.

A new operator is one more entry: a name and a function of the number of elements that returns `Work`, or None where
this processor has no such kernel. --elements is for the block formats; the others have the shapes of a model.

(Not called kernels.py: transformers and bitsandbytes import a package of that name if they find one.)
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import machine
import torch
from operator_cases import CASES, Work

from halfbyte import ops


@dataclass(frozen=True)
class Measurement:
    name: str
    seconds: float
    bytes_per_second: float
    of_copy: float
    operations_per_second: float
    of_products: float | None


# -- measuring -------------------------------------------------------------------------------------------------------


def best_seconds(call: Callable[[], object], budget: float) -> float:
    """The least of the calls that fit into `budget` seconds, at least two, after one that warms up."""
    call()
    best, spent, calls = float("inf"), 0.0, 0
    while spent < budget or calls < 2:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
    return best


def copy_rate(moved: int, budget: float) -> float:
    """Bytes read and written a second by a copy that moves `moved` of them in all."""
    source = torch.ones(max(moved // 2, 1), dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_seconds(partial(target.copy_, source), budget)


@cache
def product_rate(dtype: torch.dtype, budget: float, width: int = 512) -> float:
    """Operations a second of torch's product of two square matrices that stay in cache."""
    a, b, out = (torch.ones(width, width, dtype=dtype) for _ in range(3))
    return 2 * width**3 / best_seconds(partial(torch.mm, a, b, out=out), budget)


def measure(name: str, elements: int, budget: float) -> Measurement | None:
    """None where this processor has no such kernel."""
    work: Work | None = CASES[name](elements)
    if work is None:
        return None
    seconds = best_seconds(work.call, budget)
    moved, done = work.bytes / seconds, work.operations / seconds
    of_products = done / product_rate(work.dtype, budget) if work.operations else None
    return Measurement(name, seconds, moved, moved / copy_rate(work.bytes, budget), done, of_products)


def table(measurements: list[Measurement]) -> str:
    head = ["operator", "ms", "GB/s", "of a copy", "GFLOP/s", "of torch's product"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for m in measurements:
        products = (
            ["", ""] if m.of_products is None else [f"{m.operations_per_second / 1e9:.0f}", f"{m.of_products:.0%}"]
        )
        lines.append(
            [m.name, f"{1e3 * m.seconds:.3f}", f"{m.bytes_per_second / 1e9:.2f}", f"{m.of_copy:.0%}", *products]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=8960 * 1536, help="of a weight; default: a linear of Qwen 1.5B")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each measurement")
    parser.add_argument("--match", default="", help="only the operators whose names contain this")
    parser.add_argument("--json", type=Path, help="write the figures and the machine there too")
    args = parser.parse_args()
    names = [name for name in CASES if args.match in name]
    if not names:
        parser.error(f"no operator's name contains {args.match!r}: " + "; ".join(CASES))
    torch.set_num_threads(args.threads)
    print(f"halfbyte's kernels: {ops.backend()}; {args.threads} threads, {args.elements} elements\n")
    found = {name: measure(name, args.elements, args.seconds) for name in names}
    measurements = [measured for measured in found.values() if measured is not None]
    print(table(measurements))
    if missing := [name for name, measured in found.items() if measured is None]:
        print("\nNot on this processor: " + "; ".join(missing))
    if args.json:
        record = {"machine": machine.describe(args.threads, None), "backend": str(ops.backend())}
        record |= {"revision": machine.revision(), "elements": args.elements}
        args.json.write_text(json.dumps(record | {"operators": [asdict(m) for m in measurements]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
