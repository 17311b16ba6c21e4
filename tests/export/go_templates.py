"""Enough of Go's text/template and of Ollama's Modelfile parser to see what Ollama would make of our text.

Written from Go's documentation (pkg.go.dev/text/template) and Ollama's (docs/modelfile.mdx, parser/parser.go): actions
`range`, `if`, `else`, `else if`, `end`, assignments, fields, variables, string and number literals, `eq`, `and`, `not`;
anything else is an error here, so that we emit nothing that was not thought of. Trim markers are not emitted either.
"""

import re
from collections.abc import Sequence
from typing import Any

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\(|\)|:=|=|,|[^\s(),]+)')


def ollama_prompt(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What Ollama sends to the model: its collate() joins the system texts and merges neighbours of one role."""
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1] = {"role": message["role"], "content": f"{merged[-1]['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    data = {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in merged]}
    return render(template, data | {"Response": ""})


def render(template: str, data: Any) -> str:
    """A template with `data` as dot."""
    nodes, rest, end = _parse(_split(template), 0)
    assert end is None
    assert rest == len(_split(template)), "an end too many"
    return _run(nodes, data, [{"$": data}])


def modelfile_commands(text: str) -> list[tuple[str, str]]:
    """(command, value) of a Modelfile, as Ollama's ParseFile reads them."""
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
        elif text[at] == "#":
            at = (text.find("\n", at) + 1) or len(text)
        else:
            name = re.compile(r"[A-Za-z]+[ \t]").match(text, at)
            assert name, f"no command at {text[at : at + 30]!r}"
            at = name.end()
            command = name[0].strip().lower()
            if command == "parameter":
                parameter = re.compile(r"[A-Za-z0-9_]+[ \t]").match(text, at)
                assert parameter
                at, command = parameter.end(), parameter[0].strip()
            value, at = _value(text, at)
            found.append((command, value))
    return found


def _value(text: str, at: int) -> tuple[str, int]:
    """The value from `at` on: it ends at the first line end where its quotes are closed."""
    buffer = ""
    while True:
        done = at >= len(text)
        if done or text[at] in "\r\n":
            closed = _unquote(buffer.strip())
            if closed is not None:
                return closed, at + 1
            assert not done, "the quotes are never closed"
        if text[at].isprintable() or text[at] in "\r\n\t":
            buffer += text[at]
        at += 1


def _unquote(text: str) -> str | None:
    for mark in ('"""', '"'):
        if text.startswith(mark):
            return text[len(mark) : -len(mark)] if len(text) >= 2 * len(mark) and text.endswith(mark) else None
    return text


def _split(template: str) -> list[tuple[str, str]]:
    """("text" | "action", its inside) in order."""
    parts, at = [], 0
    for action in _ACTION.finditer(template):
        assert not action[1].startswith("-"), "trim markers are not for here"
        assert not action[1].endswith("-"), "trim markers are not for here"
        parts += [("text", template[at : action.start()]), ("action", action[1].strip())]
        at = action.end()
    return [*parts, ("text", template[at:])]


def _parse(parts: list[tuple[str, str]], at: int) -> tuple[list[Any], int, str | None]:
    """(nodes, where parsing stopped, the `end` or `else …` that stopped it)."""
    nodes: list[Any] = []
    while at < len(parts):
        kind, inside = parts[at]
        at += 1
        word = inside.split(" ", 1)[0] if kind == "action" else ""
        if kind == "text":
            nodes.append(("text", inside))
        elif word in ("end", "else"):
            return nodes, at, inside
        elif word in ("if", "range"):
            branches, otherwise, at = _branches(parts, at, inside.split(" ", 1)[1])
            assert word == "if" or (len(branches) == 1 and not otherwise)
            nodes.append((word, branches, otherwise))
        else:
            nodes.append(("print", inside))
    return nodes, at, None


def _branches(parts: list[tuple[str, str]], at: int, condition: str) -> tuple[list[Any], list[Any], int]:
    branches, otherwise = [], []
    while True:
        body, at, stop = _parse(parts, at)
        branches.append((condition, body))
        assert stop is not None, "an end is missing"
        if stop.startswith("else if "):
            condition = stop.removeprefix("else if ")
            continue
        if stop == "else":
            otherwise, at, stop = _parse(parts, at)
        assert stop == "end"
        return branches, otherwise, at


def _run(nodes: Sequence[Any], dot: Any, scopes: list[dict[str, Any]]) -> str:
    out = ""
    scopes = [*scopes, {}]
    for node in nodes:
        match node:
            case ("text", text):
                out += text
            case ("print", expression):
                out += _print(expression, dot, scopes)
            case ("if", branches, otherwise):
                chosen = next((body for condition, body in branches if _evaluate(condition, dot, scopes)), otherwise)
                out += _run(chosen, dot, scopes)
            case ("range", [(what, body)], _):
                names, _, over = what.rpartition(":=")
                for index, item in enumerate(_evaluate(over.strip(), dot, scopes)):
                    own = dict(zip((n.strip() for n in names.split(",")), (index, item), strict=True)) if names else {}
                    out += _run(body, item, [*scopes, own])
    return out


def _print(expression: str, dot: Any, scopes: list[dict[str, Any]]) -> str:
    assigned = re.fullmatch(r"(\$\w+) (:?=) (.+)", expression)
    if assigned is None:
        value = _evaluate(expression, dot, scopes)
        assert isinstance(value, str)
        return value
    name, how, value = assigned[1], assigned[2], _evaluate(assigned[3], dot, scopes)
    where = scopes[-1] if how == ":=" else next(scope for scope in reversed(scopes) if name in scope)
    where[name] = value
    return ""


def _evaluate(expression: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    tokens = _TOKEN.findall(expression)
    value, rest = _call(tokens, dot, scopes)
    assert not rest
    return value


def _call(tokens: list[str], dot: Any, scopes: list[dict[str, Any]]) -> tuple[Any, list[str]]:
    if tokens[0] in ("eq", "and", "not"):
        name, rest, arguments = tokens[0], tokens[1:], []
        while rest and rest[0] != ")":
            value, rest = _operand(rest, dot, scopes)
            arguments.append(value)
        if name == "not":
            return not arguments[0], rest
        if name == "eq":
            assert type(arguments[0]) is type(arguments[1]), "Go does not compare different types"
            return arguments[0] == arguments[1], rest
        return next((a for a in arguments if not a), arguments[-1]), rest
    return _operand(tokens, dot, scopes)


def _operand(tokens: list[str], dot: Any, scopes: list[dict[str, Any]]) -> tuple[Any, list[str]]:
    first, rest = tokens[0], tokens[1:]
    if first == "(":
        value, rest = _call(rest, dot, scopes)
        assert rest[0] == ")"
        return value, rest[1:]
    if first.startswith('"'):
        return first[1:-1], rest
    if first.isdigit():
        return int(first), rest
    name, *fields = first.split(".")
    assert not name or name.startswith("$"), f"{first} is not known here"
    value = dot if not name else next(scope[name] for scope in reversed(scopes) if name in scope)
    for field in fields:
        value = value[field]
    return value, rest
