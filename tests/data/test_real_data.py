"""Public data sets and the tokenizers of real models."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.data import DataOptions, Encoder, prepare, render_prompt, resolve_template
from halfbyte.data.examples import Recipe, encode_rows
from halfbyte.data.records import Completion
from tests.data.conftest import make_bpe
from tests.data.test_examples import HERE, chat
from tests.data.test_templates import talk


@pytest.mark.shared
def test_sst2(shared: Path) -> None:
    options = DataOptions(
        data=str(shared / "sst2"), eval_data=str(shared / "sst2/test.jsonl"), label_names=("negative", "positive")
    )
    found = prepare(options, make_bpe(), 42)
    assert (found.audit.rows_train, found.audit.rows_eval, found.data_format) == (6920, 1821, "classification")
    assert found.audit.bad == ()


@pytest.mark.shared
def test_gsm8k(shared: Path) -> None:
    options = DataOptions(
        data=str(shared / "gsm8k"), columns={"instruction": "question", "output": "answer"}, max_seq_length=4096
    )
    found = prepare(options, make_bpe(), 42)
    assert (found.audit.rows_train, found.audit.rows_eval) == (7473 - 374, 374)
    assert found.audit.truncated == 0


@pytest.mark.shared
@pytest.mark.parametrize(("name", "rows"), [("instruction-data.json", 1100), ("alpaca_en_demo.json", 999)])
def test_instructions(shared: Path, name: str, rows: int) -> None:
    found = prepare(DataOptions(data=str(shared / "instruct" / name), max_bad_share=0), make_bpe(), 42)
    assert found.audit.rows_train + found.audit.rows_eval == rows
    assert found.data_format == "alpaca"


@pytest.mark.shared
def test_wikipedia_is_learned_token_for_token(shared: Path) -> None:
    options = DataOptions(data=str(shared / "text/wiki_demo.txt"), text_split="line", max_seq_length=512, eval_split=0)
    tokenizer = make_bpe()
    found = prepare(options, tokenizer, 42)
    lines = (shared / "text/wiki_demo.txt").read_text().split("\n")
    documents = [line for line in lines if line.strip()]
    # Without a BOS the first token of each document has nothing that could predict it.
    expected = sum(len(ids) for ids in tokenizer(documents)["input_ids"])
    assert found.audit.supervised_train == expected


@cache
def encoder_of(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)


content = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=40).filter(str.strip)


@pytest.mark.real_model
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(content, min_size=1, max_size=4), st.sampled_from(["auto", "plain", "alpaca", "gemma", "chatml"]))
def test_prompts_are_prefixes_with_real_tokenizers(real_tokenizer: Any, contents: list[str], name: str) -> None:
    encoder = encoder_of(real_tokenizer)
    needed = {"gemma": "<start_of_turn>", "chatml": "<|im_start|>"}.get(name)
    template = resolve_template("auto" if needed and not encoder.has_token(needed) else name, encoder)
    messages = talk(*contents, *(["end"] if len(contents) % 2 else []))
    encoded = encode_rows([chat(messages)], Recipe(encoder, 4096, template))
    (example,) = encoded.examples
    prompt = render_prompt(encoder, messages[:-1], template)
    assert example.prompt_ids.tolist() == prompt
    assert example.supervised[len(prompt) :].all()
    assert example.input_ids[-1] in encoder.special_ids
    assert (encoded.double_bos, encoded.missing_bos, encoded.unsupervised_eos, encoded.prompt_mismatch) == (0, 0, 0, 0)
    learned = real_tokenizer.decode(example.input_ids[len(prompt) : -1], clean_up_tokenization_spaces=False)
    spoken = messages[-1]["content"]
    assert learned == (spoken.strip() if template.name == "gemma" else spoken)


@pytest.mark.real_model
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content, content)
def test_raw_prompts_are_what_the_tokenizer_makes_of_them(real_tokenizer: Any, prompt: str, completion: str) -> None:
    encoder = encoder_of(real_tokenizer)
    (example,) = encode_rows([Completion(HERE, prompt, completion)], Recipe(encoder, 4096)).examples
    ids = render_prompt(encoder, prompt)
    assert example.prompt_ids.tolist() == ids == real_tokenizer(prompt)["input_ids"]
    decoded = real_tokenizer.decode(example.input_ids[len(ids) : -1], clean_up_tokenization_spaces=False)
    assert decoded == completion


@pytest.mark.real_model
def test_qwens_own_template_renders_as_in_transformers(real_tokenizer: Any) -> None:
    encoder = Encoder(real_tokenizer)
    template = resolve_template("auto", encoder)
    messages = talk("hi", "hello", "and?")
    ours = render_prompt(encoder, messages[:1], template)
    theirs = real_tokenizer.apply_chat_template(
        messages[:1], chat_template=template.source, add_generation_prompt=True, return_dict=False
    )
    assert ours == theirs
    assert template.render(messages, None, True) == real_tokenizer.apply_chat_template(
        messages, chat_template=template.source, add_generation_prompt=True, tokenize=False
    )


@pytest.mark.real_model
def test_labels_are_single_tokens_with_real_tokenizers(real_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sentence,label\n" + "".join(f"film {number},{number % 2}\n" for number in range(20)))
    found = prepare(DataOptions(data=str(path), label_names=("negative", "positive")), real_tokenizer, 1)
    assert [len(choice.input_ids) for choice in found.labels] == [2, 2]
    first = found.train[0]
    assert first.input_ids[first.prompt_length :].tolist() == list(found.labels[first.label or 0].input_ids)
