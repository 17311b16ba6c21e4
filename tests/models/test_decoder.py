"""What the decoder offers beside the families' numbers (test_families): full fine-tuning, caches, its tensors."""

import pytest
import torch
import torch.nn.functional as F

from halfbyte.adapters import LoraOptions, attach
from halfbyte.batch import IGNORE, Batch
from halfbyte.errors import UsageError
from halfbyte.linear import LoraAdapter, segments
from halfbyte.models.decoder import Decoder
from halfbyte.models.spec import ModelSpec
from halfbyte.ops import native, pool
from halfbyte.quant import DenseWeight
from tests.adapters.models import tiny
from tests.models import families


def batch(lengths: tuple[int, ...], vocab: int) -> Batch:
    ids = torch.randint(0, vocab, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1)
    targets[torch.tensor(lengths).cumsum(0) - 1] = IGNORE
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(ids, positions, targets, lengths)


@pytest.mark.parametrize("name", ["llama2-mha-tied", "gemma3", "qwen2", "phi3"])
def test_full_fine_tuning_has_transformers_gradients(name: str) -> None:
    theirs = families.make_model(families.config(name))
    values = {k: v.clone() for k, v in theirs.state_dict().items()}
    spec = ModelSpec.from_config(theirs.config.to_dict())
    ours = Decoder.build(spec, lambda n, _: DenseWeight(values[n]), lambda n: values[n])
    parameters = ours.unfreeze()
    assert parameters.keys() == dict(theirs.named_parameters()).keys()
    work = batch((13, 20, 7), spec.vocab_size)
    loss, count = ours.loss(work)
    (loss / count).backward()
    total = torch.zeros(())
    for ids, targets in zip(work.input_ids.split(work.lengths), work.targets.split(work.lengths), strict=True):
        logits = theirs(ids[None]).logits[0]
        total = total + F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    (total / count).backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-4)
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            parameters[key].grad, parameter.grad, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_a_quantized_base_is_not_unfrozen() -> None:
    with pytest.raises(UsageError, match=r"q_proj.weight is held in nf4\+dq"):
        tiny("nf4").unfreeze()


def test_the_last_logits_of_a_batch_are_those_of_each_sequence_alone() -> None:
    model = tiny()
    prompts = [torch.arange(1, 8), torch.arange(5, 9), torch.arange(20, 33)]
    cache = model.new_cache(20, batch=3)
    together = model.logits(torch.cat(prompts), tuple(len(p) for p in prompts), cache, last_only=True)
    alone = torch.stack([model.logits(p)[-1] for p in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    nexts = together.argmax(-1)
    step = model.logits(nexts, (1, 1, 1), cache)
    alone = torch.stack([model.logits(torch.cat([p, n[None]]))[-1] for p, n in zip(prompts, nexts, strict=True)])
    torch.testing.assert_close(step, alone, rtol=1e-5, atol=1e-5)


def test_forward_has_a_graph_and_the_logits_values() -> None:
    model = tiny()
    model.unfreeze()
    ids = torch.randint(0, 96, (2, 9))
    logits = model(ids)
    torch.testing.assert_close(logits[1].detach(), model.logits(ids[1]), rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_token_logprobs_sum_to_the_loss() -> None:
    model = tiny()
    work = batch((5, 9), 96)
    loss, count = model.loss(work)
    logprobs = model.token_logprobs(work)
    assert logprobs.shape == (count,) == (12,)
    torch.testing.assert_close(-logprobs.sum(), loss.detach())


def test_named_tensors_are_the_checkpoint() -> None:
    model = tiny()
    assert {n: tuple(t().shape) for n, t in model.named_tensors()} == dict(model.spec.tensors())


def test_nothing_supervised_is_a_loss_of_zero_that_can_be_backpropagated() -> None:
    model = tiny()
    model.unfreeze()
    ids = torch.arange(4)
    loss, count = model.loss(Batch(ids, ids, torch.full((4,), IGNORE), (4,)))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)


def _adapted(name: str, dtype: torch.dtype) -> Decoder:
    values = {k: v.clone() for k, v in families.make_model(families.config(name)).state_dict().items()}
    spec = ModelSpec.from_config(families.config(name).to_dict())
    model = Decoder.build(spec, lambda n, _: DenseWeight(values[n].to(dtype)), lambda n: values[n], dtype)
    generator = torch.Generator().manual_seed(1)
    attach(model, LoraOptions(lora_r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def _loss_and_gradients(model: Decoder, work: Batch) -> list[torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    loss, count = model.loss(work)
    (loss / count).backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama2-mha-tied", "gemma2", "gemma3", "qwen2", "qwen3", "phi3"])
def test_where_memory_comes_from_changes_no_bit(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, work = _adapted(name, dtype), batch((13, 40, 7), families.config(name).vocab_size)
    plain = _loss_and_gradients(model, work)
    monkeypatch.setattr(pool, "SMALLEST", 1)  # every activation, not only large ones
    for checkpointing in (False, True, False):
        model.checkpointing = checkpointing
        again = _loss_and_gradients(model, work)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["llama2-mha-tied", "gemma2", "gemma3", "qwen2", "qwen3"])
def test_supervised_rows_alone_give_what_masking_gives(name: str) -> None:
    model, work = _adapted(name, torch.float32), batch((13, 40, 7), families.config(name).vocab_size)
    work.targets[torch.arange(60) % 3 != 0] = IGNORE
    selected = _loss_and_gradients(model, work)
    for parameter in model.parameters():
        parameter.grad = None
    hidden = model.hidden(work.input_ids, work.position_ids, work.lengths)
    logits = F.linear(hidden, model.head.dequantize(torch.float32))
    cap = model.spec.final_softcap
    logits = logits if cap is None else (logits / cap).tanh() * cap
    masked = F.cross_entropy(logits, work.targets, ignore_index=IGNORE, reduction="sum")
    (masked / (work.targets != IGNORE).sum()).backward()
    everything = [masked.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for a, b in zip(selected, everything, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)


def give_magnitudes(model: Decoder) -> None:
    """DoRA on every adapter, with values that are not the weights' own lengths."""
    generator = torch.Generator().manual_seed(5)
    for segment in segments(model).values():
        adapter = segment.adapter
        assert adapter is not None
        with torch.no_grad():
            adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator) / 8)
        lengths = segment.weight.dequantize(torch.float32).norm(dim=1)
        scale = torch.rand(lengths.shape, generator=generator) + 0.5
        segment.adapter = LoraAdapter(adapter.lora_A, adapter.lora_B, adapter.scaling, 0.0, lengths * scale)


@pytest.mark.parametrize("name", ["llama3-gqa", "llama-biases", "gemma3", "qwen2", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dora_is_the_merged_model_and_native_gradients_are_torchs(name: str, checkpointing: bool) -> None:
    """Nobody writes over an output that the magnitudes' gradients need."""
    theirs = families.make_model(families.config(name))
    values = {k: v.clone() for k, v in theirs.state_dict().items()}
    spec = ModelSpec.from_config(theirs.config.to_dict())
    work = batch((13, 20, 7), spec.vocab_size)

    def build(dtype: torch.dtype) -> Decoder:
        return Decoder.build(spec, lambda n, _: DenseWeight(values[n].to(dtype)), lambda n: values[n], dtype)

    def run(dtype: torch.dtype, backend: str | None) -> tuple[torch.Tensor, dict[str, torch.Tensor], Decoder]:
        native.use(backend)
        try:
            model = build(dtype)
            attach(model, LoraOptions(lora_r=3))
            give_magnitudes(model)
            model.checkpointing = checkpointing and backend is None
            model.train()
            loss, count = model.loss(work)
            (loss / count).backward()
            grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
            return loss.detach() / count, grads, model
        finally:
            native.use(None)

    loss, exact, model = run(torch.float32, "reference")
    merged = build(torch.float32)
    for key, segment in segments(merged).items():
        segment.weight = DenseWeight(segments(model)[key].merged())
    torch.testing.assert_close(merged.loss(work)[0] / work.supervised_tokens, loss, rtol=1e-5, atol=1e-5)
    assert sum("magnitude" in key for key in exact) == len(list(spec.linears()))

    def errors(grads: dict[str, torch.Tensor]) -> torch.Tensor:
        assert grads.keys() == exact.keys()
        return torch.stack([(grads[key] - exact[key]).norm() / (exact[key].norm() + 1e-6) for key in exact])

    assert errors(run(torch.float32, None)[1]).max() < 1e-4
    ours, torchs = errors(run(torch.bfloat16, None)[1]), errors(run(torch.bfloat16, "reference")[1])
    assert ours.mean() < 1.2 * torchs.mean()
    assert (ours < 2 * torchs + 0.01).all()
