"""GPTQ: a merged model in 4 or 8 bits, each linear's rounding error made up for by the inputs not yet rounded.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
2210.17323. A linear's output error on the calibration tokens is tr(E H E^T) with E = W - Q and H = 2 X X^T. Inputs
are rounded one after the other, and each error is spread over the later inputs along the rows of the Cholesky factor
of H^-1 (section 3.3, "step 3"), in blocks of 128 inputs whose effect on the rest is applied at once ("step 2").

What is left out: the search for a smaller range by mean squared error (`mse`), and 2 and 3 bits.

Shape letters: I input features, O output features, G groups, T tokens.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.export.int4_folder import (
    Int4Report,
    OnProgress,
    choose_group_size,
    decoder_spec,
    seconds_since,
    write_int4_folder,
)
from halfbyte.export.layer_by_layer import LayerByLayer
from halfbyte.export.safetensors_file import Planned
from halfbyte.models.dtype import fast_dtype
from halfbyte.models.source import ModelSource
from halfbyte.options import Options
from halfbyte.quant import DenseWeight, gptq_format
from halfbyte.quant.group_codes import GroupCodes, encode, fit_grid

_BLOCK = 128
_MOST_DAMPING = 1.0


class GptqOptions(Options):
    """How a model is quantized by GPTQ."""

    bits: Literal[4, 8] = Field(default=4, description="bits of a code")
    group_size: Literal[32, 64, 128] | None = Field(
        default=None, description="inputs that share a scale; by default the largest of 128, 64, 32 that divides all"
    )
    sym: bool = Field(default=True, description="the zero point in the middle, which vLLM's fast kernels want")
    order: Literal["inputs", "activation", "desc_act"] = Field(
        default="activation",
        description="which inputs are rounded first: as they lie; the most active ones, in groups as they lie; or the "
        "most active ones in groups of their own (desc_act, slower to serve)",
    )
    damp_percent: float = Field(
        default=0.01, gt=0, le=1, description="share of the Hessian's mean diagonal that is added to it"
    )
    checkpoint_format: Literal["gptq", "gptq_v2"] = Field(
        default="gptq", description="how zero points are stored; gptq is read by everything, gptq_v2 only by some"
    )


@dataclass(frozen=True)
class Factor:
    """A Hessian made ready for the linears that share an input.

    order    int64 [I], the inputs as they are rounded
    upper    [I, I], in that order: upper triangular U with U^T U = (H + damping)^-1
    damping  share of the mean diagonal that was added
    """

    order: Tensor
    upper: Tensor
    damping: float


def factorize(hessian: Tensor, damp_percent: float = 0.01, by_activation: bool = False) -> Factor:
    """`Factor` of X^T X [I, I] (any multiple of it gives the same weights), in float64, returned in the given type.

    Where the damped matrix is not positive definite in floating point, ten times the damping is tried, and more;
    HalfbyteError where nothing helps, or the matrix holds NaN.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise HalfbyteError("the calibration's Hessian is not finite: the model's weights or activations are broken")
    matrix = hessian.double()
    diagonal = matrix.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if by_activation else torch.arange(len(diagonal))
    matrix = matrix.index_select(0, order).index_select(1, order)
    mean = float(diagonal.mean()) or 1.0  # nothing ever came in: then every rounding is as good as the nearest
    damping = damp_percent
    while damping <= _MOST_DAMPING:
        # H = R R^T with R upper triangular is the Cholesky factorization read from the last row; then U = R^-1.
        damped = matrix.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper = lower.flip(0, 1)
            eye = torch.eye(len(order), dtype=upper.dtype)
            inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
            return Factor(order, inverse.to(hessian.dtype), damping)
        damping *= 10
    raise HalfbyteError(
        "the calibration's Hessian cannot be inverted even with its whole diagonal added: give more, or other, rows"
    )


def quantize_gptq(weight: Tensor, factor: Factor, group_size: int, options: GptqOptions) -> GroupCodes:
    """The weight [O, I] in codes. Computed in the weight's type (float32 or float64), like `factor.upper`."""
    outputs, inputs = weight.shape
    grid = _Grid(weight, factor.order, group_size, options)
    rest_IO = weight.index_select(1, factor.order).t().contiguous()
    codes_IO = torch.empty(inputs, outputs, dtype=torch.uint8)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        block, upper = rest_IO[start:stop], factor.upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            scales, zeros = grid.at(start + i, rest_IO)
            codes = encode(block[i], scales, zeros, options.bits)
            codes_IO[start + i] = codes.to(torch.uint8)
            errors[i] = (block[i] - (codes - zeros) * scales) / upper[i, i]
            block[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        rest_IO[stop:].addmm_(factor.upper[start:stop, stop:].t(), errors, alpha=-1)
    back = factor.order.argsort()
    return GroupCodes(
        codes_IO.index_select(0, back),
        grid.scales.to(torch.float16),
        grid.zeros.to(torch.uint8),
        grid.group_of.index_select(0, back).to(torch.int32),
        options.bits,
    )


class _Grid:
    """Scales and zero points [G, O] of the groups.

    Groups as they lie, with inputs rounded in another order, are fitted to the weights before anything is rounded;
    otherwise a group is fitted when its turn comes, to what earlier errors have made of it.
    """

    def __init__(self, weight: Tensor, order: Tensor, group_size: int, options: GptqOptions) -> None:
        outputs, inputs = weight.shape
        self.size, self.options = group_size, options
        self.scales, self.zeros = (weight.new_empty(inputs // group_size, outputs) for _ in range(2))
        self.first_zero = gptq_format.FIRST_ZERO[options.checkpoint_format]
        self.beforehand = options.order == "activation"
        place = order if self.beforehand else torch.arange(inputs)
        self.group_of = place // group_size
        """The group of the input that is rounded at each step, int64 [I]."""
        if self.beforehand:
            for group in range(inputs // group_size):
                self._fit(group, weight[:, group * group_size : (group + 1) * group_size].t())

    def at(self, step: int, rest_IO: Tensor) -> tuple[Tensor, Tensor]:
        """(scales, zeros) [O] for the input rounded at `step`."""
        group = int(self.group_of[step])
        if not self.beforehand and step % self.size == 0:
            self._fit(group, rest_IO[step : step + self.size])
        return self.scales[group], self.zeros[group]

    def _fit(self, group: int, values: Tensor) -> None:
        self.scales[group], self.zeros[group] = fit_grid(
            values.amin(0), values.amax(0), self.options.bits, self.options.sym, self.first_zero
        )


class Gram:
    """X^T X of what a group of linears is given, summed in float32."""

    def __init__(self, inputs: int) -> None:
        self.matrix = torch.zeros(inputs, inputs)

    def add(self, x_TI: Tensor) -> None:
        x = x_TI.float()
        self.matrix.addmm_(x.t(), x)


def write_gptq_folder(
    folder: Path,
    source: ModelSource,
    planned: Sequence[Planned],
    calibration: Sequence[Tensor],
    options: GptqOptions | None = None,
    adapter: Path | None = None,
    on_progress: OnProgress | None = None,
    dtype: torch.dtype | None = None,
) -> Int4Report:
    """Quantize the merged model and write a Hugging Face folder that GPTQModel, vLLM and transformers load.

    planned      the merged model's tensors, from `export.merge.plan_tensors`
    calibration  token ids of the training prompts, int64 [T] each, as the model is given them
    adapter      the adapter's folder, whose tokenizer files (a chat template) replace the source's
    dtype        type of the calibration's forward passes; None: the faster one here

    Held in memory: one layer, its Hessians, and the calibration tokens' hidden states. The inputs of each linear are
    those that the linears before it, already quantized, give.

    Raises UsageError for an architecture, shapes or calibration that do not do, DoesNotFit for a full disk, and
    HalfbyteError where the numbers are broken; `folder` is then untouched.
    """
    options = options or GptqOptions()
    started = time.monotonic()
    spec = decoder_spec(source, "GPTQ")
    size = choose_group_size(spec, options.group_size, 32 // options.bits)
    model = LayerByLayer(planned, spec, calibration, fast_dtype()[0] if dtype is None else dtype)
    shapes = {
        linear.name: gptq_format.shapes(linear.out_features, linear.in_features, size, options.bits)
        for linear in spec.linears()
    }
    run = _Run(model, size, options, on_progress)
    nbytes, tensors = write_int4_folder(
        folder, source, planned, adapter, shapes, frozenset(), run.tensors(), quantization_config(size, options)
    )
    return Int4Report(
        folder,
        "gptq",
        options.bits,
        size,
        nbytes,
        tensors,
        len(shapes),
        model.tokens,
        seconds_since(started),
        tuple(run.notes),
    )


class _Run:
    """Quantizing layer after layer, as far as somebody asks for the tensors."""

    def __init__(
        self, model: LayerByLayer, group_size: int, options: GptqOptions, on_progress: OnProgress | None
    ) -> None:
        self.model, self.group_size, self.options, self.on_progress = model, group_size, options, on_progress
        self.total = len(model.spec.linears())
        self.notes: list[str] = []
        widest = max(linear.in_features for linear in model.spec.linears())
        if model.tokens < widest:
            self.notes.append(
                f"{model.tokens} calibration tokens are fewer than the {widest} inputs of the widest linear: more "
                "rows would help"
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every quantized linear, in the model's order."""
        done = 0
        for index in range(self.model.spec.num_layers):
            layer = self.model.layer(index)
            for group in (layer.qkv, layer.o, layer.gate_up, layer.down):
                gram = Gram(group.parts[0].in_features)
                self.model.feed(layer, group, gram.add)
                factor = factorize(gram.matrix, self.options.damp_percent, self.options.order != "inputs")
                if factor.damping > self.options.damp_percent:
                    self.notes.append(f"{group.parts[0].name}: its Hessian needed a damping of {factor.damping:g}")
                for segment in group.parts:
                    weight = segment.weight.dequantize(torch.float32)
                    codes = quantize_gptq(weight, factor, self.group_size, self.options)
                    segment.weight = DenseWeight(codes.dequantize(segment.weight.source_dtype))
                    done += 1
                    if self.on_progress is not None:
                        self.on_progress(done, self.total)
                    yield from gptq_format.pack(codes, segment.name, self.options.checkpoint_format).items()
            self.model.advance(layer)


def quantization_config(group_size: int, options: GptqOptions) -> dict[str, Any]:
    """What config.json says of the quantization; keys as GPTQModel writes them."""
    return {
        "quant_method": "gptq",
        "bits": options.bits,
        "group_size": group_size,
        "desc_act": options.order == "desc_act",
        "sym": options.sym,
        "lm_head": False,
        "damp_percent": options.damp_percent,
        "true_sequential": True,
        "static_groups": options.order == "activation",
        "checkpoint_format": options.checkpoint_format,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"halfbyte:{version('halfbyte')}"]},
    }
