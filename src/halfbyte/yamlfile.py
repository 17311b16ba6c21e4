"""YAML with line numbers: every value remembers where it was written, so that an error can say so.

Three traps of YAML 1.1 are closed here. `1e-4` without a dot is a number, as everybody who writes it means.
`on`, `off`, `yes` and `no` are words, not booleans. A key that is written twice is an error, where a plain loader
silently keeps the last.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import UsageError

MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Entry:
    """One top-level key's value and where it stands: `file:line`, or the flag that gave it."""

    value: Any
    where: str


class _Loader(yaml.SafeLoader):
    """SafeLoader (no Python objects, ever) with YAML 1.2's numbers and booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    "-+.0123456789",
)


def _construct_float(loader: _Loader, node: yaml.nodes.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_yaml(path: Path) -> dict[str, Entry]:
    """The top-level keys of a YAML file. UsageError for a missing, unreadable, malformed or repeating file."""
    return parse_yaml(_read_text(path), str(path))


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size:,} bytes are too many for a config file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such config file (`halfbyte init {path}` writes one)") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not a config file") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None


def parse_yaml(text: str, name: str) -> dict[str, Entry]:
    """As `read_yaml`, from text; `name` is what errors call it."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{name}:1: expected `key: value` lines, found something else")
        return _entries(loader, node, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _entries(loader: _Loader, node: yaml.MappingNode, name: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        key, where = loader.construct_object(key_node, deep=True), f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise UsageError(f"{where}: the key {key!r} is not a word")
        if key in found:
            raise UsageError(f"{where}: {key} was already given at {found[key].where}: remove one")
        found[key] = Entry(loader.construct_object(value_node, deep=True), where)
    return found
