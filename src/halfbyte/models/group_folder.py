"""The linears of a GPTQ or AWQ folder: which tensors are theirs, checked by their headers, and how they are read.

config.json's `quantization_config` says how codes are laid; which linears are quantized is what the files say, by a
`NAME.qweight` in the place of `NAME.weight`. So rules that name modules (`modules_in_block_to_quantize`,
`modules_to_not_convert`, GPTQModel's `dynamic` rules that skip some) need no reading, and those that give some modules
other bits are refused.

Read: GPTQ in 4 and 8 bits, versions 1 and 2 of the zero points, any group size, act-order, symmetric or not; AWQ's
"gemm" layout. Sources: GPTQModel 7.7 (`QuantizeConfig`), transformers 5 (`GPTQConfig`, `AwqConfig`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, ValidationError
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.models.model_source import TensorInfo
from halfbyte.quant import GroupWeight, awq_format, gptq_format
from halfbyte.quant.group_codes import GroupCodes
from halfbyte.quant.group_weight import held_bytes

METHODS = ("gptq", "awq")
_READABLE = "GPTQ in 4 or 8 bits (checkpoint_format gptq or gptq_v2) and AWQ (gemm) can be read"
_MARK = ".qweight"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_OVERRIDES = ("bits", "format", "checkpoint_format", "method", "quant_method", "pack_dtype")
"""What GPTQModel's `dynamic` rules may give some modules, and we read for all alike."""


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class GroupQuantization(BaseModel):
    """`quantization_config`, as far as reading the weights needs it; the rest is about making or serving them."""

    quant_method: Literal["gptq", "awq"]
    bits: int = Field(4, validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(0, validation_alias=AliasChoices("group_size", "q_group_size"), ge=-1)
    desc_act: bool | None = False
    zero_point: bool | None = True
    layout: Annotated[str | None, BeforeValidator(_lower)] = Field(
        None, validation_alias=AliasChoices("checkpoint_format", "version", "format")
    )
    pack_dtype: Annotated[str | None, BeforeValidator(_lower)] = "int32"
    is_marlin_format: bool | None = False
    dynamic: dict[str, Any] | None = None

    def refusal(self) -> str | None:
        """Why a folder that says this cannot be read; None where it can."""
        layouts, bits = (gptq_format.FORMATS, gptq_format.BITS) if self.quant_method == "gptq" else (("gemm",), (4,))
        method = self.quant_method.upper()
        if self.bits in (2, 3) and self.quant_method == "gptq":
            return f"GPTQ in {self.bits} bits, which no kernel here multiplies with"
        if self.bits not in bits:
            return f"{method} in {self.bits} bits"
        if self.layout not in (None, *layouts) or self.is_marlin_format:
            return f"{method} packed as {'marlin' if self.is_marlin_format else self.layout}"
        if self.pack_dtype not in (None, "int32"):
            return f"{method} packed in {self.pack_dtype}"
        if self.quant_method == "awq" and self.zero_point is False:
            return "AWQ without zero points"
        for pattern, rule in (self.dynamic or {}).items():
            own = {"bits": self.bits, "pack_dtype": "int32"}
            for key in _OVERRIDES if isinstance(rule, dict) and not pattern.startswith("-:") else ():
                if key in rule and rule[key] != own.get(key):
                    return f"{method} with {key} {rule[key]!r} for the modules {pattern!r} only"
        return None


def read_group_quantization(folder: Path, quantization: Mapping[str, Any]) -> GroupQuantization:
    """The checked `quantization_config` of GPTQ or AWQ; a UsageError says what in it cannot be read."""
    path = folder / "config.json"
    try:
        stated = GroupQuantization.model_validate(quantization)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["quantization_config", *map(str, first["loc"])])
        raise UsageError(f"{path}: {where}: {first['msg']}; {_READABLE}: use another copy of the model") from None
    why = stated.refusal()
    if why is not None:
        raise UsageError(f"{path}: the model is quantized with {why}; {_READABLE}: use another copy of the model")
    return stated


class GroupFolder:
    """The quantized linears of one folder.

    path    for messages
    config  config.json
    infos   every tensor of the files as they are, by name
    """

    def __init__(self, path: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.stated = read_group_quantization(path, config["quantization_config"])
        self.dtype = _stated_dtype(config)
        suffixes = gptq_format.SUFFIXES if self.stated.quant_method == "gptq" else awq_format.SUFFIXES
        self.parts: dict[str, list[str]] = {}
        """NAME.weight -> the names of the tensors that hold it."""
        self._groups: dict[str, int] = {}
        self.infos: dict[str, TensorInfo] = {}
        """NAME.weight -> its shape, and the type that it is dequantized to."""
        for key in infos:
            if key.endswith(_MARK):
                linear = key.removesuffix(_MARK)
                name = f"{linear}.weight"
                if name in infos:
                    raise UsageError(f"{path} has both {name} and {key}: one of them is of another model")
                self.parts[name] = [f"{linear}.{s}" for s in suffixes if f"{linear}.{s}" in infos]
                shape, self._groups[name] = self._checked(linear, infos)
                self.infos[name] = TensorInfo(shape, self.dtype)
        if not self.parts:
            raise UsageError(
                f"{path}: config.json says that the model is quantized with {self.stated.quant_method.upper()}, and no "
                "tensor NAME.qweight is there: config and weights are not of the same model"
            )

    def codes(self, name: str, read: Callable[[str], Tensor]) -> GroupCodes:
        """What the file holds for NAME.weight; `read` gives a tensor of the files by name. UsageError where damaged."""
        tensors = {key: read(key) for key in self.parts[name]}
        linear, stated = name.removesuffix(".weight"), self.stated
        try:
            if stated.quant_method == "awq":
                return awq_format.unpack(tensors, linear)
            return gptq_format.unpack(tensors, linear, stated.bits, stated.layout or "gptq", stated.group_size)
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}") from None

    def weight(self, name: str, read: Callable[[str], Tensor]) -> GroupWeight:
        """NAME.weight as a base; as `codes`."""
        return GroupWeight.from_codes(self.codes(name, read), self.stated.quant_method, self.dtype)

    def nbytes(self, name: str) -> int:
        """What the weight takes in memory, by the headers."""
        rows, columns = self.infos[name].shape
        groups = self._groups[name]
        return held_bytes((rows, columns), groups, self.stated.bits, bool(self.stated.desc_act) and groups > 1)

    def _checked(self, linear: str, infos: Mapping[str, TensorInfo]) -> tuple[tuple[int, int], int]:
        """((outputs, inputs), groups) of a linear by the headers of its tensors."""
        scales = self._info(infos, f"{linear}.scales", 2)
        groups, outputs = scales.shape
        codes, word = self._info(infos, f"{linear}.qweight", 2, torch.int32), 32 // self.stated.bits
        if self.stated.quant_method == "awq":
            inputs, wanted = codes.shape[0], (codes.shape[0], outputs // word)
        else:
            inputs, wanted = codes.shape[0] * word, (codes.shape[0], outputs)
        if not inputs or not outputs or not groups or outputs % word:
            raise UsageError(f"{self.path}: {linear} has {inputs} inputs, {groups} groups, {outputs} outputs: damaged")
        self._require(f"{linear}.qweight", codes, wanted)
        self._require(
            f"{linear}.qzeros", self._info(infos, f"{linear}.qzeros", 2, torch.int32), (groups, outputs // word)
        )
        if self.stated.quant_method == "gptq" and (
            f"{linear}.g_idx" in infos or (self.stated.desc_act and groups > 1)  # else groups are runs of inputs
        ):
            self._require(f"{linear}.g_idx", self._info(infos, f"{linear}.g_idx", 1, torch.int32), (inputs,))
        return (outputs, inputs), groups

    def _info(
        self, infos: Mapping[str, TensorInfo], key: str, dims: int, dtype: torch.dtype | None = None
    ) -> TensorInfo:
        """The header at `key`, of `dtype` (None: floating point); a UsageError says what is wrong with it."""
        if key not in infos:
            raise UsageError(f"{self.path}: {key} is missing: the checkpoint is not whole; download it again")
        info = infos[key]
        right = info.dtype.is_floating_point and info.dtype.itemsize > 1 if dtype is None else info.dtype == dtype
        if not right or len(info.shape) != dims:
            held = f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"
            wanted = "floating point" if dtype is None else str(dtype).removeprefix("torch.")
            raise UsageError(f"{self.path}: {key} holds {held}, {wanted} in {dims} dimensions is needed")
        return info

    def _require(self, key: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
        if info.shape != shape:
            raise UsageError(
                f"{self.path}: {key} is {list(info.shape)}, and the tensors beside it and {self.stated.bits} bits need "
                f"{list(shape)}: the file is damaged, or config.json is of another model"
            )


def _stated_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The type that the model's other weights have, by its config: what dequantized weights are merged in."""
    stated = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(stated, torch.float16) if isinstance(stated, str) else torch.float16
