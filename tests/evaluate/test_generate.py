"""Generation against transformers' `generate` on the same weights, and batches against one prompt at a time."""

import random

import pytest
import torch

import halfbyte.evaluate.session as session_module
from halfbyte.data import ChatTemplate, Encoder
from halfbyte.errors import UsageError
from halfbyte.evaluate.generate import end_ids, generate, generate_batch
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.evaluate.session import Session, inference
from tests.evaluate.conftest import TURN, Tiny


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    draw = random.Random(count)
    return [[draw.randrange(256) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def reference_greedy(tiny: Tiny, prompt: list[int], new: int) -> list[int]:
    """transformers without a cache: the same numbers whatever its own cache does."""
    ids = torch.tensor([prompt])
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat([ids, tiny.reference(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


def test_greedy_is_transformers(tiny: Tiny) -> None:
    for prompt in prompts(4):
        result = generate(tiny.model, tiny.tokenizer, prompt, GenerateOptions(max_new_tokens=20))
        assert list(result.tokens) == reference_greedy(tiny, prompt, 20)
        assert result.finish_reason == "length"
        assert result.prompt_tokens == len(prompt)


def test_a_batch_gives_what_each_prompt_gives_alone(tiny: Tiny) -> None:
    options = GenerateOptions(max_new_tokens=12)
    many = prompts(9)
    # An end token that some texts meet early, some late, some never: sequences leave at different steps.
    first = [reference_greedy(tiny, prompt, 12) for prompt in many]
    eos = {first[0][2], first[3][7]}
    alone = [generate(tiny.model, tiny.tokenizer, prompt, options, eos) for prompt in many]
    seen: list[int] = []
    together = generate_batch(
        tiny.model, tiny.tokenizer, many, options, eos, batch_size=4, on_done=lambda i, _: seen.append(i)
    )
    assert together == alone
    assert sorted(seen) == list(range(9))
    assert "eos" in {result.finish_reason for result in alone}
    assert not any(set(result.tokens) & eos for result in alone)


def test_sampling_depends_on_seed_and_index_not_on_the_batch(llama: Tiny) -> None:
    options = GenerateOptions(max_new_tokens=8, temperature=1.0, top_k=50)
    many = prompts(6)
    one_by_one = generate_batch(llama.model, llama.tokenizer, many, options, batch_size=1)
    assert generate_batch(llama.model, llama.tokenizer, many, options, batch_size=6) == one_by_one
    assert generate(llama.model, llama.tokenizer, many[0], options) == one_by_one[0]
    other = generate(llama.model, llama.tokenizer, many[0], options.model_copy(update={"seed": 1}))
    assert other.tokens != one_by_one[0].tokens


def test_long_prompts_are_read_in_pieces(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    options, many = GenerateOptions(max_new_tokens=6), prompts(5)
    whole = generate_batch(tiny.model, tiny.tokenizer, many, options)
    monkeypatch.setattr(session_module, "PREFILL_TOKENS", 7)
    assert generate_batch(tiny.model, tiny.tokenizer, many, options) == whole


def test_a_branch_leaves_no_trace(tiny: Tiny) -> None:
    first, second = prompts(2)
    with inference(tiny.model):
        session = Session(tiny.model, 200, 2)
        session.feed([first, second])
        expected = session.feed([[5], [6]])
        session.rewind([len(first), len(second)])
        with session.branch():
            inside = session.feed_all([[1, 2, 3], [4]])
            assert inside.shape == (4, 258)
        assert session.lengths == [len(first), len(second)]
        torch.testing.assert_close(session.feed([[5], [6]]), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="at least one new token"):
            session.feed([[1], []])


def test_streamed_text_is_the_text(llama: Tiny) -> None:
    pieces: list[str] = []
    prompt = llama.tokenizer("Grüße: ").input_ids
    result = generate(llama.model, llama.tokenizer, prompt, GenerateOptions(max_new_tokens=40), (), pieces.append)
    assert "".join(pieces) == result.text == llama.tokenizer.decode(list(result.tokens))


def test_stop_text_ends_the_answer(llama: Tiny) -> None:
    prompt = llama.tokenizer("hello").input_ids
    free = generate(llama.model, llama.tokenizer, prompt, GenerateOptions(max_new_tokens=30))
    stop = free.text[6:8]
    result = generate(llama.model, llama.tokenizer, prompt, GenerateOptions(max_new_tokens=30, stop=(stop,)))
    assert result.finish_reason == "stop"
    assert result.text == free.text[: free.text.index(stop)]
    assert len(result.tokens) < 30


def test_repetition_penalty_changes_greedy(llama: Tiny) -> None:
    prompt = prompts(1)[0]
    plain = generate(llama.model, llama.tokenizer, prompt, GenerateOptions(max_new_tokens=30))
    heavy = GenerateOptions(max_new_tokens=30, repetition_penalty=50.0)
    fresh = generate(llama.model, llama.tokenizer, prompt, heavy)
    assert len(set(plain.tokens)) < len(set(fresh.tokens)) == 30


def test_the_context_is_the_limit(llama: Tiny) -> None:
    prompt = [1] * 250  # of 256
    result = generate(llama.model, llama.tokenizer, prompt, GenerateOptions(max_new_tokens=50))
    assert (len(result.tokens), result.finish_reason) == (6, "length")
    with pytest.raises(UsageError, match="prompt 1 has 256 tokens and the model's context is 256: shorten"):
        generate(llama.model, llama.tokenizer, [1] * 256)
    with pytest.raises(UsageError, match="prompt 2 is empty"):
        generate_batch(llama.model, llama.tokenizer, [[1], []])


def test_training_mode_is_put_back(llama: Tiny) -> None:
    llama.model.train()
    try:
        generate(llama.model, llama.tokenizer, [1, 2], GenerateOptions(max_new_tokens=1))
        assert llama.model.training
    finally:
        llama.model.eval()


def test_end_ids_are_those_of_all_files_and_of_turns(llama: Tiny) -> None:
    encoder = Encoder(llama.tokenizer)
    turn, eos = llama.tokenizer.convert_tokens_to_ids(TURN), llama.tokenizer.eos_token_id
    chat = ChatTemplate("chat", "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}", {})
    assert end_ids(encoder, None) == {eos}
    assert end_ids(encoder, chat) == {eos, turn}
    assert end_ids(encoder, None, {"eos_token_id": [1, 2]}, {"eos_token_id": 3}, {}) == {eos, 1, 2, 3}


def test_nothing_to_do(llama: Tiny) -> None:
    assert generate_batch(llama.model, llama.tokenizer, []) == []
