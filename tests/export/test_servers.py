"""Real transformers and real llama.cpp on tiny models: ids, log-probabilities and answers equal ours."""

from pathlib import Path

import pytest
import torch

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export import servers
from halfbyte.export.servers import LlamaCppServer, NotServed, Served, TransformersServer
from tests.export.served_models import BOS, EOS, Tuned, make_tuned, one_thread

__all__ = ["one_thread"]

pytest.importorskip("llama_cpp", reason="llama-cpp-python is the `parity` extra")

pytestmark = pytest.mark.usefixtures("one_thread")

TALK = [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "2?"}]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return make_tuned(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def gguf_file(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned.gguf(tmp_path_factory.mktemp("gguf") / "merged.gguf")


@pytest.fixture(params=["transformers", "peft", "llama.cpp"])
def served(request: pytest.FixtureRequest, tuned: Tuned, gguf_file: Path, tmp_path: Path) -> Served:
    if request.param == "llama.cpp":
        return LlamaCppServer(gguf_file, 256)
    if request.param == "peft":
        (tuned.base / "chat_template.jinja").write_text(tuned.template.source)
        return TransformersServer(tuned.base, torch.float32, adapter=tuned.adapter)
    tuned.merged().save_pretrained(tmp_path)
    tuned.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(tuned.template.source)
    return TransformersServer(tmp_path, torch.float32)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own
def test_every_program_says_what_the_trained_model_says(tuned: Tuned, served: Served) -> None:
    model = tuned.model()
    for prompt in (TALK, "Plain <|im_end|> text ä"):
        ids = model.token_ids(prompt)
        assert ids[0] == BOS
        assert ids.count(BOS) == 1
        assert served.token_ids(prompt) == ids
    row = tuned.row(2)
    ours = model.logprobs(row.input_ids)
    theirs = served.logprobs(row.input_ids)
    assert theirs.shape == ours.shape == (len(row.input_ids), 260)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs.exp().sum(1), torch.ones(len(theirs)))
    assert (model.base_logprobs(row.input_ids) - ours).abs().max() > 0.5  # the adapter says something
    torch.testing.assert_close(served.logprobs(row.input_ids, 17), ours[17:], rtol=0, atol=1e-4)
    torch.testing.assert_close(model.logprobs(row.input_ids, 17), ours[17:], rtol=0, atol=1e-5)
    answer = model.greedy(ids, 10, ())
    assert len(answer) == 10
    assert served.greedy(ids, 10, ()) == answer
    assert (
        served.greedy(ids, 10, {answer[4]}) == model.greedy(ids, 10, {answer[4]}) == answer[: answer.index(answer[4])]
    )
    served.close()


def test_long_texts_are_read_in_pieces(tuned: Tuned, gguf_file: Path) -> None:
    server = LlamaCppServer(gguf_file, 256)
    ids = [BOS, *torch.randint(0, 256, (199,), generator=torch.Generator().manual_seed(3)).tolist()]
    torch.testing.assert_close(server.logprobs(ids, 60), tuned.model().logprobs(ids, 60), rtol=0, atol=2e-4)
    assert server.greedy(ids, 5, ()) == tuned.model().greedy(ids, 5, ())
    with pytest.raises(HalfbyteError, match="could not read 300 tokens"):
        server.logprobs([1] * 300)
    server.close()
    server.close()  # twice is fine


def test_an_adapter_beside_its_base_in_llama_cpp_is_refused_where_it_is_none(tuned: Tuned, gguf_file: Path) -> None:
    with pytest.raises(HalfbyteError, match=r"llama\.cpp does not load .*merged.gguf with .*merged.gguf: "):
        LlamaCppServer(gguf_file, 64, lora=gguf_file)


def test_bos_is_llama_servers(tuned: Tuned, tmp_path: Path) -> None:
    """One BOS that the template prints is taken away where the tokenizer adds one, a second one stays."""
    source = tuned.template.source
    expected = tuned.model().token_ids(TALK)
    for template, ids in (
        (source, expected),
        (source.removeprefix("{{- bos_token -}}"), expected),
        ("{{- bos_token -}}" + source, [BOS, *expected]),
        (source + "{{- eos_token -}}", [*expected, EOS]),
    ):
        server = LlamaCppServer(tuned.gguf(tmp_path / "m.gguf", template=template), 128)
        assert server.token_ids(TALK) == ids
        server.close()


def test_what_a_template_cannot_render(tuned: Tuned, tmp_path: Path) -> None:
    server = LlamaCppServer(tuned.gguf(tmp_path / "m.gguf", template="{{ raise_exception('never') }}"), 128)
    with pytest.raises(NotServed, match=r"llama\.cpp cannot render it: never"):
        server.token_ids(TALK)
    assert server.token_ids("text") == [BOS, *tuned.tokenizer("text", add_special_tokens=False)["input_ids"]]
    with pytest.raises(NotServed, match="empty prompt"):
        server.token_ids("")
    server.close()
    server = LlamaCppServer(tuned.gguf(tmp_path / "m.gguf", template=None), 128)
    with pytest.raises(NotServed, match="has no chat template"):
        server.token_ids(TALK)
    server.close()
    with pytest.raises(HalfbyteError, match="Expected an expression"):
        LlamaCppServer(tuned.gguf(tmp_path / "m.gguf", template="{% if %}"), 128)
    tuned.merged().save_pretrained(tmp_path / "folder")
    tuned.tokenizer.save_pretrained(tmp_path / "folder")
    with pytest.raises(NotServed, match=r"transformers .* cannot render it"):
        TransformersServer(tmp_path / "folder", torch.float32).token_ids(TALK)


def test_today_is_the_day_of_training(tuned: Tuned, tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }}"
    wanted = tuned.tokenizer("26 Jul 2024", add_special_tokens=False)["input_ids"]
    server = LlamaCppServer(tuned.gguf(tmp_path / "m.gguf", template=template), 128, date="2024-07-26")
    assert server.token_ids(TALK) == [BOS, *wanted]
    server.close()
    tuned.merged().save_pretrained(tmp_path)
    tuned.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    assert TransformersServer(tmp_path, torch.float32, date="2024-07-26").token_ids(TALK) == wanted


def test_llama_cpp_is_silent_and_its_reason_is_told(
    tuned: Tuned, gguf_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    LlamaCppServer(gguf_file, 64).close()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:-5000])
    with pytest.raises(HalfbyteError, match=r"llama\.cpp does not load .*broken\.gguf: .*\w") as caught:
        LlamaCppServer(broken, 64)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(UsageError, match=r'llama-cpp-python is not installed .*pip install "halfbyte\[parity\]"'):
        servers.LlamaCppServer(tmp_path / "x.gguf", 64)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UsageError, match="peft is not installed"):
        servers.require_peft()
