"""`halfbyte export`: a run, an adapter or a fully tuned model as plain values for `export.export`.

What only a run knows is found here: how its base was held, the rows that it held out (their messages, so that the
serving program renders them itself), the template that it was trained with, its rows of training, its model card.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from halfbyte.data import ChatTemplate, Encoder, Example, Prepared, load_rows, resolve_template
from halfbyte.data.options import DataOptions, sources_of
from halfbyte.data.records import Chat, Origin
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.generate import end_ids
from halfbyte.evaluate.metrics import ACCURACY, find_metrics
from halfbyte.export.card import export_card
from halfbyte.export.export import ExportOptions, ExportReport, OnEvent, Subject, export
from halfbyte.export.parity import HeldOutRow, Question
from halfbyte.export.servers import TrainedModel
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import ModelSource, open_source
from halfbyte.run import folder, planning, tasks
from halfbyte.run.config import RunConfig
from halfbyte.run.outputs import TEMPLATE
from halfbyte.run.target import Target, open_target, rows_from
from halfbyte.train.run_directory import RESULT

CALIBRATION_TOKENS = 32_768
"""Tokens of training rows, as they come, on which gptq and awq see what the linears are given: some hundred rows."""


def export_target(
    target: Target,
    out: Path | None,
    options: ExportOptions,
    data: str | None = None,
    on_event: OnEvent | None = None,
) -> ExportReport:
    """Write what `target` is and compare it; see `export.export`.

    out    the folder; None: beside the run (or here), named after it and the format
    data   rows to compare on, all of them; None: those that the run held out

    UsageError for a target that was not trained: there is nothing of ours to export.
    """
    if target.adapter is None and target.run is None:
        raise UsageError(
            f"{target.config.model} is a model as it came: export a run, or an adapter (a model and --adapter)"
        )
    source = open_source(target.config.model, target.config.revision)
    tasks.require_language_model(target.opened_with(source).config, "export")
    subject = subject_of(target, source, options, data)
    where = out or Path(target.run.parent if target.run is not None else ".") / f"{subject.name}-{options.to}"
    return export(subject, where, options, on_event)


def subject_of(target: Target, source: ModelSource, options: ExportOptions, data: str | None = None) -> Subject:
    """The target as plain values; rows, and the trained model, are read when they are asked for."""
    config = target.config
    tokenizer = source.tokenizer()
    encoder = Encoder(tokenizer)
    template = _template(target, encoder)
    ends = end_ids(encoder, template, source.config, source.generation)

    def with_rows() -> RunConfig:
        return planning.absolute(rows_from(target, data).config)  # rows are told apart by the paths of their files

    @cache
    def prepared() -> Prepared:
        found = planning.survey(with_rows()).prepared
        assert found is not None
        return found

    def held_out() -> tuple[Sequence[HeldOutRow], Question]:
        found = prepared()
        chosen = found.eval[: options.rows]
        rows = held_out_rows(chosen, with_rows().pick(DataOptions))
        names = [name for name in options.metrics if name != ACCURACY]
        question = Question(ends | set(found.stop_ids), found.labels, find_metrics(names), options.max_new_tokens)
        return rows, question

    return Subject(
        name=_name(target),
        model=config.pick(ModelOptions),
        source=source,
        adapter=target.adapter,
        quant=target.quant,
        template=template,
        adds_bos=encoder.adds_bos,
        stop=()
        if template is None
        else tuple(text for text in _texts(tokenizer, ends) if text in encoder.special_tokens),
        system=config.system_prompt if template is not None else None,
        trained=lambda: _trained(target, source, template),
        held_out=held_out,
        calibration=lambda: calibration_rows(prepared().train),
        card=None if target.run is None else _card(target.run, source),
    )


def held_out_rows(examples: Sequence[Example], options: DataOptions) -> list[HeldOutRow]:
    """Examples with what was asked, as a server is given it: messages of conversations are read from the data again."""
    conversations: dict[Origin, Chat] = {}
    talks = False
    wanted = {example.origin for example in examples}
    sources = (True, False) if sources_of(options.eval_data) else (False,)
    for evaluation in sources:
        for part in load_rows(options, evaluation=evaluation):
            chats = [row for row in part.rows if isinstance(row, Chat)]
            talks |= bool(chats)
            conversations = {chat.origin: chat for chat in chats if chat.origin in wanted} | conversations
    lost = [example.origin for example in examples if example.prompt_length and example.origin not in conversations]
    if talks and lost:  # its rendered text is no prompt: rendered again it would be another
        raise HalfbyteError(f"{lost[0]}: this held-out row was not found again; were its data changed meanwhile?")
    return [_row(example, conversations.get(example.origin)) for example in examples]


def _row(example: Example, chat: Chat | None) -> HeldOutRow:
    row = HeldOutRow(
        name=str(example.origin),
        prompt=example.prompt if example.prompt_length else None,
        tools=None,
        input_ids=example.input_ids.tolist(),
        supervised=example.supervised.tolist(),
        answer=example.completion,
        label=example.label,
    )
    if chat is None:
        return row
    # A row that did not fit ends with an earlier answer than the last: its text says which.
    learned = [i for i, on in enumerate(chat.supervise) if on]
    same = [i for i in learned if chat.messages[i].get("content") == example.completion]
    last = (same or learned)[-1]
    return replace(row, prompt=chat.messages[:last], tools=chat.tools)


def _template(target: Target, encoder: Encoder) -> ChatTemplate | None:
    """The template that the run was trained with; of an adapter the tokenizer's own; None: it knows plain text only."""
    config = target.config
    if target.run is not None:
        _, record = folder.read_config(target.run)
        if record.get("chat_template", {}).get("name") is None:
            return None
        kept = target.run / TEMPLATE
        option = str(kept) if kept.is_file() else config.chat_template
        return resolve_template(option, encoder, config.chat_template_date)
    if not getattr(encoder.tokenizer, "chat_template", None):
        return None
    return resolve_template("auto", encoder, config.chat_template_date)


def _trained(target: Target, source: ModelSource, template: ChatTemplate | None) -> TrainedModel:
    """The trained model, in float32 where that fits: its own rounding is then not part of what is compared."""
    config = target.config
    numel = sum(info.numel for info in source.tensors().values())
    held = 1 if target.quant is not None else 4  # bytes a weight
    if config.device != "cuda" and numel * held * 2 < psutil.virtual_memory().available:
        config = config.replace(dtype="float32")
    opened = open_target(replace(target, config=config), source)
    return TrainedModel(opened.model, opened.loaded.tokenizer, template)


def _card(run: Path, source: ModelSource) -> Any:
    config, record = folder.read_config(run)
    result = folder.read_json(run / RESULT) if (run / RESULT).is_file() else {}

    def card(exported: Mapping[str, Any]) -> str:
        return export_card(config.model_dump(mode="json"), record, result, source, exported)

    return card


def _name(target: Target) -> str:
    """A run's own name; of an adapter its folder's; as file names and Ollama take it."""
    path = target.run or target.adapter
    assert path is not None
    return re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.lower()).strip("-.") or "model"


def _texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(index)) for index in sorted(ids)]


def calibration_rows(examples: Sequence[Example]) -> list[Tensor]:
    found: list[Tensor] = []
    tokens = 0
    for example in examples:
        if found and tokens + len(example) > CALIBRATION_TOKENS:
            break
        found.append(torch.from_numpy(example.input_ids).long())
        tokens += len(example)
    return found
