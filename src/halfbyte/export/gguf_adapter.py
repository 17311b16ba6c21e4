"""A LoRA adapter alone as a GGUF file, for llama.cpp's `--lora` over the base model's own GGUF file.

llama.cpp computes W x + (alpha / rank) B A x with one alpha for the whole file and each tensor's own rank. Where
scaling * rank is the same everywhere (no alpha patterns), that is alpha; where not, the rest is multiplied into B, so
that every rank pattern, alpha pattern and rsLoRA comes out exactly. An adapter of a shifted base (PiSSA, LoftQ) is
written as the plain LoRA of twice the rank that it is over the base itself. Rows of B go where the base's rows went:
Llama's q and k in llama.cpp's order. Source: llama.cpp's src/llama-adapter.cpp, convert_lora_to_gguf.py.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.export.deltas import Delta, Deltas
from halfbyte.export.gguf_container import Entry, float32, header, string, uint32, write_container
from halfbyte.export.gguf_names import gguf_tensor_name, heads_in
from halfbyte.export.gguf_types import find_quantization
from halfbyte.export.gguf_writer import general, permuted, spec_of
from halfbyte.files import require_free_space
from halfbyte.models.source import ModelSource
from halfbyte.models.spec import ModelSpec
from halfbyte.quant.gguf_encode import encode


def write_gguf_adapter(
    path: Path, deltas: Mapping[str, Delta], source: ModelSource, name: str, dtype: str = "f32"
) -> None:
    """Write the adapter to `path`, whole or not at all.

    deltas  the updates by linear (`export.merge.read_deltas`)
    source  the base model, of which only config and licence are read
    name    general.name
    dtype   f32 or f16

    Raises UsageError where an update is of no linear of the base or does not fit it, or is not finite in `dtype`;
    DoesNotFit for a full disk.
    """
    if dtype not in ("f32", "f16"):
        raise UsageError(f"{dtype!r} is not a type for a GGUF adapter: choose f32 or f16")
    if not deltas:
        raise UsageError("the adapter changes no linear, so there is nothing to write as GGUF")
    _require_plain(deltas)
    spec = spec_of(source)
    deltas = {name: delta.as_plain() for name, delta in deltas.items()}
    alpha = _alpha(deltas)
    entries = []
    for linear, delta in deltas.items():
        entries += _entries(linear, delta, alpha, spec, find_quantization(dtype).base)
    fields = general(spec, source, "adapter", name)
    fields |= {
        "general.file_type": uint32(find_quantization(dtype).file_type),
        "adapter.type": string("lora"),
        "adapter.lora.alpha": float32(alpha),
    }
    start = header(fields, entries)
    require_free_space(path.parent, len(start) + sum(entry.nbytes + 32 for entry in entries), f"the adapter ({path})")
    write_container(path, start, entries)


def _require_plain(deltas: Mapping[str, Delta]) -> None:
    """UsageError for what llama.cpp's adapters have no place for."""
    instead = "export it merged, --to gguf (for Ollama, --to ollama with a --quantization)"
    if any(delta.magnitude is not None for delta in deltas.values()):
        raise UsageError(f"a DoRA scales the rows of base plus update, which a GGUF adapter cannot say: {instead}")
    if isinstance(deltas, Deltas) and deltas.whole:
        raise UsageError(
            f"the adapter holds whole modules ({min(deltas.whole)}), and a GGUF adapter holds updates only: {instead}"
        )


def _alpha(deltas: Mapping[str, Delta]) -> float:
    """The file's one alpha: the largest scaling * rank. llama.cpp reads 0 as "no scaling", so it is never that."""
    return max((delta.scaling * delta.a.shape[0] for delta in deltas.values()), default=1.0) or 1.0


def _entries(linear: str, delta: Delta, alpha: float, spec: ModelSpec, type_name: str) -> list[Entry]:
    shapes = {each.name: (each.out_features, each.in_features) for each in spec.linears()}
    if not spec.tied:
        shapes["lm_head"] = (spec.vocab_size, spec.hidden_size)
    shape = shapes.get(linear)
    if shape is None:
        raise UsageError(f"the adapter changes {linear}, for which a GGUF adapter of this model has no place")
    if (delta.b.shape[0], delta.a.shape[1]) != shape:
        raise UsageError(
            f"the adapter's update of {linear} is {delta.b.shape[0]} x {delta.a.shape[1]}, the model's linear "
            f"{shape[0]} x {shape[1]}: it was trained on another base"
        )
    rank = delta.a.shape[0]
    b = delta.b.float()
    if (factor := delta.scaling * rank / alpha) != 1:
        b = b * factor
    if heads_in(spec, linear):
        b = permuted(b, spec.head_dim)
    name = gguf_tensor_name(spec, f"{linear}.weight")
    return [_entry(f"{name}.lora_{letter}", part, type_name) for letter, part in (("a", delta.a.float()), ("b", b))]


def _entry(name: str, values: Tensor, type_name: str) -> Entry:
    try:
        raw = encode(values.to(torch.float32), type_name)
    except ValueError as error:
        raise UsageError(f"{name} cannot be written as {type_name}: {error}") from error
    return Entry(name, tuple(values.shape), type_name, lambda: iter([raw]))
