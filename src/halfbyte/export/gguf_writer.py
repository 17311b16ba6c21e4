"""A whole model as one GGUF file that llama.cpp (and so Ollama, LM Studio and others) loads.

The plan comes first, as values: each tensor's type (`gguf_types`), the metadata (`gguf_metadata`), the vocabulary
(`gguf_vocabulary`); only then is a weight read. Tensors are made, reordered, encoded and written in pieces of rows, so
that held at once are a few megabytes and the vocabulary, not a tensor.

What changes on the way: the architecture's names, Llama's q and k rows in llama.cpp's order (it rotates neighbours
where transformers rotates halves), 1 added to Gemma's norms, vectors in float32. A tied output head is left out.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.card import licence_of
from halfbyte.export.gguf_container import Entry, Fields, header, string, uint32, write_container
from halfbyte.export.gguf_metadata import extra_tensors, metadata
from halfbyte.export.gguf_names import architecture_of, gguf_tensor_name, heads_in
from halfbyte.export.gguf_types import Quantization, find_quantization, types_of
from halfbyte.export.gguf_vocabulary import vocabulary
from halfbyte.export.safetensors_file import Planned
from halfbyte.files import require_free_space
from halfbyte.models.gguf_config import PLUS_ONE
from halfbyte.models.gguf_source import GgufSource
from halfbyte.models.hub import is_hub_id
from halfbyte.models.source import ModelSource
from halfbyte.models.spec import ModelSpec
from halfbyte.quant.gguf_encode import TYPES as WRITTEN
from halfbyte.quant.gguf_encode import block_of, encode
from halfbyte.quant.gguf_reround import TYPES as REROUNDED
from halfbyte.quant.gguf_reround import reround


@dataclass(frozen=True)
class GgufPlan:
    """Everything that the file will hold: its header's bytes, and the tensors that are still to be made."""

    start: bytes
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return len(self.start) + sum(entry.nbytes + -entry.nbytes % 32 for entry in self.entries)


def write_gguf(
    path: Path,
    planned: Sequence[Planned],
    source: ModelSource,
    quantization: str,
    template: str | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the model to `path`, whole or not at all.

    planned       its tensors, in Hugging Face's names and layout (`export.merge.plan_tensors`)
    source        the model that it came from: config, tokenizer, licence
    quantization  one of `gguf_types.QUANTIZATIONS`
    template      the chat template to keep in the file; None: none
    on_progress   hears (bytes of tensors written, bytes in all)

    Raises UsageError for a model, tokenizer or quantization that cannot be written, DoesNotFit for a full disk,
    HalfbyteError for weights that are not finite; what was at `path` is then untouched.
    """
    plan = plan_gguf(planned, source, quantization, template, path.stem)
    require_free_space(path.parent, plan.nbytes, f"the GGUF file ({path})")
    done, total = 0, sum(entry.nbytes for entry in plan.entries)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    write_container(path, plan.start, plan.entries, on_bytes)


def plan_gguf(
    planned: Sequence[Planned], source: ModelSource, quantization: str, template: str | None, name: str
) -> GgufPlan:
    """The file as a value; reads no weights. `name` becomes `general.name`."""
    chosen = find_quantization(quantization)
    spec = spec_of(source)
    types = _own_types(source, chosen) or types_of(spec, quantization)
    _check_complete(planned, spec, source)
    words = vocabulary(source, spec, template)
    fields = general(spec, source, "model", _safe_name(name, words.strips_after_special))
    fields["general.file_type"] = uint32(chosen.file_type)
    entries = [_entry(tensor, spec, types, source) for tensor in planned]
    entries += [_constant(name, values) for name, values in extra_tensors(spec).items()]
    return GgufPlan(header({**fields, **metadata(spec), **words.fields}, entries), tuple(entries))


def _own_types(source: ModelSource, chosen: Quantization) -> dict[str, str] | None:
    """The types of the base's own file, where that is a file of the quantization that is asked for.

    Recipes differ between llama.cpp's versions; on the file's own blocks a small update survives (`_onto_own_blocks`).
    """
    if not isinstance(source, GgufSource) or not source.prequantized_bytes():
        return None
    if source.file.get("general.file_type") != chosen.file_type:
        return None
    types = {tensor.name: tensor.type_name for tensor in source.file.tensors.values()}
    return types if {*types.values()} <= {*WRITTEN, *REROUNDED} else None


def spec_of(source: ModelSource) -> ModelSpec:
    """The model's shapes. UsageError for a family that is not written as GGUF."""
    if not ModelSpec.serves(source.config):
        raise UsageError(
            f"{source.name} is a {source.config.get('model_type')} model, which halfbyte does not write as GGUF: "
            "export a Hugging Face folder and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    return ModelSpec.from_config(source.config)


def general(spec: ModelSpec, source: ModelSource, kind: str, name: str) -> Fields:
    """The `general.*` keys of a model or an adapter: what it is called, made from and licensed under."""
    fields = {
        "general.architecture": string(architecture_of(spec)),
        "general.type": string(kind),
        "general.name": string(name),
        "general.quantization_version": uint32(gguf.GGML_QUANT_VERSION),
    }
    licence = licence_of(source)
    if licence is not None:
        fields["general.license"] = string(licence)
    if source.kind == "hub" and is_hub_id(source.name):
        owner, base = source.name.split("/")[:2]
        fields["general.base_model.count"] = uint32(1)
        fields["general.base_model.0.name"] = string(base)
        fields["general.base_model.0.organization"] = string(owner)
        fields["general.base_model.0.repo_url"] = string(f"https://huggingface.co/{owner}/{base}")
    return fields


def _safe_name(name: str, strips_after_special: bool) -> str:
    """llama.cpp drops whitespace after special tokens in models whose name has phi-3 in it, and in no others."""
    if strips_after_special:
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"{name} (Phi-3)"
    return re.sub("(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE)


def _check_complete(planned: Sequence[Planned], spec: ModelSpec, source: ModelSource) -> None:
    expected = dict(spec.tensors())
    found = {tensor.name: tensor.shape for tensor in planned}
    if found != expected:
        odd = next(name for name in {**expected, **found} if found.get(name) != expected.get(name))
        raise UsageError(
            f"{source.name}: tensor {odd} is {found.get(odd, 'missing')}, the config says {expected.get(odd, 'none')}: "
            "the model is incomplete or of another architecture"
        )


def _entry(tensor: Planned, spec: ModelSpec, types: dict[str, str], source: ModelSource) -> Entry:
    name = gguf_tensor_name(spec, tensor.name)
    type_name = types[name]
    plus_one = architecture_of(spec) in PLUS_ONE and tensor.name.endswith("norm.weight")
    heads = heads_in(spec, tensor.name)
    linear = any(f"{each.name}.weight" == tensor.name for each in spec.linears())
    quantize = _onto_own_blocks(tensor, type_name, source, linear) or partial(_encode_rows, type_name)

    def pieces() -> Iterator[Tensor]:
        rows = _reordered(tensor.rows(), spec.head_dim) if heads else tensor.rows()
        at = 0
        for piece in rows:
            values = piece.float() + 1 if plus_one else piece
            try:
                yield quantize(at, values)
                at += piece.shape[0]
            except ValueError as error:
                raise HalfbyteError(
                    f"{tensor.name} cannot be written as {type_name}: {error}; the adapter has diverged, or the type "
                    "is too narrow (try bf16)"
                ) from error

    return Entry(name, tensor.shape, type_name, pieces)


def _encode_rows(type_name: str, at: int, values: Tensor) -> Tensor:
    return encode(values.view(1, -1) if values.ndim == 1 else values, type_name)


def _onto_own_blocks(
    tensor: Planned, type_name: str, source: ModelSource, linear: bool
) -> Callable[[int, Tensor], Tensor] | None:
    """How rows from `at` on are rounded where the base's own file has this tensor in blocks of this type; else None.

    A base that lies on the levels of its blocks would be all that is left of base plus a small update.
    """
    if not isinstance(source, GgufSource) or type_name not in REROUNDED or source.type_of(tensor.name) != type_name:
        return None
    own, weights = source, block_of(type_name)[0]
    # The same file from the same model: the draws depend on the tensor's name alone.
    generator = torch.Generator().manual_seed(zlib.crc32(tensor.name.encode())) if linear else None

    def quantize(at: int, values: Tensor) -> Tensor:
        raw = own.read_blocks(tensor.name, at, at + values.shape[0])
        blocks = raw.view(-1, block_of(type_name)[1])
        return reround(blocks, type_name, values.reshape(-1, weights), generator).view(raw.shape)

    return quantize


def _reordered(pieces: Iterator[Tensor], head_dim: int) -> Iterator[Tensor]:
    """Rows in llama.cpp's order: of each head the halves (p, p + d / 2) become neighbours (2 p, 2 p + 1)."""
    left: Tensor | None = None
    for piece in pieces:
        rows = piece if left is None else torch.cat([left, piece])
        whole = rows.shape[0] // head_dim * head_dim
        left = rows[whole:]
        if whole:
            yield permuted(rows[:whole], head_dim)
    if left is not None and left.shape[0]:
        raise ValueError(f"{left.shape[0]} rows are no whole head of {head_dim}")


def permuted(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads of transformers' rows [heads * head_dim, ...] in llama.cpp's order."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _constant(name: str, values: Tensor) -> Entry:
    return Entry(name, tuple(values.shape), "F32", lambda: iter([encode(values.view(1, -1), "F32")]))
