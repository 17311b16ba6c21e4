"""The claims that arithmetic decides: each verdict is computed here from shapes, `plan.memory` and `plan.stacks`.

A claim is taken apart into statements that hold or do not (`_Part`); all hold: confirmed, none: refuted, else partly.
Statements of one page that exclude each other make it contradict itself, whichever of them holds.

A published range of memory holds where ordinary setups span it: LEAN takes no more than its low end and LARGE no less
than its high end, both to the whole GB that is published.

Units: GB is 10⁹ bytes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from halfbyte.adapters.lora import LoraOptions
from halfbyte.models.spec import ModelSpec
from halfbyte.plan import memory, stacks
from halfbyte.plan.catalog import Machine, find_model, machines, models
from halfbyte.plan.catalog.machines import FILE as SHIPPED_MACHINES
from halfbyte.plan.claim_file import Claims, Decision
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
class _Part:
    """One statement of a claim, whether it holds, and why, in words."""

    holds: bool
    said: str
    why: str

    def __str__(self) -> str:
        return f"{self.said} ({self.why})"


@dataclass(frozen=True)
class _Span:
    """Peak GB of one method on one model: lean and large, of the stock stack, and halfbyte's own arithmetic."""

    low: float
    high: float
    own_low: float
    own_high: float

    def __str__(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f}; halfbyte {self.own_low:.1f} to {self.own_high:.1f}"


@cache
def _spec(name: str) -> ModelSpec:
    return ModelSpec.from_config(find_model(name))


def _parameters(name: str) -> int:
    return _spec(name).total_parameters


def _sixteen(name: str) -> float:
    """GB of the 16-bit weights."""
    return 2 * _parameters(name) / GB


def _four(name: str) -> tuple[float, float]:
    """GB of NF4 linears with double-quantized constants, and of what stays in 16 bits beside them."""
    spec = _spec(name)
    linears = sum(sum(memory.weight_bytes(x.parameters, "nf4")) for x in spec.linears())
    return linears / GB, 2 * (spec.total_parameters - spec.linear_parameters) / GB


@cache
def _span(name: str, method: str) -> _Span:
    found = []
    for setup in (LEAN, LARGE):
        stock = stacks.peak(_spec(name), stacks.find(STOCK), replace(setup, method=method)).total
        found.append((stock / GB, _own(name, method, setup)))
    (low, own_low), (high, own_high) = found
    return _Span(low, high, own_low, own_high)


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
    return sum(memory.phases(_spec(name), job)["train"].values()) / GB


def _adapter(name: str, rank: int, targets: str = "all-linear") -> int:
    return memory.adapter_parameters(_spec(name), Setup("lora", rank=rank, targets=targets).job())


@cache
def _cards() -> dict[str, Machine]:
    """The machines that ship: a verdict does not depend on what the user added to them."""
    return machines(SHIPPED_MACHINES)


def _usable(machine: str) -> float:
    """GB that a run gets of a card."""
    return _cards()[machine].usable / GB


def _title(machine: str) -> str:
    return _cards()[machine].title.removeprefix("NVIDIA ").removeprefix("GeForce ")


def _decision(
    parts: Sequence[_Part],
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


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _ends(span: _Span) -> tuple[float, float, float]:
    """(figure, low, high) of a span: the least that it takes, and both ends."""
    return span.low, span.low, span.high


def _range(name: str, method: str, low: float, high: float) -> _Part:
    """A published range of peak memory, in whole GB."""
    span = _span(name, method)
    said = f"{METHODS[method]} on {SIZES[name]} takes {low:g} to {high:g} GB"
    return _Part(round(span.low) <= low and round(span.high) >= high, said, str(span))


def _fits(name: str, method: str, machine: str, large: bool = False) -> _Part:
    """Whether a card holds the lean setup, or even the large one."""
    span, room = _span(name, method), _usable(machine)
    needed = span.high if large else span.low
    said = f"{METHODS[method]} on {SIZES[name]} fits {_title(machine)}"
    why = f"{'large' if large else 'lean'} {needed:.1f} of {room:.1f} GB"
    if not large and needed <= room:
        why += f", large {span.high:.1f} GB" + ("" if span.high <= room else " does not fit")
    return _Part(needed <= room, said, why)


def spans() -> list[tuple[str, str, str, dict[str, int]]]:
    """(size, method, setup, bytes by component) of every peak that a verdict here rests on, of the stock stack."""
    used = [(SEVEN, m) for m in METHODS] + [(THIRTEEN, m) for m in METHODS]
    used += [(THIRTY, m) for m in METHODS] + [(SIXTY_FIVE, m) for m in METHODS] + [(SEVENTY, "qlora")]
    found = []
    for name, method in used:
        for words, setup in (("lean", LEAN), ("large", LARGE)):
            peak = stacks.peak(_spec(name), stacks.find(STOCK), replace(setup, method=method))
            found.append((SIZES[name], METHODS[method], words, dict(peak.parts)))
    return found


# -- the claims ---------------------------------------------------------------------------------------------------


def _claim_1() -> Decision:
    linears, rest = _four(SEVEN)
    ratio = _sixteen(SEVEN) / (linears + rest)
    parts = [
        _range(SEVEN, "lora", 16, 20),
        _range(SEVEN, "qlora", 6, 10),
        _Part(abs(ratio - 4) < 0.25, "base ÷4", f"÷{ratio:.2f}: embeddings and head stay in 16 bits"),
    ]
    whole = f"2 x {_parameters(SEVEN):,} = {_sixteen(SEVEN):.2f} GB"
    return _decision(
        parts, f"{whole}; NF4 {linears:.2f} + 16-bit {rest:.2f} = {linears + rest:.2f} GB", ratio, unit="times smaller"
    )


def _claim_2() -> Decision:
    parts = [_range(THIRTEEN, "lora", 28, 36), _range(THIRTEEN, "qlora", 12, 16)]
    weights = (
        f"weights 2 x {_parameters(THIRTEEN):,} = {_sixteen(THIRTEEN):.1f} GB, in 4 bits {sum(_four(THIRTEEN)):.1f} GB"
    )
    return _decision(parts, weights, *_ends(_span(THIRTEEN, "qlora")))


def _claim_3() -> Decision:
    room = _cards()["rtx-3070"].usable
    longest = stacks.longest_context(_spec(SEVEN), stacks.find(STOCK), replace(LEAN, method="qlora"), room)
    seven = _fits(SEVEN, "qlora", "rtx-3070")
    parts = [
        replace(seven, why=f"{seven.why}; one row of up to {longest:,} tokens does"),
        _fits(THIRTEEN, "qlora", "rtx-3090", large=True),
    ]
    span = _span(SEVEN, "qlora")
    return _decision(parts, f"{span.low:.1f} < {_usable('rtx-3070'):.1f} GB", *_ends(span))


def _claim_4() -> Decision:
    span, (linears, rest) = _span(THIRTY, "qlora"), _four(THIRTY)
    return _decision(
        [_fits(THIRTY, "qlora", "rtx-3090"), _fits(THIRTY, "qlora", "rtx-a6000", large=True)],
        f"NF4 {linears:.1f} + 16-bit {rest:.1f} = {linears + rest:.1f} GB; in all {span.low:.1f} to {span.high:.1f}",
        *_ends(span),
        contradicts="One place says 24 GB and another 48 GB, without the setups that make both true",
    )


def _claim_5() -> Decision:
    span, small = _span(SEVEN, "lora"), _usable("rtx-4080")
    parts = [
        _Part(
            span.low > small,
            "it wants 24 GB or more",
            f"lean {span.low:.1f} GB fits the {small:.1f} GB of a 16 GB card",
        ),
        _Part(span.high < _usable("a100-40g"), "40 GB is comfortable", f"large {span.high:.1f} GB"),
    ]
    weights = _sixteen(SEVEN)
    return _decision(parts, f"weights {weights:.1f} + lean {span.low - weights:.1f} = {span.low:.1f} GB", *_ends(span))


def _claim_11() -> Decision:
    own = {"qlora": 1 - 12 / 780, "lora": 1 - 48 / 780}
    full = 12 * _parameters(SIXTY_FIVE) / GB
    true = {method: 1 - _span(SIXTY_FIVE, method).low / full for method in own}
    parts = [
        _Part(
            abs(true[m] - said) < 0.02,
            f"{METHODS[m]} saves {_percent(said)}",
            f"{_percent(true[m])} of {full:.0f} GB, 65B, lean",
        )
        for m, said in (("qlora", 0.75), ("lora", 0.70))
    ]
    qlora, lora = _percent(own["qlora"], 1), _percent(own["lora"], 1)
    return _decision(
        parts,
        f"1 - 12/780 = {qlora}; 1 - 48/780 = {lora}",
        true["qlora"],
        unit="saved by QLoRA, as a share",
        contradicts=f"Its own peaks (claim 13) give {qlora} and {lora}, not 75 % and 70 %",
    )


def _claim_12() -> Decision:
    steps = {"7B": (2.4, 1.8), "13B": (1.6, 1.1), "30B": (0.8, 0.5)}
    faster = {size: lora / qlora - 1 for size, (lora, qlora) in steps.items()}
    slower = [1 - qlora / lora for lora, qlora in steps.values()]
    shown = ", ".join(f"{size} {_percent(share)}" for size, share in faster.items())
    way = f"{_percent(min(slower))} to {_percent(max(slower))}"
    return _decision(
        [_Part(any(abs(share - 0.66) < 0.01 for share in faster.values()), "66 % in its own table", shown)],
        "; ".join(f"{lora}/{qlora} = {lora / qlora:.2f}" for lora, qlora in steps.values()),
        max(faster.values()),
        min(faster.values()),
        max(faster.values()),
        unit="faster by its own table, as a share",
        contradicts=f"No row of its own table has 66 %; read the other way round QLoRA is {way} slower there",
    )


def _claim_13() -> Decision:
    count, (linears, rest) = _parameters(SIXTY_FIVE), _four(SIXTY_FIVE)
    weights, quantized, full = _sixteen(SIXTY_FIVE), linears + rest, 12 * _parameters(SIXTY_FIVE) / GB
    both = f"the 4-bit linears alone are {linears:.1f} GB, {quantized:.1f} with embeddings and head"
    parts = [
        _Part(
            abs(full / 780 - 1) < 0.02,
            "full 780 GB",
            f"{full:.0f} GB with 12 bytes a parameter: 16-bit weights and gradients, two float32 moments",
        ),
        _Part(weights <= 48, "LoRA 48 GB", f"the 16-bit weights alone are {weights:.1f} GB"),
        _Part(quantized <= 12, "QLoRA 12 GB", both),
    ]
    return _decision(
        parts, f"2 x {count:,} = {weights:.1f} GB; {linears:.1f} + {rest:.1f} = {quantized:.1f} GB", quantized
    )


def _claim_16() -> Decision:
    thirty, sixty, one = _span(THIRTY, "lora"), _span(SIXTY_FIVE, "lora"), _usable("a100-80g")
    parts = [
        _fits(SEVEN, "lora", "rtx-3090", large=True),
        _fits(THIRTEEN, "lora", "a100-40g", large=True),
        _Part(thirty.low > one, "LoRA on 30B needs several A100", f"lean {thirty.low:.1f} of one's {one:.1f} GB"),
        _Part(sixty.low > one, "LoRA on 65B needs several", f"lean {sixty.low:.1f} of one's {one:.1f} GB"),
        _fits(SEVEN, "qlora", "rtx-3060"),
        _fits(THIRTEEN, "qlora", "rtx-3090", large=True),
        _fits(SIXTY_FIVE, "qlora", "a100-80g", large=True),
    ]
    return _decision(parts, f"30B: weights 2 x {_parameters(THIRTY):,} = {_sixteen(THIRTY):.1f} GB", *_ends(thirty))


def _claim_23() -> Decision:
    whole, one = _parameters(SEVEN), _adapter(SEVEN, 1)
    lowest, highest = -(-whole // (1000 * one)), whole // (100 * one)
    parts = [_Part(lowest <= highest, "100 to 1000 times fewer", f"7B, all linears, ranks {lowest} to {highest}")]
    for rank, targets, words in ((64, "all-linear", "all linears"), (8, "q_proj,v_proj", "q and v only")):
        ratio = whole / _adapter(SEVEN, rank, targets)
        parts.append(_Part(100 <= ratio <= 1000, f"the same at rank {rank} on {words}", f"{ratio:,.0f} times"))
    extremes = whole / _adapter(SEVEN, 64), whole / _adapter(SEVEN, 8, "q_proj,v_proj")
    count = _adapter(SEVEN, 16)
    return _decision(
        parts, f"rank 16: {whole:,} / {count:,} = {whole / count:.0f}", whole / count, *extremes, unit="times"
    )


def _claim_24() -> Decision:
    lora, qlora = _span(SEVEN, "lora"), _span(SEVEN, "qlora")
    weights, full = _sixteen(SEVEN), 8 * _parameters(SEVEN) / GB
    parts = [
        _Part(weights <= 12, "LoRA ~12 GB", f"the 16-bit weights alone are {weights:.1f} GB; {lora}"),
        _Part(qlora.low <= 8 <= qlora.high, "QLoRA ~8 GB", str(qlora)),
        _Part(full >= 40, "full 40 GB or more", f"{full:.1f} GB with weights, gradients and both moments in 16 bits"),
    ]
    return _decision(parts, f"2 x {_parameters(SEVEN):,} = {weights:.1f} GB", *_ends(lora))


def _claim_25() -> Decision:
    full, largest = 8 * _parameters(SEVEN) / GB, _usable("rtx-5090")
    seven = _fits(SEVEN, "lora", "rtx-3060")
    fitting = [m for m in models().values() if ModelSpec.serves(m.config) and _lean_lora(m.name) <= _usable("rtx-3060")]
    most = max(fitting, key=lambda model: model.parameters)
    parts = [
        _fits(SEVEN, "qlora", "rtx-3070"),
        replace(seven, why=f"{seven.why}; of the catalogue's models {most.name} is the largest that does"),
        _Part(
            full > largest, "full fine-tuning of 7B on data-centre cards", f"{full:.1f} GB; RTX 5090 has {largest:.1f}"
        ),
    ]
    span = _span(SEVEN, "lora")
    return _decision(parts, f"LoRA lean {span.low:.1f} > {_usable('rtx-3060'):.1f} GB of a 12 GB card", *_ends(span))


def _lean_lora(name: str) -> float:
    return stacks.peak(_spec(name), stacks.find(STOCK), LEAN).total / GB


def _claim_28() -> Decision:
    linears, rest = _four(SIXTY_FIVE)
    quantized, weights, room = linears + rest, _sixteen(SIXTY_FIVE), _usable("rtx-3090")
    alone = f"the 4-bit weights alone are {quantized:.1f} GB; the same page says that 70B does not fit 24 GB"
    parts = [
        _Part(round(weights, -1) == 130, "130 GB in 16 bits", f"{weights:.1f} GB"),
        _fits(SIXTY_FIVE, "qlora", "rtx-a6000"),
        _Part(quantized <= room, "or even 24 GB", alone),
    ]
    working = f"{linears:.1f} + {rest:.1f} = {quantized:.1f} > {room:.1f} GB"
    return _decision(parts, working, *_ends(_span(SIXTY_FIVE, "qlora")))


def _claim_29() -> Decision:
    sizes = sorted(round(m.memory / (1 << 30)) for name, m in _cards().items() if name.startswith("a100"))
    shown = " and ".join(map(str, sizes))
    part = _Part(48 in sizes, "an A100 with 48 GB", f"there are {shown} GB; 48 GB are what an RTX A6000 has")
    return _decision([part], f"48 is neither {' nor '.join(map(str, sizes))}")


def _claim_31() -> Decision:
    span, weights = _span(SEVEN, "lora"), _sixteen(SEVEN)
    parts = [
        _Part(span.high > 40, "well above 40 GB", f"large {span.high:.1f} GB"),
        _fits(SEVEN, "lora", "a100-40g", large=True),
        _range(SEVEN, "lora", 18, 22),
    ]
    beside = f"{span.low - weights:.1f} to {span.high - weights:.1f}"
    return _decision(
        parts,
        f"2 x {_parameters(SEVEN):,} = {weights:.1f} GB of weights, and {beside} GB beside them",
        *_ends(span),
        contradicts="More than 40 GB, on a card of 40 GB, and 18 to 22 GB exclude each other",
    )


def _claim_32() -> Decision:
    linears, rest = _four(SIXTY_FIVE)
    quantized, weights = linears + rest, _sixteen(SIXTY_FIVE)
    saved, pair = 1 - quantized / weights, 2 * _usable("rtx-3090")
    codes, lean = _parameters(SIXTY_FIVE) / 2 / GB, _span(SIXTY_FIVE, "qlora").low
    parts = [
        _Part(
            round(saved, 2) == 0.75, "base weights -75 %", f"{_percent(saved, 1)} with constants and 16-bit embeddings"
        ),
        _Part(
            round(quantized) <= 33, "65B in 32 to 33 GB", f"{codes:.1f} GB if all were codes, {quantized:.1f} as held"
        ),
        _Part(lean < pair, "a pair of 24 GB cards holds it", f"lean {lean:.1f} of {pair:.1f} GB"),
    ]
    return _decision(parts, f"1 - ({linears:.1f} + {rest:.1f}) / {weights:.1f} = {_percent(saved, 1)}", quantized)


def _claim_33() -> Decision:
    card, tokens = _cards()["rtx-4090"], 3 * 10_000 * 512
    rate = card.gemm["bfloat16"] * card.reachable
    hours = {name: 6 * _spec(name).matmul_parameters() * tokens / rate / 3600 for name in (SEVEN, THIRTEEN)}
    least = (
        f"matrix products of 3 epochs of 10,000 rows of 512 tokens: {hours[SEVEN]:.1f} h, 13B {hours[THIRTEEN]:.1f} h"
    )
    parts = [
        _fits(SEVEN, "qlora", "rtx-4090", large=True),
        _fits(THIRTEEN, "qlora", "rtx-4090", large=True),
        _Part(hours[THIRTEEN] < 24, "in hours, as far as arithmetic goes", least),
    ]
    count = _spec(SEVEN).matmul_parameters()
    working = (
        f"forward, recomputed, gradient: 6 x {count:,} x {tokens:,} / {rate:.3g} FLOP/s (assumed) "
        f"= {3600 * hours[SEVEN]:,.0f} s"
    )
    return _decision(parts, working, hours[SEVEN], hours[SEVEN], hours[THIRTEEN], unit="hours")


def _claim_36() -> Decision:
    single, double = 32 / 64, 8 / 64 + 32 / (64 * 256)
    saved = single - double
    part = _Part(round(saved, 2) == 0.37, "0.37 bits", f"constants of {single:.3f} bits a weight become {double:.3f}")
    return _decision([part], f"32/64 - (8/64 + 32/(64 x 256)) = {saved:.3f}", saved, unit="bits a parameter")


def _claim_37() -> Decision:
    name, targets = "llama-3.1-8b", "q_proj,k_proj,v_proj,o_proj"
    spec, count, half = _spec(name), _adapter(name, 16, targets), _adapter(name, 8, targets)
    share = count / _parameters(name)
    rank_8 = f"rank 8 would have {half:,}, {_percent(half / _parameters(name), 3)}"
    parts = [
        _Part(share < 0.01, "a fraction of a percent", f"{_percent(share, 2)}"),
        _Part(abs(count / 6.5e6 - 1) < 0.05, "~6.5M parameters", f"{count:,}; {rank_8}"),
        _Part(round(share * 100, 2) == 0.08, "0.08 %", f"{_percent(share, 2)}"),
    ]
    d, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    working = f"{spec.num_layers} layers x 16 x (2 x ({d:,} + {q:,}) + 2 x ({d:,} + {kv:,})) = {count:,}"
    return _decision(parts, working, count, unit="parameters")


def _claim_39() -> Decision:
    count, (linears, rest) = _parameters(SEVEN), _four(SEVEN)
    full, moments, adapter = 8 * count / GB, 4 * count / GB, _adapter(SEVEN, 16)
    state = 8 * adapter / GB
    parts = [
        _Part(
            45 <= full <= 60,
            "full takes 45 to 60 GB",
            f"{full:.1f} GB if weights, gradients and both moments are 16-bit; {12 * count / GB:.0f} "
            "with float32 moments",
        ),
        _Part(abs(moments / 28 - 1) < 0.05, "its optimizer 28 GB", f"two 16-bit moments are {moments:.1f} GB"),
        _range(SEVEN, "lora", 18, 22),
        _range(SEVEN, "qlora", 6, 10),
        _Part(abs(linears / 3.5 - 1) < 0.05, "NF4 weights 3.5 GB", f"{linears:.2f} GB, and {rest:.2f} stay in 16 bits"),
        _Part(round(state, 1) == 0.3, "optimizer 0.3 GB", f"float32 moments of rank 16 on all linears: {state:.2f} GB"),
    ]
    return _decision(parts, f"8 x {count:,} = {full:.1f} GB; 8 x {adapter:,} = {state:.2f} GB", full)


def _claim_46() -> Decision:
    linears, rest = _four(SEVENTY)
    quantized, room = linears + rest, _usable("rtx-3090")
    parts = [
        _fits(SEVENTY, "qlora", "rtx-a6000"),
        _Part(quantized > room, "not on 24 GB", f"the 4-bit weights alone are {quantized:.1f} GB"),
    ]
    working = f"{linears:.1f} + {rest:.1f} = {quantized:.1f} > {room:.1f} GB"
    return _decision(parts, working, *_ends(_span(SEVENTY, "qlora")))


DECIDED: dict[int, Callable[[], Decision]] = {
    1: _claim_1,
    2: _claim_2,
    3: _claim_3,
    4: _claim_4,
    5: _claim_5,
    11: _claim_11,
    12: _claim_12,
    13: _claim_13,
    16: _claim_16,
    23: _claim_23,
    24: _claim_24,
    25: _claim_25,
    28: _claim_28,
    29: _claim_29,
    31: _claim_31,
    32: _claim_32,
    33: _claim_33,
    36: _claim_36,
    37: _claim_37,
    39: _claim_39,
    46: _claim_46,
}
"""By number: every claim of kind A, and the A part of a mixed one."""


def decided(claims: Claims, numbers: Iterable[int] = DECIDED) -> Claims:
    """The claims with everything that arithmetic decides computed anew; other decisions stay as they are."""
    for number in numbers:
        claims = claims.replaced(claims.find(number).with_decision(DECIDED[number]()))
    return claims
