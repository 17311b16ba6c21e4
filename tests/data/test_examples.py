"""Tokens and masks: against a naive reference, and the promise that prompts are prefixes of what was trained."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from halfbyte.data import Encoder, Example, render_prompt
from halfbyte.data.examples import LabelChoice, Recipe, encode_rows
from halfbyte.data.records import Chat, Completion, Labelled, Origin, Row, Text
from halfbyte.data.templates import ChatTemplate, resolve_template
from tests.data.conftest import make_bpe, small_tokenizer
from tests.data.test_templates import ALL, encoder_for, family, talk

HERE = Origin("f.jsonl", 3)


def chat(messages: list[dict[str, Any]], **kwargs: Any) -> Chat:
    return Chat(HERE, messages, tuple(message["role"] == "assistant" for message in messages), **kwargs)


def recipe(encoder: Encoder, template: ChatTemplate | None = None, **kwargs: Any) -> Recipe:
    return Recipe(encoder, **{"max_seq_length": 2048, "template": template, **kwargs})


def one(row: Row, how: Recipe) -> Example:
    encoded = encode_rows([row], how)
    assert not encoded.bad, encoded.bad
    (example,) = encoded.examples
    return example


def learned(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.input_ids[example.supervised]))


content = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=30).filter(str.strip)


@given(st.lists(content, min_size=1, max_size=4), st.booleans())
def test_chatml_against_a_naive_reference(contents: list[str], train_on_inputs: bool) -> None:
    """The reference writes ChatML by hand: a piece of text and whether it is learned, tokenized piece by piece."""
    messages = talk(*contents, *(["end"] if len(contents) % 2 else []))
    template, encoder = family("chatml")
    pieces: list[tuple[str, bool]] = [("", False)]
    for message in messages:
        pieces[-1] = (f"{pieces[-1][0]}<|im_start|>{message['role']}\n", False)
        if message["role"] == "assistant":
            pieces += [(f"{message['content']}<|im_end|>", True), ("\n", False)]
        else:
            pieces[-1] = (f"{pieces[-1][0]}{message['content']}<|im_end|>\n", False)
    ids = [(token, learn) for text, learn in pieces for token in encoder.encode(text)]
    if not train_on_inputs:
        ids.pop()  # the newline after the last turn is learned by no one, so it is left out
    example = one(chat(messages), recipe(encoder, template, train_on_inputs=train_on_inputs))
    assert example.input_ids.tolist() == [token for token, _ in ids]
    expected = [train_on_inputs or learn for _, learn in ids]
    expected[0] = False
    assert example.supervised.tolist() == expected


@given(st.lists(content, min_size=1, max_size=4), st.sampled_from(ALL), st.booleans())
def test_prompts_are_prefixes_of_what_was_trained(contents: list[str], name: str, system: bool) -> None:
    messages = talk(
        *contents, *(["end"] if len(contents) % 2 else []), system="s" if system and name != "inst" else None
    )
    template, encoder = family(name)
    example = one(chat(messages), recipe(encoder, template))
    prompt = render_prompt(encoder, messages[:-1], template)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert example.prompt_ids.tolist() == prompt
    assert not example.supervised[len(prompt) - 1]
    assert example.supervised[len(prompt) :].all()


@given(content, content, st.sampled_from(["bpe", "sp", "sp-first"]))
def test_raw_prompts_are_prefixes_too(prompt: str, completion: str, kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    example = one(Completion(HERE, prompt, completion), recipe(Encoder(tokenizer)))
    ids = render_prompt(tokenizer, prompt)
    assert example.prompt_ids.tolist() == ids == tokenizer(prompt)["input_ids"]
    assert example.supervised.tolist() == [number >= len(ids) for number in range(len(example))]
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_completions_for_evaluation(bpe: PreTrainedTokenizerFast) -> None:
    template, encoder = family("chatml")
    example = one(chat(talk("q", "a", "next?", " done ")), recipe(encoder, template))
    assert (example.prompt, example.completion, example.label) == ("next?", " done ", None)
    assert learned(example, bpe) == "a<|im_end|> done <|im_end|>"
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = chat([*talk("q"), {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert one(row, recipe(encoder, template)).completion == (
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    )


def test_turns_that_are_not_learned_are_still_cut_out() -> None:
    """So that a conversation is tokenized the same, whatever is learned of it."""
    template, encoder = family("chatml")
    messages = talk("q", "\nfirst", "r", "second")
    both = one(Chat(HERE, messages, (False, True, False, True)), recipe(encoder, template))
    last = one(Chat(HERE, messages, (False, False, False, True)), recipe(encoder, template))
    assert both.input_ids.tolist() == last.input_ids.tolist()
    assert learned(last, encoder.tokenizer) == "second<|im_end|>"
    assert both.prompt_ids.tolist() == last.prompt_ids.tolist()


def test_never_a_double_bos(sp: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(sp)
    template = ChatTemplate("twice", "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}: ", {"bos_token": "<s>"})
    source = template.source + "{{ messages[1].content if messages | length > 1 }}"
    twice = ChatTemplate("twice", source, {"bos_token": "<s>"})
    encoded = encode_rows([chat(talk("a", "b"))], recipe(encoder, twice))
    assert encoded.double_bos == 1
    assert encoded.examples[0].input_ids.tolist().count(encoder.bos) == 1
    assert render_prompt(sp, talk("a"), twice) == encoded.examples[0].prompt_ids.tolist()
    raw = encode_rows([Completion(HERE, "<s>a", " b")], recipe(encoder))
    assert raw.examples[0].input_ids.tolist().count(encoder.bos) == 1


def test_what_is_noticed(sp: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(sp)
    no_end = ChatTemplate("no end", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", {})
    encoded = encode_rows([chat(talk("a </s>", "b"))], recipe(encoder, no_end))
    assert (encoded.unsupervised_eos, encoded.missing_bos, encoded.specials_in_text) == (1, 1, 1)
    raw = encode_rows(
        [Completion(HERE, "a", "b"), Completion(HERE, "a ", "b"), Completion(HERE, "a", "\nb</s>")], recipe(encoder)
    )
    assert (raw.glued, raw.unsupervised_eos, raw.specials_in_text) == (1, 0, 1)
    assert raw.examples[2].input_ids.tolist().count(encoder.eos) == 1


def test_a_prompt_that_inference_would_not_give() -> None:
    """The header is inside the generation block, but the generation prompt prints it too."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}bot: {{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}bot: {% endif %}"
    )
    encoder = encoder_for("chatml")
    encoded = encode_rows([chat(talk("a", "b"))], recipe(encoder, ChatTemplate("x", source, {})))
    assert encoded.prompt_mismatch == 1


@pytest.mark.parametrize("limit", [4, 7, 12, 40])
def test_truncation(limit: int) -> None:
    encoder = Encoder(make_bpe())
    row = Completion(HERE, "abc", " defghij")
    whole = one(row, recipe(encoder))
    cut = one(row, recipe(encoder, max_seq_length=limit))
    assert cut.input_ids.tolist() == whole.input_ids[:limit].tolist()
    assert cut.truncated == max(0, len(whole) - limit)
    assert cut.supervised.tolist() == whole.supervised[:limit].tolist()


def test_a_row_without_a_learned_token_left_is_set_aside() -> None:
    encoded = encode_rows([Completion(HERE, "a long prompt", " b")], recipe(Encoder(make_bpe()), max_seq_length=3))
    assert not encoded.examples
    assert str(encoded.bad[0]).startswith("f.jsonl:3: nothing is left to learn: the answer begins after")


def test_truncation_inside_a_conversation_moves_the_prompt_to_the_last_turn_that_fits() -> None:
    template, encoder = family("chatml")
    messages = talk("q", "first", "r" * 300, "second")
    limit = len(render_prompt(encoder, messages[:1], template)) + 4
    example = one(chat(messages), recipe(encoder, template, max_seq_length=limit))
    assert example.completion == "first"
    assert example.prompt_ids.tolist() == render_prompt(encoder, messages[:1], template)


def test_classification(sp: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(sp)
    labels = tuple(
        LabelChoice(value, word, (*encoder.encode_continuation(f" {word}"), encoder.eos))
        for value, word in enumerate(["negative", "positive"])
    )
    how = recipe(encoder, labels=labels)
    example = one(Labelled(HERE, (("sentence", "A fine film ."),), 1), how)
    assert (example.prompt, example.completion, example.label) == ("A fine film .\nLabel:", "positive", 1)
    assert example.prompt_ids.tolist() == render_prompt(sp, "A fine film .\nLabel:")
    assert tuple(example.input_ids[example.prompt_length :].tolist()) == labels[1].input_ids
    word = one(
        Labelled(HERE, (("premise", "a"), ("hypothesis", "b")), "negative"),
        recipe(encoder, labels=labels, instruction="Judge."),
    )
    assert (word.prompt, word.label) == ("Judge.\n\npremise: a\nhypothesis: b\nLabel:", 0)
    unknown = encode_rows([Labelled(HERE, (("sentence", "x"),), 2)], how)
    assert "the label 2 is not among label_names (negative, positive)" in unknown.bad[0].reason


@given(
    st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=200),
    st.integers(3, 40),
    st.sampled_from(["bpe", "sp"]),
)
def test_windows_learn_every_token_once(text: str, limit: int, kind: str) -> None:
    assume(text.strip())
    encoder = Encoder(small_tokenizer(kind))
    whole = [*encoder.prefix, *encoder.encode(text), encoder.eos]
    examples = encode_rows([Text(HERE, text)], recipe(encoder, max_seq_length=limit)).examples
    seen = [token for example in examples for token in example.input_ids[example.supervised].tolist()]
    assert seen == whole[1:]
    position = 0
    for example in examples:
        assert len(example) <= limit
        ids = example.input_ids.tolist()
        assert ids[: len(encoder.prefix)] == list(encoder.prefix)
        first = int(np.flatnonzero(example.supervised)[0])
        # The context of the first target is the token before it in the text.
        assert ids[first - 1] == whole[position]
        position += example.supervised_tokens


def test_render_prompt_needs_a_template_for_messages() -> None:
    with pytest.raises(ValueError, match="messages need a template"):
        render_prompt(make_bpe(), talk("a"))
    template = resolve_template("plain", Encoder(make_bpe()))
    assert make_bpe().decode(render_prompt(make_bpe(), talk("a"), template)) == "User:\na\n\nAssistant:\n"
    assert make_bpe().decode(render_prompt(make_bpe(), talk("a"), template, False)) == "User:\na\n\n"
