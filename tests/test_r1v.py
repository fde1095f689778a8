"""As R1-V counts: rows of its published logs, each with its verdict, and what they do not show."""

import json
import os
from pathlib import Path

import pytest

from mr1fast.rewards import REWARDS, judged_as_r1v
from mr1fast.rewards import worker as math_worker
from mr1fast.rewards.r1v import r1v_counting

LOGS = Path(os.environ.get("R1V_LOGS", "no logs"))  # every second row of those in R1-V's src/eval/logs
# Rows of them: completion, solution, R1-V's verdict.
COUNTING = [
    ("<answer>4</answer>", "4", True),
    ("<think>\nA. 10\n</think>\n<answer>\n10\n</answer>", "10", True),
    ("<think>\nA. 7\nB. 6\n</think>\n<answer>Q</answer>", "7", False),
]
GEOMETRY = [
    ("<think>Angle CDB is half of angle ABC, which is 35 degrees. </think> <answer>35</answer>", "55°", False),
    ("<think> Therefore, angle EAC = 80.0 - 35.0 = 45.0. </think> <answer>45.0</answer>", "45°", True),
    ("<think>BC + BE = AB = 6.0. </think>\n<answer>6.0</answer>", "6cm", True),
]


@pytest.mark.parametrize("rows", [COUNTING, GEOMETRY])
def test_rows_are_judged_as_r1v_did(rows):
    completions, solutions, verdicts = (list(column) for column in zip(*rows))
    assert judged_as_r1v(completions, solutions) == verdicts
    name = "r1v-counting" if rows is COUNTING else "r1v-geometry"
    assert REWARDS[name](completions, solutions, choices=[None] * 3) == verdicts


@pytest.mark.skipif(not LOGS.is_dir(), reason="needs R1-V's logs, in the folder $R1V_LOGS")
@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("superclevr_2b_grpo100", 86),
        ("superclevr_2b_instruct", 52),
        ("geoqa_7b_grpo", 142),
        ("geoqa_7b_instruct", 113),
    ],
)
def test_every_row_of_the_published_logs(name, right):
    rows = [json.loads(line) for line in (LOGS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    verdicts = judged_as_r1v([row["model_output"] for row in rows], [row["ground_truth"] for row in rows])
    assert verdicts is not None
    assert [r["row"] for r, verdict in zip(rows, verdicts) if verdict != r["r1v_counts_right"]] == []
    assert sum(verdicts) == right


def test_counting_takes_the_first_tagged_integer_of_any_length():
    assert r1v_counting("<answer>x</answer> <answer>03</answer> <answer>4</answer>", "3")
    assert not r1v_counting("<answer>3.0</answer>", "3")
    assert not r1v_counting("<answer>3</answer>", "3 cm")
    assert r1v_counting(f"<answer>{'9' * 5000}</answer>", "9" * 5000)
    assert r1v_counting("<answer>0</answer>", "00")


def test_without_math_verify_there_is_no_verdict_on_geometry(monkeypatch):
    monkeypatch.setattr(math_worker, "missing", lambda: "math-verify")
    assert judged_as_r1v(["<answer>3</answer>"], ["3 cm"]) is None
    assert judged_as_r1v(["<answer>3</answer>"], ["3"]) == [True]
