"""Other stacks' memory: each habit does to a peak what its arithmetic says, on numbers done by hand."""

from dataclasses import fields, replace

import pytest

from halfbyte.errors import UsageError
from halfbyte.models.spec import ModelSpec
from halfbyte.plan import stacks
from halfbyte.plan.catalog import find_model
from halfbyte.plan.memory import CUDA_CONTEXT
from halfbyte.plan.stacks import Setup, Stack

LLAMA_2 = ModelSpec.from_config(find_model("llama-2-7b"))
LLAMA_3 = ModelSpec.from_config(find_model("llama-3.1-8b"))
LINEARS_2, WORDS_2 = 6_476_005_376, 32_000 * 4096
NORMS_2 = 65 * 4096
HF = "transformers-peft-2025"


def stack(name: str, **habits: object) -> Stack:
    return replace(stacks.find(name), activation_factor=1.0, **habits)  # type: ignore[arg-type]


def test_a_4_bit_base_of_llama_2_by_hand() -> None:
    parts = stacks.base(LLAMA_2, stack("unsloth-2024"), Setup("qlora"))
    assert parts["base weights"] == LINEARS_2 // 2
    # One byte for each block of 64, and for each 256 of those a float32; one more float32 for each of 224 matrices.
    assert parts["quantization constants"] == LINEARS_2 // 64 + 4 * (LINEARS_2 // 64 // 256) + 4 * 224
    assert parts["embeddings, head, norms"] == 2 * (2 * WORDS_2 + NORMS_2)


def test_a_16_bit_base_is_two_bytes_a_parameter() -> None:
    assert stacks.base(LLAMA_2, stack("torchtune"), Setup("lora")) == {"base weights": 2 * 6_738_415_616}


def test_float32_embeddings_and_their_16_bit_copy_are_counted_for_a_quantized_base_only() -> None:
    quantized = stacks.fixed(LLAMA_2, stack(HF), Setup("qlora"))
    assert quantized["embeddings, head, norms"] == 4 * (2 * WORDS_2 + NORMS_2)
    assert quantized["head copy"] == 2 * WORDS_2
    assert "head copy" not in stacks.fixed(LLAMA_2, stack(HF), Setup("lora"))


def test_adapters_and_their_state_by_hand() -> None:
    # r 8 on all linears of Llama 2 7B: 32 layers of 8 (4 · 8192 + 3 · 15104).
    count = 32 * 8 * (4 * 8192 + 3 * 15_104)
    parts = stacks.fixed(LLAMA_2, stack("transformers-peft-2024"), Setup("qlora", rank=8))
    assert parts["adapters"] == 4 * count == 79_953_920
    assert parts["optimizer"] == 8 * count
    assert stacks.fixed(LLAMA_2, stack(HF), Setup("qlora", rank=8, optimizer="adamw_8bit"))["optimizer"] == 2 * count


def test_the_logits_of_a_full_vocabulary_by_hand() -> None:
    loss = stacks.moments(LLAMA_3, stack(HF), Setup("qlora", length=1000))[0]
    assert loss.moment == "loss"
    assert loss.parts["logits"] == 1000 * 128_256 * 14
    assert loss.parts["activations"] == 1000 * 32 * 4096 * 4


def test_recomputing_keeps_inputs_only_and_offloading_two_of_them() -> None:
    torchtune, setup = stack("torchtune"), Setup("full", length=1000, compiled=True, chunked=True)
    assert stacks.activations(LLAMA_3, torchtune, setup) == 32 * 4096 * 2
    assert stacks.activations(LLAMA_3, torchtune, replace(setup, offload=True)) == 2 * 4096 * 2
    # Kept: residuals; queries, attention's output, repeated keys and values; gate and up; and the linears' inputs.
    kept = 2 * (2 * 4096 + 4 * 4096 + 2 * 14_336 + 2 * 4096 + 14_336)
    assert stacks.activations(LLAMA_3, torchtune, replace(setup, checkpointing=False)) == 32 * kept


def test_inputs_of_frozen_linears_are_not_kept() -> None:
    setup = Setup("lora", targets="q_proj,v_proj", compiled=True, checkpointing=False)
    every = replace(setup, targets="all-linear")
    difference = stacks.layer_kept(LLAMA_3, stack("torchtune"), every) - stacks.layer_kept(
        LLAMA_3, stack("torchtune"), setup
    )
    assert difference == 2 * (4096 + 14_336)  # what gate and up read, and what down reads


def test_gradients_stand_together_unless_the_optimizer_takes_them_one_by_one() -> None:
    setup = Setup("full", length=1)
    end = stacks.moments(LLAMA_2, stack("torchtune"), setup)[2]
    assert end.parts["gradients"] == 2 * LLAMA_2.total_parameters
    one = stacks.moments(LLAMA_2, stack("torchtune"), replace(setup, in_backward=True))[2]
    assert one.parts["gradients"] == 2 * WORDS_2


def test_eager_scores_grow_with_the_square_of_the_length() -> None:
    plain, eager = (Setup("lora", batch=4, length=1024, eager=flag) for flag in (False, True))
    made = stack("transformers-peft-2024")
    difference = stacks.layer_work(LLAMA_2, made, eager) - stacks.layer_work(LLAMA_2, made, plain)
    assert 4 * 1024 * difference == 14 * 4 * 32 * 1024**2


def test_what_is_reserved_adds_the_moments_up_and_never_shrinks() -> None:
    setup = Setup("qlora", length=4096)
    active = stacks.peak(LLAMA_2, stack("transformers-peft-2024", reserved=False), setup)
    reserved = stacks.peak(LLAMA_2, stack("transformers-peft-2024"), setup)
    assert reserved.total > active.total
    tutorial = stack("torchtune-2024-04", quantizing_bytes=10_000)
    assert stacks.peak(LLAMA_2, tutorial, replace(setup, length=1)).moment == "load"


def test_the_context_of_the_driver_is_on_the_card_but_not_in_torchs_counters() -> None:
    assert stacks.fixed(LLAMA_2, stack(HF), Setup("qlora"))["CUDA context"] == CUDA_CONTEXT
    assert "CUDA context" not in stacks.fixed(LLAMA_2, stack("torchtune"), Setup("qlora"))


def test_the_longest_context_fills_the_card_and_one_token_more_does_not_fit() -> None:
    setup, card = Setup("qlora", rank=32, optimizer="adamw_8bit"), 24 << 30
    longest = stacks.longest_context(LLAMA_3, stack(HF), setup, card)
    assert stacks.peak(LLAMA_3, stack(HF), replace(setup, length=longest)).total <= card
    assert stacks.peak(LLAMA_3, stack(HF), replace(setup, length=longest + 1)).total > card
    assert stacks.longest_context(LLAMA_3, stack(HF), setup, 4 << 30) == 0


def test_an_unknown_stack_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'axolotl' is not a stack .* known are transformers-peft-2025"):
        stacks.find("axolotl")


def test_every_habit_that_an_entry_states_says_where_it_was_read() -> None:
    silent = {"name", "title", "read", "like", "activation_factor"}
    for made in stacks.stacks().values():
        before = stacks.find(made.like) if made.like else None
        for habit in (f.name for f in fields(Stack) if f.name not in silent):
            value = getattr(made, habit)
            changed = bool(value) if before is None else value != getattr(before, habit)
            assert not changed or habit in made.read or not value, f"{made.name}: {habit} names no source"


def test_every_constant_is_within_the_range_that_physics_leaves_it() -> None:
    held = stacks.constants()
    tokens, factor = held["alpaca_tokens"], held["activation_factor"]
    assert tokens["range"][0] <= tokens["value"] <= tokens["range"][1]
    low, high = factor["range"]
    assert low >= 0.8
    assert high <= 1.5
    assert all(low < made.activation_factor < high for made in stacks.stacks().values())
