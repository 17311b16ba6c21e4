"""What `operators.py` measures: every native operator on inputs of the sizes that training gives it.

The block formats are measured on as many elements as are asked for; the others have the shapes of one layer of Qwen 2.5
1.5B at 512 tokens or Gemma 3 270M at 4 documents of 512, with adapters of rank 16, in bfloat16.

Shape letters: T tokens, I input features, O output features of a segment, S their sum, D hidden size, V vocabulary,
H query heads, K key-value heads, E head features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.ops import attention as attention_ops
from halfbyte.ops import elementwise, linear, loss, native
from halfbyte.optim import OptimOptions
from halfbyte.optim.adamw import AdamW
from halfbyte.quant import DenseWeight, QuantOptions, Weight
from halfbyte.quant import quantize as quantize_weight

BLOCKSIZE, NESTED = 64, 256
RANK = 16
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Work:
    """One call, the bytes it must read and write at least, the floating-point operations of its products."""

    call: Callable[[], object]
    bytes: int
    operations: int = 0
    dtype: torch.dtype = torch.float32


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- block formats -----------------------------------------------------------------------------------------------------


def dequantize(elements: int, quant_type: str, dtype: torch.dtype) -> Work:
    codes, absmax = ops.quantize_blockwise(torch.randn(elements), quant_type, BLOCKSIZE)
    out = torch.empty(elements, dtype=dtype)
    call = partial(ops.dequantize_blockwise_out, codes, absmax, quant_type, BLOCKSIZE, out)
    return Work(call, size_of(codes, absmax, out))


def dequantize_nested(elements: int, dtype: torch.dtype) -> Work:
    codes, absmax = ops.quantize_blockwise(torch.randn(elements), "nf4", BLOCKSIZE)
    offset = absmax.mean()
    inner, constants = ops.quantize_dynamic(absmax - offset, NESTED)
    out = torch.empty(elements, dtype=dtype)
    call = partial(
        ops.dequantize_blockwise_out, codes, inner, "nf4", BLOCKSIZE, out, nested_absmax=constants, nested_offset=offset
    )
    return Work(call, size_of(codes, inner, constants, out))


def quantize(elements: int, quant_type: str, dtype: torch.dtype) -> Work:
    x = torch.randn(elements).to(dtype)
    outputs = ops.quantize_blockwise(x, quant_type, BLOCKSIZE)
    return Work(partial(ops.quantize_blockwise, x, quant_type, BLOCKSIZE), size_of(x, *outputs))


def quantize_dynamic(elements: int) -> Work:
    x = torch.randn(elements)
    return Work(partial(ops.quantize_dynamic, x, NESTED), size_of(x, *ops.quantize_dynamic(x, NESTED)))


def dequantize_dynamic(elements: int) -> Work:
    codes, absmax = ops.quantize_dynamic(torch.randn(elements), NESTED)
    out = ops.dequantize_dynamic(codes, absmax, NESTED)
    return Work(partial(ops.dequantize_dynamic, codes, absmax, NESTED), size_of(codes, absmax, out))


# -- linears and the loss --------------------------------------------------------------------------------------------


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


class Linears:
    """A group of linears with adapters, in a format ("bf16", or NF4 with nested constants)."""

    def __init__(self, tokens: int, features: int, outputs: tuple[int, ...], form: str, rank: int = RANK) -> None:
        values = [torch.randn(rows, features) / features**0.5 for rows in outputs]
        self.weights: list[Weight] = [
            DenseWeight(v.to(BF16)) if form == "bf16" else quantize_weight(v.to(BF16), QuantOptions()) for v in values
        ]
        self.factors = [(torch.randn(rank, features), torch.randn(rows, rank)) for rows in outputs]
        self.x_TI, self.dy_TS = _random(tokens, features), _random(tokens, sum(outputs))
        self.low_TR = _random(tokens, len(outputs) * rank)
        self.held = sum(weight.nbytes for weight in self.weights) + sum(size_of(*pair) for pair in self.factors)
        self.base = 2 * tokens * features * sum(outputs)
        self.update = 2 * tokens * rank * (features * len(outputs) + sum(outputs))

    def segments(self) -> list[linear.LinearSegment]:
        made = []
        for weight, pair in zip(self.weights, self.factors, strict=True):
            view = weight.native_view()
            assert view is not None
            made.append(linear.LinearSegment(view, None, *pair, 1.0))
        return made

    def forward(self) -> object:
        return linear.linear_forward(self.x_TI, self.segments())

    def backward(self) -> object:
        return linear.linear_backward(self.dy_TS, self.x_TI, self.low_TR, self.segments(), needs_input=True)


def linear_forward(tokens: int, features: int, outputs: tuple[int, ...], form: str) -> Work:
    case = Linears(tokens, features, outputs, form)
    moved = case.held + size_of(case.x_TI, case.dy_TS, case.low_TR)
    return Work(case.forward, moved, case.base + case.update, BF16)


def linear_backward(tokens: int, features: int, outputs: tuple[int, ...], form: str) -> Work:
    """Gradients of x, of A and of B; the weight has none."""
    case = Linears(tokens, features, outputs, form)
    gradients = sum(size_of(*pair) for pair in case.factors)
    moved = case.held + gradients + size_of(case.x_TI, case.x_TI, case.dy_TS, case.low_TR)
    return Work(case.backward, moved, case.base + 2 * case.update, BF16)


def cross_entropy(rows: int, width: int, vocab: int) -> Work:
    """The loss with the gradient of the hidden states: two products with the head."""
    head = DenseWeight((torch.randn(vocab, width) / width**0.5).to(BF16))
    hidden_ND, targets_N = _random(rows, width), torch.randint(0, vocab, (rows,))

    def call() -> object:
        view = head.native_view()
        assert view is not None
        return loss.linear_cross_entropy(hidden_ND, view, targets_N, None, needs_grad=True)

    moved = head.nbytes + size_of(hidden_ND, hidden_ND, targets_N) + 4 * rows
    return Work(call, moved, 4 * rows * vocab * width, BF16)


# -- attention -------------------------------------------------------------------------------------------------------


def attention(lengths: tuple[int, ...], heads: int, kv_heads: int, features: int, backward: bool) -> Work:
    """Causal, every document whole; operations of the pairs that are seen only, two products forward, five backward."""
    tokens = sum(lengths)
    q, k, v = _random(tokens, heads + 2 * kv_heads, features).split((heads, kv_heads, kv_heads), 1)
    scale = features**-0.5
    out, lse = attention_ops.attention(q, k, v, lengths, scale)
    products = 5 if backward else 2
    operations = products * 2 * heads * features * sum(n * (n + 1) // 2 for n in lengths)
    if not backward:
        call = partial(attention_ops.attention, q, k, v, lengths, scale)
        return Work(call, size_of(q, k, v, out, lse), operations, BF16)
    dout = _random(tokens, heads, features)
    call = partial(attention_ops.attention_backward, dout, q, k, v, out, lse, lengths, scale)
    return Work(call, size_of(*2 * (q, k, v), out, lse, dout), operations, BF16)


# -- what is elementwise ---------------------------------------------------------------------------------------------


def norm(rows: int, width: int, backward: bool) -> Work:
    """s = x + h and its norm, or the gradient of x and h."""
    x, h, weight = _random(rows, width), _random(rows, width), torch.randn(width)
    s, y, _, rstd = elementwise.add_rms_norm(x, h, None, weight, 1e-6)
    assert y is not None
    assert rstd is not None
    if not backward:
        return Work(partial(elementwise.add_rms_norm, x, h, None, weight, 1e-6), size_of(x, h, s, y, weight, rstd))
    call = partial(elementwise.rms_norm_backward, y, s, weight, rstd, x)
    return Work(call, size_of(y, s, x, x, weight, rstd))


def gated_unit(rows: int, width: int, backward: bool) -> Work:
    gate_up, out = _random(rows, 2 * width), _random(rows, width)
    if not backward:
        return Work(partial(elementwise.gated_unit, gate_up, "silu"), size_of(gate_up, out))
    call = partial(elementwise.gated_unit_backward, out, gate_up, "silu", torch.empty_like(gate_up))
    return Work(call, size_of(gate_up, gate_up, out))


def heads(tokens: int, count: int, features: int, backward: bool) -> Work:
    """Norm and rotation of queries, or their gradient."""
    x, out, weight = _random(tokens, count, features), _random(tokens, count, features), torch.randn(features)
    angle = torch.randn(tokens, features // 2)
    cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
    rstd = elementwise.rotate_heads(x, cos, sin, out, weight, 1e-6)
    assert rstd is not None
    if not backward:
        call = partial(elementwise.rotate_heads, x, cos, sin, out, weight, 1e-6)
        return Work(call, size_of(x, out, cos, sin, weight, rstd))
    dy = _random(tokens, count, features)
    call = partial(elementwise.rotate_heads_backward, dy, cos, sin, x, weight, rstd, out)
    return Work(call, size_of(x, dy, out, cos, sin, weight, rstd))


# -- the optimizer ---------------------------------------------------------------------------------------------------


def optimizer_step(optim: str, layers: int = 18) -> Work:
    """AdamW over the adapters of all linears of Gemma 3 270M: parameters and moments are read and written."""
    shapes = [(640, 1024), (640, 256), (640, 256), (1024, 640), (640, 2048), (640, 2048), (2048, 640)]
    parameters = {}
    for layer in range(layers):
        for i, (features, rows) in enumerate(shapes):
            for name, shape in (("A", (RANK, features)), ("B", (rows, RANK))):
                parameter = nn.Parameter(torch.randn(shape))
                parameter.grad = torch.randn(shape)
                parameters[f"{layer}.{i}.{name}"] = parameter
    optimizer = AdamW(parameters, OptimOptions(optim=optim))
    values = size_of(*parameters.values())
    return Work(partial(optimizer.step, 1e-4), 3 * values + 2 * optimizer.nbytes)


# -- all of them -----------------------------------------------------------------------------------------------------


def _multiplied(make: Callable[[], Work]) -> Callable[[int], Work | None]:
    """A case that needs the engine's bfloat16 products; None where this processor has none."""
    return lambda _: make() if native.multiplies(BF16) else None


def _elementwise(make: Callable[[], Work]) -> Callable[[int], Work | None]:
    return lambda _: make() if elementwise.available(torch.empty(0, dtype=BF16)) else None


CASES: dict[str, Callable[[int], Work | None]] = {
    "dequantize nf4 to bf16": lambda n: dequantize(n, "nf4", torch.bfloat16),
    "dequantize nf4 to fp32": lambda n: dequantize(n, "nf4", torch.float32),
    "dequantize nf4, nested, to bf16": lambda n: dequantize_nested(n, torch.bfloat16),
    "dequantize int8 to bf16": lambda n: dequantize(n, "int8", torch.bfloat16),
    "quantize bf16 to nf4": lambda n: quantize(n, "nf4", torch.bfloat16),
    "quantize bf16 to int8": lambda n: quantize(n, "int8", torch.bfloat16),
    "quantize fp32 to dynamic 8-bit": quantize_dynamic,
    "dequantize dynamic 8-bit to fp32": dequantize_dynamic,
}

_QWEN, _GEMMA = (512, 1536, (8960, 8960)), (2048, 640, (2048, 2048))
for _form in ("nf4+dq", "bf16"):
    for _name, _shape in (("Qwen's", _QWEN), ("Gemma's", _GEMMA)):
        CASES[f"linear {_form}, {_name} gate-up"] = _multiplied(partial(linear_forward, *_shape, _form))
        CASES[f"linear {_form}, {_name} gate-up, gradients"] = _multiplied(partial(linear_backward, *_shape, _form))
CASES["loss, Qwen's"] = _multiplied(partial(cross_entropy, 512, 1536, 151_936))
for _suffix, _backward in (("", False), (", gradients", True)):
    CASES |= {
        f"attention, Qwen's{_suffix}": _multiplied(partial(attention, (512,), 12, 2, 128, _backward)),
        f"attention, Gemma's{_suffix}": _multiplied(partial(attention, (512,) * 4, 4, 1, 256, _backward)),
        f"add and norm{_suffix}": _elementwise(partial(norm, 2048, 1536, _backward)),
        f"gated unit{_suffix}": _elementwise(partial(gated_unit, 512, 8960, _backward)),
        f"norm and rotation of heads{_suffix}": _elementwise(partial(heads, 2048, 4, 256, _backward)),
    }
CASES |= {
    "AdamW step": lambda _: optimizer_step("adamw"),
    "AdamW step, 8-bit": lambda _: optimizer_step("adamw_8bit"),
}
