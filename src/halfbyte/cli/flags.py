"""Flags made from the fields of the config, so that an option is declared once.

A flag is `--field-name`; underscores work too, and so do other tools' names (hidden from `--help`). Flags only carry
text: what a value must be is checked where the field is declared, so a flag and a YAML line get the same message.
"""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from halfbyte.errors import UsageError
from halfbyte.options import Options, parse_bytes
from halfbyte.run import aliases
from halfbyte.run.config import COMPONENTS

SHORT = {"model": ("-m",), "data": ("-d",), "output_dir": ("-o",)}
"""One-letter forms of the flags that every run needs."""


def with_config_flags(
    components: Sequence[str] | None = None, leave_out: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: add a flag for each field of the named components (all by default) to a verb, aliases included.

    The verb receives what was given, by field or alias name, as `flags: dict[str, Any]`.
    """
    return _with({title: COMPONENTS[title] for title in components or COMPONENTS}, leave_out, "flags")


def with_option_flags(
    title: str, options: type[Options], leave_out: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the same for one options class that is not part of the config, as `options: dict[str, Any]`."""
    return _with({title: options}, leave_out, "options")


def _with(
    chosen: Mapping[str, type[Options]], leave_out: Sequence[str], parameter: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    fields = {n: f.annotation for o in chosen.values() for n, f in o.model_fields.items() if n not in leave_out}

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(verb, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != parameter]
        taken = {p.name for p in own}
        hidden = [p for p in _aliases(fields) if p.name not in taken] if parameter == "flags" else []
        added = [*_parameters(chosen, fields), *hidden]
        names = {p.name for p in added}

        def wrapper(**values: Any) -> None:
            given = {k: _value(k, v, fields) for k, v in values.items() if k in names and v is not None and v != []}
            verb(**{parameter: given}, **{k: v for k, v in values.items() if k not in names})

        parameters = [*own, *added]
        wrapper.__name__, wrapper.__doc__ = verb.__name__, verb.__doc__
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _parameters(components: Mapping[str, type[Options]], fields: Mapping[str, Any]) -> list[inspect.Parameter]:
    found = []
    for title, options in components.items():
        for name, field in options.model_fields.items():
            if name not in fields:
                continue
            kind, flag = kind_of(field.annotation), name.replace("_", "-")
            option = typer.Option(
                f"--{flag}/--no-{flag}" if kind == "bool" else f"--{flag}",
                *SHORT.get(name, ()),
                help=_help(field),
                show_default=False,
                metavar=None if kind == "bool" else _metavar(field, kind),
                rich_help_panel=title.capitalize(),
            )
            found.append(_parameter(name, kind, option))
    return found


def _aliases(fields: Mapping[str, Any]) -> list[inspect.Parameter]:
    """Other tools' names, hidden: they work, and `--help` teaches ours."""
    found = [
        _hidden(name, "bool" if name in aliases.SWITCHES else kind_of(fields[alias.field]))
        for name, alias in aliases.ALIASES.items()
        if alias.field in fields and len(name) > 1
    ]
    if "method" in fields:
        names = (*aliases.METHOD_KEYS, *aliases.BITS_KEYS)
        found += [_hidden(name, "bool" if name in aliases.SWITCHES else "str") for name in names]
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


def _help(field: FieldInfo) -> str:
    """The field's own description, with its default."""
    default = _shown(field.get_default(call_default_factory=True))
    text = str(field.description)
    if default and f"by default {default}" not in text:
        text = f"{text} [default: {default}]"
    return text.replace("[", "\\[")  # square brackets are Rich's markup


def _metavar(field: FieldInfo, kind: str) -> str:
    """What `--help` shows for the value: the allowed words, or the kind."""
    if kind == "dict":
        return "KEY=VALUE"
    if parse_bytes.__name__ in repr(field.annotation):
        return "SIZE"
    annotation = field.annotation
    words = [str(w) for m in _members(annotation) if get_origin(m) is Literal for w in get_args(m)]
    if words:
        return "|".join(words)
    names = {int: "N", float: "X"}
    return next((names[m] for m in _members(annotation) if m in names), "TEXT")


def _shown(default: Any) -> str:
    if default is None or default in ({}, (), []) or default is PydanticUndefined:
        return ""
    if isinstance(default, tuple | list):
        return ", ".join(map(str, default))
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _value(name: str, value: Any, fields: Mapping[str, Any]) -> Any:
    """A flag's text as the field takes it: repeated flags or commas are a list, `a=b` a mapping."""
    alias = aliases.ALIASES.get(name)
    field = alias.field if alias is not None and name not in fields else name
    if field in fields and isinstance(value, str):
        # Pydantic makes an int of "64" anywhere but in a Literal.
        choices = [w for m in _members(fields[field]) if get_origin(m) is Literal for w in get_args(m)]
        return next((choice for choice in choices if isinstance(choice, int) and str(choice) == value), value)
    if not isinstance(value, list | tuple) or field not in fields:
        return value
    items = [str(item) for item in value]
    if kind_of(fields[field]) == "dict":
        pairs = [item.partition("=") for item in items]
        wrong = [item for item, (_, mark, _) in zip(items, pairs, strict=True) if not mark]
        if wrong:
            raise UsageError(f"--{name.replace('_', '-')} {wrong[0]}: write it as KEY=VALUE")
        return {key: text for key, _, text in pairs}
    if field not in ("data", "eval_data", "stop"):  # the name of a file, or a text, may hold a comma
        items = [part.strip() for item in items for part in item.split(",")]
    takes_text = any(member is str for member in _members(fields[field]))
    return items[0] if takes_text and len(items) == 1 else items
