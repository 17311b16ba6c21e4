"""The whole way from options to examples: read, detect, check, render, tokenize, hold out, count."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.data.audit import Audit, audit
from halfbyte.data.detection import check_columns, detect, fits, rename
from halfbyte.data.encoding import Encoder
from halfbyte.data.examples import Encoded, Example, LabelChoice, Recipe, encode_rows, label_text
from halfbyte.data.options import DataOptions, DataSource, RowFormat, Task, sources_of
from halfbyte.data.reading import read_source
from halfbyte.data.records import BadRow, Chat, Labelled, Preference, Record, Row, RowError
from halfbyte.data.rows import canonical, normalise
from halfbyte.data.sampler import Sampler
from halfbyte.data.templates import ChatTemplate, resolve_template, stop_ids
from halfbyte.errors import UsageError

#: Part of every fingerprint: raise it when the same rows and options come to mean other tokens.
_VERSION = 1

#: The options that decide which tokens the rows become (layout, paths and limits on bad rows do not).
_FINGERPRINTED = (
    "eval_split", "eval_max_rows", "text_split", "label_names", "max_seq_length", "train_on_inputs", "system_prompt",
)  # fmt: skip


@dataclass(slots=True)
class Rows:
    """The rows of one source."""

    source: DataSource
    row_format: RowFormat
    rows: list[Row]
    bad: list[BadRow]
    notes: list[str] = field(default_factory=list)
    label_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Prepared:
    """A data set ready to train on.

    train, eval    examples; `train` is ordered by source
    fingerprint    SHA-256 over the rows, their order and the options that decide what tokens they become
    template       for conversations, else None; `template_hash` is then that of the plain prompt form
    data_format    the row format, or several joined by " + "
    stop_ids       the ids at which a generated answer ends
    labels         classification: the classes, in the order of Example.label
    pairs          whether the training rows are pairs of answers, each an Example with `rejected`: `task: dpo`
    sizes, weights of the sources in `train`, for the sampler
    """

    train: list[Example]
    eval: list[Example]
    audit: Audit
    fingerprint: str
    template_hash: str
    template: ChatTemplate | None
    data_format: str
    stop_ids: tuple[int, ...]
    labels: tuple[LabelChoice, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None

    @property
    def pairs(self) -> bool:
        return self.data_format == "preference"

    def sampler(self, seed: int) -> Sampler:
        """The order of the training rows."""
        return Sampler(len(self.train), seed, self.sizes, self.weights)


def load_rows(options: DataOptions, evaluation: bool = False) -> list[Rows]:
    """Read and check the rows of `data` (or of `eval_data`), without a tokenizer.

    Raises UsageError where a file is broken, the format cannot be told, or too many rows are unusable.
    """
    sources = sources_of(options.eval_data if evaluation else options.data)
    if not sources:
        raise UsageError(f"no {'evaluation ' if evaluation else ''}data given: name a file, a folder or a Hub data set")
    result = [_load_source(source, options, evaluation) for source in sources]
    _refuse_bad([bad for part in result for bad in part.bad], sum(len(part.rows) for part in result), options)
    return result


def _load_source(source: DataSource, options: DataOptions, evaluation: bool) -> Rows:
    raw = read_source(source, options.text_split, evaluation)
    if not raw.records:
        _refuse_bad(raw.bad, 0, options)
    columns = source.columns if source.columns is not None else options.columns or {}
    check_columns(columns, raw.records, source.path)
    records = [Record(record.origin, rename(record.values, columns)) for record in raw.records]
    names = [frozenset(record.values) for record in records]
    asked = source.data_format or options.data_format
    if asked is not None and not any(fits(asked, present) for present in set(names)):
        present = ", ".join(sorted(set().union(*names)))
        raise UsageError(f"{source.path}: no row has the columns of data_format {asked}; it has {present}")
    if asked is None and options.task == "dpo" and any(fits("preference", present) for present in set(names)):
        asked = "preference"  # the Hub's UltraFeedback has `messages` beside its pairs
    row_format = asked or detect(names, source.path, frozenset(columns))
    result = Rows(source, row_format, [], raw.bad, raw.notes, raw.label_names)
    if asked is None:
        result.notes.append(f"{source.path}: the row format is {row_format} (from its columns)")
    for record in records:
        try:
            result.rows.append(normalise(record, row_format, options.system_prompt))
        except RowError as error:
            result.bad.append(BadRow(record.origin.file, record.origin.line, str(error)))
    return result


def _refuse_bad(bad: Sequence[BadRow], good: int, options: DataOptions) -> None:
    """Stop if too many rows are unusable, naming the first few."""
    total = len(bad) + good
    if not bad or (good and len(bad) <= options.max_bad_share * total):
        return
    first = "; ".join(map(str, sorted(bad, key=lambda row: (row.file, row.line))[:3]))
    more = "; …" if len(bad) > 3 else ""
    limit = f" (max_bad_share allows {options.max_bad_share:.0%})" if good else ""
    raise UsageError(f"{len(bad):,} of {total:,} rows are unusable{limit}: {first}{more}")


def prepare(options: DataOptions, tokenizer: Any, seed: int, labels: Sequence[str] | None = None) -> Prepared:
    """Training and held-out examples, with an account of what happened. Deterministic in its arguments and files.

    tokenizer  a transformers tokenizer
    labels     the words of the classes, in order, where a trained head has them already

    Raises UsageError with one line for the user.
    """
    encoder = Encoder(tokenizer)
    parts = load_rows(options)
    held_out_parts = load_rows(options, evaluation=True) if options.eval_data is not None else []
    _check_task(options, parts)
    _check_task(options.model_copy(update={"task": "auto"}), held_out_parts)
    recipe, notes = _recipe(options, encoder, parts, held_out_parts, labels)
    encoded = _encode(parts, recipe, options)
    held_out_encoded = _encode(held_out_parts, recipe, options)
    everything = [example for part in encoded for example in part.examples]
    held_out = [example for part in held_out_encoded for example in part.examples]
    train, duplicates, leaked = everything, _duplicates(everything) + _duplicates(held_out), 0
    if held_out_parts:
        known = set(map(_key, held_out))
        leaked = sum(_key(example) in known for example in train)
    elif options.eval_split:
        chosen_by = seed if options.eval_seed is None else options.eval_seed
        train, held_out = hold_out(everything, options.eval_split, options.eval_max_rows, chosen_by)
    template_hash = recipe.template.hash if recipe.template else hashlib.sha256(b"halfbyte plain prompts 1").hexdigest()
    data_format = " + ".join(dict.fromkeys(part.row_format for part in parts))
    report = audit(
        train,
        held_out,
        [*encoded, *held_out_encoded],
        words=[choice.word for choice in recipe.labels],
        leaked=leaked,
        duplicates=duplicates,
        data_format=data_format,
        template=f"{recipe.template.name} ({recipe.template.origin})" if recipe.template else "none",
        notes=[*(note for part in [*parts, *held_out_parts] for note in part.notes), *notes],
        bad=_all_bad([*parts, *held_out_parts], [*encoded, *held_out_encoded]),
    )
    sizes = tuple(sum(example.source == number for example in train) for number in range(len(parts)))
    return Prepared(
        train=_numbered(train),
        eval=_numbered(held_out),
        audit=report,
        fingerprint=_fingerprint(parts, held_out_parts, options, recipe, template_hash),
        template_hash=template_hash,
        template=recipe.template,
        data_format=data_format,
        stop_ids=stop_ids(encoder, recipe.template),
        labels=recipe.labels,
        sizes=sizes,
        weights=_weights(parts, sizes),
    )


def _check_task(options: DataOptions, parts: Sequence[Rows]) -> None:
    """Pairs of answers are for `task: dpo`, and it is for nothing else."""
    pairs = [part for part in parts if part.row_format == "preference"]
    others = [part for part in parts if part.row_format != "preference"]
    if pairs and others:
        raise UsageError(
            f"{pairs[0].source.path} has preference rows and {others[0].source.path} {others[0].row_format} rows: "
            "train on them one after the other (adapter_path goes on from an adapter)"
        )
    if pairs and options.task not in ("auto", "dpo"):
        raise UsageError(
            f"{pairs[0].source.path}: preference rows (chosen, rejected) are for task dpo, not {options.task}: to "
            "learn the better answers alone, set data_format: prompt_completion and columns: {completion: chosen}"
        )
    if pairs and options.train_on_inputs:
        raise UsageError("train_on_inputs has no effect on preference rows (both answers follow one prompt): drop it")
    if options.task == "dpo" and others:
        raise UsageError(
            f"{others[0].source.path}: task dpo needs pairs of answers (prompt, chosen, rejected), and these are "
            f"{others[0].row_format} rows: map them with columns: {{part: column}}, or leave task out"
        )
    if pairs and options.task == "auto":
        pairs[0].notes.append(f"{pairs[0].source.path}: pairs of answers select task dpo")


def _recipe(
    options: DataOptions,
    encoder: Encoder,
    train: Sequence[Rows],
    held_out: Sequence[Rows],
    known: Sequence[str] | None,
) -> tuple[Recipe, list[str]]:
    """What `encode_rows` needs, and what the user should be told about it."""
    parts = [*train, *held_out]
    _require_rows_of(options, parts)
    rows = [row for part in parts for row in part.rows]
    talks = any(isinstance(row, Chat | Preference) for row in rows)
    chats = talks and options.task != "seq2seq"  # an encoder-decoder reads the words of a conversation, no template
    labelled = [row for row in rows if isinstance(row, Labelled)]
    if options.task == "classification":  # a head has the classes that it was trained on, and no other
        labelled = [row for part in train for row in part.rows if isinstance(row, Labelled)]
    if options.system_prompt and not talks and not labelled:
        raise UsageError("system_prompt has no effect on prompt/completion and text rows: leave it out")
    if options.chat_template != "auto" and not chats:
        why = "an encoder-decoder is given plain text" if talks else "no conversations"
        raise UsageError(f"chat_template has no effect on this data ({why}): leave it out")
    template = resolve_template(options.chat_template, encoder, options.chat_template_date) if chats else None
    declared = options.label_names or next((part.label_names for part in parts if part.label_names), None)
    if known is None:
        labels = _labels(labelled, declared, encoder, options.task)
    else:
        labels = _known_labels(known, numbered=options.label_names is not None)
    if options.task == "classification":
        _require_known(held_out, labels)
    notes = []
    if labelled and options.label_names is None and known is None:
        shown = ", ".join(choice.word for choice in labels[:6])
        origin = "as the data set declares" if declared else "as they stand in the data; label_names gives them words"
        notes.append(f"labels: {shown}{', …' if len(labels) > 6 else ''} ({origin})")
    recipe = Recipe(
        encoder, options.max_seq_length, template, labels, options.train_on_inputs, options.system_prompt, options.task
    )
    return recipe, notes


def _require_rows_of(options: DataOptions, parts: Sequence[Rows]) -> None:
    """UsageError for rows that the task cannot be learned from."""
    task = options.task
    if task in ("classification", "seq2seq") and options.train_on_inputs:
        raise UsageError(f"train_on_inputs is for causal language models, and the task is {task}: leave it out")
    for part in parts:
        if task == "classification" and part.row_format != "classification":
            raise UsageError(
                f"{part.source.path}: its rows are {part.row_format}, and task: classification needs a text (or a "
                "pair) and a label: map them with columns: {text: column, label: column}"
            )
        if task == "seq2seq" and part.row_format == "text":
            raise UsageError(
                f"{part.source.path}: its rows are text alone, and an encoder-decoder needs a source and an answer: "
                "map them with columns: {prompt: column, completion: column}"
            )


def _require_known(parts: Sequence[Rows], labels: Sequence[LabelChoice]) -> None:
    """UsageError for a held-out row whose label no training row has: set aside, it would flatter the accuracy."""
    known = {choice.value for choice in labels} | {choice.word for choice in labels}
    for part in parts:
        for row in part.rows:
            if isinstance(row, Labelled) and row.label not in known:
                words = ", ".join(choice.word for choice in labels)
                raise UsageError(
                    f"{row.origin}: the label {row.label!r} is not one that the head is trained on ({words}): correct "
                    "the row, or leave it out"
                )


def _known_labels(words: Sequence[str], numbered: bool) -> tuple[LabelChoice, ...]:
    """The classes of a trained head, as the rows that it was trained on named them.

    Integers in the data are class numbers where label_names says so (`numbered`), or where no class is an integer.
    """
    integers = {word: int(word) for word in words if re.fullmatch(r"0|[1-9][0-9]*", word)}
    if numbered or not integers:
        return tuple(LabelChoice(index, word, ()) for index, word in enumerate(words))
    return tuple(LabelChoice(integers.get(word, word), word, ()) for word in words)


def _labels(
    rows: Sequence[Labelled], names: Sequence[str] | None, encoder: Encoder, task: Task
) -> tuple[LabelChoice, ...]:
    """The classes: those that are named, else those that occur, sorted."""
    if not rows:
        return ()
    if names:
        values: list[tuple[int | str, str]] = list(enumerate(names))
    else:
        present = {row.label for row in rows}
        values = [(value, str(value)) for value in sorted(present, key=lambda v: (isinstance(v, str), v))]
    if len(values) < 2:
        raise UsageError(f"classification needs at least two classes; every label here is {values[0][1]!r}")
    if len({word for _, word in values}) < len(values):
        raise UsageError("label_names: every name must be different")

    def ids(word: str) -> tuple[int, ...]:
        if task == "classification":
            return ()
        if task == "seq2seq":
            answer = encoder.encode_whole(word)
            return (*answer, *(() if answer[-1:] == [encoder.eos] else (encoder.eos,)))
        return (*encoder.encode_continuation(label_text(word)), encoder.eos)

    return tuple(LabelChoice(value, word, ids(word)) for value, word in values)


def _encode(parts: Sequence[Rows], recipe: Recipe, options: DataOptions) -> list[Encoded]:
    """Tokenize each source; rows that turn out unusable here count with those that were before."""
    encoded = [encode_rows(part.rows, recipe, number) for number, part in enumerate(parts)]
    bad = _all_bad(parts, encoded)
    _refuse_bad(
        bad, sum(len(part.rows) - len(result.bad) for part, result in zip(parts, encoded, strict=True)), options
    )
    return encoded


def _all_bad(parts: Sequence[Rows], encoded: Sequence[Encoded]) -> list[BadRow]:
    bad = [row for part in parts for row in part.bad] + [row for result in encoded for row in result.bad]
    return sorted(bad, key=lambda row: (row.file, row.line))


def _numbered(examples: Iterable[Example]) -> list[Example]:
    return [replace(example, index=index) for index, example in enumerate(examples)]


# ---------------------------------------------------------------- held-out rows


def _key(example: Example) -> bytes:
    """Two rows with the same key are the same row: same tokens, same supervision."""
    digest = hashlib.blake2b(digest_size=16)
    for document in example.documents:
        digest.update(document.input_ids.tobytes())
        digest.update(document.supervised.tobytes())
    if example.target is not None:
        digest.update(example.target.to_bytes(8, "little"))
    return digest.digest()


def _duplicates(examples: Sequence[Example]) -> int:
    return len(examples) - len(set(map(_key, examples)))


def hold_out(
    examples: Sequence[Example], split: float, max_rows: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Divide rows into those to train on and those held out, in their order.

    `split` below 1 is a share (at most `max_rows`, at least 1 row), else a number of rows. Which rows are taken depends
    on their content and `seed`, not on their order; equal rows stay on one side. Raises UsageError where that leaves
    nothing on a side.
    """
    wanted = int(split) if split >= 1 else min(max_rows, max(1, round(split * len(examples))), len(examples) - 1)
    groups: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_key(example), []).append(index)
    if len(groups) < 2 or wanted >= len(examples):
        raise UsageError(
            f"eval_split: cannot hold out {wanted:,} of {len(examples):,} rows ({len(groups):,} different): "
            "add rows, or set eval_split: 0"
        )
    salt = f"halfbyte {seed}".encode()
    shuffled = sorted(groups, key=lambda key: hashlib.blake2b(key, key=salt, digest_size=16).digest())
    taken: set[int] = set()
    for key in shuffled:
        if len(taken) + len(groups[key]) <= wanted:
            taken.update(groups[key])
    if not taken:  # every row occurs more often than rows are wanted
        taken.update(groups[min(shuffled, key=lambda key: len(groups[key]))])
    train = [example for index, example in enumerate(examples) if index not in taken]
    return train, [examples[index] for index in sorted(taken)]


# ---------------------------------------------------------------- weights and fingerprint


def _weights(parts: Sequence[Rows], sizes: Sequence[int]) -> tuple[float, ...] | None:
    weights = [part.source.weight for part in parts]
    if all(weight is None for weight in weights):
        return None
    for part, size in zip(parts, sizes, strict=True):
        if size == 0:
            raise UsageError(f"{part.source.path}: no row is left to train on after eval_split held some out")
    return tuple(weight for weight in weights if weight is not None)


def _fingerprint(
    parts: Sequence[Rows], held_out: Sequence[Rows], options: DataOptions, recipe: Recipe, template_hash: str
) -> str:
    chosen = {name: getattr(options, name) for name in _FINGERPRINTED}
    if options.task in ("classification", "seq2seq"):
        chosen["task"] = options.task
    words = [choice.word for choice in recipe.labels]
    digest = hashlib.sha256(json.dumps([_VERSION, template_hash, words, chosen], sort_keys=True).encode())
    for kind, group in (("train", parts), ("eval", held_out)):
        for part in group:
            digest.update(f"\0{kind} {part.row_format} {part.source.weight}\0".encode())
            for row in part.rows:
                digest.update(canonical(row).encode() + b"\n")
    return digest.hexdigest()
