"""One function from a trained model to files that another program serves, and the proof that they behave as trained.

    export(subject, out, options)    plan → check output and disk → write → rename → compare → parity.json, model card

What is exported comes as plain values (`Subject`); the layers above know of runs. The folder takes its name once all of
it is on the disk. Only then is it compared, so that a comparison that fails, or is killed, costs no export: parity.json
says "not compared" until it has been.

Formats (`FORMATS`): how each is written, which program serves it and with which command.
"""

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from pydantic import Field, field_validator
from torch import Tensor

from halfbyte.data import ChatTemplate
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export import parity
from halfbyte.export.folder import check_output, new_folder
from halfbyte.export.merge import MergeOptions, merge, plan_tensors, read_deltas
from halfbyte.export.ollama import MODELFILE, modelfile
from halfbyte.export.parity import PARITY, HeldOutRow, ParityReport, Question
from halfbyte.export.safetensors_file import Planned
from halfbyte.export.servers import LlamaCppServer, Served, TrainedModel, TransformersServer, require_llama_cpp
from halfbyte.files import require_free_space, write_atomic
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.gguf_source import GgufSource
from halfbyte.models.ollama import OllamaSource, is_ollama_name
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import ModelSource, open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.options import Options
from halfbyte.quant import QuantOptions

Format = Literal["gguf", "gguf-adapter", "hf", "ollama", "bnb-4bit", "gptq", "awq"]
CARD, TEMPLATE = "README.md", "chat_template.jinja"
_SMALL_FILES = 64_000_000  # tokenizer, config, template: for the check of the disk
_BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 7.0, "q5_k_m": 6.5, "q4_k_m": 6.0, "q4_0": 5.5,
}  # fmt: skip
"""Bits a weight that a GGUF file takes at most, its larger output head included; the keys are what can be asked for."""
_HF_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}

OnEvent = Callable[[str, int, int], None]
"""Hears (what is being done, done, in all)."""


class ExportOptions(Options):
    """What is written, and how it is compared."""

    to: Format = Field(
        description="gguf (llama.cpp), gguf-adapter (llama.cpp's --lora), hf (transformers, vLLM), ollama, bnb-4bit, "
        "gptq or awq",
    )
    quantization: tuple[str, ...] = Field(
        default=(),
        description="gguf and ollama: f32, f16, bf16, q8_0 (the default), q6_k, q5_k_m, q4_k_m or q4_0, a file each; "
        "hf: bf16 (the default), f16 or f32",
    )
    base: Literal["dequantized", "16bit"] = Field(
        default="dequantized",
        description="what the adapter is merged into: the weights that it was trained on (dequantized, if it was "
        "QLoRA), or the source's own 16-bit weights",
    )
    over: str | None = Field(
        default=None,
        description="gguf-adapter: the base's GGUF file (or ollama:NAME) to compare over; by default the base that was "
        "trained on, if it is one",
    )
    parity: bool = Field(default=True, description="compare the export with the trained model in the serving program")
    strict: bool = Field(default=False, description="fail where it cannot be compared, instead of saying so")
    rows: int = Field(default=32, ge=1, description="held-out rows to compare on")
    max_new_tokens: int = Field(default=64, ge=0, description="longest greedy answer that is compared; 0 compares none")
    metrics: tuple[str, ...] = Field(
        default=("exact_match",), description="of the greedy answers, as in evaluate; accuracy for classification"
    )
    overwrite: bool = Field(default=False, description="replace an existing export at the output")

    @field_validator("quantization")
    @classmethod
    def _lower(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.lower() for name in value))


@dataclass(frozen=True)
class Subject:
    """What is exported.

    name         for file names and for Ollama
    model        the base as it was loaded for training, `quant` its format (None: 16 or 32 bits); `source` is open
    adapter      a PEFT folder; None: `source` itself is the trained model
    template     the chat template that it was trained with; None: with plain text
    adds_bos     whether its tokenizer puts BOS in front of a text
    stop         texts that end an answer
    system       a system text to ask with where the user gives none
    trained      loads the trained model, for the comparison
    held_out     the rows to compare on, and what is asked of them
    calibration  rows of training as token ids, for gptq and awq
    card         the model card, given the export's part of it; None: nothing is known of the training
    """

    name: str
    model: ModelOptions
    source: ModelSource
    adapter: Path | None
    quant: QuantOptions | None
    template: ChatTemplate | None
    adds_bos: bool
    stop: tuple[str, ...]
    system: str | None
    trained: Callable[[], TrainedModel]
    held_out: Callable[[], tuple[Sequence[HeldOutRow], Question]]
    calibration: Callable[[], Sequence[Tensor]]
    card: Callable[[Mapping[str, Any]], str] | None = None


@dataclass(frozen=True)
class Exported:
    """One thing that is served: `file` in the folder ("" is the folder), the kind of its weights, and the command."""

    file: str
    kind: str
    command: str


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares. `results` go by the file's name; `notes`: what users should know."""

    path: Path
    to: str
    exported: tuple[Exported, ...]
    nbytes: int
    seconds: float
    results: Mapping[str, ParityReport]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool | None:
        """False where one comparison failed, None where none was made."""
        verdicts = {result.passed for result in self.results.values()}
        return False if False in verdicts else (True if True in verdicts else None)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": parity.SCHEMA_VERSION,
            "format": self.to,
            "passed": self.passed,
            "files": [
                {"file": one.file, "kind": one.kind, "command": one.command, "parity": self.results[one.file].to_json()}
                for one in self.exported
            ],
            "notes": list(self.notes),
        }


def export(subject: Subject, out: Path, options: ExportOptions, on_event: OnEvent | None = None) -> ExportReport:
    """Write `subject` as `options` say into the folder `out`, and compare it with what was trained.

    The report says whether the comparison passed; a failed one leaves the files. Raises UsageError for what cannot be
    exported so, DoesNotFit for a full disk; `out` is then untouched. With `strict`, also UsageError where nothing can
    be compared: before anything is written, if that is known.
    """
    tell = on_event or (lambda what, done, total: None)
    started = time.monotonic()
    plan = _plan(subject, options)
    if options.parity and options.strict and plan.program == "llama.cpp":
        require_llama_cpp()
    keep = (subject.source.path, *([subject.adapter] if subject.adapter is not None else []))
    check_output(out, options.overwrite, keep, marker=PARITY)
    require_free_space(out.parent, plan.nbytes + _SMALL_FILES, f"the export ({out})")
    why = "the comparison was not finished" if options.parity else "--no-parity was given"
    untold = {one.file: ParityReport(kind=one.kind, skipped=why) for one in plan.exported}
    with new_folder(out) as folder:
        notes = plan.write(folder, tell)
        nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        report = ExportReport(out, options.to, plan.exported, nbytes, 0.0, untold, tuple(notes))
        report = replace(report, exported=tuple(replace(e, command=plan.command(out, e)) for e in plan.exported))
        _write_words(folder, report, subject)
    if options.parity:
        results = _compare(subject, out, options, plan, tell)
        report = replace(report, results=results)
        _write_words(out, report, subject)
        unmade = [result.skipped for result in results.values() if result.skipped]
        if options.strict and unmade:
            raise UsageError(f"{out} was written and not compared: {unmade[0]}")
    return replace(report, seconds=time.monotonic() - started)


def _write_words(folder: Path, report: ExportReport, subject: Subject) -> None:
    """parity.json and the model card: of the export, as far as it has been compared."""
    write_atomic(folder / PARITY, json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n")
    if subject.card is not None:
        write_atomic(folder / CARD, subject.card(report.to_json()))


# -- what is written --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """An export before anything is written.

    exported   what will be served; commands come once the place is known
    nbytes     on the disk, at most
    write      fills a folder, returns notes for people
    command    how a file (of the finished folder) is served
    program    that serves it: "llama.cpp" or "transformers"
    serve      starts it, given the finished folder, the file and the longest text
    """

    exported: tuple[Exported, ...]
    nbytes: int
    write: Callable[[Path, OnEvent], list[str]]
    command: Callable[[Path, Exported], str]
    program: str
    serve: Callable[[Path, Exported, int, str | None], Served]


def _plan(subject: Subject, options: ExportOptions) -> _Plan:
    """UsageError for what does not go together."""
    adapter_asked = options.to == "gguf-adapter"
    if options.over is not None and not adapter_asked:
        raise UsageError(f"--over is the base of an adapter (--to gguf-adapter), and --to {options.to} is whole: leave "
                         "it out")  # fmt: skip
    if subject.adapter is None and adapter_asked:
        raise UsageError(f"{subject.name} has no adapter: export it whole, --to gguf")
    known: tuple[str, ...] = {"gguf": (*_BITS,), "ollama": (*_BITS,), "hf": (*_HF_TYPES,)}.get(options.to, ())
    for name in options.quantization:
        if name not in known:
            can = f"{', '.join(known)} can be written" if known else "it has one kind of weights: leave it out"
            raise UsageError(f"--quantization {name} is not for --to {options.to}: {can}")
    if options.to == "gguf":
        return _plan_gguf(subject, options)
    if options.to == "gguf-adapter":
        return _plan_adapter(subject, options)
    if options.to == "ollama":
        return _plan_ollama(subject, options)
    return _plan_folder(subject, options)


def _numel(subject: Subject) -> int:
    return sum(info.numel for info in subject.source.tensors().values())


def _planned(subject: Subject, options: ExportOptions, dtype: torch.dtype) -> list[Planned]:
    deltas = {} if subject.adapter is None else read_deltas(subject.adapter)
    quant = subject.quant if options.base == "dequantized" else None
    return plan_tensors(subject.model, subject.source, deltas, quant, dtype)


def _plan_gguf(subject: Subject, options: ExportOptions, fixed: str | None = None) -> _Plan:
    """`fixed`: the name of the one file, whatever its quantization."""
    kinds = options.quantization or ("q8_0",)
    files = tuple(Exported(fixed or f"{subject.name}-{kind.upper()}.gguf", kind, "") for kind in kinds)

    def write(folder: Path, tell: OnEvent) -> list[str]:
        from halfbyte.export.gguf_metadata import limits
        from halfbyte.export.gguf_writer import spec_of, write_gguf

        planned = _planned(subject, options, torch.float32)
        source = None if subject.template is None else subject.template.source
        for one in files:
            progress = partial(tell, f"writing {one.file}")
            write_gguf(folder / one.file, planned, subject.source, one.kind, source, progress)
        return limits(spec_of(subject.source))

    return _Plan(
        exported=files,
        nbytes=int(sum(_numel(subject) * _BITS[kind] / 8 for kind in kinds)),
        write=write,
        command=lambda out, one: f"llama-server -m {_shown(out / one.file)}",
        program="llama.cpp",
        serve=lambda out, one, context, date: LlamaCppServer(out / one.file, context, date=date),
    )


def _plan_adapter(subject: Subject, options: ExportOptions, fixed: str | None = None) -> _Plan:
    assert subject.adapter is not None
    adapter = subject.adapter
    file = fixed or f"{subject.name}-adapter.gguf"
    over = _base_file(subject, options.over)
    template = _template_beside(subject, over)

    def write(folder: Path, tell: OnEvent) -> list[str]:
        from halfbyte.export.gguf_adapter import write_gguf_adapter

        write_gguf_adapter(folder / file, read_deltas(adapter), subject.source, subject.name)
        if template is not None:
            (folder / TEMPLATE).write_text(template, encoding="utf-8")
        return []

    def serve(out: Path, one: Exported, context: int, date: str | None) -> Served:
        if over is None:
            raise UsageError(f"the base {subject.source.name} is not a GGUF file: name the one it will be served over, "
                             "--over FILE.gguf")  # fmt: skip
        return LlamaCppServer(over, context, lora=out / one.file, date=date, template=template)

    def command(out: Path, one: Exported) -> str:
        base = "BASE.gguf" if over is None else _shown(over)
        own = "" if template is None else f" --jinja --chat-template-file {_shown(out / TEMPLATE)}"
        return f"llama-server -m {base} --lora {_shown(out / one.file)}{own}"

    return _Plan(
        exported=(Exported(file, _kind_over(subject, over), ""),),
        nbytes=sum(path.stat().st_size for path in adapter.glob("adapter_model.*")),
        write=write,
        command=command,
        program="llama.cpp",
        serve=serve,
    )


def _plan_ollama(subject: Subject, options: ExportOptions) -> _Plan:
    """An adapter over a model of Ollama's where that is the base and no quantization was asked for, else merged."""
    over_base = isinstance(subject.source, OllamaSource) and subject.adapter is not None and not options.quantization
    if len(options.quantization) > 1:
        raise UsageError(
            f"--to ollama writes one model: give one --quantization, not {', '.join(options.quantization)}"
        )
    file = "adapter.gguf" if over_base else "model.gguf"
    inner = _plan_adapter(subject, options, file) if over_base else _plan_gguf(subject, options, file)

    def write(folder: Path, tell: OnEvent) -> list[str]:
        inner.write(folder, tell)
        base = subject.source.ollama if isinstance(subject.source, OllamaSource) else None
        made = modelfile(
            base=base.name if over_base and base else f"./{file}",
            template=subject.template,
            adds_bos=subject.adds_bos,
            stop=(*subject.stop, *(base.stop if base else ())),
            system=subject.system or (base.system if base else None),
            adapter=f"./{file}" if over_base else None,
        )
        (folder / MODELFILE).write_text(made.text, encoding="utf-8")
        return [
            *made.notes,
            "compared in llama.cpp, which Ollama runs; what Ollama makes of the Modelfile's template was not run here",
        ]

    def command(out: Path, one: Exported) -> str:
        return f"ollama create {subject.name} -f {_shown(out / MODELFILE)} && ollama run {subject.name}"

    return replace(inner, write=write, command=command)


def _plan_folder(subject: Subject, options: ExportOptions) -> _Plan:
    """A Hugging Face folder: hf, bnb-4bit, gptq, awq."""
    if subject.adapter is None and options.to == "hf":
        raise UsageError(
            f"{subject.name} is a Hugging Face folder already (every weight was trained): serve it as it is"
        )
    kind = (options.quantization or ("bf16",))[0] if options.to == "hf" else options.to
    if len(options.quantization) > 1:
        raise UsageError(f"--to hf writes one folder: give one --quantization, not {', '.join(options.quantization)}")
    bits = _BITS[kind] if options.to == "hf" else 8  # embeddings and the output head stay in 16 bits

    def write(folder: Path, tell: OnEvent) -> list[str]:
        return _write_folder(folder, subject, options, kind, tell)

    def serve(out: Path, one: Exported, context: int, date: str | None) -> Served:
        # In float32, so that what is seen is what the file holds and not the rounding of a 16-bit computation.
        return TransformersServer(out, torch.float32 if options.to == "hf" else "auto", date=date)

    return _Plan(
        exported=(Exported("", kind, ""),),
        nbytes=int(_numel(subject) * bits / 8),
        write=write,
        command=lambda out, one: f"vllm serve {_shown(out)}",
        program="transformers",
        serve=serve,
    )


def _write_folder(folder: Path, subject: Subject, options: ExportOptions, kind: str, tell: OnEvent) -> list[str]:
    """Fill `folder`; returns what users should know."""
    if options.to == "hf":
        assert subject.adapter is not None
        base: Any = "trained" if options.base == "dequantized" else options.base
        merging = MergeOptions(base=base, merge_dtype=_HF_TYPES[kind], verify=False)
        merge(subject.model, subject.adapter, folder, subject.quant, merging, partial(tell, "writing"))
        return []
    adapter = subject.adapter or subject.source.path
    if options.to == "bnb-4bit":
        from halfbyte.export.bnb_folder import linear_formats, write_bnb_folder

        quant = subject.quant
        four_bit = quant is not None and quant.quant_type in ("nf4", "fp4")
        # GGUF's, GPTQ's and AWQ's blocks are other formats: what was trained on them is quantized like 16-bit weights.
        served = ModelSpec.serves(subject.source.config)
        same = served and four_bit and options.base == "dequantized" and not _trained_in_foreign_blocks(subject)
        planned = _planned(subject, options, torch.float32 if same else torch.bfloat16)
        chosen = quant if four_bit and quant is not None else QuantOptions()
        if same:
            formats = linear_formats(subject.source, chosen)
            exact = {f"{name}.weight" for name, kind in formats.items() if kind is not None}
            planned = [one if one.name in exact else _as_bfloat16(one) for one in planned]
        deltas = None if subject.adapter is None else read_deltas(subject.adapter)
        anew = frozenset[str]() if deltas is None else deltas.off_the_base
        write_bnb_folder(folder, planned, subject.source, chosen, adapter, trained_on=same, anew=anew)
        return []
    planned = _planned(subject, options, torch.bfloat16)
    rows, progress = subject.calibration(), partial(tell, "quantizing")
    if options.to == "gptq":
        from halfbyte.export.gptq import write_gptq_folder

        report = write_gptq_folder(folder, subject.source, planned, rows, adapter=adapter, on_progress=progress)
    else:
        from halfbyte.export.awq import write_awq_folder

        report = write_awq_folder(folder, subject.source, planned, rows, adapter=adapter, on_progress=progress)
    return list(report.notes)


def _trained_in_foreign_blocks(subject: Subject) -> bool:
    kept = subject.quant is not None and not subject.quant.requantize
    return kept and subject.source.blocks not in (None, "bitsandbytes")


def _as_bfloat16(tensor: Planned) -> Planned:
    return Planned(
        tensor.name, tensor.shape, torch.bfloat16, lambda: (piece.to(torch.bfloat16) for piece in tensor.rows())
    )


def _template_beside(subject: Subject, over: Path | None) -> str | None:
    """The run's chat template, where the base's file does not have the same one: an adapter's file holds none."""
    if subject.template is None:
        return None
    own = None if over is None else GgufFile(over).get("tokenizer.chat_template")
    return None if own == subject.template.source else subject.template.source


def _base_file(subject: Subject, over: str | None) -> Path | None:
    """The GGUF file that an adapter is served over; None where the base is none and none was named."""
    if over is None:
        return subject.source.path if isinstance(subject.source, GgufSource) else None
    path = Path(over).expanduser()
    if not is_ollama_name(over) and not path.is_file():
        raise UsageError(f"--over {over}: there is no such file (give a GGUF file or ollama:NAME)")
    source = open_source(over)
    if not isinstance(source, GgufSource):
        raise UsageError(f"--over {over} is no GGUF file: give the base as llama.cpp will serve it")
    return source.path


def _kind_over(subject: Subject, over: Path | None) -> str:
    """The bounds of an adapter: tight over the very weights that it was trained on, else those of the file's blocks."""
    if over is None or _trained_on(subject, over):
        return "adapter"
    found = {tensor.type_name.lower() for tensor in GgufFile(over).tensors.values() if len(tensor.shape) == 2}
    bounds = {name: parity.BOUNDS.get(name, parity.FOUR) for name in found}
    return max(bounds, key=lambda name: bounds[name].kl, default="adapter")


def _trained_on(subject: Subject, over: Path) -> bool:
    if not (isinstance(subject.source, GgufSource) and over.resolve() == subject.source.path.resolve()):
        return False
    return subject.quant is None or (not subject.quant.requantize and bool(subject.source.prequantized_bytes()))


def _shown(path: Path) -> str:
    """A path as one types it."""
    return shlex.quote(str(path))


# -- how it is compared -----------------------------------------------------------------------------------------------


def _compare(
    subject: Subject, out: Path, options: ExportOptions, plan: _Plan, tell: OnEvent
) -> dict[str, ParityReport]:
    """A result a file, made one after the other; what cannot be compared says why."""
    blank = {one.file: ParityReport(kind=one.kind) for one in plan.exported}
    try:
        if plan.program == "llama.cpp":
            require_llama_cpp()
        rows, question = subject.held_out()
        if not rows:
            raise UsageError("there are no held-out rows")
        trained = subject.trained()
    except UsageError as error:
        return {file: replace(result, skipped=str(error)) for file, result in blank.items()}
    context = _longest(trained, rows, question)
    date = None if subject.template is None else subject.template.date
    exact = trained.dtype == torch.float32
    try:
        for one in plan.exported:

            def hear(what: str, done: int, total: int, name: str = one.file or out.name) -> None:
                tell(f"comparing {name}: {what}", done, total)

            blank[one.file] = _compare_one(
                plan, out, one, trained, rows, question, context, date, exact, subject.adapter is not None, hear
            )
    finally:
        trained.close()
    return blank


def _compare_one(
    plan: _Plan,
    out: Path,
    one: Exported,
    trained: TrainedModel,
    rows: Sequence[HeldOutRow],
    question: Question,
    context: int,
    date: str | None,
    exact: bool,
    tuned: bool,
    hear: OnEvent,
) -> ParityReport:
    blank = ParityReport(program=plan.program, kind=one.kind)
    needed = sum(p.stat().st_size for p in ([out / one.file] if one.file else out.glob("*.safetensors")))
    needed *= 2 if plan.program == "transformers" else 1  # held in float32
    free = psutil.virtual_memory().available
    if needed * 1.1 > free:
        return replace(
            blank, skipped=f"it needs {needed * 1.1 / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
        )
    try:
        served = plan.serve(out, one, context, date)
    except UsageError as error:
        return replace(blank, skipped=str(error))
    except HalfbyteError as error:
        return replace(blank, failures=(str(error),), bounds=parity.bounds_of(one.kind, exact))
    try:
        return parity.check(trained, served, rows, question, one.kind, parity.bounds_of(one.kind, exact), tuned, hear)
    except HalfbyteError as error:
        return replace(blank, failures=(str(error),), bounds=parity.bounds_of(one.kind, exact))
    finally:
        served.close()


def _longest(trained: TrainedModel, rows: Sequence[HeldOutRow], question: Question) -> int:
    """Tokens of the longest text that a server will hold."""
    labels = max((len(label.input_ids) for label in question.labels), default=0)
    return max(len(row.input_ids) for row in rows) + max(question.max_new_tokens, labels) + 64
