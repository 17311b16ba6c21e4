"""JSON Lines and JSON, read strictly: a broken row is one BadRow with its line, a broken file one UsageError.

Stricter than `json.loads` where leniency would change data silently: duplicate keys and NaN are errors, and the
text must be UTF-8. Lines are split at `\\n` only (`str.splitlines` would also split at U+2028 inside a string).
"""

import json
from typing import Any

from halfbyte.data.records import BadRow, Origin, RawData, Record, RowError
from halfbyte.errors import UsageError

_SPACE = " \t\n\r"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RowError(f"the key {twice!r} is given twice")
    return values


def _constant(name: str) -> float:
    raise RowError(f"{name} is not a JSON value (write null, or leave the key out)")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_LENIENT = json.JSONDecoder()


def decode_utf8(raw: bytes, file: str) -> str:
    """The text of a whole file; UTF-8 with or without a byte order mark."""
    refuse_utf16(raw, file)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{file}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}): save it as UTF-8") from None


def refuse_utf16(raw: bytes, file: str) -> None:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:4]:
        raise UsageError(f"{file}: this is not UTF-8 text but looks like UTF-16 or a binary file: save it as UTF-8")


def _row(value: Any, origin: Origin) -> Record:
    if not isinstance(value, dict):
        raise RowError(f"a row must be an object {{…}}, this is {_kind(value)}")
    return Record(origin, value)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def read_jsonl(raw: bytes, file: str) -> RawData:
    """One object a line. Blank lines are allowed; anything else that is not an object is a bad row."""
    refuse_utf16(raw, file)
    data = RawData()
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data.records.append(_row(_parse_line(line, number == len(lines)), Origin(file, number)))
        except RowError as error:
            data.bad.append(BadRow(file, number, str(error)))
    return data


def _parse_line(line: bytes, unterminated: bool) -> Any:
    """The value of one line. `unterminated`: the file ends without a newline after it, so it may be cut off."""
    try:
        return _STRICT.decode(line.decode())
    except UnicodeDecodeError as error:
        cut = unterminated and error.end == len(line)
        raise RowError(
            "half-written: the file ends in the middle of this row" if cut else "not UTF-8 text (save it as UTF-8)"
        ) from None
    except json.JSONDecodeError as error:
        if unterminated:
            raise RowError("half-written: the file ends in the middle of this row") from None
        raise RowError(f"not valid JSON ({error.msg.lower()}, column {error.colno})") from None
    except RecursionError:
        raise RowError("nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RowError(str(error)) from None


def read_json(raw: bytes, file: str) -> RawData:
    """A list of objects; a file of JSON Lines that is merely named .json is read as such, and that is noted."""
    text = decode_utf8(raw, file)
    start = _skip(text, 0)
    if start == len(text):
        raise UsageError(f"{file}: the file is empty")
    if text[start] == "[":
        return _read_array(text, start + 1, file)
    if text[start] == "{":
        return _read_objects(raw, text, start, file)
    raise UsageError(f"{file}: a JSON data file must hold a list of objects, this one begins with {text[start]!r}")


def _read_objects(raw: bytes, text: str, start: int, file: str) -> RawData:
    """Several objects after each other are JSON Lines; a single one is not a data set."""
    try:
        value, end = _LENIENT.raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError):
        end = start
        value = None
    if value is not None and _skip(text, end) == len(text):
        keys = ", ".join(map(repr, list(value)[:6]))
        raise UsageError(f"{file}: a JSON data file must hold a list of rows, this is one object with the keys {keys}")
    data = read_jsonl(raw, file)
    data.notes.append(f"{file}: holds JSON Lines although it is named .json; read as JSON Lines")
    return data


def _read_array(text: str, position: int, file: str) -> RawData:
    data = RawData()
    counted, line = 0, 1
    position = _skip(text, position)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = _STRICT.raw_decode(text, position)
            data.records.append(_row(value, Origin(file, line)))
        except RowError as error:
            if counted == position:
                _, position = _raw_decode(text, position, file)
            data.bad.append(BadRow(file, line, str(error)))
        except (json.JSONDecodeError, RecursionError):
            _, position = _raw_decode(text, position, file)
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise _syntax_error(text, position, file, "expected ',' or ']' after a row")
    if (rest := _skip(text, position + 1)) != len(text):
        raise _syntax_error(text, rest, file, "text after the list's end")
    return data


def _raw_decode(text: str, position: int, file: str) -> tuple[Any, int]:
    """Decode leniently, only to find where the value ends; what cannot be decoded ends the file."""
    try:
        return _LENIENT.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _syntax_error(text, error.pos, file, error.msg.lower()) from None
    except RecursionError:
        raise _syntax_error(text, position, file, "nested too deeply") from None


def _syntax_error(text: str, position: int, file: str, message: str) -> UsageError:
    line = text.count("\n", 0, position) + 1
    # A string that is never closed is reported at its start, but the file's end is what is wrong.
    if position >= len(text.rstrip()) or message.startswith("unterminated string"):
        return UsageError(f"{file}:{line}: the file ends in the middle of a row: it is half-written, write it again")
    return UsageError(f"{file}:{line}: not valid JSON ({message})")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position
