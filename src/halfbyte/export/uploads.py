"""What of a model goes to the Hub: what belongs to it and nothing else, and nothing of this machine.

    collect(path)       the files of an adapter, a model's folder or GGUF files, checked to be whole

What stays here: checkpoints, events, lock, plan, and run.yaml and result.json, which name this machine's files (their
figures and options are on the card). What goes has no path of this machine in it: the card, adapter_config.json and
other small JSON are uploaded with the names of files instead; the files on the disk stay as they are.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError, safe_open

from halfbyte.adapters.heads import LABELS
from halfbyte.adapters.peft_io import CONFIG as ADAPTER_CONFIG
from halfbyte.adapters.peft_io import WEIGHTS as ADAPTER_WEIGHTS
from halfbyte.adapters.peft_io import read_adapter_config
from halfbyte.errors import UsageError
from halfbyte.export.model_files import LICENCE_FILES, TOKENIZER_FILES
from halfbyte.export.safetensors_file import INDEX
from halfbyte.files import sha256_file
from halfbyte.models import hub
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.safetensors_source import read_headers, read_json_object

Kind = Literal["adapter", "model", "gguf"]
_RELATIONS: dict[Kind, str] = {"adapter": "adapter", "model": "finetune", "gguf": "quantized"}
"""The Hub's words for what a model is to its base."""
CARD, PARITY = "README.md", "parity.json"
_CONFIGS = ("config.json", "generation_config.json", "quantize_config.json", "quant_config.json", PARITY)
_SERVING = ("Modelfile",)
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# /home/me/x, ~/x, C:\\x, file:///home/x; not the path of a web address, not ./x, not a single /x.
_LOCAL_PATH = re.compile(
    r"(?<![\w/:.~\\-])(?:(?:file://)?(?:~(?=/))?(?:/[\w.@+-]+){2,}/?|~/[\w.@+-]+|[A-Za-z]:(?:\\[\w.@+-]+)+)"
)


@dataclass(frozen=True)
class Origin:
    """What is known of where a model came from.

    base_model  Hub id of its base, None where only this machine's files are known
    here        texts that name this machine's files (as a card or a config may quote them) -> what to say instead
    tags        for a card that has to be made
    """

    base_model: str | None = None
    here: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ("halfbyte",)


@dataclass(frozen=True)
class Upload:
    """A file of the repository: from the disk, or bytes that stand for a file of the disk."""

    name: str
    content: Path | bytes

    @property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def is_at(self, sibling: Any) -> bool:
        """Whether the Hub's file (huggingface_hub's RepoSibling) has the same bytes; reads ours only if sizes agree."""
        if sibling.size != self.nbytes:
            return False
        if sibling.lfs is None:
            raw = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
            return bool(sibling.blob_id == hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest())  # git's own
        if isinstance(self.content, bytes):
            return bool(sibling.lfs.sha256 == hashlib.sha256(self.content).hexdigest())
        return bool(sibling.lfs.sha256 == sha256_file(self.content))


@dataclass(frozen=True)
class Model:
    """What would be uploaded. `notes`: what its user should know about it, a line each."""

    path: Path
    kind: Kind
    uploads: tuple[Upload, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(upload.nbytes for upload in self.uploads)


# -- what is uploaded -------------------------------------------------------------------------------------------------


def collect(path: Path, origin: Origin | None = None) -> Model:
    """The files of the model at `path`: the folder of an adapter, of a model or of GGUF files, or one GGUF file.

    UsageError where there is no model, or one that is not whole.
    """
    origin = origin or Origin()
    kind, weights = _weights(path)
    folder = path if path.is_dir() else None
    others = [] if folder is None else [folder / name for name in _beside(kind) if (folder / name).is_file()]
    notes: list[str] = []
    uploads = [Upload(file.name, file) for file in weights]
    for file in others:
        content = _clean(file, origin, notes)
        uploads.append(Upload(file.name, content))
    notes += _parity(path)
    card = folder / CARD if folder is not None and (folder / CARD).is_file() else None
    lone_adapter = kind == "gguf" and all(GgufFile(file).get("general.type") == "adapter" for file in weights)
    relation = "adapter" if lone_adapter else _RELATIONS[kind]
    uploads.append(Upload(CARD, _card(card, kind, relation, origin, path, notes)))
    if origin.base_model is None:
        notes.append("the card names no base model on the Hub: give its id with --base-model")
    return Model(path, kind, tuple(sorted(uploads, key=lambda upload: upload.name)), tuple(notes))


def _weights(path: Path) -> tuple[Kind, list[Path]]:
    """What `path` holds, and its files of weights, each read far enough to know that it is whole."""
    if path.is_file() and path.suffix == ".gguf":
        GgufFile(path)
        return "gguf", [path]
    if not path.is_dir():
        raise UsageError(f"{path} is neither a folder nor a .gguf file: give a run, an adapter or an exported model")
    if (path / ADAPTER_CONFIG).is_file():
        read_adapter_config(path)
        _check_adapter(path / ADAPTER_WEIGHTS)
        return "adapter", [path / ADAPTER_WEIGHTS]
    ggufs = sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file():
        read_json_object(path / "config.json")
        files = {entry.file.path for entry in read_headers(path).values()}
        return "model", sorted([*files, *([path / INDEX] if (path / INDEX).is_file() else [])])
    if ggufs:
        for file in ggufs:
            GgufFile(file)
        return "gguf", ggufs
    raise UsageError(
        f"{path} holds no finished model (neither {ADAPTER_CONFIG} nor config.json nor a .gguf file): finish the run "
        "with `halfbyte resume`, or give an exported folder"
    )


def _parity(path: Path) -> list[str]:
    """What `halfbyte export` found when it compared the model with the trained one, where that is not good news."""
    if not (path / PARITY).is_file():
        return []
    passed = read_json_object(path / PARITY).get("passed", True)
    if passed is None:
        return ["the export was not compared with the trained model (parity.json)"]
    return [] if passed else ["the export does not behave as trained: its comparison failed (parity.json)"]


def _check_adapter(path: Path) -> None:
    try:
        with safe_open(path, "pt") as file:
            empty = not list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is not a whole adapter ({error}): copy it again") from None
    if empty:
        raise UsageError(f"{path} holds no tensors: it is not an adapter")


def _beside(kind: Kind) -> tuple[str, ...]:
    """The names of a model's other files."""
    if kind == "gguf":
        return (PARITY, "chat_template.jinja", *_SERVING, *LICENCE_FILES)
    own = (ADAPTER_CONFIG, LABELS, PARITY) if kind == "adapter" else _CONFIGS
    return (*own, *TOKENIZER_FILES, *LICENCE_FILES)


# -- nothing of this machine ------------------------------------------------------------------------------------------


def _clean(file: Path, origin: Origin, notes: list[str]) -> Path | bytes:
    """The file itself, or its bytes without this machine's paths where it had some."""
    if file.name == ADAPTER_CONFIG:
        config = read_json_object(file)
        named = config.get("base_model_name_or_path")
        config["base_model_name_or_path"] = origin.base_model or (_name_of(named) if _is_path(named) else named)
        return _json(_without_paths(config))
    if file.name in (*_CONFIGS, "tokenizer_config.json"):
        plain = read_json_object(file)
        cleaned = _without_paths(plain, in_sentences=file.name == PARITY)
        if cleaned != plain:
            notes.append(f"{file.name}: paths of this machine are left out")
            return _json(cleaned)
    if file.name in _SERVING:
        text = _read_text(file)
        cleaned_text = re.sub(r"(?m)^((?:FROM|ADAPTER)\s+)(\S*[/\\])([^/\\\s]+)\s*$", _beside_it, text)
        if cleaned_text != text:
            notes.append(f"{file.name}: paths of this machine are left out")
            return cleaned_text.encode()
    return file


def _beside_it(line: re.Match[str]) -> str:
    """FROM /here/model.gguf -> FROM ./model.gguf; a model's name in a registry stays."""
    return f"{line[1]}./{line[3]}" if _is_path(line[2] + line[3]) else line[0]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths(value: Any, in_sentences: bool = False) -> Any:
    """The same JSON with the file's name for each text that is a path of this machine, or has some in it (commands)."""
    if isinstance(value, dict):
        return {key: _without_paths(item, in_sentences) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, in_sentences) for item in value]
    if in_sentences and isinstance(value, str):
        return _LOCAL_PATH.sub(lambda match: _name_of(match[0]), value)
    return _name_of(value) if _is_path(value) else value


def _is_path(value: Any) -> bool:
    if not isinstance(value, str) or not value or "\n" in value:
        return False
    return _LOCAL_PATH.fullmatch(value) is not None or ("/" in value and " " not in value and Path(value).exists())


def _name_of(value: Any) -> str:
    return re.split(r"[/\\]", str(value).rstrip("/\\"))[-1]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not UTF-8 text: save it as that") from None


def _card(file: Path | None, kind: Kind, relation: str, origin: Origin, path: Path, notes: list[str]) -> bytes:
    """README.md with the front matter that the Hub needs, and no path of this machine."""
    text = _read_text(file) if file is not None else f"# {path.resolve().name}\n\n{_introduction(kind, origin)}\n"
    match = _FRONT.match(text)
    try:
        front = (yaml.safe_load(match[1]) or {}) if match else {}
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: its front matter is not YAML ({str(error).splitlines()[0]}): correct it") from None
    if not isinstance(front, dict):
        raise UsageError(f"{file}: its front matter is not a mapping: correct it")
    body, count = _say_instead(text[match.end() :] if match else text, origin.here)
    if count:
        notes.append(f"{CARD}: {count} paths of this machine are left out")
    front = _front_matter(front, kind, relation, origin)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body.lstrip()}".encode()


def _introduction(kind: Kind, origin: Origin) -> str:
    what = {"adapter": "A LoRA adapter", "model": "A language model", "gguf": "A language model in GGUF"}[kind]
    base = f" of [{origin.base_model}](https://huggingface.co/{origin.base_model})" if origin.base_model else ""
    return f"{what}{base}, written by halfbyte."


def _front_matter(front: Mapping[str, Any], kind: Kind, relation: str, origin: Origin) -> dict[str, Any]:
    """The card's own entries, completed. The Hub refuses a `base_model` that is not an id of its own."""
    made = dict(front)
    if origin.base_model is not None:
        made["base_model"] = origin.base_model
        made.setdefault("base_model_relation", relation)
    elif isinstance(made.get("base_model"), str) and not _can_be_id(made["base_model"]):
        del made["base_model"]
        made.pop("base_model_relation", None)
    if kind == "adapter":
        made["library_name"] = "peft"
    else:
        made.setdefault("library_name", {"model": "transformers", "gguf": "gguf"}[kind])
    made.setdefault("pipeline_tag", "text-generation")
    made.setdefault("tags", [*origin.tags, *(["lora"] if kind == "adapter" else [])])
    return made


def _can_be_id(name: str) -> bool:
    return hub.is_hub_id(name) and name.count("/") <= 1 and not Path(name).exists()


def _say_instead(text: str, here: Mapping[str, str]) -> tuple[str, int]:
    """The text without this machine's paths, and how many there were: those that are known, then all that look so."""
    count = 0
    for private in sorted(here, key=len, reverse=True):
        if private:
            count += text.count(private)
            text = text.replace(private, here[private])

    def shorter(match: re.Match[str]) -> str:
        return _name_of(match[0])

    text, more = _LOCAL_PATH.subn(shorter, text)
    return text, count + more
