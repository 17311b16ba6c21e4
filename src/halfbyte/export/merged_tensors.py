"""The merged model as named tensors: what each is called, its shape, and how its rows are made.

W' = round(W + scaling * B A), computed in float32 and rounded once; of a DoRA, with its rows brought to their trained
lengths. W is the base that is asked for: with `quant` the weights as training held them, dequantized, and where PiSSA
or LoftQ had shifted the base, as shifted; without, the source's own, from which a shift is taken in float32. A module
that was trained whole replaces its tensors.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from halfbyte.adapters.initial import Shift
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.deltas import Delta, Deltas
from halfbyte.export.heads import Head
from halfbyte.export.safetensors_file import Planned
from halfbyte.models.classifier import SCORE
from halfbyte.models.load import load_model, read_weight
from halfbyte.models.options import ModelOptions
from halfbyte.models.shifted_source import ShiftedSource
from halfbyte.models.source import ModelSource
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import DTYPE_NAMES, DTYPES, QuantOptions, Weight

_PIECE = 1 << 22  # elements in flight: 16 MB of float32


def plan_tensors(
    model: ModelOptions,
    source: ModelSource,
    deltas: Mapping[str, Delta],
    quant: QuantOptions | None,
    dtype: torch.dtype,
    head: Head | None = None,
) -> list[Planned]:
    """Every tensor of the merged model, and how its rows are made. Reads no weights for the decoder's families.

    head   of a classifier: it stands where a language model has its output head
    """
    shifts = deltas.shifts if isinstance(deltas, Deltas) and quant is not None else {}
    held = base_in_training(source, shifts)
    if ModelSpec.serves(source.config):
        planned = _plan_streamed(held, deltas, quant, dtype, head)
    else:
        planned = _plan_loaded(model, held, deltas, quant, dtype, head)
    if head is not None:
        planned = [*(tensor for tensor in planned if tensor.name != SCORE), head.planned(dtype)]
    if isinstance(deltas, Deltas):
        planned = _with_whole(planned, deltas, source, dtype)
    names = {tensor.name for tensor in planned}
    lost = sorted(name for name in deltas if f"{name}.weight" not in names)
    if lost:
        raise UsageError(
            f"the adapter changes {lost[0]} ({len(lost)} such), which {source.name} has not: it is another model's"
        )
    return planned


def base_in_training(source: ModelSource, shifts: Mapping[str, Shift]) -> ModelSource:
    """The source whose weights training quantized: `source`, freed of the shifts of these linears."""
    if not shifts:
        return source
    return ShiftedSource(source, {f"{name}.weight": shift.rows for name, shift in shifts.items()})


def _with_whole(planned: list[Planned], deltas: Deltas, source: ModelSource, dtype: torch.dtype) -> list[Planned]:
    """With the modules that were trained whole. UsageError for a tensor that the model has not, or in another shape."""
    shapes = {tensor.name: tensor.shape for tensor in planned}
    twice = [tensor for name, tensor in deltas.whole.items() if deltas.tied and name in shapes]
    for name, tensor in deltas.whole.items():
        if name not in shapes and any(torch.equal(tensor, other) for other in twice):
            continue  # the other name of tied embeddings, which are one tensor of the model
        if shapes.get(name) != tuple(tensor.shape):
            raise UsageError(
                f"the adapter replaces {name}, {list(tensor.shape)}, and {source.name} has "
                f"{list(shapes[name]) if name in shapes else 'no such tensor'}: it was trained on another base"
            )
    return [
        Planned(one.name, one.shape, dtype, *_replaced(deltas.whole[one.name], one.name, dtype))
        if one.name in deltas.whole
        else one
        for one in planned
    ]


def _replaced(
    tensor: Tensor, name: str, dtype: torch.dtype
) -> tuple[Callable[[], Iterator[Tensor]], Callable[[int, int], Tensor]]:
    def read(start: int, stop: int) -> Tensor:
        return _finite(tensor[start:stop].to(dtype, copy=True), name)

    def rows() -> Iterator[Tensor]:
        for start, stop in _pieces(tuple(tensor.shape)):
            yield read(start, stop)

    return rows, read


def _plan_streamed(
    source: ModelSource, deltas: Mapping[str, Delta], quant: QuantOptions | None, dtype: torch.dtype, head: Head | None
) -> list[Planned]:
    spec = ModelSpec.from_config(source.config)
    spec = spec if head is None else spec.without_head()
    linears = {f"{linear.name}.weight": linear.name for linear in spec.linears()}
    planned = []
    for name, shape in spec.tensors():
        found = source.info(name)
        if found.shape != shape:
            raise UsageError(f"{source.path}: tensor {name} is {list(found.shape)}, the config says {list(shape)}")
        if name not in linears:
            planned.append(Planned(name, shape, dtype, *_copied(source, name, dtype)))
            continue
        delta = deltas.get(linears[name])
        _require_fit(linears[name], delta, shape)

        def weight(name: str = name) -> Weight:
            own = source.info(name).dtype  # what stays unquantized keeps its precision until the sum
            return read_weight(source, name, quant, own if own in DTYPE_NAMES else torch.float32, torch.device("cpu"))

        planned.append(Planned(name, shape, dtype, _merged(weight, delta, name, dtype, quant is not None)))
    return planned


def _plan_loaded(
    model: ModelOptions,
    source: ModelSource,
    deltas: Mapping[str, Delta],
    quant: QuantOptions | None,
    dtype: torch.dtype,
    head: Head | None,
) -> list[Planned]:
    kind = None if head is None else head.options
    loaded = load_model(model, quant, device="cpu", source=source, head=kind).model
    transposed: frozenset[str] = getattr(loaded, "transposed", frozenset())
    planned = []
    for name, dense in loaded.named_tensors():  # type: ignore[operator]
        module = name.removesuffix(".weight")
        delta = deltas.get(module) if name.endswith(".weight") else None
        shape = tuple(dense().shape)
        _require_fit(module, delta, shape[::-1] if module in transposed else shape)
        rows = _at_once(dense, delta, module in transposed, name, dtype, quant is not None)
        planned.append(Planned(name, shape, dtype, rows))
    return planned


def _require_fit(name: str, delta: Delta | None, shape: tuple[int, ...]) -> None:
    if delta is not None and (delta.b.shape[0], delta.a.shape[1]) != tuple(shape):
        raise UsageError(
            f"the adapter's update of {name} is {delta.b.shape[0]} x {delta.a.shape[1]}, the model's linear "
            f"{' x '.join(map(str, shape))}: it was trained on another base"
        )


def _copied(
    source: ModelSource, name: str, dtype: torch.dtype
) -> tuple[Callable[[], Iterator[Tensor]], Callable[[int, int], Tensor]]:
    def read(start: int, stop: int) -> Tensor:
        return _finite(source.read_rows(name, start, stop).to(dtype), name)

    def rows() -> Iterator[Tensor]:
        info = source.info(name)
        # A quantized head is decoded from one reading: `read_rows` would read all of it for every piece.
        held = None if source.reads_rows(name) else source.prequantized(name)
        for start, stop in _pieces(info.shape):
            if held is None:
                yield read(start, stop)
            else:
                yield _finite(held.dequantize(info.dtype, rows=slice(start, stop)).to(dtype), name)

    return rows, read


def _merged(
    weight: Callable[[], Weight], delta: Delta | None, name: str, dtype: torch.dtype, shifted: bool
) -> Callable[[], Iterator[Tensor]]:
    def rows() -> Iterator[Tensor]:
        held = weight()
        for start, stop in _pieces(held.shape):
            piece = held.dequantize(torch.float32, rows=slice(start, stop))
            if delta is not None:
                piece = delta.applied(piece, start, shifted)
            yield _finite(piece.to(dtype), name)

    return rows


def _at_once(
    dense: Callable[[], Tensor], delta: Delta | None, transposed: bool, name: str, dtype: torch.dtype, shifted: bool
) -> Callable[[], Iterator[Tensor]]:
    def rows() -> Iterator[Tensor]:
        tensor = dense().float()
        if delta is not None:
            turned = delta.applied(tensor.t() if transposed else tensor, 0, shifted)
            tensor = turned.t() if transposed else turned
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


def base_is_the_sources_own(source: ModelSource, quant: QuantOptions | None) -> bool:
    """Whether the weights that training held are the source's own, so that both bases of a merge are one.

    Without quantization they are; and where training kept a quantized file as it is, its blocks and what is in none.
    """
    if quant is None:
        return True
    if not ModelSpec.serves(source.config):
        return False

    as_in_file = source.blocks is not None and not quant.requantize

    def kept(name: str) -> bool:
        chosen = quant.format_of(name)
        own = source.info(f"{name}.weight").dtype
        if chosen in DTYPES:
            return DTYPES[chosen] is own
        return as_in_file

    return all(kept(linear.name) for linear in ModelSpec.from_config(source.config).linears())
