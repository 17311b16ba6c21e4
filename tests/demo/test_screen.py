"""The demo's output: plain where there is no terminal, silent where it was asked to be, and never read as markup."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from halfbyte.demo.screen import Screen


def row(prompt: str, reference: str, prediction: str, right: bool) -> dict[str, Any]:
    return {"prompt": prompt, "reference": reference, "prediction": prediction, "scores": {"m": float(right)}}


def result(rows: list[dict[str, Any]], low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    return {"rows": rows, "m": sum(r["scores"]["m"] for r in rows) / len(rows), "intervals": {"m": [low, high]}}


RIGHT = row("Send 3 [bold]kettles[/].", '{"quantity":3}', '{"quantity":3}', True)
WRONG = row("Send 4 fans.", '{"quantity":4}', '{"quantity":5}', False)
EMPTY = row("Send 4 fans.", '{"quantity":4}', "\n \n", False)
LONG = row("Send 3 [bold]kettles[/].", '{"quantity":3}', "I would like\nto send\n" + "very " * 60 + "many", False)

PLAN = {
    "method": "qlora",
    "reason": "it fits",
    "methods": [
        {
            "method": name,
            "fits": name == "qlora",
            "peak_memory_bytes": {"p50": 1.25e9 * size, "p95": 1.5e9 * size},
            "seconds": {"p50": 60.0 * size, "p95": 90.0 * size},
        }
        for size, name in enumerate(("qlora", "lora", "full"), start=1)
    ],
}


def shown(action: str, *arguments: object, terminal: bool = False, quiet: bool = False, width: int = 100) -> str:
    out = io.StringIO()
    screen = Screen(
        Console(
            file=out, force_terminal=terminal, quiet=quiet, width=width, color_system="truecolor" if terminal else None
        )
    )
    getattr(screen, action)(*arguments)
    return out.getvalue()


def test_plain_without_a_terminal_and_coloured_on_one() -> None:
    both = [WRONG], [RIGHT], "m"
    assert "\x1b" not in shown("rows", *both) + shown("title", "a")
    assert "\x1b[" in shown("rows", *both, terminal=True)


def test_quiet_is_silent() -> None:
    assert shown("plan", PLAN, quiet=True) == shown("say", "x", quiet=True) == ""


def test_text_of_rows_and_models_is_no_markup() -> None:
    text = shown("rows", [LONG], [RIGHT], "m")
    assert "Send 3 [bold]kettles[/]." in text
    assert shown("say", "[red]a[/]") == "[red]a[/]\n"


def test_a_model_cannot_send_control_sequences_to_the_terminal() -> None:
    hostile = row("a", "b", "x\x1b[2J\x07\x9b31m\x00y", False)
    assert "tuned  x\ufffd[2J\ufffd\ufffd31m\ufffdy\n" in shown("rows", [hostile], [hostile], "m")


def test_rows_show_an_error_of_the_tuned_model_with_the_right_answer() -> None:
    lines = shown("rows", [EMPTY] * 9, [RIGHT] * 8 + [WRONG], "m").splitlines()
    assert sum(line.startswith("asked") for line in lines) == 4
    assert [line.split()[-1] for line in lines if line.startswith("tuned")] == ['{"quantity":3}'] * 3 + [
        '{"quantity":5}'
    ]
    assert [line.split()[-1] for line in lines if line.startswith("right")] == ['{"quantity":4}']
    assert "(nothing)" in lines[2]


def test_scores_come_with_their_interval() -> None:
    base, tuned = result([WRONG] * 20, 0.0, 0.161), result([RIGHT] * 19 + [WRONG], 0.764, 0.991)
    lines = shown("scores", base, tuned, "m").splitlines()
    assert lines[1].split() == ["base", "0", "of", "20", "0.0%", "0%", "to", "16%"]
    assert lines[2].split() == ["tuned", "19", "of", "20", "95.0%", "76%", "to", "99%"]


def test_the_plan_names_every_method_and_the_reason() -> None:
    lines = shown("plan", PLAN).splitlines()
    assert lines[1].split() == ["qlora", "1.25", "GB", "1.50", "GB", "60", "s", "90", "s", "yes"]
    assert lines[3].split() == ["full", "3.75", "GB", "4.50", "GB", "3.0", "min", "4.5", "min", "no"]
    assert lines[4] == "Chosen: qlora, because it fits."


def test_commands_stay_on_one_line_however_narrow_the_terminal() -> None:
    command = "halfbyte train --model " + "very/" * 30 + "long"
    assert command in shown("commands", [("train", command)], width=40).splitlines()[0]


def test_the_task_shows_its_first_row(tmp_path: Path) -> None:
    line = json.dumps({"messages": [{"role": "user", "content": "a [b] c"}, {"role": "assistant", "content": "{}"}]})
    for name in ("train", "held_out"):
        (tmp_path / name).write_text(f"{line}\n")
    text = shown("task", tmp_path / "train", tmp_path / "held_out", width=40)
    assert f"1 rows to learn from in {tmp_path / 'train'}, 1 held out in" in text
    assert [line.rstrip() for line in text.splitlines()[1:]] == ["asked  a [b] c", "right  {}"]


def test_cost_with_and_without_a_plan() -> None:
    measured = {"peak_memory_bytes": 2.5e9, "seconds": 200.0}
    predicted = {"peak_memory_bytes": {"p50": 1e9, "p95": 3e9}, "seconds": {"p50": 90.0, "p95": 300.0}}
    lines = shown("cost", predicted, measured).splitlines()
    assert lines[1].split() == ["peak", "memory", "1.00", "GB", "3.00", "GB", "2.50", "GB"]
    assert lines[2].split() == ["time", "90", "s", "5.0", "min", "3.3", "min"]
    assert shown("cost", {}, measured).splitlines()[2].split() == ["time", "-", "-", "3.3", "min"]
