"""What is a formula, and its LaTeX for math-verify.

A small grammar of its own, because math-verify reads anything: words as products of letters, the last of several
numbers. What is not wholly a formula is not one. The LaTeX has all brackets and signs of multiplication, and fractions
for decimals. The value of what has no letters in it is computed on the way: a formula whose value a float cannot hold,
such as 9^9^9^9, is none, and math-verify is never asked about two that clearly differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

MAX_EXPONENT = 999

_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "cot": lambda x: 1 / math.tan(x),
    "arcsin": math.asin,
    "arccos": math.acos,
    "arctan": math.atan,
    "exp": math.exp,
    "ln": math.log,
    "log": math.log10,
}
_TOKEN = re.compile(
    r" ?(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<command>\\[a-z]+)|(?P<name>[A-Za-zα-ωΩΔ]+'*(?:_(?:\{\w+\}|\w))?)"
    r"|(?P<sign>[-+*/^!|°_(){}\[\]])) ?",
    re.ASCII,
)
_DATE = re.compile(r"\d{4}([-/])\d{1,2}\1\d{1,2}|\d{1,2}([-/])\d{1,2}\2\d{4}|\d+/\d+/\d+", re.ASCII)
_WORD_BY_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2} (?=[A-Za-z\d])|[A-Za-z\d] [A-Za-z]{2}(?![A-Za-z])")


@dataclass(frozen=True)
class Formula:
    latex: str
    value: float  # NaN if there are names in it
    names: frozenset[str]  # of variables, points and lines
    degrees: bool = False  # it is an angle: it has degree signs outside of functions


class _NoFormula(ValueError):
    pass


def read_formula(text: str) -> Formula | None:
    """`text` (normalised) as a formula; None if it is none: a word, a date, something with a gap in it."""
    if _WORD_BY_WORD.search(text) or _DATE.fullmatch(text):
        return None
    try:
        formula = _Parser(text).formula()
    except (ValueError, ArithmeticError):
        return None
    return formula if formula.names or math.isfinite(formula.value) else None


_Node = tuple[str, float]  # LaTeX that binds like a factor, and the value


class _Parser:
    """Recursive descent, a method for each rule of the grammar:

    sum     = [sign] product (("+" | "-") product)*
    product = power (("*" | "/") [sign] power | power)*
    power   = atom ("^" argument | "!" | "°")*
    atom    = number | name | \\pi | \\sqrt argument | \\frac{sum}{sum} | function argument | (sum) | |sum|
    """

    def __init__(self, text: str):
        self.tokens: list[tuple[str, str]] = []
        end = 0
        while end < len(text):
            match = _TOKEN.match(text, end)
            if match is None:
                raise _NoFormula
            end = match.end()
            self.tokens += _pieces(str(match.lastgroup), match[str(match.lastgroup)])
        self.at = 0
        self.names: set[str] = set()
        self.degrees = False
        self.loose = False  # what comes next as a factor would be a guess
        self.in_bars = False
        self.in_function = 0

    def formula(self) -> Formula:
        if all(kind == "name" for kind, _ in self.tokens):  # a word
            raise _NoFormula
        latex, value = self.sum()
        if self.at < len(self.tokens):
            raise _NoFormula
        return Formula(latex, value, frozenset(self.names), self.degrees)

    # ---- tokens ----------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else "end"

    @property
    def text(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self, *texts: str) -> str:
        """The next token if it is one of these, else ""."""
        text = self.text
        if text not in texts:
            return ""
        self.at += 1
        return text

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise _NoFormula

    # ---- rules -----------------------------------------------------------------------------------------------------

    def sum(self) -> _Node:
        latex, value = self.signed(self.product)
        while sign := self.take("+", "-"):
            right, y = self.product()
            latex, value = f"({latex}{sign}{right})", value + y if sign == "+" else value - y
        return latex, value

    def signed(self, rule: Callable[[], _Node]) -> _Node:
        sign = self.take("+", "-")
        latex, value = rule()
        return (f"(-{latex})", -value) if sign == "-" else (latex, value)

    def product(self) -> _Node:
        latex, value = self.power()
        while True:
            if self.take("*"):
                right, y = self.signed(self.power)
                self.loose = False
            elif self.take("/"):
                right, y = self.signed(self.power)
                latex, value = rf"\frac{{{latex}}}{{{right}}}", value / y
                self.loose = True  # 1/2x may be x/2 or 1/(2x), and sin 2x a product or not
                continue
            elif self.kind == "name" or self.text in ("(", "\\pi", "\\sqrt", "\\frac") or self.text[1:] in _FUNCTIONS:
                after_number = self.tokens[self.at - 1][0] == "number"
                if self.loose or (after_number and self.text == "\\frac"):  # 2\frac{1}{2} is a mixed number, or is it?
                    raise _NoFormula
                right, y = self.power()
            else:
                self.loose = False
                return latex, value
            latex, value = rf"{latex}\cdot {right}", value * y

    def power(self) -> _Node:
        latex, value = self.atom()
        while sign := self.take("^", "!", "°"):
            if sign == "^":
                exponent, y = self.argument()
                latex, value = rf"({latex})^{{{exponent}}}", _power(value, y)
            elif sign == "!":
                latex, value = f"({latex})!", float(math.factorial(_small(value)))
            elif self.in_function:
                latex, value = rf"({latex}\cdot \frac{{\pi}}{{180}})", math.radians(value)
            else:
                self.degrees = True
        return latex, value

    def atom(self) -> _Node:
        kind, text = self.kind, self.text
        self.at += 1
        if kind == "number":
            return self.number(text)
        if kind == "name":
            self.names.add(text)
            return f"n_{{{''.join(f'{ord(char):04d}' for char in text)}}}", math.nan
        if text == "\\pi":
            return text, math.pi
        if text == "\\sqrt":
            return self.root()
        if text == "\\frac":
            (top, x), (bottom, y) = self.braces(), self.braces()
            return rf"\frac{{{top}}}{{{bottom}}}", x / y
        if text[1:] in _FUNCTIONS:
            return self.function(text)
        if text in ("(", "{"):
            latex, value = self.inside(text)
            return f"({latex})", value
        if text == "|" and not self.in_bars:
            self.in_bars = True
            latex, value = self.inside(text)
            self.in_bars = False
            return f"|{latex}|", abs(value)
        raise _NoFormula

    def number(self, text: str) -> _Node:
        whole, _, fraction = text.partition(".")
        if len(whole) > 1 and whole[0] == "0":  # a date, a number of a house
            raise _NoFormula
        if not fraction:
            return whole, float(whole)
        return rf"\frac{{{int(whole + fraction)}}}{{{10 ** len(fraction)}}}", float(text)

    def root(self) -> _Node:
        degree = 2.0
        latex = r"\sqrt"
        if self.take("["):
            kind, text = self.kind, self.text
            self.at += 1
            self.expect("]")
            if kind != "number" or text not in "23456789":
                raise _NoFormula
            degree, latex = float(text), rf"\sqrt[{text}]"
        inside, value = self.argument()
        return rf"{latex}{{{inside}}}", _power(value, 1 / degree)

    def function(self, name: str) -> _Node:
        base = self.argument() if name == "\\log" and self.take("_") else None
        power = self.argument() if self.take("^") else None
        if power is not None and not power[1] > 0:  # \sin^{-1} is the inverse
            raise _NoFormula
        self.in_function += 1
        bare = self.text not in ("(", "{")
        latex, value = self.power() if bare else self.argument()
        if self.text == "°":  # \sin(30)°
            raise _NoFormula
        self.in_function -= 1
        self.loose = bare
        if base is None:
            latex, value = rf"{name}({latex})", _FUNCTIONS[name[1:]](value)
        else:
            latex, value = rf"\log_{{{base[0]}}}({latex})", math.log(value) / math.log(base[1])
        return (latex, value) if power is None else (rf"({latex})^{{{power[0]}}}", _power(value, power[1]))

    def argument(self) -> _Node:
        """What a root, a power or a function takes: something in brackets, or one signed number or name."""
        if opening := self.take("(", "{"):
            return self.inside(opening)
        sign = self.take("-", "+")
        if self.kind not in ("number", "name") and self.text != "\\pi":
            raise _NoFormula
        latex, value = self.atom()
        return (f"-{latex}", -value) if sign == "-" else (latex, value)

    def braces(self) -> _Node:
        self.expect("{")
        return self.inside("{")

    def inside(self, opening: str) -> _Node:
        """What is in brackets, the first of which has been taken."""
        loose, self.loose = self.loose, False
        node = self.sum()
        self.expect({"(": ")", "{": "}", "|": "|"}[opening])
        self.loose = loose
        return node


def _pieces(kind: str, text: str) -> list[tuple[str, str]]:
    """A name is one letter, with its marks, or a few capitals (AB, a line). Two small letters are a product."""
    if kind == "name" and len(text) > 1:
        letters = text.rstrip("'").partition("_")[0].rstrip("'")
        if len(letters) == 2 == len(text) and letters.islower():
            return [(kind, letter) for letter in letters]
        if len(letters) > 1 and not (len(letters) <= 4 and letters.isupper()):
            raise _NoFormula
        text = text.replace("{", "").replace("}", "")
    return [(kind, text)]


def _power(base: float, exponent: float) -> float:
    """Raises OverflowError where the value, or the fraction that it is, has too many digits to be worked with."""
    if abs(exponent) > MAX_EXPONENT:
        raise OverflowError
    value = base**exponent
    if isinstance(value, complex) or (value == 0 and base != 0):
        raise OverflowError
    return value


def _small(value: float) -> int:
    if value != int(value) or not 0 <= value <= 170:
        raise OverflowError
    return int(value)
