"""`halfbyte data check` on a terminal: what the rows become, with every token shown as supervised or not."""

from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from halfbyte.data.audit import Audit
from halfbyte.data.examples import Example
from halfbyte.data.prepare import Prepared

SUPERVISED_STYLES = ("black on green", "black on bright_green")  # alternate, so that token borders can be seen
CONTEXT_STYLES = ("dim", "dim underline")
_SHOWN_TOKENS = 400
_BAR_WIDTH = 40


def render_check(prepared: Prepared, tokenizer: Any, console: Console, rows: int = 3) -> None:
    """Print the audit and the first `rows` training rows. Without colours, supervised tokens stand in ⟦ ⟧."""
    console.print(_summary(prepared))
    console.print(_histogram(prepared.audit))
    for note in prepared.audit.notes:
        console.print(Text(f"note: {note}", style="cyan"))
    for warning in prepared.audit.warnings():
        console.print(Text(f"look: {warning}", style="yellow"))
    for bad in prepared.audit.bad[:5]:
        console.print(Text(f"  {bad}", style="red"))
    if len(prepared.audit.bad) > 5:
        console.print(Text(f"  … and {len(prepared.audit.bad) - 5:,} more", style="red"))
    coloured = console.color_system is not None and not console.no_color
    for example in prepared.train[:rows]:
        console.print(_row(example, tokenizer, coloured))


def _summary(prepared: Prepared) -> Table:
    audit = prepared.audit
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    share = audit.supervised_train / audit.tokens_train
    table.add_row("row format", audit.data_format)
    table.add_row("chat template", audit.template)
    table.add_row("rows", f"{audit.rows_train:,} to train on, {audit.rows_eval:,} held out")
    table.add_row("tokens", f"{audit.tokens_train:,}, of which {audit.supervised_train:,} supervised ({share:.1%})")
    lengths = audit.lengths
    spread = f"{lengths.shortest:,} shortest, {lengths.median:,} median, {lengths.p95:,} at 95 %"
    table.add_row("tokens a row", f"{spread}, {lengths.longest:,} longest")
    if audit.labels:
        table.add_row("labels", ", ".join(f"{word}: {count:,}" for word, count in audit.labels.items()))
    table.add_row("fingerprint", prepared.fingerprint[:16])
    return table


def _histogram(audit: Audit) -> Table:
    """Rows by length, a bar a bin."""
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    lengths = audit.lengths
    most = max(lengths.counts)
    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        bar = "█" * max(bool(count), round(_BAR_WIDTH * count / most))
        span = f"{low:,}" if high - low == 1 else f"{low:,}–{high - 1:,}"
        table.add_row(span, Text(bar, style="blue"), f"{count:,}")
    return table


def _row(example: Example, tokenizer: Any, coloured: bool) -> Panel:
    place = f"{Path(example.origin.file).name}:{example.origin.line}"  # the whole path would not fit
    learned = f"{example.supervised_tokens:,} supervised" if example.target is None else f"class {example.completion}"
    title = f"{place} · {len(example):,} tokens, {learned}"
    parts: list[Text] = []
    for document in example.documents:
        if parts:
            parts.append(Text("rejected:", style="bold"))
        parts.append(token_text(document, tokenizer, coloured))
        if (more := len(document.input_ids) - _SHOWN_TOKENS) > 0:
            parts.append(Text(f"… {more:,} more tokens", style="dim italic"))
    return Panel(Group(*parts), title=Text(title), title_align="left")


def token_text(example: Example, tokenizer: Any, coloured: bool) -> Text:
    """The first tokens of a row, each in the style of its supervision; newlines are shown as ⏎ before they break."""
    text = Text()
    inside = False
    ids = example.input_ids[:_SHOWN_TOKENS].tolist()
    for number, (token, supervised) in enumerate(zip(ids, example.supervised.tolist(), strict=False)):
        if not coloured and bool(supervised) != inside:
            text.append("⟦" if supervised else "⟧")
            inside = bool(supervised)
        styles = SUPERVISED_STYLES if supervised else CONTEXT_STYLES
        text.append(_shown(tokenizer, token), style=styles[number % 2] if coloured else None)
    if inside:
        text.append("⟧" if len(example.input_ids) <= _SHOWN_TOKENS else "…")
    return text


def _shown(tokenizer: Any, token: int) -> str:
    """One token as text, with what a terminal would act upon (escapes, carriage returns) spelled out.

    Decoded behind another token, because alone some decoders strip a word's space.
    """
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    text = str(tokenizer.decode([*before, token])).removeprefix(str(tokenizer.decode(before)))
    safe = "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
    return safe.replace("\n", "⏎\n")
