"""Flags made from the fields of the config, so that an option is declared once.

A flag is `--field-name`; underscores work too, and so do other tools' names (hidden from `--help`). Flags only carry
text: what a value must be is checked where the field is declared, so a flag and a YAML line get the same message.
"""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from halfbyte.errors import UsageError
from halfbyte.options import Options
from halfbyte.run import aliases
from halfbyte.run.config import COMPONENTS, RunConfig


def with_config_flags(
    components: Sequence[str] | None = None, leave_out: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: add a flag for each field of the named components (all by default) to a verb.

    The verb receives what was given, by field or alias name, as `flags: dict[str, Any]`.
    """
    chosen = {title: COMPONENTS[title] for title in components or COMPONENTS}

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "flags"]
        added = [*_parameters(chosen, leave_out), *_alias_parameters(chosen, leave_out)]
        names = {parameter.name for parameter in added}

        def wrapper(**values: Any) -> None:
            given = {k: _value(k, v) for k, v in values.items() if k in names and v is not None and v != []}
            verb(flags=given, **{k: v for k, v in values.items() if k not in names})

        wrapper.__doc__ = verb.__doc__
        wrapper.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        return wrapper

    return decorate


def _parameters(components: Mapping[str, type[Options]], leave_out: Sequence[str]) -> list[inspect.Parameter]:
    found = []
    for title, options in components.items():
        for name, field in options.model_fields.items():
            if name in leave_out:
                continue
            kind = kind_of(field.annotation)
            default = field.get_default(call_default_factory=True)
            flag = "--" + name.replace("_", "-")
            option = typer.Option(
                f"{flag}/--no-{name.replace('_', '-')}" if kind == "bool" else flag,
                help=_escape(str(field.description)),
                show_default=_shown(default),
                metavar=None if kind == "bool" else _metavar(field.annotation, kind),
                rich_help_panel=title.capitalize(),
            )
            found.append(_parameter(name, kind, option))
    return found


def _alias_parameters(components: Mapping[str, type[Options]], leave_out: Sequence[str]) -> list[inspect.Parameter]:
    """Other tools' names, hidden: they work, and `--help` teaches ours."""
    fields = {name: f for options in components.values() for name, f in options.model_fields.items()}
    found = []
    for name, alias in aliases.ALIASES.items():
        if alias.field not in fields or alias.field in leave_out or len(name) == 1:
            continue
        kind = "bool" if name in aliases.SWITCHES else kind_of(fields[alias.field].annotation)
        found.append(_hidden(name, kind))
    if "method" in fields and "method" not in leave_out:
        found += [_hidden(n, "bool" if n in aliases.SWITCHES else "str") for n in aliases.METHOD_KEYS]
        found += [_hidden(n, "bool" if n in aliases.SWITCHES else "str") for n in aliases.BITS_KEYS]
    return found


def _hidden(name: str, kind: str) -> inspect.Parameter:
    flag = name.replace("_", "-")
    return _parameter(name, kind, typer.Option(f"--{flag}/--no-{flag}" if kind == "bool" else f"--{flag}", hidden=True))


def _parameter(name: str, kind: str, option: Any) -> inspect.Parameter:
    plain: Any = {"bool": bool | None, "list": list[str] | None, "dict": list[str] | None}.get(kind, str | None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain, option])


def kind_of(annotation: Any) -> str:
    """bool, list, dict or str: how a field is written on a command line."""
    kinds = {_single(part) for part in _members(annotation)}
    for kind in ("dict", "list"):
        if kind in kinds:
            return kind
    return "bool" if kinds == {"bool"} else "str"


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for part in get_args(annotation) for m in _members(part) if m is not type(None)]
    return [annotation]


def _single(annotation: Any) -> str:
    origin = get_origin(annotation) or annotation
    if origin is bool:
        return "bool"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "dict"
    return "list" if origin in (list, tuple, set, frozenset) else "str"


def _metavar(annotation: Any, kind: str) -> str:
    """What `--help` shows for the value: the allowed words, or the kind."""
    if kind == "dict":
        return "KEY=VALUE"
    words = [str(w) for m in _members(annotation) if get_origin(m) is Literal for w in get_args(m)]
    if words:
        return "|".join(words)
    names = {int: "N", float: "X"}
    return next((names[m] for m in _members(annotation) if m in names), "TEXT")


def _shown(default: Any) -> str | bool:
    if default is None or default in ({}, (), []) or repr(default) == "PydanticUndefined":
        return False
    if isinstance(default, tuple | list):
        return ", ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else f"{default:g}" if _small(default) else str(default)


def _small(value: Any) -> bool:
    return isinstance(value, float)


def _escape(text: str) -> str:
    """Square brackets are Rich's markup."""
    return text.replace("[", "\\[")


def _value(name: str, value: Any) -> Any:
    """A flag's text as the field takes it: repeated flags or commas are a list, `a=b` a mapping."""
    alias = aliases.ALIASES.get(name)
    field = RunConfig.model_fields.get(alias.field if alias else name)
    if not isinstance(value, list | tuple) or field is None:
        return value
    items = [str(item) for item in value]
    if kind_of(field.annotation) == "dict":
        pairs = [item.partition("=") for item in items]
        wrong = [item for item, (_, mark, _) in zip(items, pairs, strict=True) if not mark]
        if wrong:
            raise UsageError(f"--{name.replace('_', '-')} {wrong[0]}: write it as KEY=VALUE")
        return {key: text for key, _, text in pairs}
    takes_text = any(member is str for member in _members(field.annotation))
    if (alias.field if alias else name) not in ("data", "eval_data"):  # a file's name may hold a comma
        items = [part.strip() for item in items for part in item.split(",")]
    return items[0] if takes_text and len(items) == 1 else items
