"""bitsandbytes' 4-bit state dict, as transformers writes and reads it.

For a weight named NAME (`model.layers.0.mlp.down_proj.weight`) of n values in blocks:

    NAME                                      uint8 [ceil(n / 2), 1]; or the same bytes seen as another dtype
    NAME.absmax                               float32 [blocks], or uint8 [blocks] with double quantization
    NAME.quant_map                            float32 [16]
    NAME.nested_absmax                        float32 [ceil(blocks / 256)]     } with double
    NAME.nested_quant_map                     float32 [256]                    } quantization
    NAME.quant_state.bitsandbytes__nf4        uint8, the bytes of a JSON object: quant_type, blocksize, dtype, shape
                                              and, nested, nested_blocksize, nested_dtype, nested_offset

Source: bitsandbytes 0.50, `QuantState.as_dict`. The offset is read as float32 whatever the file's `nested_dtype`
says (rounded to bf16 it ruins training, bitsandbytes PR 1971), and the file's own maps are honoured.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, ValidationError
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.ops import BLOCKSIZES, levels

_MARK = ".quant_state.bitsandbytes__"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _known_blocksize(value: int) -> int:
    if value not in BLOCKSIZES:
        raise ValueError(f"one of {', '.join(map(str, BLOCKSIZES))} is needed")
    return value


Blocksize = Annotated[int, AfterValidator(_known_blocksize)]
Side = Annotated[int, Field(ge=0)]


class _Plain(BaseModel):
    """The JSON object of `quant_state`; keys that we do not know are nobody's business here."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Blocksize
    dtype: Literal["bfloat16", "float16", "float32"]
    shape: tuple[Side, Side]
    nested_blocksize: Blocksize | None = None
    nested_offset: FiniteFloat | None = None


@dataclass(frozen=True)
class BnbState:
    """One weight of such a file, checked: the arguments of `BlockWeight`."""

    codes: Tensor
    absmax: Tensor
    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_blocksize: int
    table: Tensor | None
    nested_table: Tensor | None


def bnb_keys(keys: Iterable[str]) -> dict[str, list[str]]:
    """The 4-bit weights among a file's keys: NAME → the keys that belong to it, NAME first."""
    present = sorted(keys)
    names = {key.split(_MARK)[0] for key in present if _MARK in key}
    found: dict[str, list[str]] = {name: [] for name in sorted(names)}
    parts = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    there = set(present)
    for name, own in found.items():
        own += [name + part for part in parts if name + part in there]
        own += [key for key in present if key.startswith(name + _MARK)]
    return found


def pack(state: BnbState, prefix: str) -> dict[str, Tensor]:
    """The tensors that stand for a weight named `prefix`. UsageError for INT4 and INT8, which bitsandbytes lacks."""
    if state.quant_type not in ("nf4", "fp4"):
        raise UsageError(f"{prefix}: bitsandbytes' 4-bit files know nf4 and fp4, not {state.quant_type}")
    plain: dict[str, object] = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    tensors = {
        prefix: state.codes.view(-1, 1),
        f"{prefix}.absmax": state.absmax,
        f"{prefix}.quant_map": (levels.levels(state.quant_type) if state.table is None else state.table).clone(),
    }
    if state.nested_absmax is not None:
        assert state.nested_offset is not None
        steps = levels.dynamic_map() if state.nested_table is None else state.nested_table
        tensors[f"{prefix}.nested_absmax"] = state.nested_absmax
        tensors[f"{prefix}.nested_quant_map"] = steps.clone()
        plain |= {
            "nested_blocksize": state.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": state.nested_offset.item(),
        }
    raw = bytearray(json.dumps(plain).encode())
    tensors[f"{prefix}{_MARK}{state.quant_type}"] = torch.frombuffer(raw, dtype=torch.uint8).clone()
    return tensors


def unpack(tensors: Mapping[str, Tensor], prefix: str) -> BnbState:
    """The weight named `prefix` out of a file's tensors; a UsageError names the key that is missing or wrong."""
    plain = _read_plain(tensors, prefix)
    n = plain.shape[0] * plain.shape[1]
    blocks = -(-n // plain.blocksize)
    stored = _tensor(tensors, prefix)
    codes = stored.contiguous().view(-1).view(torch.uint8)
    if codes.numel() != (n + 1) // 2:
        raise UsageError(f"{prefix}: {codes.numel()} bytes, but a shape of {list(plain.shape)} needs {(n + 1) // 2}")
    nested = f"{prefix}.nested_absmax" in tensors
    absmax = _flat(tensors, f"{prefix}.absmax", torch.uint8 if nested else torch.float32, blocks)
    nested_absmax = nested_offset = nested_table = None
    nested_blocksize = plain.nested_blocksize or 256
    if nested:
        if plain.nested_offset is None or plain.nested_blocksize is None:
            raise UsageError(f"{prefix}{_MARK}{plain.quant_type}: nested_offset or nested_blocksize is missing")
        nested_absmax = _flat(tensors, f"{prefix}.nested_absmax", torch.float32, -(-blocks // nested_blocksize))
        nested_offset = torch.tensor(plain.nested_offset, dtype=torch.float32, device=codes.device)
        nested_table = _map(tensors, f"{prefix}.nested_quant_map", levels.dynamic_map())
    return BnbState(
        codes=codes,
        absmax=absmax,
        quant_type=plain.quant_type,
        blocksize=plain.blocksize,
        shape=plain.shape,
        dtype=_DTYPES[plain.dtype],
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
        nested_blocksize=nested_blocksize,
        table=_map(tensors, f"{prefix}.quant_map", levels.levels(plain.quant_type)),
        nested_table=nested_table,
    )


def _read_plain(tensors: Mapping[str, Tensor], prefix: str) -> _Plain:
    keys = [f"{prefix}{_MARK}{name}" for name in ("nf4", "fp4") if f"{prefix}{_MARK}{name}" in tensors]
    if len(keys) != 1:
        found = "both are there" if keys else "neither is there"
        raise UsageError(f"{prefix}{_MARK}nf4 or …fp4 is needed, {found}: not a whole bitsandbytes 4-bit checkpoint")
    raw = tensors[keys[0]]
    if raw.dtype != torch.uint8:
        raise UsageError(f"{keys[0]}: {raw.dtype}, the uint8 bytes of a JSON object are needed")
    try:
        plain = _Plain.model_validate_json(bytes(raw.flatten().tolist()))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{keys[0]}: {place + ': ' if place else ''}{first['msg']}") from None
    if keys[0].removeprefix(f"{prefix}{_MARK}") != plain.quant_type:
        raise UsageError(f"{keys[0]}: its quant_type says {plain.quant_type}")
    return plain


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise UsageError(f"{key} is missing: not a whole bitsandbytes 4-bit checkpoint")
    return tensors[key]


def _flat(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype, count: int) -> Tensor:
    """The tensor at `key`, which must be flat, of `dtype` and of `count` finite values."""
    tensor = _tensor(tensors, key)
    if tensor.dtype != dtype or tensor.shape != (count,):
        raise UsageError(
            f"{key}: {tensor.dtype} {list(tensor.shape)}, {dtype} {[count]} is needed: the file was not written whole, "
            "or by a model that had been evaluated before (a known fault of bitsandbytes); quantize anew"
        )
    if dtype.is_floating_point and not torch.isfinite(tensor).all():
        raise UsageError(f"{key} holds NaN or infinite values: the file is damaged")
    return tensor.contiguous()


def _map(tensors: Mapping[str, Tensor], key: str, usual: Tensor) -> Tensor | None:
    """The levels at `key`, or None where they are the usual ones bit for bit."""
    table = _flat(tensors, key, torch.float32, usual.numel())
    return None if torch.equal(table.cpu(), usual) else table
