"""What a training step of another architecture keeps and computes, found by running its own code without memory.

transformers' model runs forward and backward on fake tensors (`FakeTensorMode`): shapes and storages, no values and no
memory. Its linears are stand-ins that keep what `linear.grouped` keeps. Counted is what is alive at every moment,
beside the parameters: the peak is what the architecture itself needs, attention's scores and masks included, where
arithmetic on the linears alone could only guess.

Where the code asks for a value (experts that are chosen by their scores), no such run is possible: `Unknown`.

Shape letters: B rows, S tokens of the longest source or text, A of the longest answer.
"""

import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from halfbyte.models.fallback_load import linears_of, recompute
from halfbyte.models.foreign_spec import build

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 1.0),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 2.5),
}
"""Attention on a CPU, which torch does not count: where its queries stand, and how much its backward pass costs."""


class Unknown(Exception):
    """This architecture's code cannot be run without values."""


@dataclass(frozen=True)
class Layout:
    """What is run: a micro-batch, padded.

    answer      tokens of the longest answer, of an encoder-decoder; 0 for a decoder
    adapted     names of the linears that have an adapter: their inputs are kept
    rank        of the adapters
    supervised  share of the logits' positions that carry a loss; all are projected, as rows differ in which do
    """

    rows: int
    longest: int
    answer: int
    dtype: torch.dtype
    adapted: frozenset[str]
    rank: int = 16
    checkpointing: bool = False
    training: bool = True
    supervised: float = 1.0


@dataclass(frozen=True)
class Traced:
    """What one micro-batch costs.

    peak      bytes alive at once beside parameters, gradients of parameters and the optimizer
    kept      bytes alive between forward and backward
    linear    operations of the linears in forward and backward, recomputation included
    other     operations of all other products: attention and the output head
    traffic   bytes that operators wrote
    """

    peak: int
    kept: int
    linear: float
    other: float
    traffic: float


def trace(config: Mapping[str, Any], layout: Layout) -> Traced:
    """Run one micro-batch of `layout`. `Unknown` for code that cannot be run so."""
    model = build(config)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _run(model, bool(config.get("is_encoder_decoder")), layout)
    except Exception as error:  # whatever a model's own code does with a tensor that has no values
        raise Unknown(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _run(model: Any, encoder_decoder: bool, layout: Layout) -> Traced:
    counts = _Counts()
    for name, linear in linears_of(model).items():
        parent, _, leaf = name.rpartition(".")
        out = int(linear.nf if hasattr(linear, "nf") else linear.out_features)  # type: ignore[arg-type]
        rank = layout.rank if name in layout.adapted else 0
        setattr(model.get_submodule(parent), leaf, _Stand(out, rank, counts))
    held = _materialise(model, layout.dtype)
    model.train(layout.training)
    if layout.checkpointing:
        recompute(model)
    live = _Live(held, counts)
    recording: AbstractContextManager[Any] = nullcontext() if layout.training else torch.no_grad()
    with recording, live:
        logits = _forward(model, encoder_decoder, layout)
        count = max(1, math.ceil(logits.shape[0] * logits.shape[1] * layout.supervised))
        targets = torch.zeros(count, dtype=torch.int64)
        chosen = logits.reshape(-1, logits.shape[-1]).index_select(0, torch.arange(count)).float()
        loss = nn.functional.cross_entropy(chosen, targets, reduction="sum")
        del logits, chosen
        kept = live.bytes
        if layout.training:
            loss.backward()
    return Traced(live.peak, kept, counts.linear, counts.other, counts.written)


def _forward(model: Any, encoder_decoder: bool, layout: Layout) -> Tensor:
    """As `models.fallback` and `models.seq2seq` call it: a mask where rows may be padded."""
    ids = torch.zeros(layout.rows, layout.longest, dtype=torch.int64)
    mask = torch.ones(layout.rows, layout.longest, dtype=torch.int64)
    if encoder_decoder:
        before = torch.zeros(layout.rows, max(1, layout.answer), dtype=torch.int64)
        out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=before, use_cache=False)
    elif layout.rows > 1:
        try:
            out = model(input_ids=ids, attention_mask=mask, use_cache=False)
        except Exception:  # a mask whose values are asked for
            out = model(input_ids=ids, use_cache=False)
    else:
        out = model(input_ids=ids, use_cache=False)
    logits: Tensor = out.logits
    return logits


def _materialise(model: Any, dtype: torch.dtype) -> set[Any]:
    """Fake tensors of the computation's type in the place of meta ones; returns their storages.

    Tied parameters stay one.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    fake = torch.empty(tensor.shape, dtype=kind)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, requires_grad=False) if parameter else fake
                tensors[name] = made[id(tensor)]
    return {tensor.untyped_storage() for tensor in made.values()}


@dataclass
class _Counts:
    linear: float = 0.0
    other: float = 0.0
    written: float = 0.0


class _Keeping(torch.autograd.Function):
    """A linear that keeps what ours keep (`linear.grouped`): its input and x A^T if it has an adapter, else nothing."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, graph: Tensor, out: int, rank: int, counts: _Counts) -> Tensor:
        ctx.width, ctx.out, ctx.rank, ctx.counts = x_TI.shape[1], out, rank, counts
        counts.linear += 2.0 * x_TI.shape[0] * x_TI.shape[1] * out
        if rank:
            ctx.save_for_backward(x_TI, x_TI.new_empty(x_TI.shape[0], rank))
        return x_TI.new_empty(x_TI.shape[0], out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        _ = ctx.saved_tensors
        ctx.counts.linear += 2.0 * dy_TO.shape[0] * ctx.width * ctx.out
        return dy_TO.new_empty(dy_TO.shape[0], ctx.width), None, None, None, None


class _Stand(nn.Module):
    weight = None  # as `fallback_load.ReplacedLinear`: T5 asks for it

    def __init__(self, out: int, rank: int, counts: _Counts) -> None:
        super().__init__()
        self.out, self.rank, self.counts = out, rank, counts

    def forward(self, x: Tensor) -> Tensor:
        graph = torch.zeros(1, requires_grad=True)  # an adapter's factors: they make the graph
        y: Tensor = _Keeping.apply(x.reshape(-1, x.shape[-1]), graph, self.out, self.rank, self.counts)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)


class _Live(TorchDispatchMode):
    """Bytes of all storages that operators made and somebody still holds."""

    def __init__(self, held: set[Any], counts: _Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self.counts = counts
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(held)
        self._held = held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flops: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.counts.other += flops(*args, **(kwargs or {}), out_val=out)
        elif func._overloadpacket in _ATTENTION:
            first, times = _ATTENTION[func._overloadpacket]
            q, k, v = args[first : first + 3]
            self.counts.other += times * 2.0 * q.numel() * k.shape[-2] * (1 + v.shape[-1] / q.shape[-1])
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.counts.written += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.bytes -= size
