"""Building a fallback model: an empty transformers model, its linears found, and the weights streamed in.

Peak memory is the finished model plus one tensor in its source type: transformers' modules are made without the
memory of their parameters, and each linear becomes ours before the next tensor is read.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import UsageError
from halfbyte.linear import GroupedLinear, Segment
from halfbyte.models.checkpoint_names import CheckpointNames
from halfbyte.models.model_source import ModelSource
from halfbyte.quant import DTYPES, DenseWeight, QuantOptions, Weight, quantize

MIN_SHARE = 0.9
"""Below this share of a model's body in linears of ours, quantizing it would be a promise not kept."""
HEAD = "score"
"""What transformers calls the trained head of a decoder for classification."""
_KINDS = {
    AutoModelForCausalLM: "a decoder-only language model",
    AutoModelForSeq2SeqLM: "an encoder-decoder",
    AutoModelForSequenceClassification: "a model that can classify texts",
}
_log = logging.getLogger(__name__)
_DROPOUT = re.compile(r"drop(out)?$|_pdrop$|dropout_|layerdrop|jitter")
# Buffers that old files carry and modules now compute.
_OLD_BUFFERS = r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|attention\.(masked_)?bias$|position_ids$"


class ReplacedLinear(nn.Module):
    """Stands where an `nn.Linear` or `Conv1D` stood: any leading shape in, the same out."""

    weight = None  # T5 asks for its dtype and takes the answer that there is no tensor

    def __init__(self, name: str, weight: Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.group = GroupedLinear([Segment(name, weight, bias)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.group(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Coverage:
    """Which part of a model our linears hold. Parameters; the body is all but embeddings and the output head."""

    replaced: int
    body: int
    total: int
    left_out: tuple[tuple[str, int], ...]  # what stays 16-bit in the body, largest first

    @property
    def share(self) -> float:
        return self.replaced / max(1, self.body)

    def __str__(self) -> str:
        text = f"{self.share:.1%} of the {self.body:,} parameters outside of the embeddings are in linear layers"
        if self.left_out and self.share < MIN_SHARE:
            kept = ", ".join(f"{name} ({count:,})" for name, count in self.left_out[:3])
            text += f"; among what is not: {kept}"
        return text


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside have a shape and no memory; buffers (RoPE frequencies, masks) are real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    # torch's annotation forgets that the hook may return a parameter, which its documentation promises.
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def empty_model(config: Mapping[str, Any], dtype: torch.dtype, auto: Any = AutoModelForCausalLM) -> Any:
    """transformers' model of a config.json without the memory of its parameters, dropout set to zero.

    auto   which kind of model: AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
    """
    kind = str(config.get("model_type", ""))
    arguments = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    arguments.pop("quantization_config", None)  # the source has decoded those weights, or hands them over as ours
    if kind not in CONFIG_MAPPING:
        raise UsageError(
            f"config.json: model_type {kind!r} is not an architecture that transformers knows, and code from a model "
            "repository is never run"
        )
    try:
        made = AutoConfig.for_model(kind, **arguments)
    except Exception as error:  # transformers raises whatever its validators raise
        reason = " ".join(str(error).split())
        raise UsageError(f"config.json: transformers refuses it for a {kind} model: {reason}") from error
    for key, value in made.to_dict().items():
        if isinstance(value, float) and _DROPOUT.search(key):
            setattr(made, key, 0.0)
    try:
        with _parameters_on_meta():
            return auto.from_config(made, dtype=dtype, trust_remote_code=False).eval()
    except Exception as error:  # whatever a model's own code trips over: heads that do not divide, sizes below zero
        if "Unrecognized configuration class" in str(error):
            raise UsageError(f"config.json: {kind!r} is not {_KINDS[auto]} in transformers") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"config.json: transformers cannot build a {kind} model of it: {reason}") from error


def recompute(model: Any, on: bool = True) -> None:
    """Switch the recomputation of activations in the backward pass, as transformers does it, on or off."""
    # transformers 5.23 renamed the methods and warns about the old names.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        model.disable_input_require_grads()  # which only reentrant checkpoints need
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear but the output head, by name: what `all-linear` means in PEFT."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    plain = (nn.Linear.forward, Conv1D.forward)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and (type(module).forward in plain or type(module).__name__ == "FalconLinear")
    }


def coverage_of(model: nn.Module, linears: Mapping[str, nn.Module]) -> Coverage:
    outside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():  # type: ignore[operator]
            outside.update(id(parameter) for parameter in module.parameters(recurse=False))
    body = {name: p for name, p in model.named_parameters() if id(p) not in outside}
    ours = {f"{name}.{leaf}" for name, linear in linears.items() for leaf, _ in linear.named_parameters()}
    left = sorted(((n, p.numel()) for n, p in body.items() if n not in ours), key=lambda item: -item[1])
    replaced = sum(p.numel() for name, p in body.items() if name in ours)
    total = sum(p.numel() for p in model.parameters())
    return Coverage(replaced, sum(p.numel() for p in body.values()), total, tuple(left))


class Loader:
    """Puts a stream of checkpoint tensors where they belong, one at a time."""

    def __init__(
        self,
        model: Any,
        linears: Mapping[str, nn.Module],
        quant: QuantOptions | None,
        dtype: torch.dtype,
        device: torch.device,
        unwanted: tuple[str, ...] = (),
    ) -> None:
        """unwanted   patterns of tensors in the files that this model has no use for, and nobody need hear of"""
        self.model, self.linears, self.quant = model, linears, quant
        self.dtype, self.device, self.unwanted = dtype, device, unwanted
        self.shapes = {name: value.shape for name, value in model.state_dict().items()}
        self.float32_names = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        self.weights: dict[str, Weight] = {}
        self.biases: dict[str, Tensor] = {}
        self.missing = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.unused: list[str] = []
        self.as_in_file = False  # a quantized file's blocks are kept, and what it left unquantized

    def load(self, source: ModelSource) -> None:
        self.as_in_file = self.quant is not None and not self.quant.requantize and source.blocks is not None
        names = CheckpointNames(self.model)
        for source_name in source.tensors():
            target, _ = names.target(source_name)
            if target not in self.shapes:
                self.unused.append(source_name)
                continue
            for name, value in names.resolve(source_name, self._read(source, source_name, target)):
                self._place(source_name, name, value)
                del value
        for name, tensor in names.finish():
            self._place(name, name, tensor)
        self._exchange()
        self._compute()
        self.model.tie_weights(missing_keys=self.missing, recompute_mapping=False)
        self._complain()

    def _read(self, source: ModelSource, source_name: str, target: str) -> Tensor | Weight:
        """A tensor, or the weight as the file quantized it, where the model's is to be quantized too."""
        module_name = target.removesuffix(".weight")
        linear = self.linears.get(module_name)
        ready = None if linear is None else source.prequantized(source_name)
        if ready is None:
            return source.read(source_name)
        if self.as_in_file and self.quant is not None and self.quant.format_of(module_name) not in DTYPES:
            return ready
        return self._weight(source_name, module_name, ready.dequantize(ready.source_dtype))

    def _weight(self, source_name: str, module_name: str, value: Tensor) -> Weight:
        value = value.to(self.device)
        if self.quant is None:
            return DenseWeight(value.to(self.dtype))
        chosen = self.quant.format_of(module_name)
        if chosen in DTYPES:
            return DenseWeight(value.to(DTYPES[chosen]))
        if self.as_in_file:
            return DenseWeight(value.to(self.dtype))
        same = chosen == self.quant.quant_type
        try:
            return quantize(value, self.quant if same else self.quant.model_copy(update={"quant_type": chosen}))
        except UsageError as error:
            raise UsageError(f"{source_name}: {error}") from None

    def _place(self, source_name: str, name: str, value: Tensor | Weight) -> None:
        module_name, _, leaf = name.rpartition(".")
        linear = self.linears.get(module_name)
        expected, actual = tuple(self.shapes[name]), tuple(value.shape)
        if isinstance(value, Weight) and isinstance(linear, Conv1D):
            expected = expected[::-1]  # bitsandbytes turns a Conv1D around before it quantizes it
        if actual != expected:
            raise UsageError(f"{source_name}: has the shape {list(actual)} where config.json asks for {list(expected)}")
        self.missing.discard(name)
        if linear is not None and leaf == "weight":
            if isinstance(value, Tensor):
                dense = value.t().contiguous() if isinstance(linear, Conv1D) else value
                value = self._weight(source_name, module_name, dense)
            self.weights[module_name] = value.to(self.device)
            return
        assert isinstance(value, Tensor)
        value = self._converted(name, value)
        if linear is not None and leaf == "bias":
            self.biases[module_name] = value
            return
        module = self.model.get_submodule(module_name)
        if leaf in module._buffers:
            module.register_buffer(leaf, value.to(module._buffers[leaf].dtype))
        else:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def _converted(self, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value.to(self.device)
        keep = any(part in name for part in self.float32_names)
        return value.to(self.device, torch.float32 if keep else self.dtype)

    def _exchange(self) -> None:
        """Put our linears in the place of transformers'."""
        for name in self.linears:
            if name not in self.weights:
                continue  # reported as missing
            parent_name, _, leaf = name.rpartition(".")
            ours = ReplacedLinear(name, self.weights.pop(name), self.biases.pop(name, None))
            setattr(self.model.get_submodule(parent_name), leaf, ours)

    def _compute(self) -> None:
        """Make what transformers computes and no file has: the sinusoidal positions of Marian and Pegasus."""
        for name in sorted(self.missing):
            module_name, _, leaf = name.rpartition(".")
            create = getattr(self.model.get_submodule(module_name), "create_weight", None)
            if create is not None and leaf == "weight":
                self._place(name, name, create())

    def _complain(self) -> None:
        if lost := sorted(self.missing):
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise UsageError(f"the model's files have no {', '.join(lost[:3])}{more}: they are incomplete")
        ignore = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        odd = [n for n in self.unused if not any(re.search(p, n) for p in (*ignore, *self.unwanted, _OLD_BUFFERS))]
        if odd:
            _log.warning("%d tensors of the model's files are not used, among them %s", len(odd), odd[0])
