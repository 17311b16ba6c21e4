"""The demo's task: an office service desk that turns a colleague's sentence into one line of strict JSON.

    Maria here. We need 3 desk lamps by Friday, it is urgent.
    {"intent":"order","item":"desk lamp","quantity":3,"due":"Friday","urgent":true,"name":"Maria"}

Every row is made by code from a fixed seed, in OpenAI's `messages` form. So that a model cannot score by remembering,
the training rows (made from `phrasing.TRAIN`) and the held-out rows (`phrasing.HELD_OUT`) do not share:

- sentences: no request, remark, greeting, due phrase or name phrase of one is in the other;
- names and items: none of one is in the other;
- calendar dates ("March 5"): none of one is in the other.

What they share, because it is the format itself: the four intents, the quantities 1 to 12 (as digits
or words), and the eighteen day words ("tomorrow", "Friday", "next Tuesday" …) that `due` copies.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.demo.phrasing import HELD_OUT, TRAIN, Phrasing
from halfbyte.files import write_atomic

TRAIN_ROWS = 2000
HELD_OUT_ROWS = 120
SEED = 42

NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS = ("today", "tomorrow", "tonight", "next week", *WEEKDAYS, *(f"next {day}" for day in WEEKDAYS))
MONTHS = ("January", "March", "April", "May", "June", "August", "September", "November")


def train_rows(count: int = TRAIN_ROWS, seed: int = SEED) -> list[dict[str, Any]]:
    """Rows to learn from."""
    return _rows(TRAIN, count, random.Random(f"train {seed}"))


def held_out_rows(count: int = HELD_OUT_ROWS, seed: int = SEED) -> list[dict[str, Any]]:
    """Rows for the score: other sentences, names, items and dates than the training rows."""
    return _rows(HELD_OUT, count, random.Random(f"held-out {seed}"))


def write_task(
    folder: Path, seed: int = SEED, train: int = TRAIN_ROWS, held_out: int = HELD_OUT_ROWS
) -> tuple[Path, Path]:
    """Write train.jsonl and held_out.jsonl below `folder`; their paths. The same arguments give the same bytes."""
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, rows in zip(paths, (train_rows(train, seed), held_out_rows(held_out, seed)), strict=True):
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return paths


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
    kind = rng.choice(("urgent", "calm", "neutral", "none"))
    name = rng.choice((None, *[rng.choice(phrasing.names)] * 3))

    body = rng.choice(phrasing.bodies[intent]).format(what=_counted(quantity, item, rng))
    if due is not None:
        body += " " + rng.choice(phrasing.due).format(due=due)
    remark = rng.choice(
        {"urgent": phrasing.urgent, "calm": phrasing.calm, "neutral": phrasing.neutral}.get(kind, ("",))
    )
    prompt = _arrange(phrasing, body, remark, name, rng)
    return prompt, {
        "intent": intent,
        "item": item,
        "quantity": quantity,
        "due": due,
        "urgent": kind == "urgent",
        "name": name,
    }


def _arrange(phrasing: Phrasing, body: str, remark: str, name: str | None, rng: random.Random) -> str:
    """A greeting or the name first, then the request and a remark (either may lead), perhaps the name last."""
    first, last = rng.choice((*phrasing.greeting, "")), ""
    if name is not None and rng.random() < 0.5:
        first = rng.choice(phrasing.opening).format(name=name)
    elif name is not None:
        last = rng.choice(phrasing.closing).format(name=name)
    if first.endswith(","):
        middle = (body + ".", remark)
    else:
        sentence = body[0].upper() + body[1:] + "."
        middle = (remark, sentence) if rng.random() < 0.25 else (sentence, remark)
    return " ".join(part for part in (first, *middle, last) if part)


def _counted(quantity: int, item: str, rng: random.Random) -> str:
    """The quantity, as a digit or a word, with the item in singular or plural; the answer has the singular."""
    if quantity == 1:
        article = "an" if item[0] in "aeiou" else "a"
        return f"{rng.choice((article, article, 'one', '1'))} {item}"
    return f"{rng.choice((str(quantity), NUMBER_WORDS[quantity - 1]))} {item}s"


def _date(phrasing: Phrasing, rng: random.Random) -> str:
    """A day of the year; the training rows have even days of the month, the held-out rows odd ones."""
    day = rng.randrange(2, 29, 2) if phrasing.even_dates else rng.randrange(1, 29, 2)
    return f"{rng.choice(MONTHS)} {day}"
