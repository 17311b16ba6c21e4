"""The claims that arithmetic decides: each verdict is computed here from shapes, `plan.memory` and `plan.stacks`.

A claim is taken apart into statements that hold or do not (`_Part`); all hold: confirmed, none: refuted, else partly.
Statements of one page that exclude each other make it contradict itself, whichever of them holds.

A published range of memory holds where ordinary setups span it: LEAN takes no more than its low end and LARGE no less
than its high end, both to the whole GB that is published.

Units: GB is 10⁹ bytes.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from halfbyte.models.spec import ModelSpec
from halfbyte.plan import stacks
from halfbyte.plan.catalog import models
from halfbyte.plan.claim_file import Claims, Decision
from halfbyte.plan.claim_parts import (
    GB,
    LEAN,
    METHODS,
    SEVEN,
    SEVENTY,
    SIXTY_FIVE,
    STOCK,
    THIRTEEN,
    THIRTY,
    Part,
    adapter,
    cards,
    decision,
    ends,
    fits,
    four,
    parameters,
    percent,
    sixteen,
    span_of,
    spec_of,
    takes,
    usable,
)

# -- the claims ---------------------------------------------------------------------------------------------------


def _claim_1() -> Decision:
    linears, rest = four(SEVEN)
    ratio = sixteen(SEVEN) / (linears + rest)
    parts = [
        takes(SEVEN, "lora", 16, 20),
        takes(SEVEN, "qlora", 6, 10),
        Part(abs(ratio - 4) < 0.25, "base ÷4", f"÷{ratio:.2f}: embeddings and head stay in 16 bits"),
    ]
    whole = f"2 x {parameters(SEVEN):,} = {sixteen(SEVEN):.2f} GB"
    return decision(
        parts, f"{whole}; NF4 {linears:.2f} + 16-bit {rest:.2f} = {linears + rest:.2f} GB", ratio, unit="times smaller"
    )


def _claim_2() -> Decision:
    parts = [takes(THIRTEEN, "lora", 28, 36), takes(THIRTEEN, "qlora", 12, 16)]
    weights = (
        f"weights 2 x {parameters(THIRTEEN):,} = {sixteen(THIRTEEN):.1f} GB, in 4 bits {sum(four(THIRTEEN)):.1f} GB"
    )
    return decision(parts, weights, *ends(span_of(THIRTEEN, "qlora")))


def _claim_3() -> Decision:
    room = cards()["rtx-3070"].usable
    longest = stacks.longest_context(spec_of(SEVEN), stacks.find(STOCK), replace(LEAN, method="qlora"), room)
    seven = fits(SEVEN, "qlora", "rtx-3070")
    parts = [
        replace(seven, why=f"{seven.why}; one row of up to {longest:,} tokens does"),
        fits(THIRTEEN, "qlora", "rtx-3090", large=True),
    ]
    span = span_of(SEVEN, "qlora")
    return decision(parts, f"{span.low:.1f} < {usable('rtx-3070'):.1f} GB", *ends(span))


def _claim_4() -> Decision:
    span, (linears, rest) = span_of(THIRTY, "qlora"), four(THIRTY)
    return decision(
        [fits(THIRTY, "qlora", "rtx-3090"), fits(THIRTY, "qlora", "rtx-a6000", large=True)],
        f"NF4 {linears:.1f} + 16-bit {rest:.1f} = {linears + rest:.1f} GB; in all {span.low:.1f} to {span.high:.1f}",
        *ends(span),
        contradicts="One place says 24 GB and another 48 GB, without the setups that make both true",
    )


def _claim_5() -> Decision:
    span, small = span_of(SEVEN, "lora"), usable("rtx-4080")
    parts = [
        Part(
            span.low > small,
            "it wants 24 GB or more",
            f"lean {span.low:.1f} GB fits the {small:.1f} GB of a 16 GB card",
        ),
        Part(span.high < usable("a100-40g"), "40 GB is comfortable", f"large {span.high:.1f} GB"),
    ]
    weights = sixteen(SEVEN)
    return decision(parts, f"weights {weights:.1f} + lean {span.low - weights:.1f} = {span.low:.1f} GB", *ends(span))


def _claim_11() -> Decision:
    own = {"qlora": 1 - 12 / 780, "lora": 1 - 48 / 780}
    full = 12 * parameters(SIXTY_FIVE) / GB
    true = {method: 1 - span_of(SIXTY_FIVE, method).low / full for method in own}
    parts = [
        Part(
            abs(true[m] - said) < 0.02,
            f"{METHODS[m]} saves {percent(said)}",
            f"{percent(true[m])} of {full:.0f} GB, 65B, lean",
        )
        for m, said in (("qlora", 0.75), ("lora", 0.70))
    ]
    qlora, lora = percent(own["qlora"], 1), percent(own["lora"], 1)
    return decision(
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
    shown = ", ".join(f"{size} {percent(share)}" for size, share in faster.items())
    way = f"{percent(min(slower))} to {percent(max(slower))}"
    return decision(
        [Part(any(abs(share - 0.66) < 0.01 for share in faster.values()), "66 % in its own table", shown)],
        "; ".join(f"{lora}/{qlora} = {lora / qlora:.2f}" for lora, qlora in steps.values()),
        max(faster.values()),
        min(faster.values()),
        max(faster.values()),
        unit="faster by its own table, as a share",
        contradicts=f"No row of its own table has 66 %; read the other way round QLoRA is {way} slower there",
    )


def _claim_13() -> Decision:
    count, (linears, rest) = parameters(SIXTY_FIVE), four(SIXTY_FIVE)
    weights, quantized, full = sixteen(SIXTY_FIVE), linears + rest, 12 * parameters(SIXTY_FIVE) / GB
    both = f"the 4-bit linears alone are {linears:.1f} GB, {quantized:.1f} with embeddings and head"
    parts = [
        Part(
            abs(full / 780 - 1) < 0.02,
            "full 780 GB",
            f"{full:.0f} GB with 12 bytes a parameter: 16-bit weights and gradients, two float32 moments",
        ),
        Part(weights <= 48, "LoRA 48 GB", f"the 16-bit weights alone are {weights:.1f} GB"),
        Part(quantized <= 12, "QLoRA 12 GB", both),
    ]
    return decision(
        parts, f"2 x {count:,} = {weights:.1f} GB; {linears:.1f} + {rest:.1f} = {quantized:.1f} GB", quantized
    )


def _claim_16() -> Decision:
    thirty, sixty, one = span_of(THIRTY, "lora"), span_of(SIXTY_FIVE, "lora"), usable("a100-80g")
    parts = [
        fits(SEVEN, "lora", "rtx-3090", large=True),
        fits(THIRTEEN, "lora", "a100-40g", large=True),
        Part(thirty.low > one, "LoRA on 30B needs several A100", f"lean {thirty.low:.1f} of one's {one:.1f} GB"),
        Part(sixty.low > one, "LoRA on 65B needs several", f"lean {sixty.low:.1f} of one's {one:.1f} GB"),
        fits(SEVEN, "qlora", "rtx-3060"),
        fits(THIRTEEN, "qlora", "rtx-3090", large=True),
        fits(SIXTY_FIVE, "qlora", "a100-80g", large=True),
    ]
    return decision(parts, f"30B: weights 2 x {parameters(THIRTY):,} = {sixteen(THIRTY):.1f} GB", *ends(thirty))


def _claim_23() -> Decision:
    whole, one = parameters(SEVEN), adapter(SEVEN, 1)
    lowest, highest = -(-whole // (1000 * one)), whole // (100 * one)
    parts = [Part(lowest <= highest, "100 to 1000 times fewer", f"7B, all linears, ranks {lowest} to {highest}")]
    for rank, targets, words in ((64, "all-linear", "all linears"), (8, "q_proj,v_proj", "q and v only")):
        ratio = whole / adapter(SEVEN, rank, targets)
        parts.append(Part(100 <= ratio <= 1000, f"the same at rank {rank} on {words}", f"{ratio:,.0f} times"))
    extremes = whole / adapter(SEVEN, 64), whole / adapter(SEVEN, 8, "q_proj,v_proj")
    count = adapter(SEVEN, 16)
    return decision(
        parts, f"rank 16: {whole:,} / {count:,} = {whole / count:.0f}", whole / count, *extremes, unit="times"
    )


def _claim_24() -> Decision:
    lora, qlora = span_of(SEVEN, "lora"), span_of(SEVEN, "qlora")
    weights, full = sixteen(SEVEN), 8 * parameters(SEVEN) / GB
    parts = [
        Part(weights <= 12, "LoRA ~12 GB", f"the 16-bit weights alone are {weights:.1f} GB; {lora}"),
        Part(qlora.low <= 8 <= qlora.high, "QLoRA ~8 GB", str(qlora)),
        Part(full >= 40, "full 40 GB or more", f"{full:.1f} GB with weights, gradients and both moments in 16 bits"),
    ]
    return decision(parts, f"2 x {parameters(SEVEN):,} = {weights:.1f} GB", *ends(lora))


def _claim_25() -> Decision:
    full, largest = 8 * parameters(SEVEN) / GB, usable("rtx-5090")
    seven = fits(SEVEN, "lora", "rtx-3060")
    fitting = [m for m in models().values() if ModelSpec.serves(m.config) and _lean_lora(m.name) <= usable("rtx-3060")]
    most = max(fitting, key=lambda model: model.parameters)
    parts = [
        fits(SEVEN, "qlora", "rtx-3070"),
        replace(seven, why=f"{seven.why}; of the catalogue's models {most.name} is the largest that does"),
        Part(
            full > largest, "full fine-tuning of 7B on data-centre cards", f"{full:.1f} GB; RTX 5090 has {largest:.1f}"
        ),
    ]
    span = span_of(SEVEN, "lora")
    return decision(parts, f"LoRA lean {span.low:.1f} > {usable('rtx-3060'):.1f} GB of a 12 GB card", *ends(span))


def _lean_lora(name: str) -> float:
    return stacks.peak(spec_of(name), stacks.find(STOCK), LEAN).total / GB


def _claim_28() -> Decision:
    linears, rest = four(SIXTY_FIVE)
    quantized, weights, room = linears + rest, sixteen(SIXTY_FIVE), usable("rtx-3090")
    alone = f"the 4-bit weights alone are {quantized:.1f} GB; the same page says that 70B does not fit 24 GB"
    parts = [
        Part(round(weights, -1) == 130, "130 GB in 16 bits", f"{weights:.1f} GB"),
        fits(SIXTY_FIVE, "qlora", "rtx-a6000"),
        Part(quantized <= room, "or even 24 GB", alone),
    ]
    working = f"{linears:.1f} + {rest:.1f} = {quantized:.1f} > {room:.1f} GB"
    return decision(parts, working, *ends(span_of(SIXTY_FIVE, "qlora")))


def _claim_29() -> Decision:
    sizes = sorted(round(m.memory / (1 << 30)) for name, m in cards().items() if name.startswith("a100"))
    shown = " and ".join(map(str, sizes))
    part = Part(48 in sizes, "an A100 with 48 GB", f"there are {shown} GB; 48 GB are what an RTX A6000 has")
    return decision([part], f"48 is neither {' nor '.join(map(str, sizes))}")


def _claim_31() -> Decision:
    span, weights = span_of(SEVEN, "lora"), sixteen(SEVEN)
    parts = [
        Part(span.high > 40, "well above 40 GB", f"large {span.high:.1f} GB"),
        fits(SEVEN, "lora", "a100-40g", large=True),
        takes(SEVEN, "lora", 18, 22),
    ]
    beside = f"{span.low - weights:.1f} to {span.high - weights:.1f}"
    return decision(
        parts,
        f"2 x {parameters(SEVEN):,} = {weights:.1f} GB of weights, and {beside} GB beside them",
        *ends(span),
        contradicts="More than 40 GB, on a card of 40 GB, and 18 to 22 GB exclude each other",
    )


def _claim_32() -> Decision:
    linears, rest = four(SIXTY_FIVE)
    quantized, weights = linears + rest, sixteen(SIXTY_FIVE)
    saved, pair = 1 - quantized / weights, 2 * usable("rtx-3090")
    codes, lean = parameters(SIXTY_FIVE) / 2 / GB, span_of(SIXTY_FIVE, "qlora").low
    parts = [
        Part(
            round(saved, 2) == 0.75, "base weights -75 %", f"{percent(saved, 1)} with constants and 16-bit embeddings"
        ),
        Part(
            round(quantized) <= 33, "65B in 32 to 33 GB", f"{codes:.1f} GB if all were codes, {quantized:.1f} as held"
        ),
        Part(lean < pair, "a pair of 24 GB cards holds it", f"lean {lean:.1f} of {pair:.1f} GB"),
    ]
    return decision(parts, f"1 - ({linears:.1f} + {rest:.1f}) / {weights:.1f} = {percent(saved, 1)}", quantized)


def _claim_33() -> Decision:
    card, tokens = cards()["rtx-4090"], 3 * 10_000 * 512
    rate = card.gemm["bfloat16"] * card.reachable
    hours = {name: 6 * spec_of(name).matmul_parameters() * tokens / rate / 3600 for name in (SEVEN, THIRTEEN)}
    least = (
        f"matrix products of 3 epochs of 10,000 rows of 512 tokens: {hours[SEVEN]:.1f} h, 13B {hours[THIRTEEN]:.1f} h"
    )
    parts = [
        fits(SEVEN, "qlora", "rtx-4090", large=True),
        fits(THIRTEEN, "qlora", "rtx-4090", large=True),
        Part(hours[THIRTEEN] < 24, "in hours, as far as arithmetic goes", least),
    ]
    count = spec_of(SEVEN).matmul_parameters()
    working = (
        f"forward, recomputed, gradient: 6 x {count:,} x {tokens:,} / {rate:.3g} FLOP/s (assumed) "
        f"= {3600 * hours[SEVEN]:,.0f} s"
    )
    return decision(parts, working, hours[SEVEN], hours[SEVEN], hours[THIRTEEN], unit="hours")


def _claim_36() -> Decision:
    single, double = 32 / 64, 8 / 64 + 32 / (64 * 256)
    saved = single - double
    part = Part(round(saved, 2) == 0.37, "0.37 bits", f"constants of {single:.3f} bits a weight become {double:.3f}")
    return decision([part], f"32/64 - (8/64 + 32/(64 x 256)) = {saved:.3f}", saved, unit="bits a parameter")


def _claim_37() -> Decision:
    name, targets = "llama-3.1-8b", "q_proj,k_proj,v_proj,o_proj"
    spec, count, half = spec_of(name), adapter(name, 16, targets), adapter(name, 8, targets)
    share = count / parameters(name)
    rank_8 = f"rank 8 would have {half:,}, {percent(half / parameters(name), 3)}"
    parts = [
        Part(share < 0.01, "a fraction of a percent", f"{percent(share, 2)}"),
        Part(abs(count / 6.5e6 - 1) < 0.05, "~6.5M parameters", f"{count:,}; {rank_8}"),
        Part(round(share * 100, 2) == 0.08, "0.08 %", f"{percent(share, 2)}"),
    ]
    d, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    working = f"{spec.num_layers} layers x 16 x (2 x ({d:,} + {q:,}) + 2 x ({d:,} + {kv:,})) = {count:,}"
    return decision(parts, working, count, unit="parameters")


def _claim_39() -> Decision:
    count, (linears, rest) = parameters(SEVEN), four(SEVEN)
    full, moments, added = 8 * count / GB, 4 * count / GB, adapter(SEVEN, 16)
    state = 8 * added / GB
    parts = [
        Part(
            45 <= full <= 60,
            "full takes 45 to 60 GB",
            f"{full:.1f} GB if weights, gradients and both moments are 16-bit; {12 * count / GB:.0f} "
            "with float32 moments",
        ),
        Part(abs(moments / 28 - 1) < 0.05, "its optimizer 28 GB", f"two 16-bit moments are {moments:.1f} GB"),
        takes(SEVEN, "lora", 18, 22),
        takes(SEVEN, "qlora", 6, 10),
        Part(abs(linears / 3.5 - 1) < 0.05, "NF4 weights 3.5 GB", f"{linears:.2f} GB, and {rest:.2f} stay in 16 bits"),
        Part(round(state, 1) == 0.3, "optimizer 0.3 GB", f"float32 moments of rank 16 on all linears: {state:.2f} GB"),
    ]
    return decision(parts, f"8 x {count:,} = {full:.1f} GB; 8 x {added:,} = {state:.2f} GB", full)


def _claim_46() -> Decision:
    linears, rest = four(SEVENTY)
    quantized, room = linears + rest, usable("rtx-3090")
    parts = [
        fits(SEVENTY, "qlora", "rtx-a6000"),
        Part(quantized > room, "not on 24 GB", f"the 4-bit weights alone are {quantized:.1f} GB"),
    ]
    working = f"{linears:.1f} + {rest:.1f} = {quantized:.1f} > {room:.1f} GB"
    return decision(parts, working, *ends(span_of(SEVENTY, "qlora")))


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
