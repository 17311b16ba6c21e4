"""What `plan.claim_arithmetic` is written with: statements that hold or do not, peaks and cards.

Units: GB is 10⁹ bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from halfbyte.adapters.lora import LoraOptions
from halfbyte.models.spec import ModelSpec
from halfbyte.plan import memory, stacks
from halfbyte.plan.catalog import Machine, find_model, machines
from halfbyte.plan.catalog.machines import FILE as SHIPPED_MACHINES
from halfbyte.plan.claim_file import Decision
from halfbyte.plan.memory import Job
from halfbyte.plan.stacks import Setup
from halfbyte.quant.options import QuantOptions

GB = 1e9
STOCK = "transformers-peft-2024"
LEAN, LARGE = Setup("lora", length=512), Setup("lora", batch=4, length=2048)
SEVEN, THIRTEEN, THIRTY, SIXTY_FIVE, SEVENTY = "llama-2-7b", "llama-2-13b", "llama-30b", "llama-65b", "llama-2-70b"
SIZES = {SEVEN: "7B", THIRTEEN: "13B", THIRTY: "30B", SIXTY_FIVE: "65B", SEVENTY: "70B"}
METHODS = {"lora": "LoRA", "qlora": "QLoRA"}


@dataclass(frozen=True)
class Part:
    """One statement of a claim, whether it holds, and why, in words."""

    holds: bool
    said: str
    why: str

    def __str__(self) -> str:
        return f"{self.said} ({self.why})"


@dataclass(frozen=True)
class Span:
    """Peak GB of one method on one model: lean and large, of the stock stack, and halfbyte's own arithmetic."""

    low: float
    high: float
    own_low: float
    own_high: float

    def __str__(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f}; halfbyte {self.own_low:.1f} to {self.own_high:.1f}"


@cache
def spec_of(name: str) -> ModelSpec:
    return ModelSpec.from_config(find_model(name))


def parameters(name: str) -> int:
    return spec_of(name).total_parameters


def sixteen(name: str) -> float:
    """GB of the 16-bit weights."""
    return 2 * parameters(name) / GB


def four(name: str) -> tuple[float, float]:
    """GB of NF4 linears with double-quantized constants, and of what stays in 16 bits beside them."""
    spec = spec_of(name)
    linears = sum(sum(memory.weight_bytes(x.parameters, "nf4")) for x in spec.linears())
    return linears / GB, 2 * (spec.total_parameters - spec.linear_parameters) / GB


@cache
def span_of(name: str, method: str) -> Span:
    found = []
    for setup in (LEAN, LARGE):
        stock = stacks.peak(spec_of(name), stacks.find(STOCK), replace(setup, method=method)).total
        found.append((stock / GB, _own(name, method, setup)))
    (low, own_low), (high, own_high) = found
    return Span(low, high, own_low, own_high)


def _own(name: str, method: str, setup: Setup) -> float:
    """GB of halfbyte's own engine on a GPU, in training: arithmetic that no GPU run has checked."""
    job = Job(
        method,
        "bfloat16",
        QuantOptions(),
        LoraOptions(lora_r=setup.rank),
        checkpointing=True,
        micro_tokens=setup.tokens,
        longest=setup.length,
        device="cuda",
        file_itemsize=2,
    )
    return sum(memory.phases(spec_of(name), job)["train"].values()) / GB


def adapter(name: str, rank: int, targets: str = "all-linear") -> int:
    return memory.adapter_parameters(spec_of(name), Setup("lora", rank=rank, targets=targets).job())


@cache
def cards() -> dict[str, Machine]:
    """The machines that ship: a verdict does not depend on what the user added to them."""
    return machines(SHIPPED_MACHINES)


def usable(machine: str) -> float:
    """GB that a run gets of a card."""
    return cards()[machine].usable / GB


def title_of(machine: str) -> str:
    return cards()[machine].title.removeprefix("NVIDIA ").removeprefix("GeForce ")


def decision(
    parts: Sequence[Part],
    working: str,
    figure: float | None = None,
    low: float | None = None,
    high: float | None = None,
    unit: str = "GB",
    contradicts: str = "",
) -> Decision:
    """The verdict of the parts; `contradicts` says which statements of the page exclude each other."""
    holding = sum(part.holds for part in parts)
    verdict = "confirmed" if holding == len(parts) else "partly" if holding else "refuted"
    words = [f"{contradicts}."] if contradicts else []
    for kind, label in ((True, "Holds"), (False, "Does not hold")):
        own = [str(part) for part in parts if part.holds is kind]
        words += [f"{label}: {'; '.join(own)}."] if own else []
    return Decision(
        by="arithmetic",
        verdict="contradicts itself" if contradicts else verdict,
        sentence=" ".join(words),
        figure=_rounded(figure),
        low=_rounded(low),
        high=_rounded(high),
        unit=unit if figure is not None else "",
        working=working,
    )


def _rounded(value: float | None) -> float | None:
    """Six digits, which is more than any of these figures carries; whole numbers stay whole."""
    return value if value is None or value == int(value) else float(f"{value:.6g}")


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def ends(span: Span) -> tuple[float, float, float]:
    """(figure, low, high) of a span: the least that it takes, and both ends."""
    return span.low, span.low, span.high


def takes(name: str, method: str, low: float, high: float) -> Part:
    """A published range of peak memory, in whole GB."""
    span = span_of(name, method)
    said = f"{METHODS[method]} on {SIZES[name]} takes {low:g} to {high:g} GB"
    return Part(round(span.low) <= low and round(span.high) >= high, said, str(span))


def fits(name: str, method: str, machine: str, large: bool = False) -> Part:
    """Whether a card holds the lean setup, or even the large one."""
    span, room = span_of(name, method), usable(machine)
    needed = span.high if large else span.low
    said = f"{METHODS[method]} on {SIZES[name]} fits {title_of(machine)}"
    why = f"{'large' if large else 'lean'} {needed:.1f} of {room:.1f} GB"
    if not large and needed <= room:
        why += f", large {span.high:.1f} GB" + ("" if span.high <= room else " does not fit")
    return Part(needed <= room, said, why)


def spans() -> list[tuple[str, str, str, dict[str, int]]]:
    """(size, method, setup, bytes by component) of every peak that a verdict here rests on, of the stock stack."""
    used = [(SEVEN, m) for m in METHODS] + [(THIRTEEN, m) for m in METHODS]
    used += [(THIRTY, m) for m in METHODS] + [(SIXTY_FIVE, m) for m in METHODS] + [(SEVENTY, "qlora")]
    found = []
    for name, method in used:
        for words, setup in (("lean", LEAN), ("large", LARGE)):
            peak = stacks.peak(spec_of(name), stacks.find(STOCK), replace(setup, method=method))
            found.append((SIZES[name], METHODS[method], words, dict(peak.parts)))
    return found
