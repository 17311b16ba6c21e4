"""What would have to change for a method that does not fit: each change is tried by arithmetic before it is named.

None of them is made silently: they change the update (a shorter row, a smaller rank, 8-bit moments) or the machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.plan.calibration import Calibration
from halfbyte.plan.estimate import Candidate, DataShape, Shape, estimate, least_peak
from halfbyte.plan.hardware import Rates

LENGTHS = (8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 64)
RANKS = (64, 32, 16, 8, 4, 2)


@dataclass(frozen=True)
class Change:
    """A change with which the method fits: fields of the config (`device` names a machine), and the peak at P95."""

    fields: Mapping[str, Any]
    peak_p95: int
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {"fields": dict(self.fields), "peak_memory_p95": self.peak_p95, "note": self.note}

    @property
    def flags(self) -> str:
        """As one would type it."""
        return " ".join(_flag(name.replace("_", "-"), value) for name, value in self.fields.items())


def _flag(name: str, value: Any) -> str:
    """A switch takes no value."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def find(
    spec: Shape,
    candidate: Candidate,
    data: DataShape,
    rates: Rates,
    limit: int,
    constants: Calibration,
) -> tuple[Change, ...]:
    """Changes that fit, one of a kind, the least intrusive first; where no single one does, several at once."""

    def tried(one: Candidate, rows: DataShape, fields: Mapping[str, Any], note: str = "") -> Change | None:
        if least_peak(spec, one, rows, constants) > limit:
            return None
        return Change(fields, estimate(spec, one, rows, rates, limit, constants).peak_p95, note)

    single = [
        next((fits for step in steps if (fits := tried(*step)) is not None), None)
        for steps in (_open_layout(candidate, data), _optimizers(candidate, data), _shorter(candidate, data),
                      _ranks(candidate, data))
    ]  # fmt: skip
    changes = tuple(one for one in single if one is not None)
    if changes:
        return changes
    together = next((fits for step in _together(candidate, data) if (fits := tried(*step)) is not None), None)
    return () if together is None else (together,)


Step = tuple[Candidate, DataShape, Mapping[str, Any], str]


def _open_layout(candidate: Candidate, data: DataShape) -> Iterator[Step]:
    """What the config fixed and the plan could have made smaller."""
    request = candidate.request
    rows = request.batches[0][0] * request.batches[0][1]
    freed = replace(request, batches=((1, rows),))
    by_layer = _by_layer(candidate)
    if request.checkpointing is False:
        yield (
            replace(candidate, request=replace(request, checkpointing=True)),
            data,
            {"gradient_checkpointing": True},
            "",
        )
    if request.batches[-1][0] > 1 and not by_layer:
        fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows}
        yield replace(candidate, request=freed), data, fields, "the same update"
        if request.checkpointing is False:
            both = replace(candidate, request=replace(freed, checkpointing=True))
            yield both, data, {**fields, "gradient_checkpointing": True}, "the same update"
    for fewer in (n for n in (8, 4, 2, 1) if by_layer and n < rows):
        smaller = replace(candidate, request=replace(request, batches=((fewer, 1),)))
        yield smaller, data, {"per_device_train_batch_size": fewer}, f"{fewer} instead of {rows} rows an update"


def _by_layer(candidate: Candidate) -> bool:
    return candidate.request.updates.by_layer


def _optimizers(candidate: Candidate, data: DataShape) -> Iterator[Step]:
    notes = {
        "adamw_8bit": "moments in a byte each",
        "paged_adamw": "the same update, its state in a file",
        "paged_adamw_8bit": "moments in a byte each, in a file",
    }
    notes = {"paged_adamw": notes["paged_adamw"], **notes} if candidate.request.device == "cpu" else notes
    if candidate.request.optim.startswith("galore"):
        notes = {"galore_adamw_8bit": "moments in a byte each"}
    for name, note in notes.items():
        if name != candidate.request.optim:
            yield _with_optimizer(candidate, name), data, {"optim": name}, note


def _with_optimizer(candidate: Candidate, name: str) -> Candidate:
    request = candidate.request
    updates = request.updates.model_copy(update={"optim": name})
    return replace(candidate, request=replace(request, optim=name, updates=updates))


def _shorter(candidate: Candidate, data: DataShape) -> Iterator[Step]:
    for length in LENGTHS:
        if length < data.longest:
            yield candidate, data.cut(length), {"max_seq_length": length}, f"the longest row has {data.longest} tokens"


def _ranks(candidate: Candidate, data: DataShape) -> Iterator[Step]:
    request = candidate.request
    if request.method == "full":
        return
    for rank in RANKS:
        if rank < request.lora.lora_r:
            yield replace(candidate, request=request.with_rank(rank)), data, {"lora_r": rank}, ""


def _together(candidate: Candidate, data: DataShape) -> Iterator[Step]:
    """Several changes at once, from the mildest mixture to the strongest."""
    optim = "paged_adamw_8bit" if candidate.request.device == "cpu" else "adamw_8bit"
    if candidate.request.optim.startswith("galore"):
        optim = "galore_adamw_8bit"
    lean = _with_optimizer(candidate, optim)
    rows = candidate.request.batches[0][0] * candidate.request.batches[0][1]
    freed: dict[str, Any] = {"optim": optim}
    if not _by_layer(candidate):
        lean = replace(lean, request=replace(lean.request, batches=((1, rows),)))
        if candidate.request.batches[-1][0] > 1:
            freed |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows}
    if lean.request.checkpointing is False:
        lean, freed = (
            replace(lean, request=replace(lean.request, checkpointing=True)),
            {
                **freed,
                "gradient_checkpointing": True,
            },
        )
    for length in LENGTHS:
        if length < data.longest:
            note = f"the longest row has {data.longest} tokens"
            yield lean, data.cut(length), {**freed, "max_seq_length": length}, note
