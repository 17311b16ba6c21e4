"""The merged model as a bitsandbytes 4-bit folder: what `from_pretrained` loads without quantizing anything.

Linears are quantized as training quantized the base (nf4 or fp4, blocks, double quantization) and stored under
bitsandbytes' names (`quant.bnb_format`); embeddings, output head, norms and biases keep the merged type. One tensor at
a time is made, quantized and written, so that memory is that of the largest.

A file's header comes first and lists offsets that are known last (a weight's `quant_state` is text of varying length).
So room for the longest possible header is left, and what is not needed of it is spaces, as the format allows. Readers
map tensors where they lie and the format knows no gaps: so a weight's parts go from wide types to narrow ones, its
`quant_state` is filled with spaces to a multiple of 8 bytes, and what is not quantized comes last.
"""

import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.export.model_files import write_model_files
from halfbyte.export.planned_source import PlannedSource
from halfbyte.export.safetensors_file import DTYPE_CODES, INDEX, Planned, plan_shards
from halfbyte.heap import give_back
from halfbyte.models.load import LARGE, read_weight
from halfbyte.models.source import ModelSource
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import DTYPES, BlockWeight, QuantOptions, quantize
from halfbyte.quant.block_reround import reround

_CODES = {**DTYPE_CODES, torch.uint8: "U8"}
_SHARD_BYTES = 16 * 10**9  # of the 16-bit model: about 5 GB in 4 bits
_ENTRY = 160  # bytes of a header's entry beside its name: dtype, shape, two offsets of up to 20 digits
_PARTS = (
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)


def write_bnb_folder(
    folder: Path,
    planned: Sequence[Planned],
    source: ModelSource,
    quant: QuantOptions,
    adapter: Path,
    trained_on: bool = False,
    anew: Collection[str] = (),
) -> None:
    """Write weights, config and tokenizer into `folder`, which exists (see `folder.new_folder`).

    planned     the merged model, of `plan_tensors`, in bfloat16, float16 or float32
    source      its base: config and tokenizer
    quant       the format; `quant_pattern` may leave linears in the merged type, and so does a quantized source
    adapter     the run's folder: its chat template replaces the base's
    trained_on  the base of `planned` is `source` in `quant`, as training held it: its blocks are kept, and base plus
                update is rounded onto their levels by chance. To the nearest level, a small update would be lost
    anew        tensors whose base's blocks are no place for them: trained whole, or on a shifted base (what PiSSA moved
                into the adapter is larger than the levels of what it left)

    Raises UsageError for an architecture whose linears are not known before it is loaded, and for formats that
    bitsandbytes' 4-bit files lack (int4, int8).
    """
    formats = linear_formats(source, quant)
    made = PlannedSource(planned, source)
    base = source if trained_on else None
    shards = plan_shards(planned, _SHARD_BYTES)
    places: dict[str, str] = {}
    total = 0
    for file, tensors in shards.items():
        names, nbytes = _write_file(folder / file, tensors, made, quant, formats, base, anew)
        places |= dict.fromkeys(names, file)
        total += nbytes
    if len(shards) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2))
    dtype = str(planned[0].dtype).removeprefix("torch.")
    write_model_files(folder, source, adapter, dtype)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = quantization_config(quant, dtype, [n for n, kind in formats.items() if not kind])
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def quantization_config(quant: QuantOptions, dtype: str, kept: Sequence[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of config.json. `kept`: full names of linears that are not quantized."""
    skipped = ["lm_head", *kept] if kept else None  # transformers' own default is the output head
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant.quant_type,
        "bnb_4bit_use_double_quant": quant.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def linear_formats(source: ModelSource, quant: QuantOptions) -> dict[str, str | None]:
    """Every linear's name -> nf4 or fp4, or None where it stays as it is: asked for, or left so by a quantized file.

    Raises UsageError as `write_bnb_folder` does.
    """
    if not ModelSpec.serves(source.config):
        raise UsageError(
            f"{source.name}: a 4-bit folder can be written for the decoder's families, and this is a "
            f"{source.config.get('model_type')}: merge it, and load the folder with load_in_4bit"
        )
    found: dict[str, str | None] = {}
    blocks = None if source.blocks is None or quant.requantize else source.prequantized_bytes()
    for linear in ModelSpec.from_config(source.config).linears():
        chosen = quant.format_of(linear.name)
        if chosen not in ("nf4", "fp4") and chosen not in DTYPES:
            raise UsageError(f"{linear.name}: bitsandbytes' 4-bit folders know nf4 and fp4, not {chosen}")
        left = chosen in DTYPES or (blocks is not None and f"{linear.name}.weight" not in blocks)
        found[linear.name] = None if left else chosen
    return found


def _write_file(
    path: Path,
    tensors: Sequence[Planned],
    made: PlannedSource,
    quant: QuantOptions,
    formats: dict[str, str | None],
    base: ModelSource | None,
    anew: Collection[str],
) -> tuple[list[str], int]:
    """Write one file; returns its tensors' names and their bytes."""
    room = _header_room(tensors, formats)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    kinds = {tensor.name: formats.get(tensor.name.removesuffix(".weight")) for tensor in tensors}
    with path.open("wb") as file:
        file.seek(8 + room)
        for tensor in sorted(tensors, key=lambda one: kinds[one.name] is None):
            own = None if tensor.name in anew else base
            for name, shape, piece in _parts_of(tensor, made, quant, kinds[tensor.name], own):
                raw = piece.contiguous().view(-1).view(torch.uint8).numpy()
                file.write(raw.data)
                entry = {"dtype": _CODES[piece.dtype], "shape": list(shape), "data_offsets": [at, at]}
                at += raw.nbytes
                entries.setdefault(name, entry)["data_offsets"][1] = at
        text = json.dumps(entries, separators=(",", ":")).encode()
        if len(text) > room:
            raise ValueError(f"{path}: a header of {len(text)} bytes, and {room} were left for it")
        file.seek(0)
        file.write(room.to_bytes(8, "little") + text.ljust(room))
    return [name for name in entries if name != "__metadata__"], at


def _header_room(tensors: Sequence[Planned], formats: dict[str, str | None]) -> int:
    """Bytes that the header needs at most, a multiple of 8: the data begin at an aligned place."""
    names = 0
    for tensor in tensors:
        parts = _PARTS if formats.get(tensor.name.removesuffix(".weight")) else ("",)
        names += sum(len(json.dumps(tensor.name + part)) + _ENTRY for part in parts)
    return (names + 64) // 8 * 8 + 8


def _quantized(tensor: Planned, made: PlannedSource, options: QuantOptions, base: ModelSource | None) -> BlockWeight:
    if base is None:
        return quantize(made.read(tensor.name), options)
    own = read_weight(base, tensor.name, options, torch.float32, torch.device("cpu"))
    if not isinstance(own, BlockWeight):
        raise UsageError(f"{tensor.name} was trained on as {own.format}, which a bitsandbytes 4-bit folder cannot hold")
    # The same folder from the same model: the draws depend on the tensor's name alone.
    return reround(own, made.read(tensor.name), torch.Generator().manual_seed(zlib.crc32(tensor.name.encode())))


def _parts_of(
    tensor: Planned, made: PlannedSource, quant: QuantOptions, kind: str | None, base: ModelSource | None
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """(name, shape, bytes) of everything that stands for a planned tensor; pieces of one name follow each other."""
    if kind is None:
        for piece in tensor.rows():
            yield tensor.name, tensor.shape, piece
        return
    options = quant if kind == quant.quant_type else quant.model_copy(update={"quant_type": kind})
    parts = _quantized(tensor, made, options, base).to_bnb(tensor.name)
    state = next(name for name in parts if ".quant_state." in name)
    written = sum(part.nbytes for part in parts.values())
    parts[state] = torch.cat([parts[state], torch.full((-written % 8,), ord(" "), dtype=torch.uint8)])
    for name, part in sorted(parts.items(), key=lambda item: (-item[1].itemsize, item[0] == state)):
        yield name, tuple(part.shape), part
    if tensor.nbytes >= LARGE:
        give_back()
