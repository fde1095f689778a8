"""What is a number? Exact, however large or small; a formula is none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# float32 has 7 to 8 significant digits. Printed as a float64, as in 0.10000000149011612, it has more than its number.
FLOAT_DIGITS = 8

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?:(?P<whole>\d+) (?P<part>\d+) ?/ ?(?P<parts>\d+)"
    rf"|(?P<top>-?{_DECIMAL}) ?/ ?(?P<bottom>-?{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>[-+]?\d{{1,3}})| ?[*x] ?10 ?\^ ?\{{?(?P<power>[-+]?\d{{1,3}})\}}?)?)"
    rf"(?P<percent> ?%)?",
    re.ASCII,
)
_SIMPLE_FRACTION = re.compile(rf"\\frac ?\{{ ?(-?{_DECIMAL}) ?\}} ?\{{ ?(-?{_DECIMAL}) ?\}}", re.ASCII)
_REPEATING = re.compile(r"(\d{1,20})\.(\d{0,20})\\(?:overline|bar|dot) ?\{(\d{1,20})\}", re.ASCII)


@dataclass(frozen=True)
class Number:
    value: Fraction
    half_digit: Fraction  # half a unit of its last digit, if it is a decimal that may be a printed float; else 0
    rest: str  # what follows it


def read_number(text: str) -> Number | None:
    """The integer, decimal (1.5e-3, 1.5*10^{-3}), quotient, mixed number or percentage that `text`, normalised, begins
    with."""
    text = " ".join(_SIMPLE_FRACTION.sub(r" \1/\2", _REPEATING.sub(_quotient, text)).split())
    match = _NUMBER.match(text)
    value = None if match is None else _value(match)
    return None if match is None or value is None else Number(value, _half_digit(match), text[match.end() :].strip())


def _quotient(match: re.Match[str]) -> str:
    """Of 0.1\\overline{6}, 15/90."""
    whole, start, period = match.groups()
    return f"{int(whole + start + period) - int(whole + start)}/{10 ** len(start) * (10 ** len(period) - 1)}"


def _value(match: re.Match[str]) -> Fraction | None:
    if match["whole"]:
        part, parts = int(match["part"]), int(match["parts"])
        if not part < parts:
            return None
        value = int(match["whole"]) + Fraction(part, parts)
    elif match["top"]:
        bottom = Fraction(match["bottom"])
        if not bottom:
            return None
        value = Fraction(match["top"]) / bottom
    else:
        value = Fraction(match["decimal"])
    return value * (-1 if match["sign"] == "-" else 1) * _scale(match)


def _half_digit(match: re.Match[str]) -> Fraction:
    whole, _, decimals = (match["decimal"] or "").partition(".")
    if not decimals.strip("0") or len((whole + decimals).strip("0")) < FLOAT_DIGITS:
        return Fraction(0)
    return Fraction(1, 2 * 10 ** len(decimals)) * _scale(match)


def _scale(match: re.Match[str]) -> Fraction:
    """At most three digits of exponent: numbers stay small enough to be worked with."""
    exponent = int(match["exponent"] or match["power"] or 0)
    return Fraction(10) ** exponent / (100 if match["percent"] else 1)
