"""From records to rows: one checked, normalised value per row, whatever format it came in.

A row that breaks its format's rules becomes a BadRow with a reason; nothing is repaired silently. Conversations end
up as OpenAI messages: roles system, user, assistant and tool; string contents; tool-call arguments as objects,
because that is what chat templates print.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from halfbyte.data.detection import REQUIRED, TEXT_COLUMNS
from halfbyte.data.jinja import MARK_BEGIN, MARK_END
from halfbyte.data.options import RowFormat
from halfbyte.data.records import Chat, CodeTests, Completion, Labelled, Origin, Preference, Record, Row, RowError, Text

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
          "function": "tool"}  # fmt: skip
_SHAREGPT_ROLES = {
    **_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "tool_call", "tool_call": "tool_call", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def normalise(record: Record, row_format: RowFormat, system_prompt: str | None = None) -> Row:
    """The row of a record whose columns have been renamed. Raises RowError with the reason if it is unusable."""
    values = record.values
    if not any(all(values.get(name) is not None for name in needed) for needed in REQUIRED[row_format]):
        raise RowError(_missing(values, row_format))
    row = _NORMALISERS[row_format](values, record.origin)
    if isinstance(row, Chat) and system_prompt and row.messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *row.messages]
        row = Chat(row.origin, messages, (False, *row.supervise), row.tools, row.tests)
    if isinstance(row, Preference) and system_prompt and row.prompt[0]["role"] != "system":
        row = replace(row, prompt=[{"role": "system", "content": system_prompt}, *row.prompt])
    _check_unicode(row)
    return row


def _missing(values: Mapping[str, Any], row_format: RowFormat) -> str:
    """Name the column that is missing or null, taking the alternative that lacks least."""
    lacking = [[name for name in needed if values.get(name) is None] for needed in REQUIRED[row_format]]
    names = min(lacking, key=len)
    nulls = all(name in values for name in names)
    return f"{' and '.join(map(repr, names))} {'is null' if nulls else 'is missing'} ({row_format} row)"


def _text(values: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    """A string column. `empty`: whether an empty one is allowed."""
    value = values.get(name)
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be a string, this is {_kind(value)}")
    if not empty and not value.strip():
        raise RowError(f"{name!r} is empty")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), f"the {type(value).__name__} {value!r:.40}")


# ---------------------------------------------------------------- conversations


def check_messages(value: Any, what: str = "messages") -> list[dict[str, Any]]:
    """OpenAI messages, checked and normalised."""
    if not isinstance(value, list) or not value:
        raise RowError(f"{what!r} must be a list of messages, this is {'empty' if value == [] else _kind(value)}")
    return [_message(item, f"{what}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RowError(f"{where} must be an object with role and content, this is {_kind(item)}")
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(f"{where} has the role {role!r}; known are {', '.join(_ROLES)}")
    message: dict[str, Any] = {"role": _ROLES[role], "content": _content(item.get("content"), where)}
    # Parquet fills the keys that a message does not have with null.
    message |= {key: value for key, value in item.items() if value is not None and key not in message}
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
        if not message["tool_calls"]:
            del message["tool_calls"]
    if role == "assistant" and not message["content"].strip() and "tool_calls" not in message:
        raise RowError(f"{where}: the assistant's content is empty")
    if message.get("weight", 1) not in (0, 1):
        raise RowError(f"{where}: weight must be 0 or 1")
    return message


def _content(value: Any, where: str) -> str:
    """A message's text; a list of text parts is joined."""
    if value is None:
        return ""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else _kind(part)
                raise RowError(f"{where}: only text parts can be trained on, this has {kind!r}")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise RowError(f"{where}: content must be a string, this is {_kind(value)}")
    return value


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError(f"{where}: tool_calls must be a list, this is {_kind(value)}")
    calls = []
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}: tool_calls[{index}] has no function name")
        arguments = _json_if_string(function.get("arguments", {}), f"{where}: tool_calls[{index}].arguments")
        rest = {key: item for key, item in call.items() if item is not None and key not in ("function", "arguments")}
        rest.pop("name", None)
        calls.append({"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _json_if_string(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except ValueError:
        raise RowError(f"{where} is not valid JSON") from None


def _tools(values: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = _json_if_string(values.get("tools"), "tools")
    if tools is None or tools in ([], {}):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools must be a list of objects (or that as a JSON string)")
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _chat(origin: Origin, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, first: int = 0) -> Chat:
    """A conversation whose assistant messages from index `first` on are learned, unless their weight is 0."""
    supervise = tuple(
        index >= first and message["role"] == "assistant" and message.get("weight", 1) != 0
        for index, message in enumerate(messages)
    )
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no message of the assistant: there is nothing to learn")
    if not any(supervise):
        raise RowError("every message of the assistant has weight 0: there is nothing to learn")
    bare = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return Chat(origin, bare, supervise, tools)


def _messages(values: Mapping[str, Any], origin: Origin) -> Row:
    return _chat(origin, check_messages(values["messages"]), _tools(values))


def _conversations(values: Mapping[str, Any], origin: Origin) -> Row:
    """ShareGPT: `from` and `value`; also `role` and `content` under this name, and a `system` column."""
    turns = values["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"'conversations' must be a list of turns, this is {'empty' if turns == [] else _kind(turns)}")
    messages = [_turn(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    if values.get("system"):
        messages.insert(0, {"role": "system", "content": _text(values, "system")})
    return _chat(origin, check_messages(messages, "conversations"), _tools(values))


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"{where} must be an object with from and value, this is {_kind(turn)}")
    if "from" not in turn:
        return turn
    speaker = turn["from"]
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"{where} is from {speaker!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    message = {"role": role, "content": turn.get("value")}
    if "weight" in turn:
        message["weight"] = turn["weight"]
    if role == "tool_call":
        calls = _json_if_string(turn.get("value"), f"{where}.value")
        message |= {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return message


def _alpaca(values: Mapping[str, Any], origin: Origin) -> Row:
    """One exchange: the instruction, a blank line and the input (if any) as the user, the output as the assistant."""
    question = _text(values, "instruction")
    if values.get("input") is not None and (extra := _text(values, "input", empty=True)).strip():
        question = f"{question}\n\n{extra}"
    messages = []
    if values.get("system"):
        messages.append({"role": "system", "content": _text(values, "system")})
    for index, turn in enumerate(values.get("history") or []):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowError(f"history[{index}] must be a pair of strings, [question, answer]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": _text(values, "output")}]
    return _chat(origin, messages, None)


def _prompt_completion(values: Mapping[str, Any], origin: Origin) -> Row:
    """Two strings, taken as they are; or two message lists, of which the completion is learned."""
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = check_messages(prompt, "prompt")
        return _chat(origin, before + check_messages(completion, "completion"), _tools(values), first=len(before))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise RowError("'prompt' and 'completion' must both be strings or both be message lists")
    return Completion(origin, _text(values, "prompt", empty=True), _text(values, "completion"))


def _document(values: Mapping[str, Any], origin: Origin) -> Row:
    return Text(origin, _text(values, "text"))


# ---------------------------------------------------------------- labels and preferences


def _classification(values: Mapping[str, Any], origin: Origin) -> Row:
    names = next(names for names in TEXT_COLUMNS if all(values.get(name) is not None for name in names))
    texts = tuple((name, _text(values, name)) for name in names)
    return Labelled(origin, texts, _label(values["label"]))


def _label(value: Any) -> int | str:
    """An integer (also as 1.0 or "1", which CSV and pandas make of it) or a word."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    if isinstance(value, int):
        if value < 0:
            raise RowError(f"the label {value} is negative (in public test sets that means unlabelled)")
        return value
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise RowError(f"'label' must be an integer or a word, this is {'empty' if value == '' else _kind(value)}")


def _preference(values: Mapping[str, Any], origin: Origin) -> Row:
    """Strings, or message lists; with lists, `prompt` may be left out and is what the two answers share."""
    prompt = _as_messages(values.get("prompt"), "prompt", "user") if values.get("prompt") is not None else []
    chosen = _as_messages(values["chosen"], "chosen", "assistant")
    rejected = _as_messages(values["rejected"], "rejected", "assistant")
    if not prompt:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise RowError("there is no prompt, and 'chosen' and 'rejected' share no message that could be one")
    if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1]["role"] != "assistant":
            raise RowError(f"{name!r} does not end with the assistant's answer")
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are the same")
    return Preference(origin, prompt, chosen, rejected)


def _as_messages(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": _text({name: value}, name)}]
    return check_messages(value, name)


# ---------------------------------------------------------------- code

_SOLUTIONS = ("canonical_solution", "code", "completion", "output")


def _code(values: Mapping[str, Any], origin: Origin) -> Row:
    """A prompt, a solution and tests: HumanEval's columns, MBPP's, or `tests` beside a prompt.

    `prompt` is taken as it is, and with an `entry_point` it is code that the answer continues. What is asked in words
    (`instruction`, and MBPP's tasks, which show their tests) becomes a conversation with the solution in a fence.
    """
    solution = next((_text(values, name) for name in _SOLUTIONS if values.get(name) is not None), None)
    if solution is None:
        raise RowError(f"there is no solution (one of {', '.join(_SOLUTIONS)}): the loss is measured on it")
    shown, program, entry_point = _tests(values)
    asked = next(name for name in ("instruction", "prompt", "text") if values.get(name) is not None)
    prompt = _text(values, asked)
    tests = CodeTests(program, prompt if entry_point else None, entry_point)
    if asked == "prompt" and not shown:
        return Completion(origin, prompt, solution, tests)
    question = prompt
    if values.get("input") is not None and (extra := _text(values, "input", empty=True)).strip():
        question = f"{question}\n\n{extra}"
    if shown:
        question = f"{question}\n\nYour code should pass these tests:\n\n{shown}"
    whole = prompt + solution if entry_point and asked == "instruction" else solution
    answer = whole if "```" in whole else f"```python\n{whole.strip()}\n```"
    row = _chat(origin, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None)
    return replace(row, tests=tests)


def _tests(values: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """(tests that the prompt shows, the program that runs them, the function they call where the row names it)."""
    if values.get("test") is not None and values.get("entry_point") is not None:
        entry_point = _text(values, "entry_point")
        if not entry_point.isidentifier():
            raise RowError(f"'entry_point' must be a function's name, not {entry_point!r}")
        return "", f"{_text(values, 'test')}\ncheck({entry_point})\n", entry_point
    if values.get("test_list") is not None:
        shown = _lines(values, "test_list")
        setup = [_lines(values, name) for name in ("test_imports", "test_setup_code") if values.get(name)]
        return shown, "\n".join([*setup, shown]) + "\n", None
    return "", _lines(values, "tests"), None


def _lines(values: Mapping[str, Any], name: str) -> str:
    """Source code: a string, or a list of them."""
    value = values.get(name)
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be Python source, a string or a list of them, this is {_kind(value)}")
    return _text(values, name)


_NORMALISERS: dict[RowFormat, Callable[[Mapping[str, Any], Origin], Row]] = {
    "messages": _messages,
    "conversations": _conversations,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _document,
    "classification": _classification,
    "preference": _preference,
    "code": _code,
}


def canonical(row: Row) -> str:
    """A row as one string that two rows share exactly when they are the same row (origins aside)."""
    match row:
        case Chat():
            content: Any = [row.messages, row.supervise, row.tools, *_tests_of(row)]
        case Completion():
            content = [row.prompt, row.completion, *_tests_of(row)]
        case Text():
            content = [row.text]
        case Labelled():
            content = [row.texts, row.label]
        case Preference():
            content = [row.prompt, row.chosen, row.rejected]
    return json.dumps([type(row).__name__, content], ensure_ascii=False, default=str)


def _tests_of(row: Chat | Completion) -> list[str | None]:
    """Nothing for a row without tests: its identity is that of before there were any."""
    return [] if row.tests is None else [row.tests.program, row.tests.prompt, row.tests.entry_point]


def _check_unicode(row: Row) -> None:
    """Tokenizers work on UTF-8, which cannot hold half a surrogate pair (JSON's \\ud83d without its other half)."""
    text = canonical(row)
    if MARK_BEGIN in text or MARK_END in text:
        raise RowError("holds U+10FFFC or U+10FFFD, private characters that mark the assistant's turns here")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair (\\ud800–\\udfff), which is not a character") from None
