"""What does an answer say? A small grammar of numbers, units, lists, relations and choices, for docs/answers.md's rule.

`read` never raises, and takes all of a text or nothing: something left over makes it text, which equals only itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from mr1fast.rewards.formula import Formula, read_formula
from mr1fast.rewards.numbers import read_number
from mr1fast.rewards.spelling import normalise
from mr1fast.rewards.units import MAX_LENGTH as MAX_UNIT
from mr1fast.rewards.units import read_unit

MAX_LENGTH = 300  # characters, normalised; more than that, and anything deeper or with more items, is text
MAX_DEPTH = 8  # of brackets
MAX_ITEMS = 50


@dataclass(frozen=True)
class Value:
    """A number or a formula, perhaps with a unit and a name: "x = 5 cm"."""

    number: Fraction | Formula
    unit: str = ""
    name: str = ""
    half_digit: Fraction = Fraction(0)  # half a unit of its last digit, if it may be a printed float; else 0


@dataclass(frozen=True)
class Several:
    """Answers in any order; or, in brackets, in this order."""

    items: tuple[Answer, ...]
    brackets: str = ""  # "()", "[)", ...; ":" for a ratio; "" for a list or a set
    name: str = ""


@dataclass(frozen=True)
class Relation:
    """An inequality or an equation that does not just name a value."""

    sides: tuple[Answer, ...]
    signs: str  # =, ≠, < or ≤ between two sides; > and ≥ are turned round
    name: str = ""  # of "x = 180 - 120 = 60"


@dataclass(frozen=True)
class Choice:
    letter: str
    text: str  # "30°" of "A. 30°", or ""


Answer = Value | Several | Relation | Choice | str


@lru_cache(maxsize=65536)
def read(text: str) -> Answer:
    text = normalise(text)
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return text if len(text) > MAX_LENGTH or deepest > MAX_DEPTH else _read(text)


def _read(text: str) -> Answer:
    return (
        _choice(text)
        or _list(text)
        or _relation(text)
        or _in_brackets(text)
        or _ratio(text)
        or _value(_without_thousands(text))
        or text
    )


# ---- choices ------------------------------------------------------------------------------------------------------

_CHOICE = re.compile(
    r"(?:(?:option|choice|选项?|选择) ?:? ?)?"
    r"(?:[(\[] ?(?P<bracketed>[A-J]) ?[)\]](?: |[.:、]|$)|(?P<bare>[A-J]) ?(?:[.:)、]|选?项|$)) ?(?P<text>.*)",
    re.IGNORECASE,
)
# "A. 30° or B. 40°" is no choice, and neither is "(a) + 5".
_NO_TEXT_OF_A_CHOICE = re.compile(r"(?<![A-Za-z°∠])(?:[A-J](?![A-Za-z])|[a-j][.:)])|^(?:[+*/^=<>,;:]|or |and )")


def _choice(text: str) -> Choice | None:
    match = _CHOICE.fullmatch(text)
    if match is None or _NO_TEXT_OF_A_CHOICE.search(match["text"]):
        return None
    return Choice((match["bracketed"] or match["bare"]).upper(), match["text"])


# ---- several answers ----------------------------------------------------------------------------------------------

_BRACKETS = r"[(\[{]|[)\]}]"
_OR = r"(?:(?<![A-Za-z])(?:or|and)(?![A-Za-z])|或者?|以及|[和与及且&])"
_SEPARATOR = re.compile(rf"{_BRACKETS}| ?[,;、] ?{_OR}?| ?{_OR}")
_COMMA = re.compile(rf"{_BRACKETS}| ?[,;、]")
_RELATION = re.compile(rf"{_BRACKETS}| ?[=<>≤≥≠∈]")
_RATIO = re.compile(rf"{_BRACKETS}| ?:")
_SIGN = re.compile(rf"{_BRACKETS}|[-+]")
# What may be one of several though it is no value: A, AB, ∠ABC, x.
_POINT = re.compile(r"[∠△]?[A-Za-z]|[∠△]?[A-Z]{2,4}|∠\d|∅")


def _split(text: str, pattern: re.Pattern[str]) -> tuple[list[str], str]:
    """The parts of `text` between the matches of `pattern` outside of brackets, and what is between them."""
    parts, signs, start, depth = [], "", 0, 0
    for match in pattern.finditer(text):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            signs += match[0].strip()
            start = match.end()
    return [*parts, text[start:].strip()], signs


def _list(text: str) -> Several | None:
    parts, _ = _split(_without_thousands(text), _SEPARATOR)
    if len(parts) == 1 and text.count("±") == 1:
        parts = [text.replace("±", sign) for sign in "+-"]
    return _several(parts) if len(parts) > 1 else None


def _several(parts: Sequence[str]) -> Several | None:
    """A list, if there is something in each place, and nothing of it is mere text."""
    if len(parts) > MAX_ITEMS or not all(parts):
        return None
    items: list[Answer] = []
    for item in map(_read, parts):
        items += item.items if isinstance(item, Several) and not item.brackets else [item]
    if any(isinstance(item, str) and not _POINT.fullmatch(item) for item in items):
        return None
    names = [item.name if isinstance(item, Value | Several) else "" for item in items]
    if names[0] and not any(names[1:]):  # "x = 1, 2"
        items = [replace(item, name=names[0]) if isinstance(item, Value | Several) else item for item in items]
    return Several(tuple(items))


def _in_brackets(text: str) -> Answer | None:
    """A point, an interval or a set; or what is in brackets for no reason."""
    if len(text) < 3 or text[0] not in "([{" or text[-1] not in ")]}":
        return None
    inside = text[1:-1]
    depth = 0
    for character in inside:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:  # (1 + 2)(3 + 4)
            return None
    parts, _ = _split(inside, _COMMA)
    brackets = text[0] + text[-1]
    if len(parts) == 1:
        return _read(inside.strip()) if brackets in ("()", "[]", "{}") else None
    if brackets == "{}":
        return _several(parts)
    return Several(tuple(map(_read, parts)), brackets) if all(parts) and len(parts) <= MAX_ITEMS else None


def _ratio(text: str) -> Several | None:
    parts, _ = _split(text, _RATIO)
    items = tuple(value for part in parts if (value := _value(part)) and not _names(value))
    return Several(items, ":") if len(items) == len(parts) > 1 else None


# ---- relations ----------------------------------------------------------------------------------------------------

_TURNED = str.maketrans(">≥", "<≤")
_NAME = re.compile(
    r"(?:\\(?:sin|cos|tan) ?)?[∠△]?[A-Za-zα-ωΩΔ一-鿿]{1,12}'?(?:_(?:\{[\w△]{1,8}\}|\w))?(?:△[A-Z]{3})?"
    r"(?:\(\w{1,3}(?:, ?\w{1,3})?\))?(?:[:/][A-Z]{1,3})?|∠\d|\|[A-Z]{2}\||\([A-Za-z], ?[A-Za-z]\)"
)


def _relation(text: str) -> Answer | None:
    """An equation that names a value is that value."""
    sides, signs = _split(text, _RELATION)
    if len(sides) == 1 or not all(sides) or (set(signs) & set("<≤") and set(signs) & set(">≥")):
        return None
    if set(signs) <= set("=∈"):
        name = ""
        if _NAME.fullmatch(sides[0]):
            name, named = sides[0], sides[1:]
        elif len(sides) == 2 and _NAME.fullmatch(sides[1]):
            name, named = sides[1], sides[:1]
        if name:
            name = re.sub(r"[ {}_]", "", name)
            value = _read(named[-1])
            if isinstance(value, Several) and len(named) == 1:
                return replace(value, name=name)
            if isinstance(value, Value):
                return replace(value, name=name) if len(named) == 1 else _chain(named, "=" * (len(named) - 1), name)
    return _chain(sides, signs)


def _chain(sides: Sequence[str], signs: str, name: str = "") -> Relation:
    answers = tuple(map(_read, sides))
    if set(signs) & set(">≥"):
        answers, signs = answers[::-1], signs[::-1].translate(_TURNED)
    return Relation(answers, signs, name)


# ---- values -------------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<![\d.,])(?<!\d )[1-9]\d{0,2}(?:(?:,\d{3})+(?!\d|,\d)|(?: \d{3})+(?! ?\d))", re.ASCII)
_CURRENCY = re.compile(r"(USD|[¥€£]) ?(?=[-\d.])")
_UNIT_BEGINS = re.compile(r"(?<![A-Za-z\\])[A-Za-zμΩ°(一-鿿]")


def _without_thousands(text: str) -> str:
    """5,000 and 5 000 are 5000; but (5,000) is a point."""
    if re.search(r"[(\[]|^\{", text):
        return text
    return _THOUSANDS.sub(lambda match: match[0].replace(",", "").replace(" ", ""), text)


def _value(text: str) -> Value | None:
    if match := _CURRENCY.match(text):
        value = _value(text[match.end() :])
        return replace(value, unit=read_unit(match[1]) or "") if value and not value.unit else None
    return _number(text) or _number_with_unit(text) or _formula(text)


def _names(value: Value) -> frozenset[str]:
    return value.number.names if isinstance(value.number, Formula) else frozenset()


def _number(text: str) -> Value | None:
    number = read_number(text)
    if number is None:
        return None
    unit = read_unit(number.rest, number.value) if number.rest else ""
    return None if unit is None else Value(number.value, unit, half_digit=number.half_digit)


def _number_with_unit(text: str) -> Value | None:
    """A formula in numbers alone, and a unit. 3 + 2m is none, but (3 + 2) m is."""
    for match in _UNIT_BEGINS.finditer(text, max(1, len(text) - MAX_UNIT)):
        number, rest = text[: match.start()].strip(), text[match.start() :]
        if rest == "°" or not (number.endswith("\\pi") or number[-1:] in "0123456789)}!|"):
            continue
        unit = read_unit(rest)
        if unit is None or (len(rest) == 1 and rest.isascii() and len(_split(number[1:], _SIGN)[0]) > 1):
            continue
        formula = read_formula(number)
        if formula is not None and not formula.names and not formula.degrees:
            return Value(formula, unit)
    return None


def _formula(text: str) -> Value | None:
    formula = read_formula(text)
    if formula is None:
        return None
    return Value(formula, read_unit("°") or "" if formula.degrees else "")
