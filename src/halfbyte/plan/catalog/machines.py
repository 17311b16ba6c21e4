"""Machines to plan for without having them: GPUs and processors by name.

An entry holds what the vendor states (memory, bandwidth, peak rates of dense matrix products) and two assumptions that
nobody measured here and that say so: the share of those peaks that a large product reaches, and the memory that is gone
before a run starts. A measurement of a machine (`plan.hardware.measure`) is worth more than any of it.

The user's file adds machines and changes entries: of one that there is already it need name only the fields that
differ, a price above all, since none ships.

    rtx-4090:
      price: 0.34 EUR/h

Units: bytes, FLOP/s (a multiply-add is two), bytes a second, weights a second.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from halfbyte.errors import UsageError
from halfbyte.options import Size
from halfbyte.plan.catalog.names import nearest, plain
from halfbyte.plan.hardware import Gpu, Hardware, Rates
from halfbyte.plan.price import Price
from halfbyte.yamlfile import Entry, read_yaml

FILE = Path(__file__).with_name("machines.yaml")
DECODED_BYTES = 2.5
"""Memory traffic of decoding one 4-bit weight: half a byte read, two written. It is what bounds decoding where an entry
states no rate of its own (assumed, unmeasured)."""
_MOST = 1e18


@dataclass(frozen=True)
class Machine:
    """One machine as an entry states it.

    name, title     the catalogue's name, and the product's
    kind            "gpu" or "cpu"
    memory          bytes of the card, or of the machine; what the driver shows
    reserved        bytes of it that no run gets: driver, display or desktop (assumed, unmeasured)
    bandwidth       bytes a second, the vendor's peak
    gemm            peak FLOP/s of dense products by dtype (bfloat16, float16, float32), without sparsity
    reachable       share of `gemm` that a large product reaches (assumed, unmeasured)
    reachable_bandwidth   share of `bandwidth` that a long copy reaches (assumed, unmeasured)
    dequantize      4-bit weights decoded a second; None: as memory traffic allows (DECODED_BYTES)
    price           None where the user entered none
    cores           of a processor; of a GPU's host nothing is known: 0
    bf16            whether bfloat16 is fast enough to compute in
    """

    name: str
    title: str
    kind: Literal["gpu", "cpu"]
    memory: int
    bandwidth: float
    gemm: Mapping[str, float]
    reachable: float
    reachable_bandwidth: float = 0.8
    reserved: int = 0
    dequantize: float | None = None
    price: Price | None = None
    cores: int = 0
    bf16: bool = True

    @property
    def usable(self) -> int:
        """Bytes that a run may plan with, a budget for `make_plan`. The CUDA context is in the plan itself."""
        return max(self.memory - self.reserved, 0)

    @property
    def device(self) -> str:
        return "cuda" if self.kind == "gpu" else "cpu"

    @property
    def dtype(self) -> str:
        """What `dtype: auto` computes in here."""
        if self.bf16:
            return "bfloat16"
        return "float16" if self.kind == "gpu" else "float32"

    def hardware(self) -> Hardware:
        """As `plan.hardware.detect` would describe it with nothing else running."""
        gpus: tuple[Gpu, ...] = ()
        if self.kind == "gpu":
            gpus = (Gpu(0, self.title, self.memory, self.usable, capability="", bf16=self.bf16),)
        return Hardware(
            system="catalogue",
            processor=self.title if self.kind == "cpu" else "",
            cores=self.cores,
            memory_total=self.memory,
            memory_available=self.usable,
            memory_limit=f"{self.name} in the catalogue of machines",
            instruction_sets=(),
            gpus=gpus,
        )

    def rates(self) -> Rates:
        """As `plan.hardware.measure` would give them, taken from the vendor's peaks and the assumed share of them."""
        bandwidth = self.bandwidth * self.reachable_bandwidth
        return Rates(
            device=self.device,
            gemm={dtype: rate * self.reachable for dtype, rate in self.gemm.items()},
            bandwidth=bandwidth,
            dequantize=self.dequantize or bandwidth / DECODED_BYTES,
        )


class _Gemm(BaseModel):
    """Peak rates by dtype."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bfloat16: float | None = Field(None, gt=0, lt=_MOST)
    float16: float | None = Field(None, gt=0, lt=_MOST)
    float32: float = Field(gt=0, lt=_MOST)


class _Fields(BaseModel):
    """What an entry of a machines file may say; checked when all of an entry's sources are laid over one another."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    title: str = ""
    kind: Literal["gpu", "cpu"]
    memory: Size = Field(gt=0, lt=1 << 50)
    reserved: Size = Field(0, ge=0)
    bandwidth: float = Field(gt=0, lt=_MOST)
    gemm: _Gemm
    reachable: float = Field(0.5, gt=0, le=1)
    reachable_bandwidth: float = Field(0.8, gt=0, le=1)
    dequantize: float | None = Field(None, gt=0, lt=_MOST)
    price: Price | None = None
    cores: int = Field(0, ge=0, le=100_000)
    bf16: bool = True

    @field_validator("price", mode="before")
    @classmethod
    def _price(cls, value: Any) -> Any:
        try:
            return value if value is None else Price.parse(str(value))
        except UsageError as error:
            raise ValueError(str(error)) from None


def user_file() -> Path:
    """Where the user's machines are read from, whether it exists or not."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return folder / "halfbyte" / "machines.yaml"


def machines(extra: Path | None = None) -> dict[str, Machine]:
    """Every machine by name: what ships, then the user's file (`extra`, or `user_file()` where it exists).

    UsageError naming file, line, entry and field for a wrong entry, and for a file that was asked for and is not there.
    """
    if extra is None:
        return _with(user_file()) if user_file().is_file() else dict(_shipped())
    path = extra.expanduser()
    if not path.exists():
        raise UsageError(f"{path}: no such file of machines")
    return _with(path)


def find_machine(name: str, extra: Path | None = None) -> Machine:
    """One machine, however its name is spelled; UsageError with the nearest names for an unknown one."""
    known = machines(extra)
    found = known.get(name) or {plain(key): machine for key, machine in known.items()}.get(plain(name))
    if found is None:
        raise UsageError(f"{name!r} is not a machine of the catalogue: {nearest(name, known)}")
    return found


@cache
def _shipped() -> dict[str, Machine]:
    return {name: _machine(name, entry, {}) for name, entry in read_yaml(FILE).items()}


@cache
def _shipped_fields() -> Mapping[str, dict[str, Any]]:
    return MappingProxyType({name: dict(entry.value) for name, entry in read_yaml(FILE).items()})


def _with(path: Path) -> dict[str, Machine]:
    made = dict(_shipped())
    given: dict[str, Entry] = {}
    for name, entry in read_yaml(path).items():
        if plain(name) in given:
            raise UsageError(f"{entry.where}: {name} was already given at {given[plain(name)].where}: remove one")
        given[plain(name)] = entry
        key = next((known for known in made if plain(known) == plain(name)), name)
        made[key] = _machine(key, entry, _shipped_fields().get(key, {}))
    return made


def _machine(name: str, entry: Entry, base: Mapping[str, Any]) -> Machine:
    """One entry laid over `base`, the fields that it need not repeat."""
    if not isinstance(entry.value, dict):
        raise UsageError(f"{entry.where}: {name} should have fields below it (kind, memory, bandwidth, gemm, price)")
    try:
        fields = _Fields.model_validate({**base, **entry.value})
    except ValidationError as error:
        raise UsageError(f"{entry.where}: {name}: {_explain(error, new=not base)}") from None
    made = Machine(
        name=name,
        title=fields.title or name,
        kind=fields.kind,
        memory=fields.memory,
        bandwidth=fields.bandwidth,
        gemm=MappingProxyType({k: v for k, v in fields.gemm.model_dump().items() if v is not None}),
        reachable=fields.reachable,
        reachable_bandwidth=fields.reachable_bandwidth,
        reserved=fields.reserved,
        dequantize=fields.dequantize,
        price=fields.price,
        cores=fields.cores,
        bf16=fields.bf16,
    )
    if made.dtype not in made.gemm:
        raise UsageError(f"{entry.where}: {name}: gemm has no rate for {made.dtype}, which it would compute in")
    if made.usable == 0:
        raise UsageError(f"{entry.where}: {name}: reserved leaves nothing of its memory")
    return made


def _explain(error: ValidationError, new: bool) -> str:
    """The first thing that is wrong, as `field: what`."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _Gemm.model_fields if field.startswith("gemm.") else _Fields.model_fields
        return f"{field} is not a field of a machine: {nearest(field.rpartition('.')[2], known)}"
    if first["type"] == "missing":
        what = " (a new machine needs kind, memory, bandwidth and gemm)" if new else ""
        return f"{field} is missing{what}"
    said = first["msg"].removeprefix("Value error, ")
    return f"{field}: {said}, not {first['input']!r}"
