"""A model in a Hugging Face folder: config.json and safetensors, one file or shards, plain or quantized.

Quantized: bitsandbytes 4-bit (`quant.bnb_format`), GPTQ and AWQ (`group_folder`).

The header is parsed here, with every length checked against the file's before anything is allocated,
and tensors are read with pread (see `halfbyte.models.pread`). Format: 8 bytes of header length, a JSON
object of name -> dtype, shape, data_offsets, then the data without gaps (safetensors' own README).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.models.group_folder import METHODS, GroupFolder
from halfbyte.models.model_source import ModelSource, Stored, TensorInfo
from halfbyte.models.names import normalised
from halfbyte.models.pread import OpenFile
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import BlockWeight, Weight, bnb_keys
from halfbyte.quant.group_codes import GroupCodes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # safetensors' own
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file; `offset` from the file's start."""

    file: OpenFile
    format: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class FolderSource(ModelSource):
    """See `ModelSource`; also serves a snapshot that came from the Hub (`kind="hub"`)."""

    def __init__(self, name: str, path: Path, kind: str = "folder", revision: str | None = None) -> None:
        super().__init__(name, kind, path, _read_config(path), revision)
        _refuse_foreign_quantization(path, self.config)
        raw = read_headers(path)
        served = ModelSpec.serves(self.config)  # for the rest, transformers has renaming rules of its own
        self._entries = {normalised(key, raw) if served else key: entry for key, entry in raw.items()}
        self._bnb = bnb_keys(self._entries)
        plain = {key: TensorInfo(entry.shape, _DTYPES[entry.format]) for key, entry in self._entries.items()}
        self._groups = _group_folder(path, self.config, plain)
        groups = {} if self._groups is None else self._groups.parts
        owned = {part for parts in (*self._bnb.values(), *groups.values()) for part in parts}
        self._infos = {key: self._bnb_info(key) for key in self._bnb}
        self._infos |= {} if self._groups is None else self._groups.infos
        self._infos |= {key: info for key, info in plain.items() if key not in owned}

    def tensors(self) -> dict[str, TensorInfo]:
        return dict(self._infos)

    def info(self, name: str) -> TensorInfo:
        return self._infos[name] if name in self._infos else super().info(name)

    def stored(self) -> Iterator[Stored]:
        for key, entry in self._entries.items():
            yield Stored(key, entry.format, entry.shape, entry.file.path, entry.offset, entry.nbytes)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        info = self.info(name)
        weight = self.prequantized(name)
        if weight is not None:
            return weight.dequantize(info.dtype, rows=slice(start, stop))
        entry = self._entries[name]
        rows = max(info.shape[0], 1) if info.shape else 1
        out = torch.empty((stop - start, *info.shape[1:]) if info.shape else (1,), dtype=info.dtype)
        entry.file.read_into(out, entry.offset + start * (entry.nbytes // rows))
        return out

    def prequantized(self, name: str) -> Weight | None:
        if name in self._bnb:
            return self._block_weight(name)
        if self._groups is not None and name in self._groups.parts:
            return self._groups.weight(name, self._raw)
        return None

    def group_codes(self, name: str) -> GroupCodes | None:
        """The integer codes of a linear's weight in a GPTQ or AWQ folder; None for another tensor."""
        if self._groups is None or name not in self._groups.parts:
            return None
        return self._groups.codes(name, self._raw)

    def prequantized_bytes(self) -> dict[str, int]:
        blocks = {name: sum(self._entries[part].nbytes for part in parts) for name, parts in self._bnb.items()}
        return blocks | ({} if self._groups is None else {n: self._groups.nbytes(n) for n in self._groups.parts})

    @property
    def blocks(self) -> str | None:
        if self._groups is not None:
            return self._groups.stated.quant_method
        return "bitsandbytes" if self._bnb else None

    def reads_rows(self, name: str) -> bool:
        return name not in self._bnb and (self._groups is None or name not in self._groups.parts)

    @property
    def generation(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return read_json_object(path) if path.is_file() else {}

    def _raw(self, key: str) -> Tensor:
        entry = self._entries[key]
        out = torch.empty(entry.shape, dtype=_DTYPES[entry.format])
        entry.file.read_into(out, entry.offset)
        return out

    def _block_weight(self, name: str) -> BlockWeight:
        try:
            return BlockWeight.from_bnb({key: self._raw(key) for key in self._bnb[name]}, name)
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}") from None

    def _bnb_info(self, name: str) -> TensorInfo:
        """Shape and dtype from the small JSON tensor beside the codes, so that opening reads no weights."""
        state = self._raw(self._bnb[name][-1])
        try:
            plain = json.loads(bytes(state.flatten().tolist()))
            rows, columns = (int(size) for size in plain["shape"])
            return TensorInfo((rows, columns), getattr(torch, plain["dtype"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self.path}: {self._bnb[name][-1]} is not bitsandbytes' description ({error})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object; UsageError naming the file and line otherwise."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}: not JSON ({error.msg}); download or copy it again") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, nesting without end
        raise UsageError(f"{path} is not JSON: {error}; download or copy it again") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} should hold a JSON object and holds a {type(value).__name__}")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
            raise UsageError(
                f"{folder} is an adapter, not a model: give its base model{f' ({base})' if base else ''} as model and "
                "this folder as adapter_path"
            )
        if ggufs := sorted(folder.glob("*.gguf")):
            raise UsageError(f"{folder} holds GGUF files: name one, for example {ggufs[0]}")
        raise UsageError(f"{folder} is not a model folder: it has no config.json")
    config = read_json_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise UsageError(f"{folder / 'config.json'} has no model_type: it is not a transformers model's config")
    return config


def _refuse_foreign_quantization(folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if isinstance(quantization, dict) and method in (None, "bitsandbytes", "bitsandbytes_4bit"):
        four_bit = quantization.get("load_in_4bit") or "bnb_4bit_quant_type" in quantization
        if four_bit and not quantization.get("load_in_8bit"):
            return
    if isinstance(quantization, dict) and method in METHODS:
        return  # `GroupFolder` says what of them cannot be read
    what = "bitsandbytes 8-bit" if method == "bitsandbytes" else repr(method)
    raise UsageError(
        f"{folder / 'config.json'}: the model is quantized with {what}; bitsandbytes 4-bit, GPTQ, AWQ, GGUF and "
        "unquantized models can be read: use the original model"
    )


def _group_folder(folder: Path, config: dict[str, Any], infos: dict[str, TensorInfo]) -> GroupFolder | None:
    """GPTQ's or AWQ's linears; None for a model that has none."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") in METHODS:
        return GroupFolder(folder, config, infos)
    if packed := next((key for key in infos if key.endswith(".qweight")), None):
        raise UsageError(
            f"{folder / 'config.json'} has no quantization_config of GPTQ or AWQ, and {packed} is packed by one: copy "
            "what the model's quantize_config.json or quant_config.json says into it"
        )
    return None


def read_headers(folder: Path) -> dict[str, _Entry]:
    """The tensors of a folder's safetensors files by the files' own names, checked against the files' sizes."""
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE)
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1 and not shards[0].name.startswith("adapter"):
        return _read_header(shards[0])
    if shards:
        raise UsageError(f"{folder} has safetensors files but no {INDEX} that says what is in which; download it again")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise UsageError(
            f"{folder} has its weights only as pickles ({pickles[0]}), which can run code and are never loaded: "
            "use a copy of the model in safetensors"
        )
    raise UsageError(f"{folder} has a config.json but no weights ({SINGLE}): download it again")


def _read_shards(folder: Path) -> dict[str, _Entry]:
    index = folder / INDEX
    listed = read_json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
        raise UsageError(f"{index} has no weight_map of tensor names to files; download it again")
    entries: dict[str, _Entry] = {}
    beside = {path.name for path in folder.iterdir() if path.is_file()}
    for shard in sorted(set(listed.values())):
        if "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise UsageError(f"{index} names {shard!r}, which is not a file beside it")
        if shard not in beside:  # looked up here: a name of thousands of characters is an error to the system
            raise UsageError(f"{folder / shard} is missing, which {INDEX} lists: download the model again")
        found = _read_header(folder / shard)
        for name in (n for n, s in listed.items() if s == shard):
            if name not in found:
                raise UsageError(f"{folder / shard} has no tensor {name}, which {INDEX} lists: download it again")
        entries |= {name: entry for name, entry in found.items() if listed.get(name) == shard}
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    file = OpenFile(path)
    length = int.from_bytes(file.read(0, 8), "little")
    if file.size < 8 or not 2 <= length <= min(_HEADER_LIMIT, file.size - 8):
        raise UsageError(
            f"{path} is not a whole safetensors file: its header would be {length} bytes, the file has {file.size}; "
            "download or copy it again"
        )
    try:
        header = json.loads(file.read(8, length))
        header.pop("__metadata__", None)
        entries = {name: _entry(file, 8 + length, name, plain) for name, plain in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: its header is damaged ({error}); download or copy it again") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise UsageError(f"{path}: tensor {name} overlaps another or leaves a gap; the file is damaged")
        end += entry.nbytes
    if end != file.size:
        raise UsageError(
            f"{path} should be {end} bytes by its header and has {file.size}: it is half-written; "
            "download or copy it again"
        )
    return entries


def _entry(file: OpenFile, data: int, name: str, plain: Any) -> _Entry:
    """One header entry, checked; ValueError (caught above) says what is wrong with it."""
    if not isinstance(plain, dict) or plain.get("dtype") not in _DTYPES:
        raise ValueError(f"{name} has dtype {plain.get('dtype') if isinstance(plain, dict) else plain!r}")
    shape, offsets = plain.get("shape"), plain.get("data_offsets")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{name} has shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise ValueError(f"{name} has data_offsets {offsets!r}")
    nbytes = _DTYPES[plain["dtype"]].itemsize
    for size in shape:
        nbytes *= size
    if offsets[0] < 0 or offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"{name} of {plain['dtype']} {shape} has {offsets[1] - offsets[0]} bytes, not {nbytes}")
    return _Entry(file, plain["dtype"], tuple(shape), data + offsets[0], nbytes)
