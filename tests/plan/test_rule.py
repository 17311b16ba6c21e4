"""The rule of `auto`, on a table of cases: machine, budget, deadline and data in, the choice and its reason out."""

from dataclasses import dataclass, replace

import pytest

from halfbyte.adapters import LoraOptions
from halfbyte.models.spec import ModelSpec
from halfbyte.plan import rule
from halfbyte.plan.calibration import Calibration, Interval
from halfbyte.plan.hardware import Gpu, Hardware, Rates
from halfbyte.plan.recommend import Candidate, DataShape, Plan, Request, make_plan
from halfbyte.plan.rule import Case, Offer, choose, largest_adapters, ranks
from halfbyte.quant import QuantOptions

# -- the table: from a machine, a model and its data through the plan's own arithmetic -------------------------------

GB = 10**9
LAPTOP = Hardware("Linux", "a laptop", 8, 16 * GB, 14 * GB, "physical memory", ("AVX2",))
SERVER = replace(LAPTOP, processor="a server", memory_total=512 * GB, memory_available=500 * GB)
CARD_12 = replace(LAPTOP, gpus=(Gpu(0, "a 12 GB card", 12 * GB, 12 * GB, "8.6", True),))
CARD_24 = replace(LAPTOP, gpus=(Gpu(0, "a 24 GB card", 24 * GB, 24 * GB, "8.9", True),))
CARD_80 = replace(LAPTOP, gpus=(Gpu(0, "an 80 GB card", 80 * GB, 80 * GB, "8.0", True),))
CPU_RATES = Rates("cpu", {"float32": 2e11, "bfloat16": 8e11}, 2e10, 1e9)
GPU_RATES = Rates("cuda", {"float32": 4e13, "bfloat16": 1e14}, 7e11, 2e11)

SHAPES = {
    "270m": (640, 2048, 18, 4, 1, 256, 262144),
    "1b": (2048, 5632, 22, 32, 4, 64, 32000),
    "7b": (4096, 11008, 32, 32, 32, 128, 32000),
}
BATCHES = ((16, 1), (8, 2), (4, 4), (2, 8), (1, 16))
FEW = DataShape(rows=1000, tokens=200_000, longest=600, supervised_share=0.4, spread=80, eval_tokens=10_000)
MANY = replace(FEW, rows=200_000, tokens=40_000_000, supervised_share=0.6)
HUGE = replace(FEW, rows=2_000_000, tokens=400_000_000, supervised_share=0.6)


def spec_of(size: str) -> ModelSpec:
    width, inner, layers, heads, kv, head, words = SHAPES[size]
    return ModelSpec.from_config(
        {"model_type": "qwen3", "vocab_size": words, "hidden_size": width, "intermediate_size": inner, "head_dim": head,
         "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
         "tie_word_embeddings": True}
    )  # fmt: skip


def held_of(spec: ModelSpec) -> dict[str, int]:
    """As a GGUF file in Q4_K has it: 4.5 bits a weight."""
    return {f"{x.name}.weight": x.parameters * 9 // 16 for x in spec.linears()}


@dataclass(frozen=True)
class Row:
    """budget None: what is free; hours None: no deadline."""

    machine: Hardware
    size: str
    method: str
    clause: str
    reason: str
    rank: int | None = None
    budget: float | None = None
    hours: float | None = None
    data: DataShape = FEW
    in_blocks: bool = False
    recomputed: bool = False


TABLE = [
    # A processor: 16 bits where they fit with room, 4 bits where not.
    Row(LAPTOP, "270m", "lora", "room", "loses nothing, fits with room", rank=16),
    Row(LAPTOP, "1b", "lora", "room", "fits with room", rank=16),
    Row(LAPTOP, "7b", "qlora", "memory", "which lora on a 16-bit base", rank=32),
    Row(SERVER, "7b", "lora", "room", "fits with room", rank=16),
    Row(LAPTOP, "1b", "qlora", "memory", "which lora on a 16-bit base", rank=32, budget=3.2),
    Row(LAPTOP, "1b", "qlora", "memory", "", rank=16, budget=2.0, recomputed=True),
    Row(LAPTOP, "1b", "lora", "room", "of 5.00 GB", rank=16, budget=5.0),
    Row(LAPTOP, "270m", "qlora", "none", "no method fits in 0.30 GB", budget=0.3),
    # A quantized file is trained on as it is, wherever it fits.
    Row(LAPTOP, "270m", "qlora", "blocks", "what will be served", rank=32, in_blocks=True),
    Row(SERVER, "7b", "qlora", "blocks", "instead of", rank=32, in_blocks=True),
    Row(CARD_80, "7b", "qlora", "blocks", "the file's own blocks", rank=32, in_blocks=True),
    # A GPU: the same clauses; cards decide by their size.
    Row(CARD_24, "1b", "lora", "room", "fits with room", rank=16),
    Row(CARD_12, "7b", "qlora", "memory", "which lora on a 16-bit base", rank=32),
    Row(CARD_24, "7b", "qlora", "memory", "leaves room", rank=32),
    Row(CARD_24, "7b", "lora", "room", "of 24.00 GB", rank=16, budget=24.0),
    Row(CARD_80, "7b", "lora", "room", "fits with room", rank=16),
    # The data: more of it raises the rank; where adapters are full and the model is small, all of it is trained.
    Row(LAPTOP, "1b", "lora", "room", "fits with room", rank=16, data=replace(FEW, rows=50_000, tokens=10_000_000)),
    Row(SERVER, "1b", "lora", "room", "fits with room", rank=32, data=replace(MANY, tokens=60_000_000)),
    Row(SERVER, "1b", "lora", "room", "fits with room", rank=128, data=HUGE),
    Row(LAPTOP, "270m", "lora", "room", "fits with room", rank=64, data=MANY),
    Row(SERVER, "270m", "full", "capacity", "240,000,000 supervised tokens are more than", data=HUGE),
    Row(LAPTOP, "270m", "full", "capacity", "all of this small model fits", data=HUGE),
    Row(LAPTOP, "270m", "lora", "room", "fits with room", rank=64, data=HUGE, budget=4.0),
    Row(SERVER, "7b", "lora", "room", "fits with room", rank=128, data=replace(HUGE, tokens=4 * 10**9)),
    # A deadline: what is too late is out; if all is, the fastest.
    Row(LAPTOP, "1b", "lora", "room", "fits with room", hours=24),
    Row(LAPTOP, "1b", "lora", "deadline", "no method is done within 10 min; this is the fastest", hours=1 / 6),
    Row(SERVER, "270m", "lora", "room", "fits with room", hours=1500, data=HUGE),
]


def plan_of(row: Row) -> Plan:
    spec, on_gpu = spec_of(row.size), bool(row.machine.gpus)
    request = Request(
        "auto", "bfloat16", "cuda" if on_gpu else "cpu", QuantOptions(), LoraOptions(), "adamw", BATCHES, None,
        epochs=3.0, max_steps=None, held=held_of(spec) if row.in_blocks else {}, open_rank=True,
    )  # fmt: skip
    return make_plan(
        spec, request, row.data, row.machine, GPU_RATES if on_gpu else CPU_RATES,
        None if row.budget is None else int(row.budget * GB),
        [Candidate(method, replace(request, method=method)) for method in ("full", "lora", "qlora")],
        constants=Calibration(), deadline=None if row.hours is None else row.hours * 3600,
    )  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.machine.processor}-{row.size}-{row.clause}-{row.method}")
def test_the_table(row: Row) -> None:
    plan = plan_of(row)
    assert (plan.method, plan.clause) == (row.method, row.clause), plan.reason
    assert row.reason in plan.reason
    if row.rank is not None:
        assert plan.chosen.job.lora.lora_r == row.rank
    assert plan.chosen.job.lora.lora_alpha == 32
    assert plan.chosen.job.lora.target_modules == "all-linear"
    assert plan.chosen.batch[0] * plan.chosen.batch[1] == 16, "the layout never changes the update"
    if row.clause != "none":
        assert plan.fits(plan.chosen)
        assert plan.chosen.job.checkpointing == row.recomputed


# -- the clauses one by one, on plain values --------------------------------------------------------------------------

CASE = Case(budget=10 * GB, tokens=100_000, parameters=GB, capacity=50_000_000)


def offer(name: str, peak: float, hours: float = 1.0, base: str = "", recomputed: bool = False) -> Offer:
    """A peak in GB at P95, of which the middle is 90 %; the upper end of the time is 1.5 times its middle."""
    seconds = Interval(hours * 3600, hours * 5400)
    weights = int({"qlora": 0.5, "lora": 2.0, "full": 2.0}[base or name] * GB)
    return Offer(name, base or name, Interval(0.9 * peak * GB, peak * GB), seconds, weights, recomputed)


FULL, LORA, QLORA = offer("full", 9), offer("lora", 5), offer("qlora", 3)


def test_tight_does_not_fit() -> None:
    tight = offer("lora", 10.5)
    assert tight.peak.p50 < CASE.budget < tight.peak.p95
    assert choose(CASE, [tight, QLORA]).name == "qlora"  # type: ignore[union-attr]
    assert choose(CASE, [tight]) is None


def test_room_is_more_where_the_budget_was_not_stated() -> None:
    nine, free_now = offer("lora", 9), replace(CASE, stated=False)
    assert choose(CASE, [nine, QLORA]).name == "lora"  # type: ignore[union-attr]
    found = choose(free_now, [nine, QLORA])
    assert found is not None
    assert (found.name, found.clause) == ("qlora", "memory")
    assert "9.00 GB of the 10.00 GB that are free now" in found.reason


def test_lora_that_pays_with_time_gives_way() -> None:
    found = choose(CASE, [offer("lora", 5, recomputed=True), QLORA])
    assert found is not None
    assert (found.name, "recompute" in found.reason) == ("qlora", True)
    slow = choose(CASE, [offer("lora", 5, hours=1.4), QLORA])
    assert slow is not None
    assert (slow.name, "40% slower in the smaller batches that it needs" in slow.reason) == ("qlora", True)
    assert choose(CASE, [offer("lora", 5, hours=1.2), QLORA]).name == "lora"  # type: ignore[union-attr]
    both = choose(CASE, [offer("lora", 5, recomputed=True), offer("qlora", 3, recomputed=True)])
    assert both is not None
    assert both.name == "lora", "where both recompute, 16 bits are still the better base"


def test_deadlines_are_kept_at_p95_before_p50() -> None:
    slow, quick = offer("lora", 5, hours=1.2), offer("qlora", 3, hours=1)
    for hours, name, clause in (
        (4.0, "lora", "room"),
        (1.6, "qlora", "memory"),
        (1.1, "qlora", "memory"),
        (0.5, "qlora", "deadline"),
    ):
        found = choose(replace(CASE, deadline=hours * 3600), [slow, quick])
        assert found is not None
        assert (found.name, found.clause) == (name, clause), hours
    late = choose(replace(CASE, deadline=1.6 * 3600), [slow, quick])
    assert late is not None
    assert "within 1.6 h, which lora is not" in late.reason


def test_full_only_where_adapters_are_full() -> None:
    def name(**changes: object) -> str:
        found = choose(replace(CASE, **changes), [FULL, LORA, QLORA])  # type: ignore[arg-type]
        assert found is not None
        return found.name

    assert name() == "lora"
    assert name(tokens=100_000_000) == "lora", "two tokens a parameter are held"
    assert name(tokens=100_000_001) == "full"
    assert name(tokens=100_000_001, parameters=GB + 1) == "lora", "a large model is a large file for every task"
    assert name(tokens=100_000_001, stated=False) == "lora", "9 of 10 GB that are free now leave no room"


def test_own_blocks_unless_they_are_much_slower() -> None:
    own = replace(CASE, own_blocks=True)
    assert choose(own, [LORA, QLORA]).clause == "blocks"  # type: ignore[union-attr]
    assert "in 0.50 GB instead of 2.00 GB" in choose(own, [LORA, QLORA]).reason  # type: ignore[union-attr]
    assert choose(own, [LORA, offer("qlora", 3, hours=1.3)]).name == "lora"  # type: ignore[union-attr]


def test_variants_are_taken_only_where_the_plain_method_was_not_asked_about() -> None:
    dora, qdora = offer("dora", 5, base="lora"), offer("qdora", 3, base="qlora")
    assert choose(CASE, [dora, LORA, QLORA]).name == "lora"  # type: ignore[union-attr]
    assert choose(CASE, [dora, qdora]).name == "dora"  # type: ignore[union-attr]
    assert choose(CASE, [offer("full", 9), offer("galore", 8, base="full")]).name == "full"  # type: ignore[union-attr]
    left = choose(CASE, [FULL])
    assert left is not None
    assert (left.clause, left.reason) == ("left", "of the methods asked about it is the one that fits in 10.00 GB")


def test_ranks_double_with_the_data_and_stop() -> None:
    a_rank, linears = 100_000, 1_000_000_000
    assert ranks(False, 0, a_rank, linears) == (16,)
    assert ranks(True, 0, a_rank, linears) == (32, 16)
    assert ranks(False, 3_200_000, a_rank, linears) == (16,)
    assert ranks(False, 3_200_001, a_rank, linears) == (32, 16)
    assert ranks(True, 10**12, a_rank, linears) == (128, 64, 32, 16)
    assert ranks(True, 10**12, a_rank, 4 * 64 * a_rank) == (64, 32, 16), "a quarter of what they adapt"
    assert ranks(True, 10**12, a_rank, a_rank) == (16,), "the field's default stays, however small the model is"
    assert largest_adapters(a_rank, linears) == 128 * a_rank
    assert largest_adapters(a_rank, 4 * 64 * a_rank) == 64 * a_rank


def test_every_clause_is_written_down() -> None:
    text = rule.__doc__ or ""
    for row in TABLE:
        assert row.clause == "none" or f"`{row.clause}`" in text
