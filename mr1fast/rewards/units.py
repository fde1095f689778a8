"""What may follow a number: a unit in any spelling, or a noun that is counted. Nothing is converted."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

# The symbol, then its other spellings; a Latin one of three letters and more may have a plural's s.
_UNITS = """
m meter metre 米
g gram 克
L l liter litre 升
s sec second 秒 秒钟
N newton 牛 牛顿
J joule 焦 焦耳
W watt 瓦 瓦特
V volt 伏 伏特
A amp ampere 安 安培
Pa pascal 帕 帕斯卡
Hz hertz 赫兹
Ω ohm 欧 欧姆
C coulomb 库仑
mol mole 摩尔
cal calorie 卡
eV electronvolt 电子伏
atm atmosphere
bar 巴
dB decibel 分贝
kWh kilowatthour 千瓦时
min minute 分钟
h hr hour 小时 时
day 天 日
week 周 星期
month 个月
year yr 年 岁
in inch inches 英寸
ft foot feet 英尺
yd yard 码
mi mile 英里
nmi nauticalmile 海里
km kms 公里
cm cms 公分
mm mms
kg kgs 公斤
lb lbs pound 磅
oz ounce 盎司
ton tonne 吨
ha hectare 公顷
acre 英亩
° deg degree
°C celsius °celsius 摄氏度
°F fahrenheit °fahrenheit 华氏度
rad radian 弧度
USD usd dollar 美元
CNY cny rmb yuan ¥ 元 块 块钱
EUR eur euro € 欧元
GBP gbp £ 英镑
cent 美分
unit 单位
time 倍 次
person people 人
child children
man men
woman women
mouse mice
sheep
fish
"""
# Prefix: symbol, name, Chinese; the units that it goes with.
_PREFIXES = """
k kilo 千: m g L N J W V Pa Hz Ω cal eV
c centi 厘: m L
d deci 分: m L
m milli 毫: m g L s W V A
μ micro 微: m g L s V A
n nano 纳: m s
M mega 兆: J W Pa Hz Ω eV
G giga 吉: J W Pa Hz eV
"""


def _spellings() -> dict[str, str]:
    rows = [row.split() for row in _UNITS.strip().splitlines()]
    table = {spelling: row[0] for row in rows for spelling in row}
    of_symbol = {row[0]: row for row in rows}
    for line in _PREFIXES.strip().splitlines():
        prefix, _, symbols = line.partition(": ")
        short, name, chinese = prefix.split()
        for symbol in symbols.split():
            unit = short + symbol
            table[unit] = unit
            for spelling in of_symbol[symbol]:
                if not spelling.isascii():
                    table[chinese + spelling] = unit
                elif len(spelling) > 2:
                    table[name + spelling] = unit
    plurals = {f"{spelling}s": unit for spelling, unit in table.items() if len(spelling) > 2 and spelling.isascii()}
    return plurals | table | {"um": "μm", "hrs": "h", "yrs": "year"}


def _unambiguous_without_case(table: dict[str, str]) -> dict[str, str]:
    """mW and MW are two units, and a single letter in the other case may be another thing: 5M is five million."""
    units: dict[str, set[str]] = {}
    for spelling, unit in table.items():
        units.setdefault(spelling.casefold(), set()).add(unit)
    return {spelling: min(found) for spelling, found in units.items() if len(found) == 1 and len(spelling) > 1}


_TABLE = _spellings()
_TABLE_WITHOUT_CASE = _unambiguous_without_case(_TABLE)

_BETWEEN = re.compile(r" ?(/|(?<![A-Za-z])per(?![A-Za-z])|每|\*) ?| ", re.IGNORECASE)
_TOGETHER = re.compile(r"((?<![A-Za-z])(?:square|sq\.?|cubic|cu\.?|nautical)|°) | (?=squared|cubed|\^)", re.IGNORECASE)
_FACTOR = re.compile(
    r"(?P<before>square|sq\.?|cubic|cu\.?|平方|立方)?(?P<name>[^\d^{} ]+?)"
    r"(?:\^\{?(?P<power>-?[1-9])\}?|(?P<after>squared|cubed)|(?P<digit>(?<=m)[23]))?",
    re.IGNORECASE,
)
_POWERS = {"sq": 2, "cu": 3, "平方": 2, "立方": 3}
_IN_ONE_WORD = {"kph": "km/h", "kmh": "km/h", "mph": "mi/h"}
MAX_LENGTH = 40

# Chinese counts with a measure word, which says nothing, and a noun that may be missing. These characters are no noun:
# five and more, about five, five thousand, five or six.
_COUNTED_CHINESE = re.compile(
    r"[个只条件张本支枝辆名位颗块台座头匹朵棵根片粒道题组种份双对]"
    r"([^\W\d_a-zA-Z左右上下内外多余几半不非或和与及且万亿千百十分倍点]{0,6})"
)
_COUNTED = re.compile(r"(?:[a-z-]{3,20} ){0,3}[a-z-]{3,20}")
_NO_NOUNS = re.compile(
    r"(?<![a-z-])(?:and|not|nor|but|than|more|fewer|other|another|extra|additional|times|over|under|about|above|below|"
    r"between|with|without|except|excluding|including|besides|per|out|from|for|the|most|least|only|never|until|total|"
    r"max|maximum|min|minimum|approx|approximately|squared|cubed|equals?|pairs?|half|halves|thirds?|quarters?|"
    r"[a-z]+ths?|dozens?|hundreds?|thousands?|[a-z]*illions?|percents?|one|two|three|four|five|six|seven|eight|nine|ten|"
    r"[a-z-]+[ius]s)(?![a-z-])"  # less, plus and minus are no plurals
)


def read_unit(text: str, number: Fraction | None = None) -> str | None:
    """The unit that `text` is, in one spelling, or "#noun" for one that is counted; None if it is neither.

    text: what follows a number, normalised. number: the number if it is plain; only such things are counted.
    """
    if not text or len(text) > MAX_LENGTH:
        return None
    if text[0] + text[-1] in ("()", "[]"):
        text = text[1:-1].strip()
    return _unit(text) or (None if number is None else _counted(text, number))


def _unit(text: str) -> str | None:
    powers: Counter[str] = Counter()
    sign = 1
    text = _TOGETHER.sub(r"\1", _IN_ONE_WORD.get(text, text))
    for i, part in enumerate(_BETWEEN.split(text)):
        if i % 2:
            sign = -1 if part and part != "*" else 1
            continue
        factor = _factor(part)
        if factor is None:
            return None
        powers[factor[0]] += sign * factor[1]
    return " ".join(f"{unit}^{power}" for unit, power in sorted(powers.items()) if power) or None


def _factor(text: str) -> tuple[str, int] | None:
    match = _FACTOR.fullmatch(text)
    if match is None:
        return None
    unit = _TABLE.get(match["name"]) or _TABLE_WITHOUT_CASE.get(match["name"].casefold())
    word = (match["before"] or match["after"] or "").casefold()
    power = match["power"] or match["digit"]
    if unit is None or (power and word) or (match["before"] and match["after"]):
        return None
    return unit, int(power or _POWERS.get(word[:2], 1))


def _counted(text: str, number: Fraction) -> str | None:
    """ "#cube" of "cubes" (or "cube", of one), "#red cube" of "red cubes"."""
    if match := _COUNTED_CHINESE.fullmatch(text):
        return f"#{match[1]}" if match[1] else ""
    text = text.casefold()
    if not _COUNTED.fullmatch(text) or _NO_NOUNS.search(text):
        return None
    if text.endswith("s"):
        return f"#{text[:-1]}"
    return f"#{text}" if abs(number) == 1 else None
