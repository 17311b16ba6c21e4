"""What GPTQ and AWQ lose beside rounding to the nearest code: perplexity and KL on a run's held-out rows, as Markdown.

    python benchmarks/int4_quality.py RUN [--rows 50] [--out DIR] [--formats gptq,awq]

RUN is a finished run with an adapter. It is merged into the base that it was trained on; every linear is then held in
16 bits, rounded to the nearest of 16 codes (groups of 128), or quantized as `halfbyte export --to gptq|awq` does it,
calibrated on the run's rows of training. All are evaluated in float32 by this package's own decoder. KL is against
16 bits.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.batch import IGNORE
from halfbyte.data import Example, collate
from halfbyte.data.options import DataOptions
from halfbyte.data.prepare import prepare
from halfbyte.export.deltas import read_deltas
from halfbyte.export.merged_tensors import plan_tensors
from halfbyte.linear import linear_logits
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import build_decoder
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import DenseWeight, QuantOptions
from halfbyte.quant.group_codes import round_to_nearest
from halfbyte.run.exporting import calibration_rows
from halfbyte.run.target import find

GROUP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--rows", type=int, default=50, help="held-out rows")
    parser.add_argument("--out", type=Path, default=Path("int4"), help="where the folders are written")
    parser.add_argument("--formats", default="gptq,awq")
    args = parser.parse_args()
    target = find(args.run)
    assert target.adapter is not None
    config = target.config
    source = open_source(config.model, config.revision)
    spec = ModelSpec.from_config(source.config)
    deltas = read_deltas(target.adapter)
    planned = plan_tensors(config.pick(ModelOptions), source, deltas, target.quant, torch.bfloat16)
    prepared = prepare(config.pick(DataOptions), source.tokenizer(), config.seed)
    held_out = prepared.eval[: args.rows]
    linears = {f"{linear.name}.weight" for linear in spec.linears()}
    tensors = {tensor.name: tensor for tensor in planned}

    def whole(name: str) -> Tensor:
        return torch.cat(list(tensors[name].rows())).float()

    def rounded(sym: bool) -> Callable[[str], Tensor]:
        def read(name: str) -> Tensor:
            if name not in linears:
                return whole(name)
            return round_to_nearest(whole(name), GROUP, sym=sym).dequantize(torch.float32)

        return read

    print("| linears | perplexity | KL, nats a token | seconds to quantize |\n|---|---:|---:|---:|")
    reference = evaluate(build(spec, whole), held_out)
    print(f"| 16 bits | {math.exp(nll_of(reference)):.3f} | 0 | |", flush=True)
    for name, sym in (("nearest code, symmetric", True), ("nearest code, asymmetric", False)):
        report(name, evaluate(build(spec, rounded(sym)), held_out), reference)
    for name in args.formats.split(","):
        started = time.perf_counter()
        folder = args.out / name
        calibration = calibration_rows(prepared.train)
        if name == "gptq":
            from halfbyte.export.gptq import write_gptq_folder as write
        else:
            from halfbyte.export.awq import write_awq_folder as write
        write(folder, source, planned, calibration, adapter=target.adapter)
        seconds = time.perf_counter() - started
        made = open_source(str(folder))
        model = build_decoder(made, spec, QuantOptions(), torch.float32, torch.device("cpu")).eval()
        report(name.upper(), evaluate(model, held_out), reference, seconds)


def build(spec: ModelSpec, read: Callable[[str], Tensor]) -> Decoder:
    return Decoder.build(spec, lambda name, _: DenseWeight(read(name)), read, torch.float32).eval()


@torch.no_grad()
def evaluate(model: Decoder, rows: list[Example]) -> list[tuple[Tensor, Tensor]]:
    """Per ten rows: log-probabilities of the supervised positions [N, V] in half precision, and their targets [N]."""
    found = []
    for start in range(0, len(rows), 10):
        batch = collate(rows[start : start + 10])
        where = (batch.targets != IGNORE).nonzero()[:, 0]
        hidden = model.hidden(batch.input_ids, batch.position_ids, batch.lengths, rows=where)
        logits = linear_logits(hidden, model.head, model.spec.final_softcap)
        found.append((logits.log_softmax(-1).half(), batch.targets[where]))
    return found


def nll_of(found: list[tuple[Tensor, Tensor]]) -> float:
    picked = torch.cat([logprobs.float().gather(1, targets[:, None])[:, 0] for logprobs, targets in found])
    return -float(picked.mean())


def report(
    name: str, found: list[tuple[Tensor, Tensor]], reference: list[tuple[Tensor, Tensor]], seconds: float | None = None
) -> None:
    total, count = 0.0, 0
    for (p, _), (q, _) in zip(reference, found, strict=True):
        one, two = p.float(), q.float()
        total += float((one.exp() * (one - two)).sum())
        count += len(p)
    took = "" if seconds is None else f"{seconds:.0f}"
    print(f"| {name} | {math.exp(nll_of(found)):.3f} | {total / count:.3f} | {took} |", flush=True)


if __name__ == "__main__":
    main()
