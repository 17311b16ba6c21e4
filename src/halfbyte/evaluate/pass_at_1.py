"""Code scored by its tests: pass@1, the share of rows whose one answer makes its row's tests pass.

Chen et al. 2021 (arXiv 2107.03374) define pass@k and HumanEval, Austin et al. 2021 (arXiv 2108.07732) MBPP. One answer
a row is generated, greedily unless the sampling options say otherwise, and run once (`code_execution`); the interval is
Wilson's over rows.

A program is: what the row's prompt begins (where the answer continues it), the answer's code, and then, compiled apart,
the row's tests.
"""

import re

from halfbyte.data.records import CodeTests
from halfbyte.errors import UsageError
from halfbyte.evaluate.code_execution import PASSED, Outcome, confinement, run_program

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = ("", "python", "python3", "py")


def require_permission(allowed: bool, programs: int, first: str) -> None:
    """UsageError unless the user allowed to run what the model writes; it says what would happen, and how."""
    if allowed:
        return
    held = ", ".join(confinement()) or "nothing but limits of time and memory"
    raise UsageError(
        f"pass@1 runs the model's answers, {programs:,} Python programs ({first} the first), on this machine, as you, "
        f"with limits of time and memory; beside them: {held}. That is no wall against a hostile program. "
        "Allow it with --allow-code-execution"
    )


def require_real_tests(tests: CodeTests, row: str, timeout: float) -> None:
    """UsageError where an empty answer passes: such tests only define something, and would say so of any answer."""
    if run_tests("", tests, timeout).status == PASSED:
        raise UsageError(
            f"{row}: its tests pass without an answer, so they cannot tell a right one from a wrong one: call what "
            "they define (test functions and classes are not run by themselves, and __name__ is not '__main__')"
        )


def code_of(answer: str) -> tuple[str, bool]:
    """(the code in an answer, whether it stood in a fence): the first fenced block of Python, else all of it."""
    for language, block in _FENCE.findall(answer):
        if language.lower() in _PYTHON:
            return block, True
    return answer, False


def continuation_of(answer: str) -> str:
    """The part of an answer that belongs to the function that the prompt began: up to the first unindented line."""
    first, *rest = answer.split("\n")
    kept = [first]
    for line in rest:
        if line and not line[0].isspace():
            break
        kept.append(line)
    return "\n".join(kept)


def program_of(answer: str, tests: CodeTests) -> list[str]:
    """The pieces to run: what the tests are about, and the tests."""
    code, fenced = code_of(answer)
    if tests.prompt is None:
        return [code, tests.program]
    continues = code.lstrip("\n")[:1].isspace()  # then a later definition is the model's next idea, not its answer
    defined = tests.entry_point and re.search(rf"^(async )?def {tests.entry_point}\b", code, re.MULTILINE)
    if defined and not continues:
        return [f"{tests.prompt}\n    pass\n\n{code}", tests.program]  # the prompt has the imports and helpers
    return [tests.prompt + (code if fenced else continuation_of(code)), tests.program]


def run_tests(answer: str, tests: CodeTests, timeout: float) -> Outcome:
    """Does the answer pass? Executes it."""
    return run_program(program_of(answer, tests), timeout)
