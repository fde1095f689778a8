"""--reward-weights: the rewards by name, and functions of one's own."""

import os
import re

import pytest

from mr1fast.errors import UserError
from mr1fast.options.reward_weights import check_columns, load_rewards
from mr1fast.rewards import REWARDS, own
from mr1fast.rewards.own import Absent, OwnReward
from tests.test_config import config


def test_reward_weights():
    assert config().rewards == {"accuracy": 1.0, "format": 0.5}
    assert config("--reward-weights", "format = 2, accuracy=0").rewards == {"format": 2.0}
    assert config("--reward-weights", "accuracy=1").for_task("vc").reward_weights == {"accuracy": 1.0}
    (accuracy,) = load_rewards({"accuracy": 1.0})
    completions = ["<answer>3</answer>", "<answer>B</answer>"]
    columns = {"problem": ["?", "?"], "choices": [None, ("3", "4")], "hint": [1, 2]}
    assert (accuracy.name, accuracy.function(completions, ["3", "4"], **columns)) == ("accuracy_reward", [1.0, 1.0])
    assert REWARDS["format"](["<think>so</think><answer>3</answer>", "3"], ["3", "3"], **columns) == [1.0, 0.0]


def test_reward_is_short_for_a_weight_of_1():
    assert config("--reward", "mine:short").rewards == {"accuracy": 1.0, "format": 0.5, "mine:short": 1.0}
    both = config("--reward-weights", "a:b=2,format=1", "--reward", "a:b", "--reward", "r1v-geometry")
    assert both.resolved()["reward_weights"] == "a:b=2,format=1,r1v-geometry=1"
    for name in ("mine:short=2", "a:b,c:d", " "):
        with pytest.raises(UserError, match="--reward takes one name, such as module:function, got"):
            config("--reward", name)
    with pytest.raises(UserError, match=r"a reward must be one of .* got 'r1v-counted'"):
        config("--reward", "r1v-counted")


MINE = """
import os, sys, time

def short(completions, solutions, *, problem, difficulty, **columns):
    assert problem == ["?"] * len(completions) and columns == {"choices": [None] * len(completions)}
    return [d - len(text) for text, d in zip(completions, difficulty)]

def raising(completions, solutions, **columns): return {}["key"]
def leaving(completions, solutions, **columns): sys.exit(1)
def dying(completions, solutions, **columns): os._exit(1)
def hanging(completions, solutions, **columns): time.sleep(60)
def nothing(completions, solutions, **columns): pass
def one(completions, solutions, **columns): return [1.0]
def number(completions, solutions, **columns): return 1.0
def mapping(completions, solutions, **columns): return {0: 1.0, 1: 1.0}

def old(completion, solution): return 1.0
def closed(completions, solutions): return [1.0]
none = 3
"""

# Apart, since importing torch takes long.
TENSORS = """
import numpy, torch

def kinds(completions, solutions, **columns):
    return torch.tensor([1.0, float("nan")]).tolist() + [None, numpy.float32(0.5), True, "1", [2]]

def array(completions, solutions, **columns): return numpy.ones(len(completions))
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The current folder has modules of the user's."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_rewards.py").write_text(MINE)
    (folder / "my_tensors.py").write_text(TENSORS)
    (folder / "your_rewards.py").write_text("from my_rewards import one\n")
    (folder / "my_broken_rewards.py").write_text("def short(:\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own.renew_process()
        yield


def call(name, completions, **columns):
    n = len(completions)
    return OwnReward(name)(completions, ["3"] * n, **{"problem": ["?"] * n, "choices": [None] * n, **columns})


def test_a_reward_of_ones_own_is_told_every_column_and_returns_any_numbers(mine):
    assert call("my_rewards:short", ["four", "a"], difficulty=[5, 5]) == [1, 4]
    assert str(call("my_tensors:kinds", ["a"] * 7)) == "[1.0, nan, nan, 0.5, 1.0, nan, nan]"
    assert call("my_tensors:array", ["a"] * 3) == [1.0] * 3
    rewards = load_rewards({"my_rewards:short": 0.25})
    assert [(reward.name, reward.weight) for reward in rewards] == [("short", 0.25)]
    check_columns(rewards, ["problem", "difficulty"])
    with pytest.raises(UserError, match="short takes 'difficulty', and the data has no such column; there are problem"):
        check_columns(rewards, ["problem", "choices"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raising", r"raised KeyError: 'key' \(.*my_rewards.py, line 8\)"),
        ("leaving", "raised SystemExit: 1"),
        ("dying", "[Aa]bnormal termination"),
        ("hanging", "took longer than 0.3 s"),
        ("nothing", "returned None, not a list of numbers"),
        ("one", "returned 1 values for 2 completions"),
        ("number", "returned 1.0, not a list of numbers"),
        ("mapping", r"returned \{0: 1.0, 1: 1.0\}, not a list"),
    ],
)
def test_a_reward_that_fails_is_absent_and_says_why(mine, name, reason, monkeypatch):
    monkeypatch.setattr(own, "SECONDS", 0.3 if name == "hanging" else 30.0)
    with pytest.raises(Absent, match=reason):
        call(f"my_rewards:{name}", ["a", "b"])
    assert call("my_rewards:one", ["a"]) == [1.0]  # the process, or the next one, goes on


def test_a_reward_that_cannot_be_called_is_one_sentence(mine):
    for name, message in (
        ("my_rewards:long", "my_rewards:long cannot be imported: AttributeError: module 'my_rewards' has no attribute"),
        ("my_rewards:none", "my_rewards:none is not a function, but of type int"),
        ("my_rewards:old", "takes (completion, solution), and must be a function (completions, solutions, **columns)"),
        ("my_rewards:closed", "takes (completions, solutions), and must be"),
        ("nowhere:short", "nowhere:short cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("my_broken_rewards:short", "cannot be imported: SyntaxError"),
        (":short", "cannot be imported: ValueError"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            OwnReward(name)
    with pytest.raises(UserError, match="two rewards are called 'one'"):
        load_rewards({"my_rewards:one": 1.0, "your_rewards:one": 1.0})


def test_the_process_sees_what_the_program_sees_when_rewards_are_loaded(tmp_path, monkeypatch):
    """Whatever the process has answered before, from another folder, and whatever another module was called."""
    told = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_name.py").write_text(
            "import os\n"
            f"def where(completions, solutions, **columns): return [float(os.environ['WHERE'] == {name!r})]\n"
            "def here(completions, solutions, **columns): return [float(open('here').read())]\n"
        )
        (tmp_path / name / "here").write_text(str(len(told)))
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setenv("WHERE", name)
        rewards = load_rewards({"same_name:where": 1.0, "same_name:here": 1.0})
        monkeypatch.chdir(tmp_path)  # which changes nothing for the rewards that are loaded
        told.append([reward.function(["a"], ["3"]) for reward in rewards])
    assert told == [[[1.0], [0.0]], [[1.0], [1.0]]]


def test_a_new_process_finds_the_module_of_a_reward_though_the_folder_was_left(tmp_path, monkeypatch):
    (tmp_path / "left.py").write_text("def one(completions, solutions, **columns): return [1.0]\n")
    (tmp_path / "elsewhere").mkdir()
    own._worker.end()
    own._worker.ask(os.getcwd, seconds=60)  # it is started in this folder
    monkeypatch.chdir(tmp_path)
    one = OwnReward("left:one")
    assert one(["a"], ["3"]) == [1.0]
    monkeypatch.chdir(tmp_path / "elsewhere")
    own._worker.end()
    assert one(["a"], ["3"]) == [1.0]
