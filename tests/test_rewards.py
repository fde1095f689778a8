"""The rewards: extracting the answer, the format, choices, time, and what holds for all answers."""

import json
import sys
import time
import warnings

import numpy as np
import pytest
from data_files import row, write_jsonl
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mr1fast.data.dataset import load_split
from mr1fast.errors import UserError
from mr1fast.rewards import accuracy_reward, check_solutions, extract_answer, format_reward
from mr1fast.rewards import worker as math_worker
from mr1fast.rewards.answers import equal
from mr1fast.rewards.reading import read

GOOD = "<think>2 items</think><answer>2</answer>"

WELL_FORMED = [
    GOOD,
    "<think>2 items</think>\n<answer>2</answer>",
    "  <think>\nfirst\nsecond\n</think> <answer> 2 </answer>\n",
    "<think></think><answer></answer>",
    "<think>a < b, b > c</think><answer>x</answer>",
    "<think>思考</think><answer>二</answer>",
]
ILL_FORMED = [
    "",
    "2",
    "<answer>2</answer>",
    "<think>2</think>",
    "<think>2</think><answer>2",
    "<think>2<answer>2</answer>",
    "<answer>2</answer><think>2</think>",
    "so: " + GOOD,
    GOOD + " indeed",
    GOOD + GOOD,
    "<think>a</think>b<answer>2</answer>",
    "<think>a<think>b</think></think><answer>2</answer>",
    "<think>a</think><answer>1</answer><answer>2</answer>",
    "<think>a</think><answer>1</think></answer>",
    "</think><think><answer>1</answer>",
    "<think><answer></think></answer>",
    "<Think>a</Think><Answer>2</Answer>",
    "< think>a</think><answer>2</answer>",
    "think a /think answer 2 /answer",
]


@pytest.mark.parametrize("text", WELL_FORMED)
def test_well_formed(text):
    assert format_reward(text) == 1.0


@pytest.mark.parametrize("text", ILL_FORMED)
def test_ill_formed(text):
    assert format_reward(text) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "2"),
        ("<answer>\n 2\t</answer>", "2"),  # R1-V's regular expression
        ("no think at all <answer>12</answer> and more", "12"),
        ("<answer>five</answer> <answer>5</answer>", "5"),  # R1-V searches for an integer
        ("<answer>x</answer><answer>y</answer>", "x"),
        ("<answer>1</answer><answer>2</answer>", "1"),
        ("<answer><answer>2</answer></answer>", "2"),
        ("</answer><answer>2</answer>", "2"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer></answer>", ""),
        ("<answer>2", None),
        ("2</answer>", None),
        ("2", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_an_answer_outside_the_tags_does_not_count():
    assert accuracy_reward("3", "3") == 0.0
    assert accuracy_reward("<think>3</think>", "3") == 0.0
    assert accuracy_reward("<answer></answer>", "") == 0.0


# Of the kinds that Qwen2-VL wrote in R1-V's evaluation logs: true answer, what was tagged, whether it is right.
QWEN = [
    ("4", "\n    4\n    ", True),
    ("8", "A. 8", False),
    ("2√{3}", "2sqrt(3)", True),
    ("65π", r"65\pi", True),
    ("9πcm^{2}", "9pi", True),
    ("4√{3}cm²", "4√3", True),
    (r"\frac{1}{3}", "sqrt(1/3)", False),
    ("10√{2}", "10.0", False),
    ("60√{3}+1", "60sqrt(3)m", False),
    ("10", "10√3", False),
    (r"\frac{1}{4}", "1:4", False),
    ("10.8m", "AB = 1.8 * BC / 1.5 = 1.8 * 9.0 / 1.5 = 10.8", False),
    ("27cm^{2}", "48.0^2", False),
    ("√{5}", "√5", True),
]


@pytest.mark.parametrize(("solution", "answer", "right"), QWEN)
def test_what_qwen_writes(solution, answer, right):
    assert accuracy_reward(f"<think>...</think>\n<answer>{answer}</answer>", solution) == right


# ---- choices ---------------------------------------------------------------------------------------------------------

ANGLES = ("30°", "40°", "50°", "60°")


@pytest.mark.parametrize(
    ("answer", "solution", "choices", "right"),
    [
        ("B", "B", ANGLES, True),
        ("40°", "B", ANGLES, True),
        ("40 degrees", "B", ANGLES, True),
        ("x = 40", "(B)", ANGLES, True),
        ("B", "40°", ANGLES, True),
        ("B. 40°", "40", ANGLES, True),
        ("C", "B", ANGLES, False),
        ("50°", "B", ANGLES, False),
        ("B. 50°", "B", ANGLES, False),  # letter and text contradict each other
        ("B. 50°", "C", ANGLES, False),
        ("41°", "B", ANGLES, False),
        ("B or C", "B", ANGLES, False),
        ("40°", "B", ("A. 30°", "B. 40°"), True),
        ("40°", "B", ("(A) 30°", "(B) 40°"), True),
        ("a red cube", "A", ["A red cube", "a blue cube"], True),
        ("5", "A", ["5", "5.0"], False),  # it may be either
        ("A", "A", ["B", "A"], True),  # choices that are letters say nothing
        ("B", "A", ["B", "A"], False),
        ("3", "3", [], True),
        ("E", "B", ANGLES, False),
        ("x" * 1000, "A", ["x" * 1000, "y"], True),
    ],
)
def test_choices(answer, solution, choices, right):
    assert accuracy_reward(f"<answer>{answer}</answer>", solution, choices=choices) == right


# ---- what holds for all answers --------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-(10**50), 10**50).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}"),
    st.decimals(-(10**6), 10**6, places=3).map(str),
)
QUANTITIES = st.tuples(
    NUMBERS, st.sampled_from(["", " cm", "cm^2", "°", "%", " items", " red cubes", "米", " m/s"])
).map("".join)
NAMED = st.tuples(st.sampled_from(["", "x = ", "∠A=", "AB = "]), QUANTITIES).map("".join)
LISTS = st.lists(NAMED, min_size=1, max_size=4).map(" or ".join)
BRACKETED = st.tuples(st.sampled_from(["(1, {})", "[{}, 2)", "{{{}, 3}}", "({})", r"\boxed{{{}}}"]), QUANTITIES).map(
    lambda pair: pair[0].format(pair[1])
)
WORDS = st.sampled_from(
    ["A", "(B)", "C. 30°", "a red cube", "Isosceles.", r"\angle ABC", "2024-01-02", "x > 5", "3:30"]
)
ANSWERS = st.one_of(LISTS, BRACKETED, WORDS, st.text(max_size=12))


@settings(max_examples=300, deadline=None)
@given(ANSWERS)
def test_an_answer_says_the_same_as_itself(answer):
    assert equal(answer, f" {answer.strip()}\n")
    assert equal(answer, answer)


@settings(max_examples=500, deadline=None)
@given(ANSWERS, ANSWERS)
def test_it_does_not_matter_which_is_the_solution(first, second):
    assert equal(first, second) == equal(second, first)


@settings(max_examples=200, deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=4, unique=True), st.randoms())
def test_lists_say_the_same_in_any_order_and_not_with_one_left_out(numbers, random):
    assume(len({read(number) for number in numbers}) == len(numbers))
    shuffled = random.sample(numbers, len(numbers))
    assert equal(", ".join(numbers), " or ".join(shuffled))
    assert not equal(", ".join(numbers), " or ".join(shuffled[1:]))


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**50), 10**50))
def test_an_integer_equals_itself_and_not_its_successor(number):
    assert accuracy_reward(f"<answer>{number}</answer>", str(number)) == 1.0
    assert accuracy_reward(f"<answer>{number}</answer>", str(number + 1)) == 0.0
    assert accuracy_reward(f"<answer>{number}e-60</answer>", f"{number + 1}e-60") == 0.0


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, min_value=-(2.0**20), max_value=2.0**20, allow_subnormal=False), st.integers(2, 6))
def test_a_float32_equals_the_decimal_that_it_was_and_no_other(value, digits):
    decimal = f"{value:.{digits}g}"
    column = float(np.float32(decimal))
    assume(not 0 < abs(column) < 1e-30)
    assert accuracy_reward(f"<answer>{decimal}</answer>", repr(column)) == 1.0
    other = f"{float(decimal) * (1 + 1e-6):.17g}"
    if float(decimal):
        assert accuracy_reward(f"<answer>{other}</answer>", repr(column)) == 0.0


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_nothing_raises_and_rewards_are_0_or_1(text):
    assert format_reward(text) in (0.0, 1.0)
    assert format_reward(f"<think>{text}</think><answer>3</answer>") in (0.0, 1.0)
    assert accuracy_reward(text, "3") in (0.0, 1.0)
    assert accuracy_reward(f"<answer>{text}</answer>", "3") in (0.0, 1.0)
    assert accuracy_reward("<answer>3</answer>", text, choices=[text, "3"]) in (0.0, 1.0)


# ---- time ------------------------------------------------------------------------------------------------------------

SYMBOLS = [
    *" \n\t135axAé°√π½²₂中个米或、.,;:+-*/=<>±()[]{}|\\$^_!%'\"~#&０②\x00\ud800",
    *(
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "<sup>",
        "or ",
        "and ",
        "1,000 ",
        "1 ",
        "1/",
        "m/",
        "per ",
        "sin ",
    ),
    *("\\frac", "\\sqrt", "\\text{", "\\boxed{", "\\left(", "\\angle ", "∠A", "A. ", "(A)", "**", "The answer is "),
]


@st.composite
def runs(draw):
    symbols = draw(st.lists(st.sampled_from(SYMBOLS), min_size=1, max_size=3))
    length = draw(st.sampled_from([30, 100, 200, 500, 5_000, 100_000]))
    if draw(st.booleans()):
        return ("".join(symbols) * length)[:length]
    return "".join(symbol * (length // len(symbols) // len(symbol)) for symbol in symbols)


def seconds(function, *arguments):
    """Of processor time, the least of three: other programs may run meanwhile."""
    times = []
    for _ in range(3):
        equal.cache_clear()
        read.cache_clear()
        started = time.process_time()
        function(*arguments)
        times.append(time.process_time() - started)
    return min(times)


@settings(max_examples=150, deadline=None)
@given(runs())
def test_any_completion_is_judged_in_10_ms(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math_worker, "equal", lambda first, second: False)  # it has a limit, and a process, of its own
        for completion in (run, f"<answer>{run}</answer>", f"<think>{run}</think><answer>{run}</answer>"):
            assert seconds(accuracy_reward, completion, "3") < 0.01
            assert seconds(format_reward, completion) < 0.01


@pytest.mark.parametrize(
    "bomb", ["9^{9^{9^{9}}}", "99999999!", "10^{10^{10}}", "0.1^{99999}", "((9^{999})^{999})^{999}"]
)
def test_a_number_that_is_too_large_is_not_computed(bomb):
    assert seconds(accuracy_reward, f"<answer>{bomb}</answer>", "3") < 0.01
    assert accuracy_reward(f"<answer>{bomb}</answer>", bomb) == 1.0


# ---- without math-verify ---------------------------------------------------------------------------------------------


def test_without_math_verify_numbers_are_compared_and_one_warning_says_what_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    math_worker._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for answer in ("60", "60.0", r"60^\circ", "120/2", "x = 60 cm"):
            assert accuracy_reward(f"<answer>{answer}</answer>", "60") == 1.0
        assert accuracy_reward("<answer>61</answer>", "60") == 0.0
        assert accuracy_reward(r"<answer>2\times 31</answer>", "60") == 0.0
    with pytest.warns(UserWarning, match="math-verify is not installed: .*pip install math-verify"):
        assert accuracy_reward(r"<answer>4\times 15</answer>", "60") == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accuracy_reward(r"<answer>4\times 15</answer>", "60") == 0.0
    monkeypatch.undo()
    assert accuracy_reward(r"<answer>4\times 15</answer>", "60") == 1.0  # it was not cached


def test_solutions_that_need_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    check_solutions(["3", "60°", "a red cube", "A", "1 1/2 cm", "30° or 150°", "1:4", "x" * 1000])
    for solution in (r"2\sqrt{3}", "65π cm²", "x = √5", "1, √2", "x > √2"):
        with pytest.raises(
            UserError, match=r"the solution .* needs the package 'math-verify'.*pip install math-verify"
        ):
            check_solutions(["3", solution])
    monkeypatch.undo()
    check_solutions([r"2\sqrt{3}"])


# ---- choices in data -------------------------------------------------------------------------------------------------


def test_choices_are_read_from_data(folder):
    cells = [["30°", 40], json.dumps(["30°", "40"]), None, "", "no list", 5, {"A": "30°"}]
    write_jsonl(folder / "data.jsonl", [row(i, choices=cell) for i, cell in enumerate(cells)])
    data = load_split(folder, "all")
    found = {data[i].problem: data[i].choices for i in range(len(cells))}
    assert [found[f"question {i}?"] for i in range(len(cells))] == [("30°", "40"), ("30°", "40"), *[None] * 5]
    assert "3 x choices are not a list, ignored" in data.summary()
