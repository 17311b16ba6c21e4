"""Conversations: the cache changes nothing but the time, and a broken turn leaves no trace."""

import pytest
import torch

from halfbyte.adapters import LoraOptions, attach, detach
from halfbyte.data import ChatTemplate, Encoder, render_prompt
from halfbyte.errors import UsageError
from halfbyte.evaluate.chat import COMMANDS, ChatSession
from halfbyte.evaluate.generate import end_ids, generate
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.evaluate.session import Session
from halfbyte.linear import segments
from tests.evaluate.conftest import Tiny

SOURCE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TEMPLATE = ChatTemplate("test", SOURCE, {})
OPTIONS = GenerateOptions(max_new_tokens=10)


def chat(tiny: Tiny, **settings: object) -> ChatSession:
    encoder = Encoder(tiny.tokenizer)
    return ChatSession(tiny.model, encoder, TEMPLATE, OPTIONS, end_ids(encoder, TEMPLATE), **settings)  # type: ignore[arg-type]


def test_every_turn_is_what_generation_from_the_whole_history_gives(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    feed = Session.feed

    def counting(self: Session, new: list[list[int]]) -> torch.Tensor:
        fed.append(len(new[0]))
        return feed(self, new)

    monkeypatch.setattr(Session, "feed", counting)
    session = chat(tiny, system="be brief")
    for turn in ("hello", "and what else?", "Grüße 🦊"):
        pieces: list[str] = []
        history = [*session.messages, {"role": "user", "content": turn}]
        prompt = render_prompt(tiny.tokenizer, history, TEMPLATE)
        fed.clear()
        answer = session.send(turn, pieces.append)
        first = fed[0]
        assert answer == generate(tiny.model, tiny.tokenizer, prompt, OPTIONS, session.end_ids)
        assert "".join(pieces) == answer.text.lstrip()
        assert session.messages == [*history, {"role": "assistant", "content": answer.text.strip()}]
        if len(history) > 2 and answer.text == answer.text.strip() and "\ufffd" not in str(history):
            assert first < len(prompt)  # the earlier turns were not read again


def test_reset_undo_and_system(llama: Tiny) -> None:
    session = chat(llama)
    first = session.send("hello")
    assert session.command("/undo") == "Forgot the last question and answer."
    assert session.command("/undo") == "There is nothing to forget."
    assert session.send("hello").text == first.text
    assert session.command("/reset") == "The conversation starts anew."
    assert session.messages == []
    assert session.command("/system Answer in French.") is not None
    assert session.messages == [{"role": "system", "content": "Answer in French."}]
    session.send("hello")
    session.reset()
    assert len(session.messages) == 1


def test_base_and_tuned_answer_the_same_conversation(llama: Tiny) -> None:
    attach(llama.model, LoraOptions(lora_r=2), seed=0)
    try:
        for segment in segments(llama.model).values():
            assert segment.adapter is not None
            segment.adapter.lora_B.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        session = chat(llama)
        tuned = session.send("hello")
        session.undo()
        assert session.command("/base") == "The base model answers, the adapter is off."
        base = session.send("hello")
        assert base.text != tuned.text
        session.undo()
        session.command("/tuned")
        assert session.send("hello").text == tuned.text
    finally:
        detach(llama.model)


def test_commands(llama: Tiny) -> None:
    session = chat(llama)
    assert session.command("hello") is None
    assert all(name in (session.command("/help") or "") for name in COMMANDS)
    with pytest.raises(UsageError, match="there is no command '/rest'; there are /reset"):
        session.command("/rest")
    with pytest.raises(UsageError, match="there is no command '/system'"):
        session.command("/system ")


def test_an_interrupted_answer_leaves_the_history(llama: Tiny) -> None:
    session = chat(llama)
    session.send("one")
    before = list(session.messages)

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.send("two", interrupt)
    assert session.messages == before
    assert session.send("two").tokens == chat_after(llama, ["one", "two"]).tokens


def chat_after(tiny: Tiny, turns: list[str]):  # type: ignore[no-untyped-def]
    session = chat(tiny)
    return [session.send(turn) for turn in turns][-1]


def test_a_full_context_is_said(llama: Tiny) -> None:
    session = chat(llama)
    with pytest.raises(UsageError, match=r"the conversation has 4\d\d tokens and there is room for 256: use /reset"):
        session.send("x" * 400)
    assert session.messages == []
    answer = session.send("x" * 245)
    assert answer.finish_reason in ("length", "eos")
    assert len(answer.tokens) < 10


def test_a_template_that_refuses_is_said(llama: Tiny) -> None:
    session = chat(llama)
    session.template = ChatTemplate("strict", "{{ raise_exception('no system message') }}", {})
    with pytest.raises(UsageError, match=r"cannot be put to the model: .*no system message"):
        session.send("hello")
