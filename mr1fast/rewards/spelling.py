"""One spelling of everything: both sides of a comparison go through `normalise` before anything is read into them.

LaTeX, Unicode, Chinese and plain keyboard spellings of the same thing become one. No pattern here has nested
quantifiers, and blanks are single before the patterns run, so the time is linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

# What stands on the left is written as what stands on the right.
_CHARACTERS = {
    "−–—‐‑‒―": "-",
    "×⋅·∙•✕": "*",
    "÷∕⁄": "/",
    "∶": ":",
    "。｡": ".",
    "“”„«»「」": '"',
    "‘’′": "'",
    "`\u200b\u200c\u200d\ufeff\u00ad": "",
    "\x02\x03": " ",  # they mark boxes, see below
    "【": "[",
    "】": "]",
    "º˚": "°",
    "≦⩽": "≤",
    "≧⩾": "≥",
    "∡∢": "∠",
    "µ": "μ",
    "√": "\\sqrt ",
    "∛": "\\sqrt[3]",
    "π": "\\pi ",
}
_TRANSLATION = str.maketrans({char: to for chars, to in _CHARACTERS.items() for char in chars})

# Full-width forms, blanks of all widths, units in one character, styled letters: as Unicode decomposes them.
_COMPATIBLE = re.compile(
    "[\uff01-\uffe6\u3000\u00a0\u2000-\u200a\u202f\u205f\u3371-\u33df\ufe50-\ufe6b℃℉\u2126\u212a\U0001d400-\U0001d7ff]"
)
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋]+")
_VULGAR_FRACTIONS = re.compile("[¼-¾⅐-⅞]")

# LaTeX's commands for a symbol, each after the symbol.
_SYMBOLS = r"""
* times cdot ast
/ div
± pm
≤ le leq leqslant
≥ ge geq geqslant
≠ ne neq
< lt
> gt
∈ in
∞ infty
∠ angle measuredangle
△ triangle
° degree
∪ cup
∥ parallel
⊥ perp
∅ emptyset varnothing
... dots ldots cdots
\frac dfrac tfrac cfrac
α alpha
β beta
γ gamma
δ delta
Δ Delta
θ theta
λ lambda
μ mu
ρ rho
σ sigma
φ phi varphi
ω omega
Ω Omega
"""
_COMMANDS = {name: row.split()[0] for row in _SYMBOLS.strip().splitlines() for name in row.split()[1:]}
_COMMANDS |= dict.fromkeys(("rm", "bf", "it", "displaystyle", "textstyle", "limits"), "")
_COMMANDS |= dict.fromkeys(("quad", "qquad"), " ")


def _command(match: re.Match[str]) -> str:
    return _COMMANDS.get(match[1], match[0])


def _angle(match: re.Match[str]) -> str:
    first, vertex, last = match.groups()
    return f"∠{min(first, last)}{vertex}{max(first, last)}"


# In this order. \text{...} and \boxed{...} are open by then, and blanks single.
_PATTERNS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"\\[,;:> ]|(?<!^)~(?=[A-Za-z])|(?<=[^ ~])~(?=\\)|&nbsp;", " "),  # but ~5 is about five
        (r"\\!|\\[()\[\]]", ""),
        (r"\\(?:left|right|[Bb]igg?[lrm]?)(?![A-Za-z])\.?", ""),
        (r"\\([%#&_{}])", r"\1"),
        (r"(?:US)?\\\$ ?", "USD "),
        (r"^(?:US)?\$ ?(?=[\d.][^$]*$)", "USD "),  # a single one in front of a number; all others are LaTeX's
        (r"\$", ""),
        (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))", "°"),
        (r"\^ ?(?:\{ ?\\prime ?\}|\\prime(?![A-Za-z]))", "'"),
        (r"\\([A-Za-z]+) ?", _command),
        (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac ?(\d) ?\{", r"\\frac{\1}{"),
        (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),
        (r"\{,\}", ","),
        (r"<sup>([^<]*)</sup>", r"^{\1}"),
        (r"</?(?:b|i|em|strong)>", ""),
        (r"(?<![\w)}*])\*\*\*?([^*]+)\*\*\*?(?![\w({*])", r"\1"),  # Markdown's bold
        (r"\*\*", "^"),  # Python's power
        (r"\^(\d)\^", r"^\1"),
        (r"(?<![A-Za-z\\])(sqrt|pi)(?![a-z])", r"\\\1 "),
        (r"(?<![A-Za-z\\])Pi(?![A-Za-z])", r"\\pi "),
        (r"根号", r"\\sqrt "),
        (r"(?<![A-Za-z\\])(sin|cos|tan|cot|ln|log)(?= ?[\d(^{\\∠A-Zα-ω]| [a-z](?![a-z]))", r"\\\1 "),
        (r"(?<=\d) ?\^(?:\{o\}|o(?![A-Za-z]))", "°"),
        (r"(?<=[\d)}]) ?(?:度|[Dd]egrees?(?![A-Za-z])|deg(?![A-Za-z]))", "°"),
        (r"(?<=\d) ?(?:[Pp]ercent|[Pp]er cent)(?![A-Za-z])", "%"),
        (r"(?<![A-Za-z])[Aa]ngle (?=[A-Z0-9])", "∠"),
        (r"(?<![A-Za-z])[Tt]riangle (?=[A-Z])", "△"),
        (r"([∠△]) ?(?:\{ ?(\w+'?) ?\})?", r"\1\2"),
        (r"(?<![A-Za-z])m∠", "∠"),  # the measure of an angle
        (r"∠([A-Z]'?)([A-Z]'?)([A-Z]'?)(?![A-Za-z])", _angle),  # an angle is the same with its ends exchanged
        (r"<=", "≤"),
        (r">=", "≥"),
        (r"!=", "≠"),
        (r"==", "="),
        (r"\+ ?/? ?-", "±"),
        (r"\+∞", "∞"),
    )
]

_WRAPPERS = re.compile(
    r"\\(text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|operatorname|mbox|boldsymbol|bm|emph|"
    r"underline|boxed|fbox) ?\{|\\[{}]|[{}]"
)
_COMMAND_AT_END = re.compile(r"\\[A-Za-z]+$")  # of \pi\text{cm}
# What may stand around two boxes with the same content.
_JOINTS = "so thus therefore hence and or i e the final answer is 即 所以 故 因此 答案 是 为"

_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore|hence|所以|因此|故),? ?)?"
    r"(?:(?:the |my )?(?:final |correct )?(?:answer|ans|option|choice|result) ?(?:is|:|=)[: ]*|there (?:are|is) "
    r"|(?:正确|最终|最后)?(?:答案|选项|结果) ?(?:是|为|:|=)[: ]*|答 ?:|[应故]?选择? ?:?(?= ?\(?[A-J])|=) ?",
    re.IGNORECASE,
)


def normalise(text: str) -> str:
    """`text` in the one spelling, without LaTeX's and Markdown's wrappings, "the answer is" and the full stop."""
    text = _VULGAR_FRACTIONS.sub(_vulgar_fraction, unicodedata.normalize("NFC", text))
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = _SUBSCRIPTS.sub(lambda match: f"_{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = _COMPATIBLE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = " ".join(text.translate(_TRANSLATION).split())
    text = _unwrapped(text)
    for pattern, to in _PATTERNS:
        text = pattern.sub(to, text)
    return _bare(_without_boxes(" ".join(text.split())))


def _vulgar_fraction(match: re.Match[str]) -> str:
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _unwrapped(text: str) -> str:
    r"""Without \text{...} and the like; a box becomes \x02...\x03."""
    parts, closing, end = [], [], 0
    for match in _WRAPPERS.finditer(text):
        parts.append(text[end : match.start()])
        end = match.end()
        if match[1]:
            is_box = match[1] in ("boxed", "fbox")
            parts += [" " if _COMMAND_AT_END.search(parts[-1]) else "", "\x02" if is_box else ""]
            closing.append("\x03" if is_box else "")
        elif match[0] == "}" and closing:
            parts.append(closing.pop())
        else:
            parts.append(match[0])
            if match[0] == "{":
                closing.append("}")
    return "".join([*parts, text[end:]])


def _without_boxes(text: str) -> str:
    """A box is no part of the answer; several with the same content are one. Different ones stay, and equal nothing."""
    contents = re.findall("\x02([^\x02\x03]*)\x03", text)
    if len(contents) > 1:
        around = re.sub("\x02[^\x02\x03]*\x03|[.,;:]", " ", text)
        same = len(set(contents)) == 1 and set(around.casefold().split()) <= set(_JOINTS.split())
        return contents[0] if same else text
    return text.replace("\x02", "").replace("\x03", "") if contents else text


def _bare(text: str) -> str:
    """Without quotation marks and stars around it, "the answer is" before it, and the full stop after it."""
    for _ in range(4):
        before = text
        if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'*_":
            text = text[1:-1]
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        text = text.strip()
        text = text[match.end() :] if (match := _LEAD_IN.match(text)) else text
        if text == before:
            break
    return text
