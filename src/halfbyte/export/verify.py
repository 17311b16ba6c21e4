"""Is the file what was computed, and does it behave as trained? Asked of every export before it is called done.

Two questions, cheap first: the written tensors are read back and some are compared with freshly computed ones, bit
for bit; then the written model and the unmerged one read the same short text, one after the other in memory.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from halfbyte.adapters.heads import put_head
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.session import inference
from halfbyte.export.deltas import Delta, attach_deltas
from halfbyte.export.heads import Head
from halfbyte.export.safetensors_file import Planned
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.shifted_source import LinearBase
from halfbyte.models.source import open_source
from halfbyte.quant import QuantOptions

PROBE = (
    "The committee met on Tuesday, 14 March, and agreed on three points: the budget, the new office, and "
    "who would write the report. def add(a, b):\n    return a + b\n"
)
MAX_KL = 0.05
"""Mean nats a token between as-trained and merged. Rounding to bf16 gives about a hundredth of it; a wrong scale,
a transposed factor or a lost layer, several nats."""
_CHECKED = 8  # tensors read back in full


@dataclass(frozen=True)
class Comparison:
    """The merged model against the unmerged one on a short text.

    max_difference  largest absolute difference of two logits
    mean_kl         mean over positions of KL(unmerged || merged), nats
    same_top        share of positions with the same likeliest token
    positions       tokens of the text
    skipped         why the models were not compared ("" where they were)
    """

    max_difference: float = 0.0
    mean_kl: float = 0.0
    same_top: float = 0.0
    positions: int = 0
    skipped: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.skipped:
            return f"not compared with the unmerged model: {self.skipped}"
        return (
            f"merged against unmerged over {self.positions} tokens: largest logit difference "
            f"{self.max_difference:.3g}, KL {self.mean_kl:.2g} nats a token, same top token {self.same_top:.0%}"
        )

    def require_close(self, strict: bool, limit: float = MAX_KL) -> None:
        """HalfbyteError where the models differ by more than `limit`; not `strict`: where the numbers are broken."""
        broken = not (self.max_difference < float("inf") and self.mean_kl < float("inf"))
        if not self.skipped and (broken or (strict and self.mean_kl > limit)):
            accept = "" if broken else f"; {limit:g} nats is the limit, and --max-kl sets another"
            raise HalfbyteError(f"the merged model does not behave as trained, nothing was written ({self}{accept})")


def check_written(folder: Path, planned: Sequence[Planned]) -> None:
    """Read the folder as a model again: every tensor is there, and a spread of them holds exactly what is computed."""
    source = open_source(str(folder))
    found = source.tensors()
    for tensor in planned:
        info = found.get(tensor.name)
        if info is None or info.shape != tensor.shape or info.dtype != tensor.dtype:
            raise HalfbyteError(
                f"{tensor.name} was not written as planned ({info}): the disk or this program is at fault"
            )
    step = max(1, len(planned) // _CHECKED)
    for tensor in planned[::step]:
        at = 0
        for piece in tensor.rows():
            written = source.read_rows(tensor.name, at, at + piece.shape[0])
            if not torch.equal(written.view(torch.uint8), piece.cpu().contiguous().view(torch.uint8)):
                raise HalfbyteError(f"{tensor.name} reads back other than it was written: the disk may be failing")
            at += piece.shape[0]


def compare_logits(
    model: ModelOptions,
    deltas: Mapping[str, Delta],
    folder: Path,
    quant: QuantOptions | None,
    dtype: str,
    merged_bytes: int,
    head: Head | None = None,
) -> Comparison:
    """Run both models on PROBE, one after the other. Skipped, and said so, where the merged one exceeds free memory.

    head   of a classifier, whose logits are of classes
    """
    free = psutil.virtual_memory().available
    needed = merged_bytes * 1.2
    if needed > free:
        return Comparison(skipped=f"it needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free")
    # Half precision is for GPUs: what it would add here is its own overflow, not the merge's error.
    compute = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    kind = None if head is None else head.options
    loaded = load_model(model, quant, compute, "cpu", head=kind)
    attach_deltas(loaded.model, deltas, LinearBase(loaded, quant))
    if head is not None:
        put_head(loaded.model, head.weight)
    ids = probe_ids(loaded.tokenizer)
    before = _logits(loaded.model, ids)
    del loaded
    gc.collect()
    merged = load_model(ModelOptions(model=str(folder)), None, compute, "cpu", head=kind)
    return compare(before, _logits(merged.model, ids))


def probe_ids(tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer(PROBE)["input_ids"][:64], dtype=torch.int64)


def compare(before_TV: Tensor, after_TV: Tensor) -> Comparison:
    """The figures of a Comparison from two models' logits on the same text."""
    p, q = before_TV.double().log_softmax(-1), after_TV.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return Comparison(
        max_difference=float((before_TV - after_TV).abs().max()),
        mean_kl=max(0.0, float(kl.mean())) if bool(torch.isfinite(kl).all()) else float("inf"),
        same_top=float((before_TV.argmax(-1) == after_TV.argmax(-1)).float().mean()),
        positions=before_TV.shape[0],
    )


def _logits(model: Any, ids: Tensor) -> Tensor:
    with inference(model):
        logits: Tensor = model.logits(ids)
    return logits
