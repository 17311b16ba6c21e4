"""GSM8K's exact match: the number after `####`, as its authors score it (Cobbe et al. 2021, arXiv 2110.14168).

halfbyte compare … --metrics benchmarks/compare_study/gsm8k.py:gsm8k_exact_match
"""

import re

_FINAL = re.compile(r"####\s*\$?(-?[0-9][0-9,]*(?:\.[0-9]+)?)")


def final_answer(text: str) -> float | None:
    """The number after the last `####`; None where there is none."""
    found = _FINAL.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def gsm8k_exact_match(prediction: str, reference: str) -> float:
    """1.0 where both end with the same number."""
    answer = final_answer(prediction)
    return float(answer is not None and answer == final_answer(reference))
