"""docs/config.md from the fields themselves: `python -m halfbyte.run.reference > docs/config.md`; a test compares."""

import sys
from typing import Any

from halfbyte.options import Options
from halfbyte.run import aliases
from halfbyte.run.config import COMPONENTS

HEAD = """\
# The config

One YAML file and flags carry the same fields; flags win. `halfbyte init` writes a commented file with all of them, and
`--lora-r 8` on the command line is `lora_r: 8` in the file. A key that halfbyte does not know is refused with the
nearest one that it does; a value that a field does not take is named with its file and line.

```sh
halfbyte init my.yaml --model my-model --data rows.jsonl --lora-r 8
halfbyte train my.yaml --max-steps 4 --output-dir runs/from-yaml
```

A run writes its config, with every default made explicit, to `run.yaml`: `halfbyte train runs/…/run.yaml --output-dir
elsewhere` repeats it.

<!-- Made by `python -m halfbyte.run.reference`; change the fields, not this page. -->
"""

ALIASES = """\
## Other tools' spellings

Files written for Axolotl, LLaMA-Factory, TRL, Unsloth, torchtune and mlx-lm mostly work as they are: these names are
understood too, in files and as flags. Two that disagree are an error.

| field | also called |
|---|---|
"""

METHOD = """
`method` also follows from {names}, which other tools combine: `adapter: lora` with `load_in_4bit: true` is `qlora`.
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [HEAD]
    for title, options in COMPONENTS.items():
        parts.append(f"## {title.capitalize()}\n\n{_table(options)}")
    called: dict[str, list[str]] = {}
    for name, alias in aliases.ALIASES.items():
        called.setdefault(alias.field, []).append(f"`{name}`")
    rows = "".join(f"| `{field}` | {', '.join(names)} |\n" for field, names in sorted(called.items()))
    names = ", ".join(f"`{name}`" for name in (*aliases.METHOD_KEYS, *aliases.BITS_KEYS))
    parts.append(ALIASES + rows + METHOD.format(names=names))
    return "\n".join(parts)


def _table(options: type[Options]) -> str:
    lines = ["| field | default | what it does |", "|---|---|---|"]
    for name, field in options.model_fields.items():
        default = "needed" if field.is_required() else _default(field.get_default(call_default_factory=True))
        text = str(field.description).rstrip(".").replace("|", "\\|")
        lines.append(f"| `{name}` | {default} | {text[0].upper()}{text[1:]} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if value is None or value in ({}, (), []):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(page())
