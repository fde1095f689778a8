"""Whatever a model answers and a user writes: never a crash, never slow, and right where an oracle knows."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_answers import PAIRS

from mr1fast.errors import UserError
from mr1fast.options.keyed import KEYED, KEYS
from mr1fast.options.parse import build_parser, parse_arguments, printed_config
from mr1fast.rewards import accuracy_reward, extract_answer, format_reward, is_right_untagged, r1v_counting, worker
from mr1fast.rewards.answers import equal
from tests.fuzzing import JSON, at_once, cases, changed

# ---- answers --------------------------------------------------------------------------------------------------------

CORPUS = sorted({text for same, other in PAIRS.values() for pair in (*same, *other) for text in pair})
PIECES = st.sampled_from([
    r"\frac{", "}", "{", "(", ")", "[", "|", "^", "_", "°", "√", "±", "%", r"\sqrt", r"\pi", "π", "!", ",",
    ";", ":", "=",
    "<", "≤", " ", "\n", "-", "+", "/", ".", "0", "1", "9" * 30, "e9", "e-99", "10^", "x", "AB", "∠", "cm", "and", "or",
    "，", "．", "１", "٣", "²", "\u202e", "\ud800", "\0", "$", r"\boxed{", "<answer>", "</answer>", "<think>",
]) | st.text(max_size=3)  # fmt: skip
ANSWERS = changed(CORPUS, PIECES)


@pytest.fixture(autouse=True)
def no_math_verify(monkeypatch):
    """It has a process and limits of its own, see test_worker.py."""
    monkeypatch.setattr(worker, "equal", lambda first, second: False)
    monkeypatch.setattr(worker, "verifies", lambda text, truth: False)
    equal.cache_clear()
    yield
    equal.cache_clear()


@given(ANSWERS, ANSWERS)
@cases(100)
def test_any_two_answers_are_the_same_or_not_and_in_either_order(first, second):
    with at_once():
        forth = accuracy_reward(f"<answer>{first}</answer>", second)
        assert forth in (0.0, 1.0)
        if first.strip() and second.strip() and "answer>" not in first + second:
            assert forth == accuracy_reward(f"<answer>{second}</answer>", first)
            assert accuracy_reward(f"<answer>{first}</answer>", first) == 1.0


@given(
    changed([f"<think>{a}</think><answer>{b}</answer>" for a, b in zip(CORPUS, reversed(CORPUS))], PIECES),
    ANSWERS,
    st.sampled_from([1, 1, 300]),
)
@cases(40)
def test_any_completion_is_judged(completion, solution, times):
    completion = completion * times
    with at_once():
        assert accuracy_reward(completion, solution) in (0.0, 1.0)
        assert format_reward(completion) in (0.0, 1.0)
        assert r1v_counting(completion, solution) in (0.0, 1.0)
        assert is_right_untagged(completion, solution) in (True, False)
        answer = extract_answer(completion)
        assert answer is None or answer in completion


def spellings(number: Fraction) -> list[str]:
    """Ways to write a number exactly."""
    sign, size = "-" * (number < 0), abs(number)
    top, bottom = size.numerator, size.denominator
    ways = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"$\frac{{{sign}{top}}}{{{bottom}}}$"]
    if bottom == 1:
        ways += [f"{sign}{top}", f"{sign}{top}.0", f"{sign}{top:,}", f"\\boxed{{{sign}{top}}}", f"**{sign}{top}**"]
    elif not sign and top > bottom:
        ways.append(f"{top // bottom} {top % bottom}/{bottom}")
    if 10**4 % bottom == 0:
        units = size * 10**4
        decimal = f"{int(units) // 10**4}.{int(units) % 10**4:04}"
        ways += [
            sign + decimal,
            sign + decimal.rstrip("0").rstrip("."),
            f"{sign}{float(size * 100):.2f}%",
            f"{sign}{decimal}e0",
            rf"{sign}{int(units)} \times 10^{{-4}}",
        ]
    return ways


RATIONALS = st.builds(Fraction, st.integers(-3000, 3000), st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 20, 100]))


@given(RATIONALS, RATIONALS | st.none(), st.data())
@cases(100)
def test_numbers_are_the_same_if_their_values_are(first, second, data):
    second = first if second is None else second
    a, b = (data.draw(st.sampled_from(spellings(number))) for number in (first, second))
    assert accuracy_reward(f"<answer>{a}</answer>", b) == float(first == second), (a, b)


# ---- options --------------------------------------------------------------------------------------------------------

OPTIONS = sorted(build_parser()._option_string_actions.keys() - {"-h", "--help", "--config", "--plan"})
VALUES = st.sampled_from([
    "1", "0", "-1", "2.5", "nan", "inf", "1e400", "9" * 5000, "0x10", "1_0", "yes", "no", "", " ", "vc", "gr",
    "vc,gr", "all",
    "sft", "grpo", "paper", "constant", "accuracy=1", "accuracy=1,format=0", "steps=5", "rank=4,alpha=8",
    "a=b,c=[d,{e", "=",
    ",", "lo\nra", "\0", "\ud800", "merge", "none", "float32", "cpu", "/", "../x", "problem=q", "{vc: 3}", "[1, 2]",
]) | st.text(max_size=5)  # fmt: skip


def outcome(arguments):
    """The options, or None for a mistake that is said in one sentence."""
    with at_once():
        try:
            return parse_arguments(arguments).config
        except UserError as error:
            assert 0 < len(str(error)) < 20_000
            assert not str(error).startswith(("Traceback", "Exceeds"))
            return None


@given(st.lists(st.tuples(st.sampled_from(OPTIONS), VALUES, st.booleans()), max_size=4))
@cases(25)
def test_any_command_line_is_options_or_a_mistake(given_options):
    arguments = []
    for option, value, joined in given_options:
        arguments += [f"{option}={value}"] if joined else [option, value]
    outcome(arguments)


YAML = [
    "method: grpo\nbeta: 0.1\n", "lora: {rank: 4, alpha: 8}\neval: steps=5\n", "task: vc\nmax_steps: {vc: 10}\n",
    "data: x\ncolumns: {problem: q}\ntest_data: [a, vc]\n", "seed: &a 3\nwarmup-steps: *a\n",
    "report_to: [csv]\nthreads: 2\n",
    "schema_version: 1\nmerge: yes\n---\n", "<<: {seed: 3}\nkl: {schedule: cosine}\n", '{"seed": 3, "bf16": null}',
]  # fmt: skip
YAML_PIECES = st.sampled_from([
    ": ", "- ", "{", "}", "[", "]", "&a ", "*a", "!!int ", "!!binary ", "!!set ", "? ", "| ", "\n  ", "\t",
    "#", "'", '"',
    "null", "~", "2026-13-45", "0o9", "1:2:3", ".inf", ".nan", "9" * 5000, "0x" + "f" * 5000, "<<", "\0",
    "\ufeff", "%YAML",
    *KEYED, *KEYS["eval"], "seed", "max_steps",
]) | st.text(max_size=3)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("options") / "run.yaml"


@given(text=changed(YAML, YAML_PIECES))
@cases(25)
def test_any_configuration_is_options_or_a_mistake(file, text):
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome(["--config", str(file)])


@given(
    entries=st.dictionaries(
        st.sampled_from([*(option[2:] for option in OPTIONS), *KEYED]), JSON, min_size=1, max_size=3
    )
)
@cases(25)
def test_any_value_of_an_option_is_taken_and_recorded_or_a_mistake(file, entries):
    file.write_text(json.dumps(entries))
    config = outcome(["--config", str(file)])
    if config is not None:
        file.write_text(printed_config(config))
        again = outcome(["--config", str(file)])
        assert again is not None
        assert again.resolved() == config.resolved()
