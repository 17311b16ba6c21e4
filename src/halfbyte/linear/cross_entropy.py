"""The vocabulary projection and the cross-entropy in one operator that never holds the logits.

A vocabulary of 262,144 words times 2,048 tokens is 2.1 GB of float32 logits, and a log-softmax writes them
several times. Here the supervised rows go through in chunks: logits, log-sum-exp, loss and, when somebody
needs gradients, the gradient of the hidden states, all while the chunk is in cache; then it is gone. The
gradient exists before `backward` is called, which then only scales it (as in Liger-Kernel's and Apple's
cut-cross-entropy, arXiv 2411.09009).

Shape letters: N supervised rows, D hidden size, V vocabulary, C rows of a chunk, P vocabulary rows of a panel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.linear.workspace import scratch
from halfbyte.ops import loss
from halfbyte.ops.linear import LinearSegment, available, linear_forward
from halfbyte.quant import Weight

LOGITS_BYTES = 134_217_728  # of one chunk, in float32
PANEL_BYTES = 16_000_000  # of the head, converted to the compute dtype at a time


def chunk_rows(vocab: int) -> int:
    """Rows whose float32 logits stay within LOGITS_BYTES, at least 32 (a product of fewer rows is bandwidth)."""
    return max(32, LOGITS_BYTES // (4 * vocab))


def _panels(head: Weight, dtype: torch.dtype) -> list[slice]:
    """Row ranges of the head: one if it is held in the compute dtype, else as much as is converted at a time."""
    if head.is_dense_in(dtype):
        return [slice(0, head.shape[0])]
    return _row_ranges(head.shape, dtype)


def _row_ranges(shape: tuple[int, int], dtype: torch.dtype) -> list[slice]:
    """The rows of a matrix in ranges of at most PANEL_BYTES: a product's output of a vocabulary's size, and what torch
    sums it in, would be another copy of the head and two."""
    step = max(1, PANEL_BYTES // (shape[1] * dtype.itemsize))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _panel(head: Weight, rows: slice, like: Tensor) -> Tensor:
    if head.is_dense_in(like.dtype):
        return head.dequantize(like.dtype, rows=rows)
    shape = (rows.stop - rows.start, head.shape[1])
    return head.dequantize(like.dtype, out=scratch(shape, like.dtype, like.device), rows=rows)


def linear_logits(hidden_ND: Tensor, head: Weight, softcap: float | None = None) -> Tensor:
    """float32 logits [N, V] = hidden @ head^T, soft-capped as c * tanh(x / c) where the model does so."""
    view = head.native_view() if available(hidden_ND) else None
    if view is not None:  # read as it is held: one token's logits must not decode the whole head to memory
        logits = linear_forward(hidden_ND, [LinearSegment(view)])[0].float()
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
    logits = torch.empty(hidden_ND.shape[0], head.shape[0], dtype=torch.float32, device=hidden_ND.device)
    for rows in _panels(head, hidden_ND.dtype):
        logits[:, rows] = hidden_ND @ _panel(head, rows, hidden_ND).t()
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _chunk_logits(hidden_CD: Tensor, head: Weight, softcap: float | None) -> Tensor:
    """As `linear_logits`, into this thread's scratch."""
    vocab = head.shape[0]
    device, dtype = hidden_CD.device, hidden_CD.dtype
    logits = scratch((hidden_CD.shape[0], vocab), torch.float32, device, "logits")
    direct = dtype == torch.float32
    raw = logits if direct else scratch((hidden_CD.shape[0], vocab), dtype, device, "raw_logits")
    for rows in _panels(head, dtype):
        torch.mm(hidden_CD, _panel(head, rows, hidden_CD).t(), out=raw[:, rows])
    if not direct:
        logits.copy_(raw)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


class _LinearCrossEntropy(torch.autograd.Function):
    """(hidden [N, D], head, targets [N]) -> negative log-likelihood of each row, float32 [N].

    The saved gradient is that of the *sum*; the caller's scale arrives in `backward`, as one number for all rows (a
    sum or a mean) or one a row, which is what makes it possible to have it before. The gradient of a trained head sums
    over rows already: there `backward` refuses unequal weights.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, trainable_VD: Tensor | None, head: Weight, targets_N: Tensor, cap: float | None
    ) -> Tensor:
        needs_hidden = ctx.needs_input_grad[0]
        needs_head = trainable_VD is not None and ctx.needs_input_grad[1]
        view = head.native_view() if available(hidden_ND) and not needs_head else None
        if view is not None:
            nll_N, grad_ND = loss.linear_cross_entropy(hidden_ND, view, targets_N, cap, needs_hidden)
            ctx.save_for_backward(grad_ND, None)
            ctx.head_dtype = None
            return nll_N
        nll_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_VD = torch.zeros(head.shape, dtype=torch.float32, device=hidden_ND.device) if needs_head else None
        step = chunk_rows(head.shape[0])
        for start in range(0, hidden_ND.shape[0], step):
            part = slice(start, min(start + step, hidden_ND.shape[0]))
            logits = _chunk_logits(hidden_ND[part], head, cap)
            target = targets_N[part, None]
            picked = logits.gather(1, target)
            capped = logits.clone() if cap is not None and (needs_hidden or needs_head) else None
            top = logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)  # in place: one pass of exponentials, not two
            nll_N[part] = (total.log() + top - picked)[:, 0]
            if not (needs_hidden or needs_head):
                continue
            logits.div_(total)  # the probabilities
            logits.scatter_add_(1, target, torch.full_like(picked, -1.0))
            if capped is not None and cap is not None:
                logits.mul_(capped.div_(cap).square_().neg_().add_(1.0))  # d tanh
            dlogits = logits
            if hidden_ND.dtype != torch.float32:
                dlogits = scratch(tuple(logits.shape), hidden_ND.dtype, hidden_ND.device, "raw_logits")
                dlogits.copy_(logits)
            if grad_ND is not None:
                for i, rows in enumerate(_panels(head, hidden_ND.dtype)):
                    dense = _panel(head, rows, hidden_ND)
                    if i == 0:
                        torch.mm(dlogits[:, rows], dense, out=grad_ND[part])
                    else:
                        grad_ND[part].addmm_(dlogits[:, rows], dense)
            if grad_VD is not None:
                for rows in _row_ranges(head.shape, hidden_ND.dtype):
                    grad_VD[rows] += dlogits[:, rows].t() @ hidden_ND[part]
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.head_dtype = None if trainable_VD is None else trainable_VD.dtype
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dnll_N,) = grads
        grad_ND, grad_VD = ctx.saved_tensors
        if dnll_N.numel() == 0:
            return (grad_ND, grad_VD, None, None, None)
        scale = dnll_N[0]
        if not bool((dnll_N == scale).all()):
            if grad_VD is not None:
                raise RuntimeError(
                    "linear_cross_entropy: with a trained head, reduce its rows with a sum or a mean, not with unequal "
                    "weights"
                )
            # In float32: a weight rounded to bfloat16 would scale a whole document's gradient by up to 0.4 % too much.
            weighted = None if grad_ND is None else (grad_ND.float() * dnll_N[:, None]).to(grad_ND.dtype)
            return weighted, None, None, None, None
        return (
            None if grad_ND is None else grad_ND * float(scale),  # a tensor's scale would be rounded to grad_ND's type
            None if grad_VD is None else _scaled(grad_VD, scale, ctx.head_dtype),
            None,
            None,
            None,
        )


def _scaled(grad_VD: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 gradient times `scale` in `dtype`, panel by panel: beside a large vocabulary's there is no room for
    another of its size in float32."""
    out = torch.empty(grad_VD.shape, dtype=dtype, device=grad_VD.device)
    for rows in _row_ranges((grad_VD.shape[0], grad_VD.shape[1]), torch.float32):
        out[rows] = grad_VD[rows] * scale
    return out


def linear_cross_entropy(hidden_ND: Tensor, head: Weight, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """Negative log-likelihood of each row, float32 [N], without ever holding [N, V] logits.

    hidden_ND  rows that are supervised, in the compute dtype
    targets_N  int64, each in [0, V)
    softcap    Gemma 2's final soft-capping: c * tanh(logits / c)

    The rows may be weighted as one likes; where the head is trained, equally (backward refuses anything else).
    """
    result: Tensor = _LinearCrossEntropy.apply(hidden_ND, head.trainable_tensor(), head, targets_N, softcap)  # type: ignore[no-untyped-call]
    return result
