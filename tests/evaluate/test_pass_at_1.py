"""pass@1 from rows in the columns of HumanEval and MBPP: programs put together, run, counted."""

from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import Prepared
from halfbyte.data.records import Chat, CodeTests, Completion, Origin, Record, RowError
from halfbyte.data.rows import canonical, normalise
from halfbyte.errors import UsageError
from halfbyte.evaluate import evaluate as module
from halfbyte.evaluate.evaluate import EvaluateOptions, RowResult, _run_programs, evaluate
from halfbyte.evaluate.intervals import mean_interval, wilson_interval
from halfbyte.evaluate.pass_at_1 import code_of, continuation_of, program_of, require_real_tests, run_tests
from tests.evaluate.conftest import Tiny
from tests.evaluate.test_evaluate import PAIRS, rows

HUMANEVAL = {
    "task_id": "Test/0",
    "prompt": 'from typing import List\n\ndef total(numbers: List[int]) -> int:\n    """The sum."""\n',
    "canonical_solution": "    return sum(numbers)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}
MBPP = {
    "task_id": 1,
    "text": "Write a function that doubles a number.",
    "code": "def double(x):\r\n    return 2 * x",
    "test_list": ["assert double(2) == 4", "assert math.isclose(double(0.5), 1)"],
    "test_setup_code": "import math",
}


def row(values: dict[str, Any]) -> Any:
    return normalise(Record(Origin("f.jsonl", 1), values), "code")


def test_rows_of_the_public_sets() -> None:
    human = row(HUMANEVAL)
    assert isinstance(human, Completion)
    assert (human.prompt, human.completion) == (HUMANEVAL["prompt"], HUMANEVAL["canonical_solution"])
    assert human.tests == CodeTests(f"{HUMANEVAL['test']}\ncheck(total)\n", str(HUMANEVAL["prompt"]), "total")
    basic = row(MBPP)
    assert isinstance(basic, Chat)
    assert "Your code should pass these tests:\n\nassert double(2) == 4" in basic.messages[0]["content"]
    assert basic.messages[1]["content"] == "```python\ndef double(x):\r\n    return 2 * x\n```"
    assert basic.tests is not None
    assert basic.tests.program.startswith("import math\nassert double(2)")
    # HumanEval's prompts through the chat template: the answer is then the whole function.
    asked = row({**{k: v for k, v in HUMANEVAL.items() if k != "prompt"}, "instruction": HUMANEVAL["prompt"]})
    assert "def total" in asked.messages[1]["content"]
    assert run_tests(asked.messages[1]["content"], asked.tests, 10).status == "passed"
    own = row({"prompt": "def f():\n", "completion": "    return 1", "tests": ["assert f() == 1"]})
    assert own.tests == CodeTests("assert f() == 1")
    assert canonical(own) != canonical(row({"prompt": "def f():\n", "completion": "    return 1", "tests": "pass"}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "p", "tests": "t"}, "there is no solution"),
        ({"prompt": "p", "completion": "c", "tests": 3}, "'tests' must be Python source"),
        ({"text": "p", "code": "c", "test_list": []}, "'test_list' must be Python source"),
        ({**HUMANEVAL, "entry_point": "total(); evil"}, "must be a function's name"),
    ],
)
def test_rows_that_cannot_be_used(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        row(values)


def test_code_is_found_in_answers() -> None:
    assert code_of("Sure:\n```python\nx = 1\n```\nDone.\n```python\ny = 2\n```") == ("x = 1\n", True)
    assert code_of("```sh\npip install x\n```\n```py\nx = 1\n```") == ("x = 1\n", True)
    assert code_of("```\nx = 1\n") == ("x = 1\n", True)
    assert code_of("x = 1") == ("x = 1", False)
    assert continuation_of("    return 1\n\n    # more\nprint(f())\ndef g(): pass") == "    return 1\n\n    # more"


TESTS = CodeTests(f"{HUMANEVAL['test']}\ncheck(total)\n", str(HUMANEVAL["prompt"]), "total")


@pytest.mark.parametrize(
    "answer",
    [
        "    return sum(numbers)",
        "    return sum(numbers)\n\nprint(total([1)\n",  # what a base model says after the function does not count
        "    result = 0\n    for n in numbers:\n        result += n\n\n    return result\n\n\ndef main(): broken(",
        "    return sum(numbers)\n\n# Another way:\ndef total(numbers):\n    broken(",
        "\n    return sum(numbers)\n",
        "```\n    return sum(numbers)\n```",
        "```python\ndef total(numbers: List[int]) -> int:\n    return sum(numbers)\n```\nThis adds them up.",
        "Here:\n\n```python\ndef helper(n): return sum(n)\n\ndef total(numbers):\n    return helper(numbers)\n```",
        "def total(numbers):\n    return sum(numbers)",
    ],
)
def test_right_answers_in_many_shapes(answer: str) -> None:
    assert run_tests(answer, TESTS, 10).status == "passed"


@pytest.mark.parametrize("answer", ["", "    return 3", "    pass", "I do not know.", "    import sys; sys.exit(0)"])
def test_wrong_answers(answer: str) -> None:
    assert run_tests(answer, TESTS, 10).status == "failed"


def test_without_an_entry_point_the_answer_is_the_program() -> None:
    tests = CodeTests("assert f() == 1")
    assert program_of("```python\ndef f(): return 1\n```", tests) == ["def f(): return 1\n", "assert f() == 1"]


@pytest.fixture
def problems(tmp_path: Path, llama: Tiny) -> Prepared:
    values = [{**HUMANEVAL, "prompt": f"# {n}\n{HUMANEVAL['prompt']}"} for n in range(6)]
    return rows(tmp_path, values, llama)


def test_each_row_says_how_its_program_ended(problems: Prepared) -> None:
    said = ["    return sum(numbers)", "    return 1", "    while True: pass", "    return sum(numbers)\nx", "(", ""]
    before = [
        RowResult(str(e.origin), e.prompt, e.completion, 1.0, 1, text)
        for e, text in zip(problems.eval, said, strict=True)
    ]
    told: list[tuple[str, int, int]] = []
    options = EvaluateOptions(metrics=("pass@1",), allow_code_execution=True, code_timeout=1)
    rows = _run_programs(problems.eval, before, range(6), options, lambda *what: told.append(what))
    outcomes = [row.outcome or "" for row in rows]
    assert outcomes[:4] == ["passed", "failed: AssertionError", "timed out: after 1 s", "passed"]
    assert outcomes[4].startswith("failed: SyntaxError")
    assert outcomes[5] == "failed: AssertionError"  # the prompt's function with its docstring alone returns None
    assert [row.scores["pass@1"] for row in rows] == [1, 0, 0, 1, 0, 0]
    assert mean_interval([row.scores["pass@1"] for row in rows]) == wilson_interval(2, 6)
    assert told == [("programs", n, 6) for n in range(1, 7)]


def test_a_random_model_passes_nothing(problems: Prepared, llama: Tiny) -> None:
    options = EvaluateOptions(metrics=("pass@1", "exact_match"), allow_code_execution=True, max_new_tokens=8)
    result = evaluate(llama.model, llama.tokenizer, problems.eval, options)
    assert result.metrics["pass@1"] == 0
    assert set(result.metrics) == {"pass@1", "exact_match"}


def test_nothing_is_run_without_permission(problems: Prepared, llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_tests", lambda *_: pytest.fail("a program was run"))
    monkeypatch.setattr(module, "generate_batch", lambda *_: pytest.fail("answers were generated"))
    with pytest.raises(
        UsageError, match=r"6 Python programs .*eval.jsonl:1 the first.*--allow-code-execution"
    ) as caught:
        evaluate(llama.model, llama.tokenizer, problems.eval, EvaluateOptions(metrics=("pass@1",)))
    assert "\n" not in str(caught.value)


def test_rows_without_tests(tmp_path: Path, llama: Tiny) -> None:
    prepared = rows(tmp_path, PAIRS, llama)
    options = EvaluateOptions(metrics=("pass@1",), allow_code_execution=True)
    with pytest.raises(UsageError, match=r"pass@1 needs rows with tests, and .*eval.jsonl:1 has none"):
        evaluate(llama.model, llama.tokenizer, prepared.eval, options)


@pytest.mark.parametrize(
    "tests",
    [
        "def test_a():\n    assert f(1) == 2\n",
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(1), 2)\n",
        "if __name__ == '__main__':\n    assert f(1) == 2\n",
    ],
)
def test_tests_that_test_nothing_are_refused(tests: str, tmp_path: Path, llama: Tiny) -> None:
    """Before anything is generated."""
    values = [{"prompt": f"# {n}\n", "completion": "def f(x): return 2", "tests": "assert f(1) == 2"} for n in range(3)]
    values[1]["tests"] = tests
    prepared = rows(tmp_path, values, llama)
    options = EvaluateOptions(metrics=("pass@1",), allow_code_execution=True, max_new_tokens=2)
    with pytest.raises(UsageError, match=r"eval.jsonl:2: its tests pass without an answer"):
        evaluate(llama.model, llama.tokenizer, prepared.eval, options)
    require_real_tests(CodeTests(f"{tests}\nassert f(1) == 2"), "row", 10)
    require_real_tests(TESTS, "row", 10)
