"""AWQ: a merged model in 4 bits, its most active inputs scaled up before rounding so that they lose least.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978.
Scaling the inputs of a linear by 1/s and its weight's columns by s changes nothing, but columns with s > 1 lose less
to rounding. s = mean|x|^alpha, with the alpha of 20 that gives the smallest output error on the calibration tokens
(section 3.2), and 1/s goes into whatever makes those inputs:

    query, key, value   the norm before the attention
    gate, up            the norm before the gated unit
    output projection   the rows of the value projection (shared by the query heads that share a key-value head)
    down                the rows of the up projection, on which the gated unit is linear

Then each group's range is shrunk as far as that reduces the error (the paper's clipping; not for queries and keys,
whose products the softmax magnifies), and the weights are rounded to the nearest code.

What is left out: error compensation (that is GPTQ), and AutoAWQ's `duo_scaling`.

Shape letters: T tokens, N sampled tokens, I input features, O output features, G groups.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

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
from halfbyte.linear import GroupedLinear, Segment
from halfbyte.models.decoder import Layer, Norm
from halfbyte.models.dtype import fast_dtype
from halfbyte.models.source import ModelSource
from halfbyte.models.spec import ModelSpec
from halfbyte.options import Options
from halfbyte.quant import awq_format
from halfbyte.quant.group_codes import round_to_nearest, rounded

_ALPHAS = 20
_SHRINKS = 10  # 1, 0.95, … 0.55
_SAMPLE = 1024
"""About how many tokens the searches measure errors on: a search costs up to 20 products of its linears with them."""
_LEAST_ACTIVITY = 1e-4
_UNCLIPPED = ("q_proj", "k_proj", "qkv_proj")


class AwqOptions(Options):
    """How a model is quantized by AWQ."""

    group_size: Literal[32, 64, 128] | None = Field(
        default=None, description="inputs that share a scale; by default the largest of 128, 64, 32 that divides all"
    )
    clip: bool = Field(default=True, description="shrink the groups' ranges where that reduces the error")


class Activity:
    """What a group of linears is given: mean |x| of each input over all tokens, and the evenly spread tokens' x."""

    def __init__(self, inputs: int, step: int) -> None:
        self._sum, self._tokens, self._step = torch.zeros(inputs), 0, step
        self._pieces: list[Tensor] = []

    def add(self, x_TI: Tensor) -> None:
        self._sum += x_TI.abs().sum(0, dtype=torch.float32)
        first = -self._tokens % self._step
        self._pieces.append(x_TI[first :: self._step].float())
        self._tokens += x_TI.shape[0]

    def divide(self, scales: Tensor) -> None:
        """As if the inputs had been divided by these scales [I]."""
        self._sum /= scales
        self._pieces = [self.sample / scales]

    @property
    def mean_abs(self) -> Tensor:
        """float32 [I]"""
        return self._sum / self._tokens

    @property
    def sample(self) -> Tensor:
        """float32 [N, I]"""
        return torch.cat(self._pieces)


@dataclass
class ScaledLayer:
    """One layer's linears in float32 and its two norms, while scales are moved between them.

    weights  name -> [O, I];  biases  name -> [O];  norms  name -> the weight as it is stored
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    norms: dict[str, Tensor]

    @classmethod
    def of(cls, layer: Layer) -> "ScaledLayer":
        parts = [segment for group in groups(layer) for segment in group.parts]
        return cls(
            {segment.name: segment.weight.dequantize(torch.float32).clone() for segment in parts},
            {segment.name: segment.bias.detach().clone() for segment in parts if segment.bias is not None},
            {norm.name: norm.weight.detach().clone() for norm in (layer.input_norm, layer.before_mlp)},
        )

    def scale_columns(self, group: GroupedLinear, scales: Tensor) -> None:
        for segment in group.parts:
            self.weights[segment.name] *= scales

    def divide_rows(self, rows: "Rows", scales: Tensor) -> None:
        """The outputs that make the inputs which were scaled, and their bias."""
        name, divisor = rows.segment.name, rows.one_of(scales)
        self.weights[name][rows.rows] /= divisor[:, None]
        if name in self.biases:
            bias = self.biases[name]
            bias[rows.rows] = (bias[rows.rows].float() / divisor).to(bias.dtype)


@dataclass(frozen=True)
class Rows:
    """The rows of a linear that make the next one's inputs; each head of values is read by `repeats` query heads."""

    segment: Segment
    rows: slice
    repeats: int = 1
    head_dim: int = 1

    def shared(self, scales: Tensor) -> Tensor:
        """Scales of the inputs, made equal (their geometric mean) for inputs that come from the same row."""
        if self.repeats == 1:
            return scales
        mean = scales.view(-1, self.repeats, self.head_dim).log().mean(1, keepdim=True).exp()
        return mean.expand(-1, self.repeats, -1).flatten()

    def one_of(self, scales: Tensor) -> Tensor:
        """The scale of each row, out of `shared` ones."""
        return scales.view(-1, self.repeats, self.head_dim)[:, 0].flatten()


def groups(layer: Layer) -> tuple[GroupedLinear, ...]:
    return layer.qkv, layer.o, layer.gate_up, layer.down


def divided_norm(norm: Norm, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(the norm's weight divided by `scales` as it will be stored, the scales that this really divides by).

    The weight is stored rounded, and Gemma's minus one, where rounding can be coarse: so what was stored decides the
    scale that the columns are multiplied with, and the product is the old one. An input that the norm silences, or
    whose stored weight would, is left alone.
    """
    one = 1.0 if norm.plus_one else 0.0
    before = norm.weight.detach().float() + one
    stored = (before / scales - one).to(norm.weight.dtype)
    after = stored.float() + one
    ratio = before / after
    usable = torch.isfinite(ratio) & (ratio > 0)
    stored = torch.where(usable, stored, norm.weight.detach())
    return stored, torch.where(usable, ratio, torch.ones_like(ratio))


def search_scales(
    activity: Activity,
    weights: Sequence[Tensor],
    group_size: int,
    possible: Callable[[Tensor], Tensor] = lambda scales: scales,
) -> Tensor:
    """The scales [I] of the linears `weights` ([O, I] each) that share an input.

    possible  turns wished-for scales into ones that what makes the input can be divided by
    """
    weight = torch.cat(list(weights))
    x_NI, activity_I = activity.sample, activity.mean_abs.clamp_min(_LEAST_ACTIVITY)
    gram_II = x_NI.t() @ x_NI if x_NI.shape[0] > x_NI.shape[1] else None  # the cheaper way to the same number
    best, least = torch.ones_like(activity_I), float("inf")
    for k in range(_ALPHAS):
        wished = activity_I.pow(k / _ALPHAS)
        scales = possible(wished / (wished.max() * wished.min()).sqrt())
        error_OI = rounded(weight * scales, group_size).div_(scales).sub_(weight)
        if gram_II is None:
            error = float((x_NI @ error_OI.t()).square_().sum())
        else:
            error = float((error_OI @ gram_II).mul_(error_OI).sum())
        if error < least:
            best, least = scales, error
    return best


def search_shrink(weight: Tensor, x_NI: Tensor, group_size: int) -> Tensor:
    """The share of each group's range [O, G] that gives the smallest error of the group's part of the outputs."""
    outputs, inputs = weight.shape
    by_group = x_NI.view(x_NI.shape[0], inputs // group_size, group_size).transpose(0, 1)
    gram = by_group.transpose(1, 2) @ by_group  # [G, size, size]
    best = weight.new_ones(outputs, inputs // group_size)
    least = torch.full_like(best, float("inf"))
    for k in range(_SHRINKS):
        shrink = torch.full_like(best, 1 - 0.05 * k)
        error_GOI = (rounded(weight, group_size, shrink) - weight).view(outputs, -1, group_size).transpose(0, 1)
        error = ((error_GOI @ gram) * error_GOI).sum(-1).t()
        better = error < least
        best, least = torch.where(better, shrink, best), torch.where(better, error, least)
    return best


def scale_layer(layer: Layer, seen: Mapping[GroupedLinear, Activity], spec: ModelSpec, group_size: int) -> ScaledLayer:
    """The layer with the scales found and moved: as a function of the layer's input it is what it was.

    What is in `seen` is divided too, so that it is what the scaled linears are given.
    """
    scaled = ScaledLayer.of(layer)

    def found(group: GroupedLinear, possible: Callable[[Tensor], Tensor]) -> Tensor:
        weights = [scaled.weights[segment.name] for segment in group.parts]
        return search_scales(seen[group], weights, group_size, possible)

    for norm, group in ((layer.input_norm, layer.qkv), (layer.before_mlp, layer.gate_up)):
        wished = found(group, lambda scales, norm=norm: divided_norm(norm, scales)[1])  # type: ignore[misc]
        scaled.norms[norm.name], scales = divided_norm(norm, wished)
        scaled.scale_columns(group, scales)
        seen[group].divide(scales)
    for group, rows in ((layer.o, _value_rows(layer, spec)), (layer.down, _up_rows(layer, spec))):
        scales = rows.shared(found(group, rows.shared))
        scaled.scale_columns(group, scales)
        scaled.divide_rows(rows, scales)
        seen[group].divide(scales)
    return scaled


def _value_rows(layer: Layer, spec: ModelSpec) -> Rows:
    count = spec.num_kv_heads * spec.head_dim
    first = (spec.num_heads + spec.num_kv_heads) * spec.head_dim if spec.fused else 0
    return Rows(layer.qkv.parts[-1], slice(first, first + count), spec.num_heads // spec.num_kv_heads, spec.head_dim)


def _up_rows(layer: Layer, spec: ModelSpec) -> Rows:
    first = spec.intermediate_size if spec.fused else 0
    return Rows(layer.gate_up.parts[-1], slice(first, first + spec.intermediate_size))


def write_awq_folder(
    folder: Path,
    source: ModelSource,
    planned: Sequence[Planned],
    calibration: Sequence[Tensor],
    options: AwqOptions | None = None,
    adapter: Path | None = None,
    on_progress: OnProgress | None = None,
    dtype: torch.dtype | None = None,
) -> Int4Report:
    """Quantize the merged model and write a Hugging Face folder that GPTQModel, vLLM and transformers load.

    Arguments and errors are those of `export.gptq.write_gptq_folder`. The scales are found on what the unquantized
    model gives its linears, as in the paper.
    """
    options = options or AwqOptions()
    started = time.monotonic()
    spec = decoder_spec(source, "AWQ")
    size = choose_group_size(spec, options.group_size, 8)
    model = LayerByLayer(planned, spec, calibration, fast_dtype()[0] if dtype is None else dtype)
    shapes = {
        linear.name: awq_format.shapes(linear.out_features, linear.in_features, size) for linear in spec.linears()
    }
    made = _tensors(model, size, options, on_progress)
    nbytes, tensors = write_int4_folder(
        folder, source, planned, adapter, shapes, _changed(spec), made, quantization_config(size)
    )
    seconds = seconds_since(started)
    return Int4Report(folder, "awq", 4, size, nbytes, tensors, len(shapes), model.tokens, seconds)


def _tensors(
    model: LayerByLayer, group_size: int, options: AwqOptions, on_progress: OnProgress | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every quantized linear, changed norm and changed bias, layer after layer."""
    done, total = 0, len(model.spec.linears())
    step = max(1, model.tokens // _SAMPLE)
    for index in range(model.spec.num_layers):
        layer = model.layer(index)
        seen = {group: Activity(group.parts[0].in_features, step) for group in groups(layer)}
        model.advance(layer, {group: activity.add for group, activity in seen.items()})
        scaled = scale_layer(layer, seen, model.spec, group_size)
        yield from ((f"{name}.weight", weight) for name, weight in scaled.norms.items())
        changed = _changed(model.spec)
        yield from ((f"{name}.bias", bias) for name, bias in scaled.biases.items() if f"{name}.bias" in changed)
        for group in groups(layer):
            for segment in group.parts:
                weight = scaled.weights[segment.name]
                clipped = options.clip and not segment.name.endswith(_UNCLIPPED)
                shrink = search_shrink(weight, seen[group].sample, group_size) if clipped else None
                codes = round_to_nearest(weight, group_size, shrink=shrink)
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
                yield from awq_format.pack(codes, segment.name).items()


def _changed(spec: ModelSpec) -> frozenset[str]:
    """The tensors that are written changed, beside the linears' weights: two norms a layer, biases of divided rows."""
    before_mlp = "pre_feedforward_layernorm" if spec.sandwich_norms else "post_attention_layernorm"
    names = [
        f"model.layers.{layer}.{norm}.weight"
        for layer in range(spec.num_layers)
        for norm in ("input_layernorm", before_mlp)
    ]
    divided = ("v_proj", "up_proj", "qkv_proj", "gate_up_proj")
    names += [f"{linear.name}.bias" for linear in spec.linears() if linear.bias and linear.name.endswith(divided)]
    return frozenset(names)


def quantization_config(group_size: int) -> dict[str, Any]:
    """What config.json says of the quantization; keys as AutoAWQ wrote them."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
        "meta": {"quantizer": [f"halfbyte:{version('halfbyte')}"]},
    }
