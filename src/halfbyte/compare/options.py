"""What is compared, as one frozen value: the options of a comparison, and the run that its variants share.

A YAML file holds both, flat: fields of `CompareOptions` and fields of any run.

    model: my-model
    data: rows.jsonl
    num_train_epochs: 2
    vary: {method: [lora, qlora], lora_r: [8, 16, 32]}     every combination
    variants:                                               and these beside them
      - {name: half, method: qlora, num_train_epochs: 1, only_a_start: true}
      - {name: switch, method: lora, num_train_epochs: 1, continue_from: half}
    seeds: 3
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from halfbyte.errors import UsageError
from halfbyte.options import Options
from halfbyte.run import aliases
from halfbyte.run.config import RunConfig, options_from_flags, translate
from halfbyte.yamlfile import Entry, read_yaml

NOT_SHARED = ("output_dir", "method", "adapter_path", "report_to")
"""Fields of a run that a comparison sets itself, or that its variants have each for themselves."""
MAX_SEEDS = 100


def _words(value: Any) -> Any:
    """One word, or several with commas, is a list of words."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _grid(value: Any) -> Any:
    """`{field: [values]}`; a flag's `field=a,b` and a single value are lists, too."""
    if not isinstance(value, Mapping):
        return value
    made = {}
    for name, values in value.items():
        if isinstance(values, str):
            values = [part.strip() for part in values.split(",")]
        made[name] = tuple(values) if isinstance(values, list | tuple) else (values,)
    return made


class CompareOptions(Options):
    """What varies, how often each is run, and what is measured beside the run itself."""

    methods: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        default=(), description="methods to compare, by name; by default lora and qlora where nothing else varies"
    )
    vary: Annotated[dict[str, tuple[Any, ...]], BeforeValidator(_grid)] = Field(
        default={}, description="a grid: every combination of these values of these fields, as lora_r=8,16,32"
    )
    variants: tuple[dict[str, Any], ...] = Field(
        default=(),
        description="further variants, each a set of fields; name, continue_from (the variant whose adapter of the "
        "same seed it goes on from) and only_a_start (it is there for others to go on from) are its own",
    )
    seeds: int = Field(default=3, ge=1, le=MAX_SEEDS, description="runs of each variant: seed, seed + 1, …")
    output: Path = Field(default=Path("comparison"), description="folder of the report and the cells")
    title: str = Field(default="", description="title of the report; by default model and data")
    tune_lr: bool = Field(
        default=False,
        description="give each variant the same small search for its learning rate, by held-out loss of one more seed",
    )
    tune_multiples: tuple[float, ...] = Field(
        default=(0.3, 1.0, 3.0), description="learning rates that are tried, in multiples of the variant's own"
    )
    tune_steps: int | None = Field(
        default=None, ge=1, description="updates of a run of the search; by default a third of a cell's"
    )
    metrics: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        default=(), description="measured on the held-out rows beside the loss, as in evaluate: exact_match, rouge_l, …"
    )
    metric_rows: int | None = Field(default=None, ge=1, description="use only the first held-out rows for metrics")
    max_new_tokens: int = Field(default=256, ge=1, description="longest answer that is generated for metrics")
    allow_code_execution: bool = Field(
        default=False, description="let pass@1 run the programs that the models write, on this machine and as you"
    )
    quality: str | None = Field(
        default=None,
        description="the metric that variants are judged by; by default the first task metric, else eval_loss",
    )
    merge_loss: bool = Field(
        default=False, description="merge each adapter and measure what the merged model's held-out loss is"
    )
    price: str | None = Field(default=None, description="what this machine costs, as 0.34 EUR/h; none is assumed")
    jobs: int = Field(
        default=1, ge=1, description="cells at once, where their planned memory fits together; times suffer from it"
    )
    accept: Annotated[tuple[Path, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str | Path) else v)] = Field(
        default=(), description="folders with finished runs, of an earlier comparison or another machine, to use"
    )
    unequal: bool = Field(
        default=False, description="let variants differ in their rows or in supervised tokens; the report says so"
    )
    keep: bool = Field(
        default=False, description="keep checkpoints and fully trained weights of finished cells, not only adapters"
    )


@dataclass(frozen=True)
class Request:
    """A comparison as asked for: its options, and the entries of the runs (translated, with their places)."""

    options: CompareOptions
    of_file: Mapping[str, Entry]
    of_flags: Mapping[str, Entry]


def load_request(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None
) -> Request:
    """From a YAML file, flags of the run's fields and flags of the comparison's; flags win.

    UsageError names what is wrong and where; unknown keys are answered with the nearest known one.
    """
    raw = read_yaml(file) if file is not None else {}
    own = {key: entry for key, entry in raw.items() if _own(key)}
    shared = {key: entry for key, entry in raw.items() if key not in own}
    for key, entry in shared.items():
        _refuse_unknown(key, entry)
    values = {key.replace("-", "_"): entry.value for key, entry in own.items()}
    if file is not None and "accept" in values:
        values["accept"] = _paths(values["accept"])
    chosen = options_from_flags(CompareOptions, _checked(values, own) | dict(options or {}))
    of_file = translate(shared)
    of_flags = translate({key: Entry(value, "--" + key.replace("_", "-")) for key, value in (flags or {}).items()})
    for name in NOT_SHARED:
        for entries in (of_flags, of_file):
            if name in entries:
                raise UsageError(f"{entries[name].where}: {name} {_why_not(name)}")
    return Request(chosen, of_file, of_flags)


def _own(key: str) -> bool:
    return key.replace("-", "_") in CompareOptions.model_fields


def _refuse_unknown(key: str, entry: Entry) -> None:
    """A key that is near to one of the comparison's own is answered with that, before a run's are searched."""
    name = key.replace("-", "_")
    known = name in RunConfig.model_fields or name in aliases.ALIASES or name in aliases.IGNORED
    if known or name in (*aliases.METHOD_KEYS, *aliases.BITS_KEYS, *aliases.LATER_KEYS, "record", "schema_version"):
        return
    near = difflib.get_close_matches(name, [*CompareOptions.model_fields, *RunConfig.model_fields], n=1)
    if near and near[0] in CompareOptions.model_fields:
        raise UsageError(f"{entry.where}: {key} is not a key that halfbyte knows: did you mean {near[0]}?")


def _checked(values: dict[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The file's own values, each checked alone so that an error names its line."""
    for key, entry in entries.items():
        name = key.replace("-", "_")
        try:
            CompareOptions.model_validate({name: values[name]})
        except ValidationError as error:
            item = error.errors(include_url=False)[0]
            text = item["msg"].removeprefix("Value error, ")
            inside = "".join(f"[{part}]" for part in item["loc"][1:] if isinstance(part, int))
            raise UsageError(
                f"{entry.where}: {name}{inside} {text[0].lower()}{text[1:]}, not {item['input']!r}"
            ) from None
    return values


def _paths(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _why_not(name: str) -> str:
    return {
        "output_dir": "is a run's folder, which a comparison chooses: give output",
        "adapter_path": "is one run's: give variants with continue_from",
        "report_to": "is not used by cells: their events.jsonl has all that dashboards show",
        "method": "is one run's: a comparison takes methods, or vary with method",
    }[name]
