"""Is an answer right as R1-V counts? Its two evaluations of Qwen2-VL, for figures to compare with those published.

Source: src/eval/test_qwen2vl_counting_superclevr.py and test_qwen2vl_geoqa.py of github.com/Deep-Agent/R1-V.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mr1fast.rewards import worker

_TAGGED_INTEGER = re.compile(r"<answer>\s*(\d+)\s*</answer>")
_INTEGER = re.compile(r"\s*(\d+)\s*")


def r1v_counting(completion: str, solution: str) -> float:
    """1.0 if the first integer in answer tags is the solution."""
    found, wanted = _TAGGED_INTEGER.search(completion), _INTEGER.fullmatch(solution)
    return float(found is not None and wanted is not None and _digits(found[1]) == _digits(wanted[1]))


def r1v_geometry(completion: str, solution: str) -> float:
    """1.0 if math-verify finds the solution in the completion, of which it reads all, the reasoning and tags included.

    Raises UserError if math-verify is broken.
    """
    try:
        return float(worker.verifies(completion, solution))
    except worker.Unanswered:
        return 0.0


def judged_as_r1v(completions: Sequence[str], solutions: Sequence[str]) -> list[bool] | None:
    """Which completions R1-V's evaluation counts as right; None if that takes math-verify, and it is not installed.

    A data set all of whose solutions are integers is counting, any other one geometry.
    """
    counting = all(map(_INTEGER.fullmatch, solutions))
    if not counting and worker.missing():
        return None
    judge = r1v_counting if counting else r1v_geometry
    return [judge(*pair) > 0 for pair in zip(completions, solutions, strict=True)]


def _digits(text: str) -> str:
    """An integer in one spelling; int() has a limit of 4,300 digits."""
    return "".join(str(int(digit)) for digit in text).lstrip("0")
