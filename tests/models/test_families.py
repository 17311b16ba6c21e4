"""The decoder equals transformers' model of each family: logits, loss, every gradient, cached generation.

The bound is measured, not chosen: transformers' own float32 error against a float64 run of the same weights.
"""

import copy
from functools import cached_property
from typing import Any

import peft
import pytest
import torch

from halfbyte.adapters import LoraOptions, adapter_state, attach, load_adapter_state
from halfbyte.batch import IGNORE, Batch
from halfbyte.linear import segments
from halfbyte.models.decoder import Decoder
from halfbyte.models.spec import ModelSpec
from tests.models.conftest import build_decoder, gradients, trained
from tests.models.families import (
    FAMILIES,
    LENGTH_DEPENDENT_ROPE,
    Reference,
    config,
    error,
    float64,
    make_batch,
    make_float64,
    make_model,
    reference,
)

# Of unequal lengths, one of a single token, some beyond the windows and RoPE limits of the configurations.
LENGTHS = (37, 1, 53, 22)
TIMES = 4.0
"""Our error may be this many times transformers' float32 error: the same rounding in another order."""
FLOOR = 4e-6
"""Below this no error counts: a few float32 steps at the size of the values."""


class Case:
    """A family's model, in float32 and float64, and what it computes for the batch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: Any = make_model(config(name))
        self.batch = make_batch(LENGTHS)
        self.float32 = reference(self.model, self.batch)
        with float64():
            self.exact: Reference = reference(make_float64(self.model), self.batch)

    @cached_property
    def lora(self) -> tuple[dict[str, torch.Tensor], Reference, Reference]:
        """(adapter values on every linear, PEFT with them in float32, and in float64)."""
        options = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(copy.deepcopy(self.model), options)
        generator = torch.Generator().manual_seed(1)
        zeros = peft.get_peft_model_state_dict(theirs)
        state = {name: 0.2 * torch.randn(value.shape, generator=generator) for name, value in zeros.items()}
        peft.set_peft_model_state_dict(theirs, state)
        float32 = reference(theirs, self.batch, lambda name: "lora_" in name)
        with float64():
            base = peft.get_peft_model(make_float64(self.model), options, autocast_adapter_dtype=False).double()
            peft.set_peft_model_state_dict(base, {name: value.double() for name, value in state.items()})
            exact = reference(base, self.batch, lambda name: "lora_" in name)
        return state, float32, exact


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """Our error against the float64 run is at most TIMES that of transformers in float32."""
    allowed = max(FLOOR, TIMES * error(theirs, exact))
    assert error(ours, exact) <= allowed, f"{what}: {error(ours, exact):.2e} where {allowed:.2e} is allowed"


def test_logits(case: Case) -> None:
    decoder = build_decoder(case.model)
    ours = decoder.logits(case.batch.input_ids, LENGTHS)
    assert_close(ours, case.float32.logits, case.exact.logits, "logits")


def test_loss_and_every_gradient(case: Case) -> None:
    decoder = build_decoder(case.model, trainable=True)
    loss, count = decoder.loss(case.batch)
    assert count == case.batch.supervised_tokens
    assert_close(loss.detach(), case.float32.loss, case.exact.loss, "loss")
    loss.backward()
    ours = gradients(trained(decoder))
    assert set(ours) == set(case.exact.gradients)
    for name, exact in case.exact.gradients.items():
        assert_close(ours[name], case.float32.gradients[name], exact, name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call
def test_lora_gradients_equal_pefts(case: Case, checkpointing: bool) -> None:
    """The same adapter values on every linear; PEFT's gradients in float64 and float32 set the bound."""
    decoder = build_decoder(case.model).train()
    decoder.checkpointing = checkpointing
    attach(decoder, LoraOptions(lora_r=3, lora_alpha=5))
    state, float32, exact = case.lora
    assert {name: value.shape for name, value in adapter_state(decoder).items()} == {
        n: v.shape for n, v in state.items()
    }
    load_adapter_state(decoder, state)
    loss, _ = decoder.loss(case.batch)
    loss.backward()
    assert_close(loss.detach(), float32.loss, exact.loss, "loss")
    ours = {
        f"base_model.model.{name}.{factor}.default.weight": getattr(segment.adapter, factor).grad
        for name, segment in segments(decoder).items()
        for factor in ("lora_A", "lora_B")
    }
    assert set(ours) == set(exact.gradients)
    for name, gradient in exact.gradients.items():
        assert_close(ours[name], float32.gradients[name], gradient, name)


def test_checkpointing_changes_nothing(case: Case) -> None:
    plain, recomputed = (build_decoder(case.model, trainable=True) for _ in range(2))
    recomputed.checkpointing = True
    results = []
    for decoder in (plain, recomputed):
        loss, _ = decoder.loss(case.batch)
        loss.backward()
        results.append((loss.detach(), gradients(trained(decoder))))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_documents_do_not_see_each_other(case: Case) -> None:
    """Packing is exact: a document's logits are those it has alone."""
    decoder = build_decoder(case.model)
    together = decoder.logits(case.batch.input_ids, LENGTHS)
    alone = [decoder.logits(ids) for ids in case.batch.input_ids.split(LENGTHS)]
    assert error(together, torch.cat(alone)) < 1e-5


def test_cached_generation(case: Case) -> None:
    """A prefill and single steps, past the window, give the logits of the whole text at once.

    Where the frequencies depend on the length, only below the limit: what is cached was rotated by the length at
    that time, here as in transformers.
    """
    length = 30 if case.name in LENGTH_DEPENDENT_ROPE else 37
    decoder = build_decoder(case.model)
    ids = case.batch.input_ids[:length]
    cache = decoder.new_cache(40)
    steps = [decoder.logits(ids[:6], cache=cache), decoder.logits(ids[6:11], cache=cache)]
    steps += [decoder.logits(ids[i : i + 1], cache=cache) for i in range(11, length)]
    assert error(torch.cat(steps), decoder.logits(ids)) < 2e-5


def test_batched_cache(case: Case) -> None:
    """Sequences of unequal length in one cache, one leaving early: each as if alone."""
    decoder = build_decoder(case.model)
    first, second = case.batch.input_ids[:9], case.batch.input_ids[40:64]
    cache = decoder.new_cache(30, batch=2)
    decoder.logits(torch.cat([first[:5], second[:20]]), (5, 20), cache=cache)
    for i in range(3):
        ids = torch.stack([first[5 + i], second[20 + i]])
        both = decoder.logits(ids, (1, 1), cache=cache)
    assert error(both[0], decoder.logits(first[:8])[-1]) < 2e-5
    assert error(both[1], decoder.logits(second[:23])[-1]) < 2e-5
    cache.keep([1])
    alone = decoder.logits(second[23:24], (1,), cache=cache)
    assert error(alone[0], decoder.logits(second)[-1]) < 2e-5


def test_bf16_is_near_float32(case: Case) -> None:
    """bf16 is as far from float32 as transformers' bf16 is, or nearer."""
    theirs = reference(make_model(config(case.name), dtype=torch.bfloat16), case.batch)
    decoder = build_decoder(case.model, torch.bfloat16)
    ours = decoder.logits(case.batch.input_ids, LENGTHS)
    mean = [float((x.float() - case.float32.logits).abs().mean()) for x in (ours, theirs.logits)]
    assert mean[0] <= 1.2 * mean[1] + 1e-3


def test_token_logprobs(case: Case) -> None:
    decoder = build_decoder(case.model)
    expected = case.float32.logits.log_softmax(-1).gather(1, case.batch.targets.clamp_min(0)[:, None])[:, 0]
    expected = expected[case.batch.targets != IGNORE]
    assert torch.allclose(decoder.token_logprobs(case.batch), expected, atol=2e-4)


def test_nothing_supervised(case: Case) -> None:
    decoder: Decoder = build_decoder(case.model, trainable=True)
    batch = Batch(case.batch.input_ids, case.batch.position_ids, torch.full_like(case.batch.targets, IGNORE), LENGTHS)
    loss, count = decoder.loss(batch)
    assert (float(loss.detach()), count) == (0.0, 0)
    loss.backward()


# What the Hub's files say, written by transformers 4 and by the models' authors -> transformers 5's own reading.
OLD_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("LlamaConfig", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama3": (
        "LlamaConfig",
        {
            "rope_theta": 5e5,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "phi3-longrope": (
        "Phi3Config",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.1] * 8,
                "long_factor": [2.2] * 8,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "gemma1-gelu": ("GemmaConfig", {"hidden_act": "gelu", "hidden_activation": None}),
    "gemma3-old": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 8,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 4,
        },
    ),
    "gemma3-bare": ("Gemma3TextConfig", {}),
    "gemma2-bare": ("Gemma2Config", {}),
    "gemma1-bare": ("GemmaConfig", {}),
    "llama-bare": ("LlamaConfig", {}),
    "mistral-bare": ("MistralConfig", {}),
    "phi3-bare": ("Phi3Config", {}),
    "qwen2-bare": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 5}),
    "qwen3-bare": ("Qwen3Config", {}),
}


@pytest.mark.parametrize("name", list(OLD_CONFIGS))
def test_old_spelling_is_read_as_transformers_reads_it(name: str) -> None:
    import transformers

    kind, arguments = OLD_CONFIGS[name]
    made = getattr(transformers, kind)(**arguments)
    written = {"model_type": made.model_type, **arguments}
    full = made.to_dict()
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        written.setdefault(key, full[key])
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        written[key] = full[key]
    assert ModelSpec.from_config(written) == ModelSpec.from_config(full)
