"""The programs that serve an exported model, asked what they do with a prompt: the other side of the parity gate.

TrainedModel        our own model, unmerged, as it was trained: what the others are compared with
TransformersServer  a Hugging Face folder, or a base and a PEFT adapter, in transformers
LlamaCppServer      a GGUF file, or a base and a GGUF adapter, in llama.cpp (llama-cpp-python, the `parity` extra)

Each renders and tokenizes a prompt in its own way, since that is half of what goes wrong; the logits are then compared
on ids, so that a difference in one says nothing about the other. llama.cpp computes with a float32 cache and without
flash attention, and its output is kept off the terminal.

Shape letters: T tokens, V vocabulary.
"""

import contextlib
import ctypes
import datetime
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from halfbyte.adapters import disabled
from halfbyte.data import ChatTemplate, Encoder, render_prompt
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.generate import generate
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.evaluate.session import Session, inference

Prompt = str | Sequence[dict[str, Any]]
"""A text to continue, or the messages of a conversation."""
Tools = list[dict[str, Any]] | None

EXTRA = 'pip install "halfbyte[parity]"'
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_BATCH = 64  # tokens llama.cpp reads at once: their logits, of 262,144 words each, are 67 MB


class NotServed(HalfbyteError):
    """The program refuses this prompt: its template does, or it has none."""


class Served(Protocol):
    """A program with a model.

    token_ids   what it makes of a prompt: rendered, tokenized, up to where the answer begins. Raises NotServed
    logprobs    after each of ids[first:]: log-probabilities of the next token, float32 [T - first, V]
    greedy      the likeliest continuation, without the stop id that ended it
    """

    name: str

    def token_ids(self, prompt: Prompt, tools: Tools = None) -> list[int]: ...
    def logprobs(self, ids: Sequence[int], first: int = 0) -> Tensor: ...
    def greedy(self, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]) -> list[int]: ...
    def close(self) -> None: ...


class TrainedModel:
    """Our model with its adapter, as it was trained. `template` is the run's; None where it knows no conversations."""

    def __init__(self, model: Any, tokenizer: Any, template: ChatTemplate | None) -> None:
        self.name = "the trained model"
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self._encoder = Encoder(tokenizer)

    @property
    def dtype(self) -> torch.dtype:
        """Type of its computation."""
        kind: torch.dtype = self.model.dtype
        return kind

    def token_ids(self, prompt: Prompt, tools: Tools = None) -> list[int]:
        messages = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        return render_prompt(self._encoder, messages, self.template, tools=tools)

    def logprobs(self, ids: Sequence[int], first: int = 0) -> Tensor:
        with inference(self.model):
            session = Session(self.model, len(ids))
            if first:
                session.feed([list(ids[:first])])
            return session.feed_all([list(ids[first:])]).float().log_softmax(-1).cpu()

    def base_logprobs(self, ids: Sequence[int], first: int = 0) -> Tensor:
        """The same without the adapter: how far tuning has moved the model."""
        with disabled(self.model):
            return self.logprobs(ids, first)

    def greedy(self, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]) -> list[int]:
        options = GenerateOptions(max_new_tokens=max_new_tokens)
        return list(generate(self.model, self.tokenizer, list(ids), options, stop_ids).tokens)

    def close(self) -> None:
        self.model = None


class TransformersServer:
    """A folder that transformers loads, with `adapter` a PEFT folder on it. `date` stands for a template's today.

    Raises UsageError where a package that it needs is missing, HalfbyteError for whatever else transformers raises.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype | str = "auto", adapter: Path | None = None, date: str | None = None
    ) -> None:
        import transformers

        self.name = f"transformers {transformers.__version__}"
        self._date = date
        with _no_progress_bar(), _one_line(f"{self.name} does not load {folder}"):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
            if adapter is not None:
                peft = require_peft()
                model = peft.PeftModel.from_pretrained(model, str(adapter))
                self.name += f" with PEFT {peft.__version__}"
            self.model: Any = model.eval()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def token_ids(self, prompt: Prompt, tools: Tools = None) -> list[int]:
        if isinstance(prompt, str):
            return list(map(int, self.tokenizer(prompt)["input_ids"]))
        try:
            template = self.tokenizer.get_chat_template(tools=tools)
            encoded = self.tokenizer.apply_chat_template(
                [dict(m) for m in prompt],
                tools=tools,
                chat_template=self._dated(template),
                add_generation_prompt=True,
                return_dict=True,
            )
        except Exception as error:  # whatever the template raises
            raise NotServed(f"{self.name} cannot render it: {_first_line(error)}") from None
        return list(map(int, encoded["input_ids"]))

    def _dated(self, template: str) -> str:
        """The template with today's date written out: transformers passes it no functions."""
        if self._date is None:
            return template
        day = datetime.date.fromisoformat(self._date)
        return _TODAY.sub(lambda call: json.dumps(day.strftime(call[2])), template)

    def logprobs(self, ids: Sequence[int], first: int = 0) -> Tensor:
        with torch.no_grad(), _one_line(f"{self.name} fails on {len(ids)} tokens"):
            logits: Tensor = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, first:]
        return logits.float().log_softmax(-1)

    def greedy(self, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]) -> list[int]:
        found: list[int] = []
        feed, cache = torch.tensor([list(ids)]), None
        with torch.no_grad(), _one_line(f"{self.name} fails on {len(ids)} tokens"):
            while len(found) < max_new_tokens:
                out = self.model(input_ids=feed, past_key_values=cache, use_cache=True)
                token = int(out.logits[0, -1].float().argmax())
                if token in stop_ids:
                    break
                found.append(token)
                feed, cache = torch.tensor([[token]]), out.past_key_values
        return found

    def close(self) -> None:
        self.model = None


class LlamaCppServer:
    """A GGUF file in llama.cpp, with `lora` a GGUF adapter on it.

    context   the most tokens of a prompt and its answer
    date      what a template that prints today's date is given, so that it is the one of training

    A conversation becomes a prompt as llama-server makes it (common/chat.cpp, tools/server): the file's Jinja template,
    rendered with `enable_thinking` set; a BOS that the template prints first is taken away where the tokenizer adds
    one, likewise an EOS at the end; then it is tokenized with special tokens parsed and BOS added.

    Raises UsageError without llama-cpp-python, HalfbyteError where llama.cpp does not load the file, with its reason.
    """

    def __init__(self, path: Path, context: int, lora: Path | None = None, date: str | None = None) -> None:
        self._api = require_llama_cpp()
        self.name = f"llama.cpp (llama-cpp-python {self._api.__version__})"
        self._date = date
        messages: list[str] = []
        with self._quiet(messages):
            try:
                self._llama: Any = self._api.Llama(
                    model_path=str(path),
                    n_ctx=context,
                    n_batch=min(_BATCH, context),
                    n_ubatch=min(_BATCH, context),
                    n_threads=torch.get_num_threads(),
                    n_threads_batch=torch.get_num_threads(),
                    n_gpu_layers=0,
                    type_k=self._api.GGML_TYPE_F32,
                    type_v=self._api.GGML_TYPE_F32,
                    flash_attn=False,
                    verbose=False,
                )
                self._model = self._llama.model
                if lora is not None:
                    self._set_adapter(lora)
            except Exception as error:  # ValueError and RuntimeError that name no reason
                why = next((m.strip() for m in messages if "error" in m.lower() or "fail" in m.lower()), "")
                raise HalfbyteError(
                    f"llama.cpp does not load {path}{f' with {lora}' if lora else ''}: {why or _first_line(error)}"
                ) from None
        self._vocab = self._api.llama_model_get_vocab(self._model)
        self._size = int(self._api.llama_vocab_n_tokens(self._vocab))
        self._formatter = self._make_formatter()
        self._batch = self._api.llama_batch_init(self._llama.n_batch, 0, 1)

    def token_ids(self, prompt: Prompt, tools: Tools = None) -> list[int]:
        text = prompt if isinstance(prompt, str) else self._rendered(prompt, tools)
        if not text:
            raise NotServed("llama.cpp is given an empty prompt")
        ids = self._llama.tokenize(text.encode(), add_bos=True, special=True)
        return list(map(int, ids))

    def logprobs(self, ids: Sequence[int], first: int = 0) -> Tensor:
        self._forget()
        rows = [row for _, row in self._feed(ids, 0, range(first, len(ids)))]
        return torch.from_numpy(np.stack(rows)).log_softmax(-1)

    def greedy(self, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]) -> list[int]:
        self._forget()
        found: list[int] = []
        feed, at = list(ids), 0
        while True:
            ((_, logits),) = self._feed(feed, at, [len(feed) - 1])
            token = int(logits.argmax())
            if token in stop_ids:
                return found
            found.append(token)
            if len(found) == max_new_tokens:
                return found
            feed, at = [token], at + len(feed)

    def close(self) -> None:
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
            self._batch = None
            with self._quiet([]):
                self._llama.close()

    def _rendered(self, messages: Sequence[dict[str, Any]], tools: Tools) -> str:
        if self._formatter is None:
            raise NotServed("the GGUF file has no chat template (tokenizer.chat_template)")
        try:
            text: str = self._formatter(
                messages=[dict(m) for m in messages], tools=tools or None, enable_thinking=True
            ).prompt
        except Exception as error:  # whatever the template raises
            raise NotServed(f"llama.cpp cannot render it: {_first_line(error)}") from None
        if self._api.llama_vocab_get_add_bos(self._vocab):
            text = text.removeprefix(self._token_text(self._api.llama_vocab_bos(self._vocab)))
        if self._api.llama_vocab_get_add_eos(self._vocab):
            text = text.removesuffix(self._token_text(self._api.llama_vocab_eos(self._vocab)))
        return text

    def _set_adapter(self, lora: Path) -> None:
        """llama-cpp-python's own way takes a null pointer, which is what a bad file gives, for an adapter."""
        adapter = self._api.llama_adapter_lora_init(self._model, str(lora).encode())
        if not adapter:
            raise RuntimeError("it is not an adapter of this model")
        one, scale = (self._api.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        if self._api.llama_set_adapters_lora(self._llama.ctx, one, 1, scale):
            raise RuntimeError("the adapter could not be put on the model")

    def _make_formatter(self) -> Any:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        raw = self._api.llama_model_chat_template(self._model, None)
        if not raw:
            return None
        bos, eos = self._api.llama_vocab_bos(self._vocab), self._api.llama_vocab_eos(self._vocab)
        made = Jinja2ChatFormatter(raw.decode(), eos_token=self._token_text(eos), bos_token=self._token_text(bos))
        if self._date is not None:
            made.strftime_now = datetime.date.fromisoformat(self._date).strftime
        return made

    def _token_text(self, token: int) -> str:
        return "" if token < 0 else str(self._api.llama_vocab_get_text(self._vocab, token).decode())

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._llama.ctx), True)

    def _feed(
        self, ids: Sequence[int], start: int, wanted: Collection[int]
    ) -> Iterator[tuple[int, "np.ndarray[Any, np.dtype[np.float32]]"]]:
        """Append ids at position `start`; (index, logits [V], a copy) after those that are `wanted`."""
        size, batch = self._llama.n_batch, self._batch
        for piece in range(0, len(ids), size):
            part = range(piece, min(piece + size, len(ids)))
            batch.n_tokens = len(part)
            for slot, index in enumerate(part):
                batch.token[slot] = int(ids[index])
                batch.pos[slot] = start + index
                batch.n_seq_id[slot] = 1
                batch.seq_id[slot][0] = 0
                batch.logits[slot] = index in wanted
            failed = self._api.llama_decode(self._llama.ctx, batch)
            if failed:
                raise HalfbyteError(f"llama.cpp could not read {len(ids)} tokens at position {start} (code {failed})")
            for slot, index in enumerate(part):
                if index in wanted:
                    logits = self._api.llama_get_logits_ith(self._llama.ctx, slot)
                    yield index, np.ctypeslib.as_array(logits, shape=(self._size,)).copy()

    @contextlib.contextmanager
    def _quiet(self, messages: list[str]) -> Iterator[None]:
        """What llama.cpp logs goes into `messages`."""

        @self._api.llama_log_callback  # type: ignore[untyped-decorator]
        def keep(level: int, text: bytes, data: Any) -> None:
            messages.append(text.decode(errors="replace"))

        from llama_cpp import _logger

        self._api.llama_log_set(keep, None)
        try:
            yield
        finally:
            self._api.llama_log_set(_logger.llama_log_callback, None)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Another program's exceptions as ours: a missing package is the user's to install, all else is a failure."""
    try:
        yield
    except HalfbyteError:
        raise
    except ImportError as error:
        raise UsageError(f"{what}: {_first_line(error)}") from error
    except Exception as error:
        raise HalfbyteError(f"{what}: {type(error).__name__}: {_first_line(error)}") from error


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def require_llama_cpp() -> Any:
    """The llama_cpp module. UsageError, naming the extra, where it is not installed."""
    try:
        import llama_cpp
    except ImportError as error:
        raise UsageError(f"llama-cpp-python is not installed ({_first_line(error)}): {EXTRA}") from None
    return llama_cpp


def require_peft() -> Any:
    """The peft module. UsageError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"peft is not installed ({_first_line(error)}): pip install peft") from None
    return peft


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
