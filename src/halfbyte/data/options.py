"""What can be said about a data set: where it is, what its rows are, and how they become tokens."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from halfbyte.options import Options

RowFormat = Literal[
    "messages", "conversations", "alpaca", "prompt_completion", "text", "classification", "preference", "code"
]  # fmt: skip
ROW_FORMATS: tuple[RowFormat, ...] = (
    "messages", "conversations", "alpaca", "prompt_completion", "text", "classification", "preference", "code",
)  # fmt: skip

Task = Literal["auto", "causal", "classification", "seq2seq", "dpo"]

#: The names that other tools give to these formats.
_FORMAT_ALIASES = {
    "openai": "messages",
    "chat": "messages",
    "chatml": "messages",
    "sharegpt": "conversations",
    "instruction": "alpaca",
    "prompt-completion": "prompt_completion",
    "prompt/completion": "prompt_completion",
    "completion": "text",
    "dpo": "preference",
    "humaneval": "code",
    "mbpp": "code",
}


def _format_alias(value: object) -> object:
    return _FORMAT_ALIASES.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _as_sources(value: object) -> object:
    """A list may mix plain paths and mappings; a single mapping is a list of one."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, (list, tuple)):
        return tuple({"path": item} if isinstance(item, str) else item for item in value)
    return value


class DataSource(Options):
    """One source of a weighted mixture: `data: [{path: a.jsonl, weight: 3}, {path: b.jsonl, weight: 1}]`."""

    path: str = Field(description="A file, a folder of files, or a data-set id of the Hugging Face Hub.")
    weight: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="The share of an epoch's rows that come from here, relative to the other sources' weights. "
        "Without weights every source gives each of its rows once an epoch.",
    )
    name: str | None = Field(default=None, description="Hub only: the configuration (subset) of the data set.")
    split: str | None = Field(default=None, description="Hub only: the split; `train` when it is not given.")
    data_format: Annotated[RowFormat | None, BeforeValidator(_format_alias)] = Field(
        default=None, description="This source's row format, if it differs from the run's `data_format`."
    )
    columns: dict[str, str] | None = Field(
        default=None, description="This source's column mapping, if it differs from the run's `columns`."
    )


Sources = Annotated[str | tuple[DataSource, ...] | None, BeforeValidator(_as_sources)]


class DataOptions(Options):
    """Everything between a file on disk and a batch of tokens."""

    data: Sources = Field(
        default=None,
        description="Training rows: a .jsonl, .json, .csv, .tsv, .parquet or .txt file (.gz too), a folder of them, "
        "a Hub data-set id, or a list of sources, each a path or {path, weight, name, split, data_format, columns}.",
    )
    eval_data: Sources = Field(
        default=None, description="Held-out rows, in the same forms as `data`. When given, `eval_split` is not used."
    )
    eval_split: float = Field(
        default=0.05,
        ge=0,
        description="Rows of `data` to hold out when there is no `eval_data`: a share below 1, or a number of rows. "
        "0 holds out none.",
    )
    eval_max_rows: int = Field(default=500, ge=1, description="The most rows that a share in `eval_split` holds out.")
    eval_seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="Seed that chooses the rows of `eval_split`; by default the run's own, so that two seeds hold out "
        "different rows.",
    )
    task: Task = Field(
        default="auto",
        description="What is learned: causal (the next token), classification (a trained head, from the label of each "
        "row), seq2seq (an encoder-decoder's answer) or dpo (to prefer the chosen answer). auto takes dpo for "
        "preference rows, seq2seq for an encoder-decoder, classification for a model that has a trained head, and "
        "causal for all others.",
    )
    data_format: Annotated[RowFormat | None, BeforeValidator(_format_alias)] = Field(
        default=None,
        description=f"What a row is: {', '.join(ROW_FORMATS)}. Detected from the columns when it is not given.",
    )
    columns: dict[str, str] | None = Field(
        default=None,
        description="Which column plays which part, as {part: column}, e.g. {instruction: question, output: answer}.",
    )
    text_split: Literal["paragraph", "line", "document"] = Field(
        default="paragraph",
        description="What one document of a .txt file is: a paragraph (set apart by blank lines), a line, or the file.",
    )
    label_names: tuple[str, ...] | None = Field(
        default=None,
        description="Classification: the word for each integer label, in order, e.g. [negative, positive]. "
        "Without it the integers themselves are the words.",
    )
    max_seq_length: int = Field(
        default=2048, ge=2, description="The most tokens of a row. Longer rows are cut; `text` is split into windows."
    )
    packing: bool = Field(
        default=True,
        description="Lay the rows of an update end to end so that micro-batches are full. It changes the layout, "
        "never the update.",
    )
    train_on_inputs: bool = Field(
        default=False, description="Supervise prompts too, not only the assistant's or the completion's tokens."
    )
    chat_template: str = Field(
        default="auto",
        description="How a conversation becomes text: `auto` (the tokenizer's own template, else `plain`), a built-in "
        "(plain, chatml, alpaca, llama3, gemma), or the path of a Jinja file.",
    )
    chat_template_date: str = Field(
        default="2024-07-26",
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="The date that templates print when they ask for today's: fixed, so that a run can be repeated.",
    )
    system_prompt: str | None = Field(
        default=None,
        description="A system message for conversations that have none; for classification, the instruction "
        "in front of every text.",
    )
    max_bad_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Broken rows are named and set aside; more than this share of them stops the run.",
    )

    @field_validator("eval_split")
    @classmethod
    def _whole_rows(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("a share below 1 or a whole number of rows")
        return value

    @model_validator(mode="after")
    def _weights_on_all_or_none(self) -> "DataOptions":
        if isinstance(self.data, tuple):
            weighted = [source for source in self.data if source.weight is not None]
            if weighted and len(weighted) < len(self.data):
                missing = next(source.path for source in self.data if source.weight is None)
                raise ValueError(f"data: give every source a weight or none (`{missing}` has none)")
        return self


def sources_of(value: str | tuple[DataSource, ...] | None) -> tuple[DataSource, ...]:
    """The sources as a tuple, whichever way they were written."""
    if value is None:
        return ()
    return (DataSource(path=value),) if isinstance(value, str) else value
