"""DPO against its definition in float64, against TRL, and as the loop sees it: exact under packing and accumulation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte.adapters import LoraOptions, attach, disabled, saved_modules
from halfbyte.batch import Batch
from halfbyte.data.examples import Example
from halfbyte.data.packing import collate, plan_micro_batches
from halfbyte.data.records import Origin
from halfbyte.data.sampler import Sampler
from halfbyte.evaluate.preference import DpoOptions
from halfbyte.linear import segments
from halfbyte.optim import OptimOptions
from halfbyte.optim.adamw import AdamW
from halfbyte.train import TrainOptions
from halfbyte.train.dpo import REFERENCE, PairedModel, evaluate_pairs, references
from halfbyte.train.events import read_events
from halfbyte.train.feed import Feed
from halfbyte.train.loop import train
from halfbyte.train.run_directory import RunDirectory
from halfbyte.train.state import CPU, TrainPlan
from halfbyte.train.update import LossScale, NonFinite, backward, split
from tests.evaluate.conftest import make_tiny
from tests.train import tiny

LOSSES = [
    DpoOptions(),
    DpoOptions(dpo_beta=0.5, dpo_label_smoothing=0.2),
    DpoOptions(dpo_loss="ipo", dpo_beta=0.3),
    DpoOptions(dpo_loss="hinge", dpo_beta=0.05),
    DpoOptions(dpo_nll_weight=0.7),
]


def pairs(count: int = 12, seed: int = 5, vocabulary: int = tiny.VOCABULARY) -> list[Example]:
    """Better answers go up by three from token to token, worse ones by five, after a common prompt."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        prompt = rng.integers(1, vocabulary, int(rng.integers(2, 6)))
        documents = []
        for step in (3, 5):
            answer = (prompt[-1] + step * np.arange(1, int(rng.integers(3, 12)))) % vocabulary
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            supervised = np.arange(len(ids)) >= len(prompt)
            documents.append(Example(ids, supervised, Origin("pairs.jsonl", index + 1), len(prompt), index=index))
        made.append(replace(documents[0], rejected=documents[1]))
    return made


def reference_of(model: Any, examples: Sequence[Example]) -> Tensor:
    """What the model without its adapter says, document by document, from its logits in float64: [pairs, 2]."""
    with torch.no_grad(), disabled(model):
        return torch.stack([torch.stack([logprob(model, d) for d in e.documents]) for e in examples])


def logprob(model: Any, document: Example) -> Tensor:
    """The definition: the sum of log p(token | the ones before) over the supervised tokens."""
    ids = torch.from_numpy(document.input_ids.astype(np.int64))
    said = model(ids[:-1]).double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return said[torch.from_numpy(document.supervised[1:])].sum()


def definition(model: Any, example: Example, reference: Tensor, options: DpoOptions) -> Tensor:
    """The loss of one pair, written out in float64."""
    chosen, rejected = (logprob(model, document) for document in example.documents)
    ratios = [chosen - reference[0], rejected - reference[1]]
    lengths = [int(document.supervised.sum()) for document in example.documents]
    beta, smoothing = options.dpo_beta, options.dpo_label_smoothing
    if options.dpo_loss == "ipo":
        loss = (ratios[0] / lengths[0] - ratios[1] / lengths[1] - 1 / (2 * beta)) ** 2
    elif options.dpo_loss == "hinge":
        loss = (1 - beta * (ratios[0] - ratios[1])).clamp(min=0)
    else:
        better = 1 / (1 + torch.exp(-beta * (ratios[0] - ratios[1])))
        loss = -(1 - smoothing) * better.log() - smoothing * (1 - better).log()
    return loss - options.dpo_nll_weight * chosen / lengths[0]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture(scope="module", params=["decoder", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One of ours and one of transformers', each with an adapter that adds something."""
    if request.param == "decoder":
        return tiny.decoder()
    loaded = make_tiny("gpt2", tmp_path_factory.mktemp("gpt2")).model
    attach(loaded, LoraOptions(lora_r=4), seed=1)
    generator = torch.Generator().manual_seed(0)
    for segment in segments(loaded).values():
        assert segment.adapter is not None
        segment.adapter.lora_B.data = torch.randn(segment.adapter.lora_B.shape, generator=generator) / 8
    return loaded


@pytest.mark.parametrize("options", LOSSES, ids=["sigmoid", "cdpo", "ipo", "hinge", "rpo"])
def test_loss_and_gradient_are_those_of_the_definition(model: Any, options: DpoOptions) -> None:
    examples = pairs()
    reference = reference_of(model, examples)
    objective = PairedModel(model, reference, options).train(False)
    loss, count = objective.loss(collate(examples))
    loss.backward()
    ours = gradients(model)
    expected = torch.stack([definition(model, e, reference[e.index], options) for e in examples]).sum()
    expected.backward()
    theirs = gradients(model)
    assert count == len(examples)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=2e-3, atol=2e-4 * float(theirs[name].abs().max()))
    found = objective.figures()
    said = [[float(logprob(model, document).detach()) for document in e.documents] for e in examples]
    margins = [
        options.dpo_beta * (chosen - rejected - float(reference[i, 0] - reference[i, 1]))
        for i, (chosen, rejected) in enumerate(said)
    ]
    assert found["rewards/margins"] == pytest.approx(sum(margins) / len(margins), rel=1e-4, abs=1e-5)
    assert found["rewards/accuracies"] == sum(m > 0 for m in margins) / len(margins)
    assert found["rewards/chosen"] - found["rewards/rejected"] == pytest.approx(found["rewards/margins"])


def test_the_first_loss_of_a_fresh_adapter_is_log_2(model: Any) -> None:
    examples = pairs()
    with disabled(model):
        loss, count = PairedModel(model, reference_of(model, examples), DpoOptions()).loss(collate(examples))
    assert float(loss) / count == pytest.approx(math.log(2), rel=1e-6)


def update_gradient(model: Any, objective: PairedModel, batches: list[Batch]) -> tuple[dict[str, Tensor], float]:
    optimizer = AdamW(tiny.trainable(model), OptimOptions(learning_rate=1.0))
    objective.train()
    update = backward(objective, optimizer, batches, 0, 1, LossScale(1.0, enabled=False), lambda: False, str)
    assert update.terms == sum(len(batch.lengths) for batch in batches) // 2
    return gradients(model), update.loss


def test_the_update_does_not_depend_on_how_its_pairs_lie(model: Any) -> None:
    """One batch, pair by pair, and packed: the same pairs, the same gradient, and both answers of a pair together."""
    examples = pairs(9)
    objective = PairedModel(model, reference_of(model, examples), DpoOptions(dpo_beta=0.5))
    lengths = [len(example) for example in examples]
    layouts = {
        "one": [list(range(9))],
        "alone": [[i] for i in range(9)],
        "packed": plan_micro_batches(lengths, 1, True, 2 * max(lengths)),
    }
    assert sorted(map(len, layouts["packed"])) != [1] * 9
    found = {}
    for name, pieces in layouts.items():
        batches = [collate([examples[i] for i in piece]) for piece in pieces]
        for batch in batches:
            assert batch.paired
            assert batch.rows[::2] == batch.rows[1::2]
        found[name] = update_gradient(model, objective, batches)
    gradient, loss = found["one"]
    for other, other_loss in (found["alone"], found["packed"]):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for name in gradient:
            torch.testing.assert_close(
                other[name], gradient[name], rtol=1e-3, atol=1e-5 * float(gradient[name].abs().max())
            )


def test_a_pair_that_breaks_the_numbers_is_named(model: Any) -> None:
    examples = pairs(6)
    reference = reference_of(model, examples)
    reference[3, 1] = math.inf
    optimizer = AdamW(tiny.trainable(model), OptimOptions(learning_rate=1.0))
    objective = PairedModel(model, reference, DpoOptions())
    feed = Feed(examples, Sampler(6, 0), 6, 6)
    with pytest.raises(NonFinite, match=r"Caused by pairs.jsonl:4: check the row"):
        backward(
            objective, optimizer, [collate(examples)], 0, 1, LossScale(1.0, enabled=False), lambda: False, feed.locate
        )
    model.zero_grad()


def test_a_batch_of_pairs_is_split_by_pairs() -> None:
    examples = pairs(3)
    pieces = split(collate(examples))
    assert [piece.rows for piece in pieces] == [(0, 0), (1, 1), (2, 2)]
    for piece, example in zip(pieces, examples, strict=True):
        assert piece.paired
        assert piece.lengths == tuple(len(document.input_ids) for document in example.documents)
        assert piece.loss_terms == 1
    single = replace(examples[0], rejected=None)
    with pytest.raises(ValueError, match="pairs or other rows"):
        collate([single, examples[1], examples[2]])


# ---------------------------------------------------------------- the reference


def ask(path: Path, model: Any, examples: list[Example], rows: Sequence[int], identity: str = "a") -> tuple[Any, int]:
    """(the reference, how many pairs the model was asked about)."""
    asked: list[int] = []

    def listen(event: dict[str, Any]) -> None:
        asked.append(event["pairs_done"])

    found = references(path, model, examples, examples[:3], rows, 60, {"base": identity}, CPU, listen)
    return found, max(asked, default=0)


def test_the_reference_is_asked_once_and_kept(tmp_path: Path) -> None:
    model, examples = tiny.decoder(), pairs()
    for segment in segments(model).values():
        assert segment.adapter is not None
        torch.nn.init.zeros_(segment.adapter.lora_B)
    expected = reference_of(model, examples)
    first, asked = ask(tmp_path, model, examples, [1, 4, 4, 5])
    assert asked == 3 + 3
    assert first.train[[1, 4, 5]].isfinite().all()
    assert first.train[[0, 2, 3]].isnan().all()
    torch.testing.assert_close(first.train[[1, 4, 5]], expected[[1, 4, 5]], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(first.eval, expected[:3], rtol=1e-6, atol=1e-5)
    again, asked = ask(tmp_path, model, examples, [1, 4, 5])
    assert asked == 0
    assert torch.equal(again.eval, first.eval)
    assert torch.equal(again.train, first.train) or bool((again.train.isnan() == first.train.isnan()).all())
    more, asked = ask(tmp_path, model, examples, range(12))
    assert asked == 9
    assert torch.equal(more.train[[1, 4, 5]], first.train[[1, 4, 5]])
    other, asked = ask(tmp_path, model, examples, [1], identity="another base")
    assert asked == 4
    (tmp_path / REFERENCE).write_bytes(b"damaged")
    repaired, asked = ask(tmp_path, model, examples, [1], identity="another base")
    assert asked == 4
    assert torch.equal(repaired.train[1], other.train[1])


def test_an_adapter_that_is_continued_is_its_own_reference(tmp_path: Path) -> None:
    """The reference is the model as the run starts: loss log 2 at first, wherever it begins."""
    model, examples = tiny.decoder(), pairs()
    found, _ = ask(tmp_path, model, examples, range(12))
    assert not torch.allclose(found.train, reference_of(model, examples), atol=1e-2)
    loss, count = PairedModel(model, found.train, DpoOptions()).train(False).loss(collate(examples))
    assert float(loss.detach()) / count == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("trained", ["norm", "magnitude"])
def test_an_adapter_with_zero_factors_may_still_change_the_model(trained: str, tmp_path: Path) -> None:
    model, examples = tiny.decoder(), pairs()
    adapters = [segment.adapter for segment in segments(model).values() if segment.adapter is not None]
    for adapter in adapters:
        torch.nn.init.zeros_(adapter.lora_B)
    if trained == "norm":
        saved_modules.train(model, saved_modules.names_in(model, ["norm"]))
        for name, tensor in model.named_parameters():
            if tensor.requires_grad and "norm" in name:
                tensor.data.mul_(2)
    else:
        for segment in segments(model).values():
            if segment.adapter is not None:
                segment.adapter.magnitude = torch.nn.Parameter(torch.full((segment.weight.shape[0],), 2.0))
    found, _ = ask(tmp_path, model, examples, range(12))
    loss, count = PairedModel(model, found.train, DpoOptions()).train(False).loss(collate(examples))
    assert float(loss.detach()) / count == pytest.approx(math.log(2), rel=1e-5)
    assert not torch.allclose(found.train, reference_of(model, examples), atol=1e-2)


# ---------------------------------------------------------------- training


def make_plan(model: Any, objective: PairedModel, examples: list[Example], held_out: Callable[..., Any]) -> TrainPlan:
    feed = Feed(examples, Sampler(len(examples), seed=3), rows_per_update=8, micro_batch=4)
    return TrainPlan(
        options=TrainOptions(save_minutes=None, seed=3, logging_steps=2),
        optim=OptimOptions(learning_rate=1e-2),
        total_steps=12,
        batches_for_update=feed.batches_for_update,
        trainable=tiny.trainable(model),
        evaluate=held_out,
        locate=feed.locate,
        figures=objective.figures,
    )


def test_training_raises_the_margin_of_held_out_pairs(tmp_path: Path) -> None:
    model, examples, held_out = tiny.decoder(), pairs(32), pairs(20, seed=77)
    for segment in segments(model).values():
        assert segment.adapter is not None
        torch.nn.init.zeros_(segment.adapter.lora_B)
    options = DpoOptions(dpo_beta=0.3)
    path = tmp_path / "run"
    with RunDirectory.create(path) as directory:
        known = references(path, model, examples, held_out, range(32), 200, {}, CPU)
        objective = PairedModel(model, known.train, options)

        def evaluate(stop: Callable[[], bool]) -> dict[str, float] | None:
            return evaluate_pairs(model, held_out, known.eval, options, 200, CPU, stop)

        before = evaluate(lambda: False)
        assert before is not None
        assert before["loss"] == pytest.approx(math.log(2), rel=1e-4)
        train(objective, make_plan(model, objective, examples, evaluate), directory)
    events = read_events(path / "events.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [2, 4, 6, 8, 10, 12]
    assert 0.5 < steps[0]["loss"] < math.log(2)  # of two updates, the first of them at log 2
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"] + 1
    assert steps[-1]["loss"] < 0.3
    (result,) = [event for event in events if event["event"] == "eval"]
    assert result["rewards/margins"] > 1
    assert result["rewards/accuracies_low"] > 0.5
    assert result["rewards/accuracies_low"] <= result["rewards/accuracies"] <= result["rewards/accuracies_high"]
    assert result["loss"] < 0.55
    assert evaluate(lambda: True) is None


# ---------------------------------------------------------------- TRL


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [*LOSSES[:1], *LOSSES[2:4]], ids=["sigmoid", "ipo", "hinge"])
def test_loss_and_rewards_are_those_of_trl(tmp_path: Path, options: DpoOptions) -> None:
    """TRL's own trainer on the same weights and the same tokens: another code base's reading of the same paper."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from halfbyte.adapters import save_adapter

    folder = tmp_path / "model"
    made = make_tiny("llama3-gqa", folder)
    model = made.model
    attach(model, LoraOptions(lora_r=4), seed=1)
    generator = torch.Generator().manual_seed(0)
    for segment in segments(model).values():
        assert segment.adapter is not None
        segment.adapter.lora_B.data = torch.randn(segment.adapter.lora_B.shape, generator=generator) / 8
    save_adapter(model, tmp_path / "adapter", LoraOptions(lora_r=4), str(folder))
    examples = pairs(4, vocabulary=250)

    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "adapter", is_trainable=True
    )
    rows = [
        {
            "prompt_ids": e.prompt_ids.tolist(),
            "chosen_ids": e.input_ids[e.prompt_length :].tolist(),
            "rejected_ids": r.input_ids[r.prompt_length :].tolist(),
        }
        for e, r in (example.documents for example in examples)
    ]
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=4, beta=options.dpo_beta, use_cpu=True,
        loss_type=[options.dpo_loss], report_to=[], bf16=False, gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    raw = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(theirs, args=config, train_dataset=raw, processing_class=made.tokenizer)
    inputs = trainer.data_collator(rows)
    with torch.no_grad():
        # TRL takes a continued adapter's copy for the reference; ours is the bare base here, so its numbers are given.
        reference = reference_of(model, examples)
        trainer.precompute_ref_logps = True
        inputs |= {"ref_chosen_logps": reference[:, 0].float(), "ref_rejected_logps": reference[:, 1].float()}
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    objective = PairedModel(model, reference, options).train(False)
    ours, count = objective.loss(collate(examples))
    assert float(ours.detach()) / count == pytest.approx(float(loss.detach()), rel=1e-4)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for name, value in objective.figures().items():
        assert value == pytest.approx(metrics[name], rel=1e-3, abs=1e-4), name
    (ours / count).backward()
    loss.backward()
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, segment in segments(model).items():
        assert segment.adapter is not None
        for part in ("lora_A", "lora_B"):
            mine, other = getattr(segment.adapter, part).grad, expected[f"{name}.{part}.default.weight"]
            torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-4 * float(other.abs().max()))
