"""Chat templates run in a sandbox: they come from the Hub and are somebody else's code.

The environment offers what model authors write against (transformers' conventions): trimmed blocks, loop controls,
`tojson` without HTML escapes, `raise_exception`, `strftime_now`, `{% generation %}` around the assistant's text.
Two differences, both for repeatability and safety: `strftime_now` formats a date that is fixed by the run, and the
template sees plain copies of JSON values only. `{% generation %}` is turned into marker characters in the output.
"""

import json
from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

#: Supplementary private-use characters, which no text has a meaning for; callers check that their text has none.
MARK_BEGIN = "\U0010fffc"
MARK_END = "\U0010fffd"


class TemplateRefusal(TemplateError):
    """The template itself called `raise_exception`, e.g. because roles do not alternate."""


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: the enclosed output goes between the two marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{MARK_BEGIN}{caller()}{MARK_END}"


class _SafeNamespace(Namespace):
    """`namespace()` without underscore names, through which sandboxes have been escaped."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template may not set the attribute {name!r}")
        super().__setitem__(name, value)


def _namespace(**attributes: Any) -> Namespace:
    result = _SafeNamespace()
    for name, value in attributes.items():
        result[name] = value
    return result


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict(…)` as a function: the class would hand its attributes to the template."""
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def compile_template(source: str, today: str) -> Template:
    """Compile a chat template. `today` (ISO date) is what `strftime_now` formats.

    Raises jinja2.TemplateSyntaxError.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=date.fromisoformat(today).strftime,
        namespace=_namespace,
        dict=_new_dict,
    )
    return environment.from_string(source)


def plain(value: Any) -> Any:
    """A copy built of JSON's own types, so that a template can reach no method that it should not."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)
