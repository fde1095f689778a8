"""When do two answers say the same? docs/answers.md has the rule. Both sides are read alike; in doubt they differ."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from mr1fast.rewards import worker
from mr1fast.rewards.formula import Formula
from mr1fast.rewards.reading import Answer, Choice, Relation, Several, Value, read

MAX_LENGTH = 200  # characters; what is longer is text
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, 3.4e38  # of normal numbers
FLOAT64_ROUNDING = Fraction(1, 2**50)  # relative: a few units in the last place, for a number that was computed
FLOAT64_DIGITS = 15


def same_answer(answer: str, solution: str, choices: Sequence[str] | None = None) -> bool:
    """Whether `answer` says what `solution` says. choices: what the letters A, B, ... stand for.

    Raises worker.Unanswered if math-verify was asked and did not answer, UserError if it is broken.
    """
    if choices:
        found, wanted = _letter(answer, choices), _letter(solution, choices)
        if found is not None and wanted is not None:
            return found == wanted != ""
    return equal(answer, solution)


@lru_cache(maxsize=65536)  # what raises is not cached
def equal(first: str, second: str) -> bool:
    """`same_answer` of a question without choices. Symmetric."""
    if first == second:
        return True
    if max(len(first), len(second)) <= MAX_LENGTH:
        return _same(read(first), read(second))
    return min(len(first), len(second)) > MAX_LENGTH and first.casefold().split() == second.casefold().split()


def needs_math_verify(solution: str) -> bool:
    """Whether another spelling of this solution can only be recognised by math-verify."""
    return len(solution) <= MAX_LENGTH and any(isinstance(value.number, Formula) for value in _values(read(solution)))


def _values(answer: Answer) -> Iterator[Value]:
    if isinstance(answer, Value):
        yield answer
    parts = answer.items if isinstance(answer, Several) else answer.sides if isinstance(answer, Relation) else ()
    for part in parts:
        yield from _values(part)


def _letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that `text` names; None if it names none, "" if its letter and its text are of two."""
    contents = [choice.text if isinstance(choice := read(text), Choice) else text for text in choices]
    letters = "ABCDEFGHIJ"[: len(contents)]
    answer = read(text) if len(text) <= MAX_LENGTH else text
    if not all(contents):  # choices that are letters themselves, in another order perhaps
        return None
    if isinstance(answer, Choice) and answer.letter in letters:
        content = contents[letters.index(answer.letter)]
        return answer.letter if not answer.text or equal(answer.text, content) else ""
    found = [letter for letter, content in zip(letters, contents) if equal(text, content)]
    return found[0] if len(found) == 1 else None


# ---- comparing what has been read ---------------------------------------------------------------------------------


def _same(a: Answer, b: Answer) -> bool:
    a, b = _settled(a), _settled(b)
    if a == b:
        return True
    match a, b:
        case str(), str():
            return _plain(a) == _plain(b)
        case Choice(), Choice():
            return a.letter == b.letter and (not a.text or not b.text or equal(a.text, b.text))
        case Value(), Value():
            return _agree(a.unit, b.unit) and _agree(a.name, b.name) and _same_number(a, b)
        case Several(), Several():
            return _same_items(a, b)
        case Relation(), Relation():
            return _same_relation(a, b)
    return False


# Blanks other than those between two words or two numbers; Chinese has none.
_GAPS = re.compile(r" (?=\W)|(?<=\W) |(?<=[^\W\d]) (?=\d)|(?<=\d) (?=[^\W\d])|(?<=[一-鿿]) | (?=[一-鿿])")


def _plain(text: str) -> str:
    return _GAPS.sub("", text.casefold())


def _agree(a: str, b: str) -> bool:
    """Units and names: one that is missing is no difference."""
    return a == b or not a or not b


def _same_number(a: Value, b: Value) -> bool:
    if a.number == b.number or _is_float_of(a, b) or _is_float_of(b, a):
        return True
    if isinstance(a.number, Fraction) and isinstance(b.number, Fraction):
        return False
    x, y = _as_formula(a.number), _as_formula(b.number)
    if x.names != y.names or abs(x.value - y.value) > 1e-6 * max(abs(x.value), abs(y.value), 1e-6):
        return False  # the values are NaN, and never differ, where there are names
    return x.latex == y.latex or worker.equal(*sorted((x.latex, y.latex)))


def _is_float_of(a: Value, b: Value) -> bool:
    """Whether `a` is what a float32 or float64 of `b` looks like: 0.10000000149011612 of 0.1, 3.1415927 of pi."""
    value = _as_formula(b.number).value
    if not a.half_digit or not isinstance(a.number, Fraction) or not FLOAT32_MIN <= abs(value) <= FLOAT32_MAX:
        return False
    (float32,) = struct.unpack("f", struct.pack("f", value))
    if abs(a.number - Fraction(float32)) <= a.half_digit:
        return True
    has_digits = a.half_digit * 10 ** (FLOAT64_DIGITS - 1) <= abs(a.number)
    return has_digits and abs(a.number - Fraction(value)) <= abs(a.number) * FLOAT64_ROUNDING


def _as_formula(number: Fraction | Formula) -> Formula:
    if isinstance(number, Formula):
        return number
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    return Formula(rf"\frac{{{number.numerator}}}{{{number.denominator}}}", value, frozenset())


def _settled(answer: Answer) -> Answer:
    """The value of a chain such as "x = 180 - 120 = 60", if its sides are equal."""
    if not isinstance(answer, Relation) or set(answer.signs) != {"="}:
        return answer
    *sides, last = answer.sides
    if isinstance(last, Value) and all(_same(side, last) for side in sides):
        return replace(last, name=answer.name)
    return answer


def _same_relation(a: Relation, b: Relation) -> bool:
    if a.signs != b.signs:
        return False
    either_way = set(a.signs) <= set("=≠")
    ways = [b.sides, b.sides[::-1]] if either_way else [b.sides]
    return any(all(map(_same, a.sides, sides)) for sides in ways)


def _same_items(a: Several, b: Several) -> bool:
    if len(a.items) != len(b.items) or a.brackets != b.brackets or not _agree(a.name, b.name):
        return False
    if a.brackets:
        return all(map(_same, a.items, b.items))
    names, others = ({getattr(item, "name", "").rstrip("0123456789") for item in one.items} for one in (a, b))
    if names != others and max(len(names), len(others)) > 1:  # "x = 1, y = 2" says more than "1, 2"
        return False
    return _can_be_paired(a.items, b.items)


def _can_be_paired(first: Sequence[Answer], second: Sequence[Answer]) -> bool:
    """Whether each has a partner in the other list that says the same: a bipartite matching, by augmenting paths."""
    same = [[_same(a, b) for b in second] for a in first]
    partner: dict[int, int] = {}  # of an item of `second`, in `first`

    def find(i: int, seen: set[int]) -> bool:
        for j, is_same in enumerate(same[i]):
            if is_same and j not in seen:
                seen.add(j)
                if j not in partner or find(partner[j], seen):
                    partner[j] = i
                    return True
        return False

    return all(find(i, set()) for i in range(len(first)))
