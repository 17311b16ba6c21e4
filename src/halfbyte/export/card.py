"""The model card: README.md of a run's folder. What was trained on what, how, with which numbers, and how to load it.

Made from what the run wrote down (its config, its record, its result) and from the base's own files; where something
is not known, it is not there. The front matter is the Hub's (hf.co/docs/hub/model-cards).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from halfbyte.models.gguf_source import GgufSource
from halfbyte.models.hub import is_hub_id
from halfbyte.models.source import ModelSource

_NAMES = {
    "loss": "loss (nats a token)",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "macro_f1": "macro F1",
}
_CLASSES = {"classification": "AutoModelForSequenceClassification", "seq2seq": "AutoModelForSeq2SeqLM"}
_PIPELINES = {"classification": "text-classification", "seq2seq": "text2text-generation"}
_BOOKKEEPING = {"schema_version", "supervised_tokens", "evaluated_rows"}
_METHODS = {
    "lora": "LoRA",
    "qlora": "QLoRA",
    "rslora": "rsLoRA",
    "qrslora": "rsQLoRA",
    "loraplus": "LoRA+",
    "qloraplus": "QLoRA+",
    "dora": "DoRA",
    "qdora": "QDoRA",
    "pissa": "PiSSA",
    "qpissa": "QPiSSA",
    "loftq": "LoftQ",
    "galore": "GaLore",
    "full": "full fine-tuning",
}
_ADAPTER_KEYS = (
    *("lora_", "target_modules", "use_rslora", "use_dora", "init_lora", "loftq_", "modules_to_save", "rank_pattern"),
    *("alpha_pattern", "adapter_"),
)
_QUANT_KEYS = ("quant_type", "blocksize", "double_quant", "quant_pattern", "requantize")


def model_card(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    result: Mapping[str, Any],
    source: ModelSource,
    commands: Sequence[str] = (),
) -> str:
    """The text of README.md.

    config, record  of run.yaml: every field by its name, and what the run was recorded on
    result          result.json's content: method, figures, `metrics` of tuned and base
    source          the base model
    commands        further commands to show, as they were given
    """
    method = str(result.get("method", config["method"]))
    title = f"{_short(str(config['model']))}, tuned with {_name(result, method)}"
    parts = [
        f"---\n{yaml.safe_dump(front_matter(config, method, source), sort_keys=False)}---",
        f"# {title}",
        _summary(config, record, result, source, method),
        _numbers(result, config),
        _data(config, record),
        _training(config, result, method),
        _loading(config, record, source, method),
        _commands(commands, config),
        _versions(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def export_card(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    result: Mapping[str, Any],
    source: ModelSource,
    exported: Mapping[str, Any],
) -> str:
    """The text of an export's README.md: the run's card, with how it is served and how it compares.

    exported   parity.json's content
    """
    method = str(result.get("method", config["method"]))
    front = front_matter(config, method, source)
    gguf = exported["format"] in ("gguf", "gguf-adapter", "ollama")
    front["library_name"] = "gguf" if gguf else "transformers"
    front["tags"] = [*front["tags"], *(["gguf"] if gguf else [])]
    if exported["format"] != "gguf-adapter" and "base_model_relation" in front:
        front["base_model_relation"] = "finetune"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_short(str(config['model']))}, tuned with {_name(result, method)}, as {exported['format']}",
        _summary(config, record, result, source, method),
        _serving(exported),
        parity_section(exported),
        _numbers(result, config),
        _data(config, record),
        _training(config, result, method),
        _versions(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def parity_section(exported: Mapping[str, Any]) -> str:
    """What was compared of an export, and the verdict: from parity.json's content."""
    rows, words = [["file", "weights", "verdict", "prompts", "KL, nats a token", "greedy", "perplexity"]], []
    for file in exported["files"]:
        found, name = file["parity"], file["file"] or "this folder"
        if found["passed"] is None:
            rows.append([name, file["kind"], "not compared", "", "", "", ""])
            words.append(f"- {name} was not compared: {found['skipped']}")
            continue
        perplexity = f"{_number(found['trained_perplexity'])} trained, {_number(found['served_perplexity'])} served"
        rows.append(
            [
                name,
                file["kind"],
                "passed" if found["passed"] else "**failed**",
                f"{found['same_prompts']} of {found['prompts']}" if found["prompts"] else "",
                f"{found['mean_kl']:.2g}" if isinstance(found["mean_kl"], float) and found["tokens"] else "",
                f"{found['same_answers']} of {found['answers']}" if found["answers"] else "",
                perplexity if found["tokens"] else "",
            ]
        )
        words += [f"- {name}: {failure}" for failure in found["failures"]]
        words += [
            f"- {name}: {k} {_number(a)} as trained, {_number(b)} served" for k, (a, b) in found["metrics"].items()
        ]
    programs = sorted({file["parity"]["program"] for file in exported["files"] if file["parity"]["program"]})
    how = (
        f"The same held-out rows through the trained, unmerged model and through {' and '.join(programs)}: prompts "
        "with identical token ids, divergence of the answers' tokens, identical greedy answers. All figures are in "
        "`parity.json`."
    )
    return "\n\n".join(
        ["## Does it behave as trained?", how if programs else "", _table(rows), "\n".join(words)]
    ).rstrip()


def _serving(exported: Mapping[str, Any]) -> str:
    commands = "\n".join(file["command"] for file in exported["files"])
    notes = "\n".join(f"- {note}" for note in exported["notes"])
    return f"## How to serve it\n\n```sh\n{commands}\n```" + (f"\n\n{notes}" if notes else "")


def front_matter(config: Mapping[str, Any], method: str, source: ModelSource) -> dict[str, Any]:
    """The Hub's metadata. `base_model` only where it is a Hub id: the Hub refuses a path."""
    model = str(config["model"])
    front: dict[str, Any] = {}
    if (source.kind == "hub" or source.revision is not None) and is_hub_id(model):  # a GGUF file's kind is "gguf"
        front["base_model"] = "/".join(model.split("/")[:2])
        front["base_model_relation"] = "finetune" if method == "full" else "adapter"
    licence = licence_of(source)
    if licence is not None:
        front["license"] = licence
    front["library_name"] = "transformers" if method == "full" else "peft"
    front["pipeline_tag"] = _PIPELINES.get(str(config.get("task")), "text-generation")
    front["tags"] = (
        ["halfbyte", method] if method == "full" else ["halfbyte", "lora", *(["qlora"] * (method == "qlora"))]
    )
    return front


def licence_of(source: ModelSource) -> str | None:
    """The base's licence as its own files name it: the GGUF metadata, or the front matter of the folder's README."""
    if isinstance(source, GgufSource):
        named = source.file.get("general.license")
        return str(named) if named else None
    readme = source.path / "README.md"
    if not readme.is_file():
        return None
    match = re.match(r"---\r?\n(.*?)\r?\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    named = front.get("license") if isinstance(front, dict) else None
    return named if isinstance(named, str) else None


def already_quantized(source: ModelSource) -> str | None:
    """In words, how the base's file was quantized before halfbyte saw it; None for 16- and 32-bit weights.

    Every figure of a model that was made from such a file is a figure of that file, not of the original.
    """
    if source.kind == "gguf" or isinstance(source, GgufSource):
        formats = sorted({stored.format for stored in source.stored() if len(stored.shape) == 2})
        formats = [name for name in formats if name not in ("F16", "F32", "F64", "BF16")]
        return f"a GGUF file in {', '.join(formats)}" if formats else None
    quantization = source.config.get("quantization_config")
    if isinstance(quantization, dict) and source.blocks in ("gptq", "awq"):
        return f"a checkpoint in {quantization.get('bits', 4)} bits by {str(source.blocks).upper()}"
    if isinstance(quantization, dict):
        return f"a bitsandbytes 4-bit checkpoint ({quantization.get('bnb_4bit_quant_type', 'fp4')})"
    return None


# -- sections ---------------------------------------------------------------------------------------------------------


def _summary(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    result: Mapping[str, Any],
    source: ModelSource,
    method: str,
) -> str:
    base = record.get("base_model", {})
    what = {
        "qlora": f"A LoRA adapter, trained on a base in {_format(config, source)}",
        "lora": "A LoRA adapter",
    }.get(method, "A model of which every weight was trained")
    text = f"{what}. Base model: `{config['model']}`"
    details = [f"revision `{base['revision']}`"] if base.get("revision") else []
    details += [f"weights `{str(base['fingerprint'])[:23]}…`"] if base.get("fingerprint") else []
    text += f" ({', '.join(details)})." if details else "."
    was = already_quantized(source)
    if was is not None:
        text += (
            f"\n\n**The base came from {was}: it was already quantized once.** All figures here are about those "
            "weights, not about the original 16-bit model."
        )
    return text


def _format(config: Mapping[str, Any], source: ModelSource) -> str:
    """In words, what the base of a QLoRA run is held in."""
    if not config.get("requantize") and source.prequantized_bytes():
        return f"the blocks of its own file ({already_quantized(source)})"
    double = ", double-quantized" if config.get("double_quant") else ""
    pattern = config.get("quant_pattern") or {}
    other = f", except {', '.join(f'{k}: {v}' for k, v in pattern.items())}" if pattern else ""
    return f"{config.get('quant_type')} in blocks of {config.get('blocksize')}{double}{other}"


def _numbers(result: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    metrics = result.get("metrics") or {}
    names = [k for k, v in metrics.items() if isinstance(v, int | float) and k not in _BOOKKEEPING]
    if not names:
        return ""
    base, intervals = metrics.get("base") or {}, metrics.get("intervals") or {}
    before_it = "always the most frequent class" if config.get("task") == "classification" else "before"
    head = (
        ["held-out rows", before_it, "after", "95 % interval"] if base else ["held-out rows", "value", "95 % interval"]
    )
    rows = [head]
    for name in names:
        low_high = intervals.get(name)
        interval = f"{_number(low_high[0])} to {_number(low_high[1])}" if low_high else ""
        before = [_number(base[name]) if name in base else ""] if base else []
        rows.append([_NAMES.get(name, name.replace("_", " ")), *before, _number(metrics[name]), interval])
    tokens = metrics.get("supervised_tokens")
    count = metrics.get("evaluated_rows")
    note = f"Measured on {count:,} rows" if isinstance(count, int) else "Measured on the held-out rows"
    note += f" ({tokens:,} supervised tokens)" if isinstance(tokens, int) else ""
    return f"## Numbers\n\n{_table(rows)}\n\n{note}; the interval is over rows, for the value after training."


def _data(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    data, template = record.get("data", {}), record.get("chat_template", {})
    source = config.get("data")
    paths = (
        [source] if isinstance(source, str) else [str(s.get("path")) for s in source or () if isinstance(s, Mapping)]
    )
    rows = [["data", ""], ["files", ", ".join(f"`{_short(path)}`" for path in paths)]]
    rows.append(["format", str(data.get("format", ""))])
    if "train_rows" in data:
        rows.append(["rows", f"{data['train_rows']:,} to train on, {data.get('eval_rows', 0):,} held out"])
    rows.append(["fingerprint", f"`{data['fingerprint']}`" if data.get("fingerprint") else ""])
    if template.get("name"):
        rows.append(["chat template", f"{template['name']} (`{str(template.get('sha256', ''))[:16]}`)"])
    return f"## Training data\n\n{_table([row for row in rows if row[1] or row is rows[0]])}"


def _training(config: Mapping[str, Any], result: Mapping[str, Any], method: str) -> str:
    measured = [["run", ""]]
    if result.get("step") is not None:
        measured.append(["updates", f"{result['step']:,}"])
    if result.get("tokens") is not None:
        measured.append(["tokens", f"{result['tokens']:,}"])
    if result.get("seconds") is not None:
        measured.append(["time", f"{result['seconds']:,.0f} s"])
    if result.get("tokens_per_second"):
        measured.append(["speed", f"{result['tokens_per_second']:,.0f} tokens/s"])
    if result.get("peak_memory_bytes"):
        measured.append(["peak memory", f"{result['peak_memory_bytes'] / 1e9:.2f} GB"])
    hidden = ("output_dir", *((*_ADAPTER_KEYS, *_QUANT_KEYS) if method == "full" else ()))
    hidden = hidden if method != "lora" else (*hidden, *_QUANT_KEYS)
    options = {k: v for k, v in config.items() if v is not None and not k.startswith(hidden) and k != "record"}
    listed = yaml.safe_dump(options | {"method": method}, sort_keys=False, allow_unicode=True, width=1000)
    return f"## Training\n\n{_table(measured)}\n\nEvery option, as resolved:\n\n```yaml\n{listed}```"


def _loading(config: Mapping[str, Any], record: Mapping[str, Any], source: ModelSource, method: str) -> str:
    kind = _CLASSES.get(str(config.get("task")), "AutoModelForCausalLM")
    lines = ['folder = "path/to/this/folder"', ""]
    if method == "full":
        imports = f"from transformers import {kind}, AutoTokenizer"
        lines += [f"model = {kind}.from_pretrained(folder)"]
    else:
        imports = f"from peft import PeftModel\nfrom transformers import {kind}, AutoTokenizer"
        arguments = _base_arguments(config, source)
        labels = record.get("data", {}).get("labels")
        if labels:
            lines += [f"labels = {labels!r}"]
            arguments += ", num_labels=len(labels), id2label=dict(enumerate(labels))"
        lines += [f"base = {kind}.from_pretrained({arguments})"]
        lines += ["model = PeftModel.from_pretrained(base, folder)"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    code = "\n".join(lines)
    text = f"## How to load it\n\n```python\n{imports}\n\n{code}\n```"
    if method == "qlora":
        text += (
            f"\n\nThe adapter was trained on a base in {_format(config, source)}; on the base in 16 bits, as above, it "
            "behaves a little differently. `halfbyte merge` writes one model of the base as it was trained on, and the "
            "adapter."
        )
    return text


def _base_arguments(config: Mapping[str, Any], source: ModelSource) -> str:
    model = str(config["model"])
    if source.kind == "gguf" or isinstance(source, GgufSource):
        name = source.path.name
        owner = "/".join(model.split("/")[:2]) if source.revision else str(source.path.parent)
        return f'"{owner}", gguf_file="{name}"'
    revision = f', revision="{source.revision}"' if source.revision else ""
    return f'"{model}"{revision}'


def _commands(commands: Sequence[str], config: Mapping[str, Any]) -> str:
    use = {
        "classification": "halfbyte evaluate . --data rows.jsonl                 # how often it is right",
        "seq2seq": 'halfbyte generate . "text"                            # what it answers',
    }
    usual = [
        "halfbyte train --config run.yaml --output-dir again   # the same run once more",
        use.get(str(config.get("task")), "halfbyte chat .                                       # talk to it"),
        "halfbyte merge . --output merged                      # one model folder that transformers loads",
    ]
    listed = "\n".join([*commands, *usual])
    return f"## Commands\n\nIn this folder:\n\n```sh\n{listed}\n```"


def _versions(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
    return f"## Versions\n\n{versions}" if versions else ""


def _name(result: Mapping[str, Any], method: str) -> str:
    """The method as people write it: `qdora+qrslora` is QDoRA and rsQLoRA."""
    return " and ".join(_METHODS.get(name, name) for name in str(result.get("method_name", method)).split("+"))


def _short(path: str) -> str:
    """A file's name without the folders of the machine that it was on; a Hub id as it is."""
    return Path(path).name if path.startswith(("/", ".", "~")) else path


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in body)]
    return "\n".join(lines)
