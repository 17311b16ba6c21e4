"""Linears that share an input (query-key-value, gate-up), called as one.

A group is a list of row segments, each with its own weight format, bias, adapter and Hugging Face name. Storage
stays as the file had it; fusion happens in the call: the segments write side by side into one output, the
gradient of the input is accumulated in one buffer, and all the A factors are one product.

Shape letters: T tokens, I input features, O output features of one segment, S their sum, R the summed ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from halfbyte.linear.dora import RowNorms, divisor, scale_rows
from halfbyte.linear.lora import LoraAdapter
from halfbyte.linear.workspace import scratch
from halfbyte.ops.linear import LinearSegment, available, linear_backward, linear_forward
from halfbyte.quant import Weight


class Segment(nn.Module):
    """One linear of the model: `name` is its dotted Hugging Face name, "model.layers.0.self_attn.q_proj"."""

    def __init__(self, name: str, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.name = name
        self.weight = weight
        self.bias: nn.Parameter | None = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.adapter: LoraAdapter | None = None
        self.norms = RowNorms()

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def active_adapter(self) -> LoraAdapter | None:
        return self.adapter if self.adapter is not None and self.adapter.enabled else None

    def merged(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight with the adapter added, [out, in]; computed in float32, rounded once."""
        weight = self.weight.dequantize(torch.float32)
        if self.adapter is not None:
            weight = weight + self.adapter.delta()
            if self.adapter.magnitude is not None:
                weight = weight * (self.adapter.magnitude.detach() / divisor(weight.norm(dim=1)))[:, None]
        return weight.to(dtype)


@dataclass(frozen=True)
class _Call:
    """What one call needs beside tensors: per segment its weight and its adapter's scaling (None without one)."""

    weights: tuple[Weight, ...]
    scalings: tuple[float | None, ...]

    @property
    def sizes(self) -> list[int]:
        return [weight.shape[0] for weight in self.weights]

    def native(self, x: Tensor, tensors: Sequence[Tensor | None]) -> list[LinearSegment] | None:
        """The call as the native engine takes it; None where PyTorch runs it (a GPU, a trained base, odd sizes)."""
        if not available(x) or any(t is not None and t.requires_grad for i in (0, 1) for t in tensors[i::4]):
            return None
        segments = []
        for i, (weight, scaling) in enumerate(zip(self.weights, self.scalings, strict=True)):
            view, held_bias = weight.native_view(), tensors[4 * i + 1]
            if view is None:
                return None
            bias = None if held_bias is None else held_bias.detach().float()
            if scaling is None:
                segments.append(LinearSegment(view, bias))
                continue
            a_RI, b_OR = tensors[4 * i + 2], tensors[4 * i + 3]
            assert a_RI is not None
            assert b_OR is not None
            segments.append(LinearSegment(view, bias, a_RI.detach(), b_OR.detach(), scaling))
        return segments


def _dense(weight: Weight, like: Tensor) -> Tensor:
    """The weight in the compute dtype: itself if it is held so, else dequantized into this thread's scratch."""
    if weight.is_dense_in(like.dtype):
        return weight.dequantize(like.dtype)
    return weight.dequantize(like.dtype, out=scratch(weight.shape, like.dtype, like.device))


class _Grouped(torch.autograd.Function):
    """y = concat_s(x W_s^T + b_s + scaling_s (x A_s^T) B_s^T), and its gradients, written by hand.

    Tensors after `x` come in fours per segment: trainable weight, bias, A, B (None where there is none).
    Saved for backward: x once, the low-rank activations x A^T, and the factors. The base weight is dequantized
    again in the backward pass: holding it would be holding the 16-bit model.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, x_TI: Tensor, *tensors: Tensor | None) -> Tensor:
        sizes = call.sizes
        y_TS = x_TI.new_empty(x_TI.shape[0], sum(sizes))
        factors = [(i, tensors[4 * i + 2]) for i, s in enumerate(call.scalings) if s is not None]
        a_RI = torch.cat([a for _, a in factors if a is not None]).to(x_TI.dtype) if factors else None
        low_TR = x_TI @ a_RI.t() if a_RI is not None else None
        low_parts = _split_low(low_TR, factors)
        for i, (weight, y_TO) in enumerate(zip(call.weights, y_TS.split(sizes, 1), strict=True)):
            bias, b_OR = tensors[4 * i + 1], tensors[4 * i + 3]
            torch.mm(x_TI, _dense(weight, x_TI).t(), out=y_TO)
            if bias is not None:
                y_TO += bias.to(x_TI.dtype)
            scaling = call.scalings[i]
            if scaling is not None and b_OR is not None:
                y_TO.addmm_(low_parts[i], (b_OR * scaling).to(x_TI.dtype).t())
        ctx.call = call
        ctx.save_for_backward(x_TI, low_TR, a_RI, *tensors)
        return y_TS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TS,) = grads
        call: _Call = ctx.call
        x_TI, low_TR, a_RI, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        dx_TI: Tensor | None = x_TI.new_empty(x_TI.shape) if ctx.needs_input_grad[1] else None
        factors = [(i, tensors[4 * i + 2]) for i, s in enumerate(call.scalings) if s is not None]
        low_parts = _split_low(low_TR, factors)
        dlow_TR = torch.empty_like(low_TR) if low_TR is not None else None
        dlow_parts = _split_low(dlow_TR, factors)
        out: list[Tensor | None] = [None] * len(tensors)
        for i, (weight, dy_TO) in enumerate(zip(call.weights, dy_TS.split(call.sizes, 1), strict=True)):
            if dx_TI is not None:
                dense = _dense(weight, x_TI)
                torch.mm(dy_TO, dense, out=dx_TI) if i == 0 else dx_TI.addmm_(dy_TO, dense)
            if needs[4 * i]:
                out[4 * i] = dy_TO.t() @ x_TI
            if needs[4 * i + 1]:
                out[4 * i + 1] = dy_TO.sum(0, dtype=torch.float32)
            scaling, b_OR = call.scalings[i], tensors[4 * i + 3]
            if scaling is not None and b_OR is not None:
                torch.mm(dy_TO, (b_OR * scaling).to(x_TI.dtype), out=dlow_parts[i])
                if needs[4 * i + 3]:
                    out[4 * i + 3] = (dy_TO.t() @ low_parts[i]).float() * scaling
        if dlow_TR is not None and a_RI is not None:
            if dx_TI is not None:
                dx_TI.addmm_(dlow_TR, a_RI)
            da_RI = (dlow_TR.t() @ x_TI).float()
            ranks = [a.shape[0] for _, a in factors]
            for (i, _), da in zip(factors, da_RI.split(ranks), strict=True):
                out[4 * i + 2] = da if needs[4 * i + 2] else None
        return (None, dx_TI, *(_like(g, t) for g, t in zip(out, tensors, strict=True)))


@dataclass(frozen=True)
class Remake:
    """How to make an operation's input (or inputs) again in the backward pass, from tensors that are kept anyway.

    The normed residual stream and the gated unit's output are one pass over memory away from what their own gradients
    keep; holding them too would be a fifth of a layer's activations.
    """

    make: Callable[..., Any]
    tensors: tuple[Tensor, ...]


class _NativeGrouped(torch.autograd.Function):
    """`_Grouped` by the native engine, which reads the weights in their blocks: nothing of a weight's size is made.

    Saved for backward: x, or what it is remade from, the low-rank activations x A^T, and the factors.
    """

    @staticmethod
    def forward(
        ctx: Any, native: list[LinearSegment], remake: Remake | None, x_TI: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        y_TS, low_TR = linear_forward(x_TI, native)
        ctx.native, ctx.make = native, None if remake is None else remake.make
        inputs = (x_TI,) if remake is None else tuple(tensor.detach() for tensor in remake.tensors)
        ctx.inputs = len(inputs)
        # The factors are saved although `native` holds them: so autograd sees it when somebody writes to them.
        ctx.save_for_backward(*inputs, low_TR, *tensors)
        return y_TS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked once: checkpointing refuses a second time
        inputs, low_TR = saved[: ctx.inputs], saved[ctx.inputs]
        x_TI = inputs[0] if ctx.make is None else ctx.make(*inputs)
        dx_TI, factors = linear_backward(grads[0], x_TI, low_TR, ctx.native, ctx.needs_input_grad[2])
        pairs = zip(factors[::2], factors[1::2], strict=True)
        return (None, None, dx_TI, *(grad for da, db in pairs for grad in (None, None, da, db)))


def _like(grad: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    return grad if grad is None or tensor is None else grad.to(tensor.dtype)


def _split_low(low_TR: Tensor | None, factors: Sequence[tuple[int, Tensor | None]]) -> dict[int, Tensor]:
    """The columns of the stacked low-rank activations that belong to each segment."""
    if low_TR is None:
        return {}
    ranks = [a.shape[0] for _, a in factors if a is not None]
    return {i: part for (i, _), part in zip(factors, low_TR.split(ranks, 1), strict=True)}


class GroupedLinear(nn.Module):
    """Segments that share an input. `forward(x [T, I]) -> [T, S]`, the segments' outputs side by side."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__()
        widths = {segment.in_features for segment in segments}
        if len(widths) != 1:
            raise ValueError(f"segments of one group read the same input; these read {sorted(widths)} features")
        self.segments = nn.ModuleList(segments)

    @property
    def parts(self) -> list[Segment]:
        return list(self.segments)  # type: ignore[arg-type]

    @property
    def sizes(self) -> list[int]:
        return [segment.out_features for segment in self.parts]

    @property
    def keeps_output(self) -> bool:
        """Whether the gradients need the output as it was returned: nobody may write over it."""
        return self._has_magnitudes() and all(segment.bias is None for segment in self.parts)

    def _has_magnitudes(self) -> bool:
        adapters = (segment.active_adapter for segment in self.parts)
        return any(adapter is not None and adapter.magnitude is not None for adapter in adapters)

    def forward(self, x_TI: Tensor, remake: Remake | None = None) -> Tensor:
        """`remake`: how to make x again, so that it need not be kept for the gradients."""
        if not self._has_magnitudes():
            return self._products(x_TI, remake, biased=True)
        return scale_rows(self._products(x_TI, remake, biased=False), *self._magnitudes(x_TI))

    def _magnitudes(self, x_TI: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(m, norm, bias) of all outputs side by side, float32 [S]; m and norm are 1 where there is no magnitude."""
        magnitudes: list[Tensor] = []
        norms, biases = [], []
        for segment in self.parts:
            adapter, ones = segment.active_adapter, torch.ones(segment.out_features, device=x_TI.device)
            if adapter is not None and adapter.magnitude is not None:
                magnitudes.append(adapter.magnitude)
                norms.append(segment.norms.of(segment.weight, adapter, x_TI.dtype))
            else:
                magnitudes.append(ones)
                norms.append(ones)
            biases.append(torch.zeros_like(ones) if segment.bias is None else segment.bias.float())
        bias = None if all(segment.bias is None for segment in self.parts) else torch.cat(biases)
        return torch.cat(magnitudes), torch.cat(norms), bias

    def _products(self, x_TI: Tensor, remake: Remake | None, biased: bool) -> Tensor:
        """x (W + s B A)^T of every segment, side by side, with the biases or without."""
        call_weights, scalings, tensors = [], [], []
        with_dropout: list[tuple[int, LoraAdapter]] = []
        for i, segment in enumerate(self.parts):
            adapter = segment.active_adapter
            if adapter is not None and adapter.dropout > 0 and adapter.training:
                with_dropout.append((i, adapter))
                adapter = None
            call_weights.append(segment.weight)
            scalings.append(None if adapter is None else adapter.scaling)
            tensors += [
                segment.weight.trainable_tensor(),
                segment.bias if biased else None,
                None if adapter is None else adapter.lora_A,
                None if adapter is None else adapter.lora_B,
            ]
        call = _Call(tuple(call_weights), tuple(scalings))
        y_TS: Tensor
        native = call.native(x_TI, tensors)
        if native is not None:
            y_TS = _NativeGrouped.apply(native, remake, x_TI, *tensors)  # type: ignore[no-untyped-call]
        else:
            y_TS = _Grouped.apply(call, x_TI, *tensors)  # type: ignore[no-untyped-call]
        if with_dropout:
            # Each adapter draws its own mask, as in PEFT, so the A products cannot be one.
            parts = list(y_TS.split(self.sizes, 1))
            for i, adapter in with_dropout:
                parts[i] = parts[i] + adapter(x_TI)
            y_TS = torch.cat(parts, 1)
        return y_TS


def segments(module: nn.Module) -> dict[str, Segment]:
    """Every segment below `module`, by its Hugging Face name, in the model's order."""
    return {m.name: m for m in module.modules() if isinstance(m, Segment)}
