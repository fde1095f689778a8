import os
import subprocess
import sys
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mr1fast.rewards import worker as math_worker
from mr1fast.rewards.accuracy import accuracy_reward, extract_answer, format_reward, parse_number
from mr1fast.rewards.worker import MathWorker

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


RIGHT = [
    ("3", "3"),
    ("03", "3"),
    ("3", "<answer> 3 </answer>"),
    ("3.0", "3"),
    ("+3", "3"),
    ("-3", "-3"),
    ("3.", "3"),
    (".5", "0.5"),
    ("1/2", "0.5"),
    ("1,000", "1000"),
    ("30°", "30"),
    ("30", "30°"),
    ("30 degrees", "30"),
    (r"30^\circ", "30"),
    (r"30^{\circ}", "30"),
    ("$30$", "30"),
    (r"\boxed{30}", "30"),
    (r"\(30\)", "30"),
    ("123456789012345678901234567890", "123456789012345678901234567890"),
    # by math-verify
    (r"\frac{1}{2}", "0.5"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"2\sqrt{3}", r"$2\sqrt{3}$"),
    ("x=3", "3"),
    ("50%", "0.5"),
    ("12 cm", "12"),
    # words
    ("B", "b"),
    ("a red cube", "a red cube"),
]
WRONG = [
    ("4", "3"),
    ("3.01", "3"),
    ("-3", "3"),
    ("33", "3"),
    ("", "3"),
    ("three", "3"),
    ("3 4 5", "3"),
    ("3 4", "7"),
    ("3 4", "12"),
    ("3 or 4", "3"),
    ("1/0", "1"),
    ("1/0", "0"),
    ("3" * 200, "3"),
    ("9" * 5000, "9"),
    ("1e999999999", "3"),
    ("nan", "3"),
    ("inf", "3"),
    ("\x00", "3"),
    ("\ud800", "3"),
    (r"\frac{", "3"),
    (r"\frac{1}{3}", "0.5"),
    ("{" * 150, "3"),
    ("(" * 150 + "3", "3"),
    ("__import__('os').getpid()", "3"),
    ("a blue cube", "a red cube"),
    ("3", ""),
]


@pytest.mark.parametrize(("answer", "solution"), RIGHT)
def test_right_answers(answer, solution):
    assert accuracy_reward(f"<think>so</think><answer> {answer} </answer>", solution) == 1.0


@pytest.mark.parametrize(("answer", "solution"), WRONG)
def test_wrong_answers(answer, solution):
    assert accuracy_reward(f"<think>so</think><answer> {answer} </answer>", solution) == 0.0


def test_an_answer_outside_the_tags_does_not_count():
    assert accuracy_reward("3", "3") == 0.0
    assert accuracy_reward("<think>3</think>", "3") == 0.0


@pytest.mark.parametrize("bomb", ["9^{9^{9^{9}}}", "99999999!"])
def test_a_bomb_costs_seconds(bomb, monkeypatch):
    monkeypatch.setattr("mr1fast.rewards.worker.ANSWER_SECONDS", 0.5)
    worker = MathWorker()
    assert worker.equal("1", "1")  # started
    start = time.monotonic()
    assert not worker.equal("3", bomb)
    assert time.monotonic() - start < 5
    monkeypatch.setattr("mr1fast.rewards.worker.ANSWER_SECONDS", 10)
    assert worker.equal("3", r"\frac{6}{2}")  # and the next question is answered
    worker.stop()


def test_a_worker_that_does_not_start_is_no_answer(monkeypatch):
    monkeypatch.setattr("mr1fast.rewards.worker.START_SECONDS", 0.0)
    assert MathWorker().equal("1", "1") is False


def test_without_math_verify_numbers_are_compared_and_one_warning_says_what_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    math_worker._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for answer in ("60", "60.0", r"60^\circ", "120/2"):
            assert accuracy_reward(f"<answer>{answer}</answer>", "60") == 1.0
        assert accuracy_reward("<answer>61</answer>", "60") == 0.0
    with pytest.warns(UserWarning, match="math-verify is not installed: .*pip install math-verify"):
        assert not MathWorker().equal("60", "60 cm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not MathWorker().equal("60", "60 cm")


def test_the_worker_ends_with_the_program():
    code = "from mr1fast.rewards.accuracy import _worker; _worker.equal('1', '2'); print(_worker._process.pid)"
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_nothing_raises_and_rewards_are_0_or_1(text):
    assert format_reward(text) in (0.0, 1.0)
    assert format_reward(f"<think>{text}</think><answer>3</answer>") in (0.0, 1.0)
    parse_number(text)
    assert accuracy_reward(text, "3") in (0.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**50), 10**50))
def test_an_integer_equals_itself_and_not_its_successor(number):
    assert accuracy_reward(f"<answer>{number}</answer>", str(number)) == 1.0
    assert accuracy_reward(f"<answer>{number}</answer>", str(number + 1)) == 0.0
