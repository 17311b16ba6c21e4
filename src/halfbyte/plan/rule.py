"""The rule of `--method auto`, written down once: which method, at which rank, and why.

It works on plain values that the plan's arithmetic has made (`Case`, `Offer`) and reads nothing else. docs/plan.md
says the same in other words. The clauses of `choose`, in order; the first that applies decides:

`fits`      What does not fit at its P95 is out. The layout has been made as small as it gets by then: see `estimate`.
`deadline`  With a deadline, what is not done by then at its P95 is out; failing that, what is not at its P50. If
            everything is too late, the fastest is taken, and the answer says so.
`capacity`  Full fine-tuning only where adapters cannot hold the data: more supervised tokens than two for each
            parameter of the largest adapters that are worth it, and a base of at most 1e9 parameters that fits with
            room. A network holds about 2 bits a parameter (arXiv 2404.05405) and text has about 1 bit a token, and
            LoRA keeps up with full fine-tuning until it is full ("LoRA Without Regret", Thinking Machines, 2025).
            Otherwise never: full fine-tuning writes a whole model for every task and forgets more of the old one
            (arXiv 2405.09673).
`blocks`    QLoRA on a quantized file, if it is at most a quarter slower: the file's own blocks are the same values
            that LoRA would decode into 16 bits, in a fraction of the memory, and they are what is served afterwards.
`room`      LoRA where its 16-bit base fits with room. Four bits are never better than sixteen, and small models lose
            much in them: NF4 raises Gemma 270M's perplexity by a quarter and Qwen 1.5B's by 4 %, and Gemma's loss
            after training is 0.10 lower on 16 bits (docs/results.md). It costs next to no time: a QLoRA step takes
            0.96 of a LoRA step on a CPU (docs/benchmarks.md), more on a GPU. "Room" is 80 % of a budget that is
            only what is free now, and all of one that was stated with --memory; and LoRA must not pay for the memory
            with time, by recomputing activations where QLoRA need not, or by being a quarter slower in small batches.
`memory`    QLoRA: it fits where LoRA does not, or not well. From 7B on, the published comparisons find the same
            quality (arXiv 2305.14314, table 4).
`left`      Else whatever fits.

Variants (DoRA, PiSSA, LoftQ, ...) are never chosen for anybody who did not ask: what they gain here is a fiftieth of
what the base is worth. Where only they were asked about, they stand for the plain method with their base.

The rank (`ranks`), where it is left open: 16, and 32 on a quantized base, whose adapters also repair what
quantization lost. Doubled while two bits a parameter hold less than the data's tokens, up to 128, and as long as the
adapters stay below a quarter of what they adapt; a raised rank is taken only if it fits without recomputed
activations, else the next lower. `lora_alpha` stays: with the scale alpha / r the best learning rate hardly depends
on the rank (LoRA Without Regret). Targets are all linears but the head, which is what makes adapters equal to full
fine-tuning (arXiv 2305.14314, section 5).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halfbyte.plan.calibration import Interval

RANK, QUANTIZED_RANK, HIGHEST_RANK = 16, 32, 128
TOKENS_A_PARAMETER = 2
"""Supervised tokens that a trained parameter holds: 2 bits over 1 bit a token."""
LARGEST_ADAPTERS = 0.25
"""Adapters beyond this share of the linears cost about what training these would."""
FULL_PARAMETERS = 1_000_000_000
ROOM = 0.8
SLOWER = 1.25


@dataclass(frozen=True)
class Case:
    """What the rule is asked about.

    budget      bytes that the run may take
    stated      the user gave it; otherwise it is what is free now, which other programs may want, too
    deadline    seconds; None: none
    tokens      supervised tokens of the distinct rows: one epoch
    parameters  of the base
    own_blocks  the model's file is quantized, and QLoRA trains on its blocks as they are
    capacity    parameters of the largest adapters worth training, `largest_adapters`
    """

    budget: int
    tokens: int
    parameters: int
    capacity: int
    stated: bool = True
    deadline: float | None = None
    own_blocks: bool = False

    @property
    def room(self) -> float:
        return self.budget if self.stated else ROOM * self.budget


@dataclass(frozen=True)
class Offer:
    """One method, laid out as large as it fits.

    name        as people call it (qdora); `base` is how it holds the weights: full, lora or qlora
    peak        bytes
    weights     bytes of the base as it is held
    recomputed  activations are recomputed, for memory's sake
    """

    name: str
    base: str
    peak: Interval
    seconds: Interval
    weights: int = 0
    recomputed: bool = False


@dataclass(frozen=True)
class Choice:
    """An offer's name, the clause that decided, and the reason in a sentence."""

    name: str
    clause: str
    reason: str


def ranks(quantized: bool, tokens: int, parameters_a_rank: int, linear_parameters: int) -> tuple[int, ...]:
    """The ranks to try for adapters of an open rank, the wanted one first, down to 16.

    tokens              supervised tokens of the distinct rows
    parameters_a_rank   adapter parameters at rank 1
    linear_parameters   of what is adapted
    """
    wanted = QUANTIZED_RANK if quantized else RANK
    while wanted < HIGHEST_RANK and tokens > TOKENS_A_PARAMETER * wanted * parameters_a_rank:
        wanted *= 2
    while wanted > RANK and wanted * parameters_a_rank > LARGEST_ADAPTERS * linear_parameters:
        wanted //= 2
    found = [wanted]
    while found[-1] > RANK:
        found.append(found[-1] // 2)
    return tuple(found)


def largest_adapters(parameters_a_rank: int, linear_parameters: int) -> int:
    """Parameters at the highest rank that the rule may choose (`Case.capacity`)."""
    rank = HIGHEST_RANK
    while rank > RANK and rank * parameters_a_rank > LARGEST_ADAPTERS * linear_parameters:
        rank //= 2
    return rank * parameters_a_rank


def choose(case: Case, offers: Sequence[Offer]) -> Choice | None:
    """The rule above; None if nothing fits."""
    fitting = [offer for offer in offers if offer.peak.p95 <= case.budget]
    if not fitting:
        return None
    pool, late = _in_time(fitting, case.deadline)
    if late:
        return Choice(late.name, "deadline", f"no method is done within {hours(case.deadline)}; this is the fastest")
    # Variants stand for their base only where the plain method was not asked about.
    of_base: dict[str, Offer] = {}
    for offer in sorted(pool, key=lambda o: o.name != o.base):
        of_base.setdefault(offer.base, offer)
    full, lora, qlora = (of_base.get(base) for base in ("full", "lora", "qlora"))
    every_lora = next((offer for offer in offers if offer.base == "lora"), None)
    if full and _beyond_adapters(case, full):
        return Choice(
            full.name,
            "capacity",
            f"{case.tokens:,} supervised tokens are more than adapters of {case.capacity:,} parameters hold, and "
            f"all of this small model fits ({gb(full.peak.p95)} of {gb(case.budget)})",
        )
    if case.own_blocks and qlora and (lora is None or qlora.seconds.p50 <= SLOWER * lora.seconds.p50):
        return Choice(qlora.name, "blocks", _own_blocks(qlora, every_lora))
    if lora and lora.peak.p95 <= case.room and not (qlora and _pays_with_time(lora, qlora)):
        return Choice(
            lora.name,
            "room",
            f"its 16-bit base, which loses nothing, fits with room ({gb(lora.peak.p95)} of {gb(case.budget)})"
            + ("" if qlora is None else f" and it is expected to be {_pace(lora, qlora)} than {qlora.name}"),
        )
    if qlora:
        return Choice(qlora.name, "memory", _instead_of(case, qlora, lora, every_lora))
    left = lora or full
    assert left is not None
    return Choice(left.name, "left", f"of the methods asked about it is the one that fits in {gb(case.budget)}")


def _in_time(fitting: Sequence[Offer], deadline: float | None) -> tuple[Sequence[Offer], Offer | None]:
    """(what is done in time, None), or (nothing, the fastest) where nothing is."""
    if deadline is None:
        return fitting, None
    times: tuple[Callable[[Offer], float], ...] = (lambda o: o.seconds.p95, lambda o: o.seconds.p50)
    for seconds in times:
        done = [offer for offer in fitting if seconds(offer) <= deadline]
        if done:
            return done, None
    return (), min(fitting, key=lambda o: o.seconds.p50)


def _beyond_adapters(case: Case, full: Offer) -> bool:
    small = case.parameters <= FULL_PARAMETERS
    return small and full.peak.p95 <= case.room and case.tokens > TOKENS_A_PARAMETER * case.capacity


def _pays_with_time(lora: Offer, qlora: Offer) -> bool:
    """Whether LoRA fits only in a layout that is much slower than the one that QLoRA has room for."""
    return (lora.recomputed and not qlora.recomputed) or lora.seconds.p50 > SLOWER * qlora.seconds.p50


def _own_blocks(qlora: Offer, lora: Offer | None) -> str:
    instead = f" in {gb(qlora.weights)} instead of {gb(lora.weights)}" if lora and lora.weights > qlora.weights else ""
    return f"the file's own blocks hold what 16 bits made of them would{instead}, and are what will be served"


def _instead_of(case: Case, qlora: Offer, lora: Offer | None, every_lora: Offer | None) -> str:
    """Why it is not LoRA. `every_lora`: also one that was left out."""
    if every_lora is None:
        return f"it fits in {gb(case.budget)}"
    need = gb(every_lora.peak.p95)
    if every_lora.peak.p95 > case.budget:
        return f"it fits in {gb(case.budget)}, which {every_lora.name} on a 16-bit base ({need}) does not"
    if lora is None:
        return f"it is done within {hours(case.deadline)}, which {every_lora.name} is not"
    if lora.peak.p95 > case.room:
        return (
            f"{lora.name} on a 16-bit base would take {need} of the {gb(case.budget)} that are free now, and this "
            f"leaves room ({gb(qlora.peak.p95)})"
        )
    if lora.recomputed and not qlora.recomputed:
        return f"{lora.name} on a 16-bit base ({need}) would have to recompute activations to fit, and this need not"
    return f"{lora.name} on a 16-bit base ({need}) would be {_pace(lora, qlora)} in the smaller batches that it needs"


def _pace(one: Offer, other: Offer) -> str:
    ratio = one.seconds.p50 / max(other.seconds.p50, 1e-9)
    if ratio < 0.97:
        return f"{1 - ratio:.0%} faster"
    return "no slower" if ratio < 1.03 else f"{ratio - 1:.0%} slower"


def hours(seconds: float | None) -> str:
    """Seconds for people."""
    assert seconds is not None
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:.3g} h" if seconds >= 3600 else f"{seconds / 60:.3g} min"


def gb(count: float) -> str:
    """Bytes for people: 1 GB is 1e9."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
