"""Merging a LoRA adapter into a folder that transformers loads.

The adapter was trained on a base, and that base is what it is merged into: for QLoRA the dequantized weights, so
that the merged model behaves as trained; `base="16bit"` takes the source's own weights instead, which the adapter
has never seen. The sum is computed in float32 and rounded once, W' = round(W + scaling * B A).

Everything is planned first (names, shapes, sizes, what goes where) and then streamed: a tensor is read, quantized and
dequantized as training did, and written in pieces of rows. Held at once are one tensor and its quantized form, not
the model; architectures without a decoder of ours are loaded whole, in the form they were trained in.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from halfbyte.adapters.peft_io import lora_options, read_adapter_config, read_adapter_tensors
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.card import already_quantized
from halfbyte.export.folder import check_output, new_folder
from halfbyte.export.model_files import write_model_files
from halfbyte.export.safetensors_file import INDEX, Planned, plan_shards, shard_index, write_file
from halfbyte.export.verify import Comparison, check_written, compare_logits
from halfbyte.files import require_free_space
from halfbyte.models.load import load_model, read_weight
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import ModelSource, open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.options import Options
from halfbyte.quant import DTYPE_NAMES, QuantOptions, Weight

_PIECE = 1 << 22  # elements in flight: 16 MB of float32
_SMALL_FILES = 64_000_000  # tokenizer, config and index, for the check of the disk


class MergeOptions(Options):
    """How an adapter becomes a part of its model."""

    base: Literal["trained", "16bit"] = Field(
        default="trained",
        description="what to merge into: the weights that the adapter was trained on (dequantized, if it was QLoRA), "
        "or the source's own 16-bit weights",
    )
    merge_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="type of the merged weights"
    )
    verify: bool = Field(default=True, description="compare the merged model's logits with the unmerged one's")
    overwrite: bool = Field(default=False, description="replace an existing model folder at the output")
    shard_gb: float = Field(default=5.0, gt=0, description="largest file, in GB")


@dataclass(frozen=True)
class Delta:
    """One linear's update: scaling * B A, by rows of the output. `a` is [rank, in], `b` is [out, rank]."""

    a: Tensor
    b: Tensor
    scaling: float

    def rows(self, start: int, stop: int) -> Tensor:
        return (self.b[start:stop].float() @ self.a.float()) * self.scaling


@dataclass(frozen=True)
class MergeReport:
    """What was written, and how it compares. `base` says in words what the adapter was merged into."""

    path: Path
    base: str
    dtype: str
    nbytes: int
    tensors: int
    merged: int
    seconds: float
    comparison: Comparison | None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "path": str(self.path),
            "base": self.base,
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "tensors": self.tensors,
            "merged_linears": self.merged,
            "seconds": self.seconds,
            "comparison": None if self.comparison is None else self.comparison.to_json(),
        }


def merge(
    model: ModelOptions,
    adapter: Path,
    out: Path,
    quant: QuantOptions | None = None,
    options: MergeOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write the model with the adapter merged in to the folder `out`.

    model, quant  the base as it was loaded for training; quant is None for LoRA on 16-bit weights
    adapter       a PEFT folder (a halfbyte run directory is one)
    on_progress   hears (bytes written, bytes in all)

    Raises UsageError for an adapter that does not fit the model or an output that may not be written, DoesNotFit for
    a full disk, HalfbyteError where the result is not what was computed; `out` is then untouched.
    """
    options = options or MergeOptions()
    started = time.monotonic()
    source = open_source(model.model, model.revision)
    check_output(out, options.overwrite, (source.path, adapter))
    deltas = read_deltas(adapter)
    trained = quant if options.base == "trained" else None
    plan = plan_tensors(model, source, deltas, trained, getattr(torch, options.merge_dtype))
    shards = plan_shards(plan, int(options.shard_gb * 1e9))
    total = sum(tensor.nbytes for tensor in plan)
    require_free_space(out.parent, total + _SMALL_FILES, f"the merged model ({out})")
    with new_folder(out) as folder:
        _write_weights(folder, shards, total, on_progress)
        write_model_files(folder, source, adapter, options.merge_dtype)
        check_written(folder, plan)
        comparison = None
        if options.verify:
            comparison = compare_logits(model, adapter, folder, quant, options.merge_dtype, total)
            comparison.require_close(strict=options.base == "trained" or quant is None)
    return MergeReport(
        path=out,
        base=describe_base(source, quant, options.base),
        dtype=options.merge_dtype,
        nbytes=total,
        tensors=len(plan),
        merged=len(deltas),
        seconds=time.monotonic() - started,
        comparison=comparison,
    )


def read_deltas(adapter: Path) -> dict[str, Delta]:
    """The updates of a PEFT folder by the linear's name. UsageError for one that is broken or not plain LoRA."""
    options = lora_options(read_adapter_config(adapter))
    tensors = read_adapter_tensors(adapter)
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = [key.removeprefix(prefix).removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    deltas: dict[str, Delta] = {}
    for name in names:
        a, b = tensors.get(f"{prefix}{name}{suffix}"), tensors.get(f"{prefix}{name}.lora_B.weight")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise UsageError(f"{adapter}: the factors of {name} do not belong together: the file is damaged")
        deltas[name] = Delta(a, b, options.scaling_of(name))
    if not deltas or len(tensors) != 2 * len(deltas):
        odd = next((k for k in tensors if ".lora_A." not in k and ".lora_B." not in k), "no factors")
        raise UsageError(f"{adapter} holds {odd}, which is not part of a plain LoRA: it cannot be merged")
    return deltas


def plan_tensors(
    model: ModelOptions,
    source: ModelSource,
    deltas: Mapping[str, Delta],
    quant: QuantOptions | None,
    dtype: torch.dtype,
) -> list[Planned]:
    """Every tensor of the merged model, and how its rows are made. Reads no weights for the decoder's families."""
    if ModelSpec.serves(source.config):
        planned = _plan_streamed(source, deltas, quant, dtype)
    else:
        planned = _plan_loaded(model, deltas, quant, dtype)
    names = {tensor.name for tensor in planned}
    lost = sorted(name for name in deltas if f"{name}.weight" not in names)
    if lost:
        raise UsageError(
            f"the adapter changes {lost[0]} ({len(lost)} such), which {source.name} has not: it is another model's"
        )
    return planned


def _plan_streamed(
    source: ModelSource, deltas: Mapping[str, Delta], quant: QuantOptions | None, dtype: torch.dtype
) -> list[Planned]:
    spec = ModelSpec.from_config(source.config)
    linears = {f"{linear.name}.weight": linear.name for linear in spec.linears()}
    planned = []
    for name, shape in spec.tensors():
        found = source.info(name)
        if found.shape != shape:
            raise UsageError(f"{source.path}: tensor {name} is {list(found.shape)}, the config says {list(shape)}")
        if name not in linears:
            planned.append(Planned(name, shape, dtype, _copied(source, name, dtype)))
            continue
        delta = deltas.get(linears[name])
        _require_fit(linears[name], delta, shape)

        def weight(name: str = name) -> Weight:
            own = source.info(name).dtype  # what stays unquantized keeps its precision until the sum
            return read_weight(source, name, quant, own if own in DTYPE_NAMES else torch.float32, torch.device("cpu"))

        planned.append(Planned(name, shape, dtype, _merged(weight, delta, name, dtype)))
    return planned


def _plan_loaded(
    model: ModelOptions, deltas: Mapping[str, Delta], quant: QuantOptions | None, dtype: torch.dtype
) -> list[Planned]:
    loaded = load_model(model, quant, device="cpu").model
    transposed: frozenset[str] = getattr(loaded, "transposed", frozenset())
    planned = []
    for name, dense in loaded.named_tensors():  # type: ignore[operator]
        module = name.removesuffix(".weight")
        delta = deltas.get(module) if name.endswith(".weight") else None
        shape = tuple(dense().shape)
        _require_fit(module, delta, shape[::-1] if module in transposed else shape)
        rows = _whole(dense, delta, module in transposed, name, dtype)
        planned.append(Planned(name, shape, dtype, rows))
    return planned


def _require_fit(name: str, delta: Delta | None, shape: tuple[int, ...]) -> None:
    if delta is not None and (delta.b.shape[0], delta.a.shape[1]) != tuple(shape):
        raise UsageError(
            f"the adapter's update of {name} is {delta.b.shape[0]} x {delta.a.shape[1]}, the model's linear "
            f"{' x '.join(map(str, shape))}: it was trained on another base"
        )


def _copied(source: ModelSource, name: str, dtype: torch.dtype) -> Callable[[], Iterator[Tensor]]:
    def rows() -> Iterator[Tensor]:
        shape = source.info(name).shape
        for start, stop in _pieces(shape):
            yield _finite(source.read_rows(name, start, stop).to(dtype), name)

    return rows


def _merged(
    weight: Callable[[], Weight], delta: Delta | None, name: str, dtype: torch.dtype
) -> Callable[[], Iterator[Tensor]]:
    def rows() -> Iterator[Tensor]:
        held = weight()
        for start, stop in _pieces(held.shape):
            piece = held.dequantize(torch.float32, rows=slice(start, stop))
            if delta is not None:
                piece = piece + delta.rows(start, stop)
            yield _finite(piece.to(dtype), name)

    return rows


def _whole(
    dense: Callable[[], Tensor], delta: Delta | None, transposed: bool, name: str, dtype: torch.dtype
) -> Callable[[], Iterator[Tensor]]:
    def rows() -> Iterator[Tensor]:
        tensor = dense().float()
        if delta is not None:
            update = delta.rows(0, delta.b.shape[0])
            tensor = tensor + (update.t() if transposed else update)
        yield _finite(tensor.to(dtype), name)

    return rows


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, _PIECE // max(1, width))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _finite(piece: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(piece).all()):
        raise HalfbyteError(
            f"{name} is not finite in {str(piece.dtype).removeprefix('torch.')}: the adapter has diverged, or the type "
            "is too narrow (use bfloat16)"
        )
    return piece


def _write_weights(
    folder: Path, shards: dict[str, list[Planned]], total: int, on_progress: Callable[[int, int], None] | None
) -> None:
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    for file, tensors in shards.items():
        write_file(folder / file, tensors, on_bytes)
    if len(shards) > 1:
        (folder / INDEX).write_text(shard_index(shards))


def describe_base(source: ModelSource, quant: QuantOptions | None, base: Literal["trained", "16bit"]) -> str:
    """In words, what the adapter was merged into: what its user must know about the file."""
    own = f"the weights of {source.name}"
    was = already_quantized(source)
    if was is not None:
        own += f" ({was}, so already quantized once)"
    if quant is None:
        return f"{own}, as trained"
    how = f"{quant.quant_type} in blocks of {quant.blocksize}{', double-quantized' if quant.double_quant else ''}"
    if base == "trained":
        return f"{own} in {how}, dequantized: the base that the adapter was trained on"
    return f"{own}, not in the {how} that the adapter was trained on: it has not seen this base"
