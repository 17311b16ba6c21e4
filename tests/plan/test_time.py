"""The arithmetic of time: what must grow with what, and what a probe corrects."""

import pytest

from halfbyte.adapters import LoraOptions
from halfbyte.models.spec import ModelSpec
from halfbyte.plan import time
from halfbyte.plan.hardware import Rates
from halfbyte.plan.memory import Job
from halfbyte.plan.time import Counts, Probed
from halfbyte.quant import QuantOptions
from tests.models import families

OWN = {"quantized": 4e11, "few": 3e11, "dense": 4e11, "loss": 4e11, "attention": 3e11}
RATES = Rates("cpu", {"float32": 1e11, "bfloat16": 4e11}, 3e10, 3e10, {"bfloat16": OWN})
BARE = Rates("cpu", {"float32": 1e11, "bfloat16": 4e11}, 3e10, 3e10)


def spec_of(name: str = "llama3-gqa") -> ModelSpec:
    return ModelSpec.from_config(families.config(name).to_dict())


def job(method: str = "qlora", **changes: object) -> Job:
    values = {"micro_tokens": 512, "longest": 128, "train_tokens": 5120, "micro_batches": 10, "steps": 10}
    return Job(method, "bfloat16", QuantOptions(), LoraOptions(lora_r=4), **(values | changes))  # type: ignore[arg-type]


def training(asked: Job, rates: Rates = RATES, counts: Counts | None = None) -> float:
    work = time.training_work(spec_of(), asked, counts or time.counts_of(asked, 128), rates)
    return work.seconds(time.costs_of(asked))


@pytest.mark.parametrize("rates", [RATES, BARE])
def test_what_costs_more_takes_longer(rates: Rates) -> None:
    plain = training(job(), rates)
    assert training(job(checkpointing=True), rates) > plain
    assert training(job("full"), rates) > plain
    twice = training(job(train_tokens=10240, micro_batches=20), rates)
    assert twice == pytest.approx(2 * plain)
    assert training(job(), rates, Counts(20, 5120, 5120, 5120 * 128)) > plain  # as many tokens in smaller pieces
    longer = training(job(), rates, Counts(10, 5120, 5120, 5120 * 512))
    assert longer > plain  # as many tokens in longer documents
    assert training(job(), rates, Counts(10, 5120, 512, 5120 * 128)) < plain  # fewer of them supervised


def test_phases_count_every_part_of_a_run() -> None:
    small, large = (
        time.phases(spec_of(), job(steps=n, micro_batches=n, train_tokens=512 * n), RATES, 128) for n in (2, 20)
    )
    assert set(small) == {"load", "train", "evaluate", "save"}
    assert large["train"] == pytest.approx(10 * small["train"])
    assert large["load"] == small["load"]
    assert small["evaluate"] == 0
    assert time.phases(spec_of(), job(eval_tokens=4096), RATES, 128)["evaluate"] > 0


def test_a_forward_pass_is_less_than_half_of_a_step() -> None:
    asked = job(eval_tokens=5120)
    assert 0.2 < time.evaluation_seconds(spec_of(), asked, 128, RATES) / training(asked) < 0.55


def probes(asked: Job, fixed: float, scale: float) -> list[Probed]:
    """What a machine would show on which a micro-batch takes `fixed + scale * predicted`."""
    found = []
    for tokens in (64, 256, 1024):
        counts = Counts(1, tokens, tokens, tokens * tokens)
        found.append(Probed(counts, fixed + scale * training(asked, RATES, counts)))
    return found


@pytest.mark.parametrize(("fixed", "scale"), [(0.0, 1.0), (0.0, 3.0), (0.01, 1.5), (0.2, 0.7)])
def test_a_probe_finds_the_machine_that_it_ran_on(fixed: float, scale: float) -> None:
    asked, spec = job(eval_tokens=5120), spec_of()
    before = time.phases(spec, asked, RATES, 128)
    counts = Counts(37, 9000, 9000, 9000 * 300)
    after = time.corrected(spec, asked, RATES, before, probes(asked, fixed, scale), counts, update_seconds=0.05)
    expected = 37 * fixed + scale * training(asked, RATES, counts) + 10 * 0.05
    assert after["train"] == pytest.approx(expected, rel=1e-6)
    assert after["evaluate"] == pytest.approx(scale * before["evaluate"], rel=1e-6)
    assert (after["load"], after["save"]) == (before["load"], before["save"])


def test_probes_of_one_length_give_the_scale_alone() -> None:
    asked, spec = job(), spec_of()
    before = time.phases(spec, asked, RATES, 128)
    counts = Counts(1, 512, 512, 512 * 128)
    seen = [Probed(counts, 2 * training(asked, RATES, counts) * noise) for noise in (0.9, 1.0, 5.0)]
    after = time.corrected(spec, asked, RATES, before, seen, time.counts_of(asked, 128))
    assert after["train"] == pytest.approx(
        2 * training(asked) + 10 * time.optimizer_seconds(spec, asked, RATES), rel=1e-6
    )


def test_a_timed_evaluation_counts_for_itself_and_no_probe_changes_nothing() -> None:
    asked, spec = job(eval_tokens=4000), spec_of()
    before = time.phases(spec, asked, RATES, 128)
    evaluation = Probed(Counts(1, 1000, 1000, 1000 * 128), 3.0)
    seen = probes(asked, 0, 1)
    assert time.corrected(spec, asked, RATES, before, seen, seen[0].counts, None, evaluation)["evaluate"] == 12.0
    assert time.corrected(spec, asked, RATES, before, [], seen[0].counts) == before


@pytest.mark.parametrize(
    ("predicted", "measured"),
    [([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]), ([1.0, 2.0, 4.0], [4.0, 3.0, 1.0]), ([1.0, 2.0, 4.0], [0.1, 1.0, 4.0])],
)
def test_a_line_is_never_negative(predicted: list[float], measured: list[float]) -> None:
    fixed, scale = time.fit_line(predicted, measured)
    assert fixed >= 0
    assert scale >= 0
    assert fixed + scale > 0
