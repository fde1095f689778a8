"""Verifiable rewards: is the completion well formed, and is its answer right? Neither ever raises or hangs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache

from mr1fast.errors import UserError
from mr1fast.rewards import worker

# R1-V's evaluation of counting: an integer between answer tags, wherever they are, is the answer.
_INTEGER_ANSWER = re.compile(r"<answer>\s*(\d+)\s*</answer>")
_ANY_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_WRAPPINGS = re.compile(r"\$|\\[()\[\]]|\\!|\\,|\\left|\\right")
_DEGREES = re.compile(r"(\s*(°|\^?\s*\{?\s*\\circ\s*\}?|\\degree|degrees?|deg))$", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|text|mathrm)\{([^{}]*)\}")
_NUMBER = re.compile(r"[-+]?(\d{1,60}|\d{1,3}(,\d{3}){1,19})?(\.\d{1,60})?")
_QUOTIENT = re.compile(r"([-+]?\d{1,60})\s*/\s*(\d{1,60})")
# Beyond this an answer is not a formula any more, and parsing it is a waste of the run's time.
_MAX_FORMULA = 200

_worker = worker.MathWorker()


def format_reward(completion: str) -> float:
    """1.0 for `<think>...</think><answer>...</answer>` and nothing else around it, each tag exactly once; else 0.0."""
    well_formed = all(completion.count(tag) == 1 for tag in _TAGS) and _FORMAT.fullmatch(completion)
    return 1.0 if well_formed else 0.0


def extract_answer(text: str) -> str | None:
    """What stands in `<answer>...</answer>`, stripped: the first integer so tagged, else the first of any kind."""
    match = _INTEGER_ANSWER.search(text) or _ANY_ANSWER.search(text)
    return match.group(1).strip() if match else None


def accuracy_reward(completion: str, solution: str) -> float:
    """1.0 if the tagged answer of `completion` equals `solution` (with or without tags), else 0.0.

    Numbers are compared as numbers ("3.0" is "3", "1/2" is "0.5", degrees are dropped); anything else by math-verify.
    """
    answer = extract_answer(completion)
    tagged = extract_answer(solution)
    return 1.0 if answer and _equal(answer, solution.strip() if tagged is None else tagged) else 0.0


def check_solutions(solutions: Iterable[str]) -> None:
    """Raises UserError if one of them, a formula, can only be compared by math-verify, and that is not installed."""
    if worker.is_installed():
        return
    for solution in solutions:
        if parse_number(solution) is None and _may_be_formula(solution):
            raise UserError(
                f"the solution {solution!r} is not a plain number and needs the package 'math-verify', "
                "which is not installed: pip install math-verify"
            )


def parse_number(text: str) -> Fraction | None:
    """The exact value of a plain integer, decimal or quotient, in degrees or without unit; None for all else."""
    text = _WRAPPINGS.sub("", text).strip()
    text = _BOXED.sub(r"\1", text).strip()
    text = _DEGREES.sub("", text).removesuffix(".").strip()
    if quotient := _QUOTIENT.fullmatch(text):
        top, bottom = (int(part) for part in quotient.groups())
        return Fraction(top, bottom) if bottom else None
    if any(character.isdigit() for character in text) and _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    return None


@lru_cache(maxsize=65536)
def _equal(answer: str, solution: str) -> bool:
    if answer == solution:
        return True
    wanted, found = parse_number(solution), parse_number(answer)
    if wanted is not None and found is not None:
        return wanted == found
    if not _may_be_formula(answer) or not _may_be_formula(solution):
        return answer.casefold() == solution.casefold()
    if wanted is not None and not re.search(r"[\d\\]", answer):
        return False  # words do not make a number
    return _worker.equal(solution, answer)


def _may_be_formula(text: str) -> bool:
    """Numbers in a row are no formula: read as a product they would be guesses, several in one answer."""
    return len(text) <= _MAX_FORMULA and "\n" not in text and not re.search(r"\d\s+\d", text)
