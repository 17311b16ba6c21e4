"""The demo's task: an office service desk that turns a colleague's sentence into one line of strict JSON.

    Maria here. We need 3 desk lamps by Friday, it is urgent.
    {"intent":"order","item":"desk lamp","quantity":3,"due":"Friday","priority":"high","name":"Maria"}

Every row is made by code from a fixed seed, in OpenAI's `messages` form. So that a model cannot score by remembering,
the training rows (made from `phrasing.TRAIN`) and the held-out rows (`phrasing.HELD_OUT`) do not share:

- sentences: no template, name phrase, due phrase or urgency phrase of one is in the other;
- names and items: none of one is in the other;
- calendar dates ("March 5"): none of one is in the other.

What they share, because it is the format itself: the four intents, the three priorities, the quantities 1 to 12 (as
digits or words), and the eighteen day words ("tomorrow", "Friday", "next Tuesday" …) that `due` copies.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.demo.phrasing import HELD_OUT, TRAIN, Phrasing
from halfbyte.files import write_atomic

TRAIN_ROWS = 1600
HELD_OUT_ROWS = 120
SEED = 42

NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS = ("today", "tomorrow", "tonight", "next week", *WEEKDAYS, *(f"next {day}" for day in WEEKDAYS))
MONTHS = ("January", "March", "April", "May", "June", "August", "September", "November")


def held_out_rows(count: int = HELD_OUT_ROWS, seed: int = SEED) -> list[dict[str, Any]]:
    """Rows for the score: other sentences, names, items and dates than the training rows."""
    return _rows(HELD_OUT, count, random.Random(f"held-out {seed}"))


def train_rows(count: int = TRAIN_ROWS, seed: int = SEED) -> list[dict[str, Any]]:
    """Rows to learn from."""
    return _rows(TRAIN, count, random.Random(f"train {seed}"))


def write_task(folder: Path, seed: int = SEED) -> tuple[Path, Path]:
    """Write train.jsonl and held_out.jsonl below `folder`; their paths. The same seed gives the same bytes."""
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, rows in zip(paths, (train_rows(seed=seed), held_out_rows(seed=seed)), strict=True):
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return paths


def is_correct(answer: str, expected: str) -> bool:
    """Whether an answer is exactly the expected object: strict JSON, nothing around it but white space, equal values.

    The order of keys and spaces between tokens do not count. Types do: 3 is not "3", 3.0 or true.
    """
    found = _strict_json(answer)
    return found is not None and _canonical(found) == _canonical(json.loads(expected))


def _rows(phrasing: Phrasing, count: int, rng: random.Random) -> list[dict[str, Any]]:
    return [_message_row(*pair) for pair in _unique_pairs(phrasing, count, rng)]


def _message_row(prompt: str, answer: dict[str, Any]) -> dict[str, Any]:
    completion = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}


def _unique_pairs(phrasing: Phrasing, count: int, rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    seen: set[str] = set()
    while len(seen) < count:
        prompt, answer = _pair(phrasing, len(seen), rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, answer


def _pair(phrasing: Phrasing, index: int, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """One request and its answer. Intents take turns, so that none is rare."""
    intent = tuple(phrasing.bodies)[index % len(phrasing.bodies)]
    item, quantity = rng.choice(phrasing.items), rng.randint(1, 12)
    due = rng.choice((None, rng.choice(DAYS), rng.choice(DAYS), _date(phrasing, rng)))
    priority = rng.choice(("high", "normal", "low"))
    name = rng.choice((None, *[rng.choice(phrasing.names)] * 3))

    body = rng.choice(phrasing.bodies[intent]).format(what=_counted(quantity, item, rng))
    if due is not None:
        body += " " + rng.choice(phrasing.due).format(due=due)
    urgency = "" if priority == "normal" else rng.choice(phrasing.urgency[priority])
    prompt = _arrange(phrasing, body, urgency, name, rng)
    return prompt, {
        "intent": intent,
        "item": item,
        "quantity": quantity,
        "due": due,
        "priority": priority,
        "name": name,
    }


def _arrange(phrasing: Phrasing, body: str, urgency: str, name: str | None, rng: random.Random) -> str:
    """A greeting or the name first, then the request and how urgent it is (either may lead), perhaps the name last."""
    first, last = rng.choice((*phrasing.greeting, "")), ""
    if name is not None and rng.random() < 0.5:
        first = rng.choice(phrasing.opening).format(name=name)
    elif name is not None:
        last = rng.choice(phrasing.closing).format(name=name)
    if first.endswith(","):
        middle = (body + ".", urgency)
    else:
        sentence = body[0].upper() + body[1:] + "."
        middle = (urgency, sentence) if rng.random() < 0.25 else (sentence, urgency)
    return " ".join(part for part in (first, *middle, last) if part)


def _counted(quantity: int, item: str, rng: random.Random) -> str:
    if quantity == 1:
        article = "an" if item[0] in "aeiou" else "a"
        return f"{rng.choice((article, article, 'one', '1'))} {item}"
    return f"{rng.choice((str(quantity), NUMBER_WORDS[quantity - 1]))} {item}s"


def _date(phrasing: Phrasing, rng: random.Random) -> str:
    """A day of the year; the training rows have even days of the month, the held-out rows odd ones."""
    day = rng.randrange(2, 29, 2) if phrasing.even_dates else rng.randrange(1, 29, 2)
    return f"{rng.choice(MONTHS)} {day}"


def _strict_json(text: str) -> Any:
    """The parsed object, or None: no text around it, no repeated key, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(dict(pairs)):
            raise ValueError("repeated key")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
