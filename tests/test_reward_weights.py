"""--reward-weights: the rewards by name, and functions of one's own."""

import re

import pytest

from mr1fast.errors import UserError
from mr1fast.options.reward_weights import load_rewards
from tests.test_config import config


def test_reward_weights():
    assert config().rewards == {"accuracy": 1.0, "format": 0.5}
    assert config("--reward-weights", "format = 2, accuracy=0").rewards == {"format": 2.0}
    assert config("--reward-weights", "accuracy=1").for_task("vc").reward_weights == {"accuracy": 1.0}
    (accuracy,) = load_rewards({"accuracy": 1.0})
    assert (accuracy.name, accuracy.function("<answer>3</answer>", "3")) == ("accuracy_reward", 1.0)


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def short(completion, solution):\n    return -len(completion)\nnone = 3\n")
    (tmp_path / "your_rewards.py").write_text("from my_rewards import short\n")
    (tmp_path / "my_broken_rewards.py").write_text("def short(:\n")
    (mine,) = load_rewards({"my_rewards:short": 0.25})
    assert (mine.name, mine.weight, mine.function("four", "")) == ("short", 0.25, -4)
    for name, message in (
        ("my_rewards:long", "my_rewards:long cannot be imported: AttributeError: module 'my_rewards' has no attribute"),
        ("my_rewards:none", "my_rewards:none is not a function, but of type int"),
        ("nowhere:short", "nowhere:short cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("my_broken_rewards:short", "cannot be imported: SyntaxError"),
        (":short", "cannot be imported: ValueError"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load_rewards({name: 1.0})
    with pytest.raises(UserError, match="two rewards are called 'short'"):
        load_rewards({"my_rewards:short": 1.0, "your_rewards:short": 1.0})
