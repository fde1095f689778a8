"""Fig. 3: the same problems answered by SFT and by GRPO-D side by side, the first ones of each test, not selected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from mr1fast.data.example import Example
from mr1fast.data.tasks import TASKS
from mr1fast.evaluation.drawing import clipped, drawable
from mr1fast.evaluation.samples import RIGHT, UNTAGGED, WRONG
from mr1fast.reproduction.arms import OTHER, TEST_OF, Test
from mr1fast.reproduction.experiments import Run
from mr1fast.reproduction.results import Results
from mr1fast.rewards import accuracy_reward, is_right_untagged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROBLEMS = 4  # of each test
ARMS_SHOWN = {"sft": "SFT", "grpo-d": "GRPO-D"}


def draw_answers(results: Results) -> Figure | None:
    """A row for each task that is trained on and each that is tested on; None if an arm of it is missing."""
    seeds = [set(results.seeds(task, arm)) for task in TASKS for arm in ARMS_SHOWN]
    common = set.intersection(*seeds)
    if not common:
        return None
    seed = min(common)
    rows = [(task, test) for task in TASKS for test in (task, OTHER[task])]
    figure = Figure(figsize=(3.1 * PROBLEMS, 3 * len(rows) + 0.6), dpi=110)
    head = f"The first {PROBLEMS} problems of each test, not selected, seed {seed}"
    figure.suptitle(head, fontsize=12, fontweight="bold", x=0.01, y=0.995, ha="left")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.955, bottom=0.01, hspace=0.16, wspace=0.05)
    for line, (task, test) in zip(figure.subplots(len(rows), PROBLEMS, squeeze=False), rows):
        for index, axis in enumerate(line):
            problem = TASKS[test].example(TEST_OF[test].split, index, reworded=True)
            said = {arm: _completion(results, Run(task, arm, seed), TEST_OF[test], index) for arm in ARMS_SHOWN}
            _draw_problem(axis, problem, said)
        kind = "same task" if test == task else "cross-task"
        line[0].set_title(f"trained on {TASKS[task].title}, {kind}", fontsize=10, loc="left", fontweight="bold")
    return figure


def _completion(results: Results, run: Run, test: Test, index: int) -> str:
    return results.records[run]["completions"][test.name][index]


def _draw_problem(axis: Axes, problem: Example, said: dict[str, str]) -> None:
    axis.set_axis_off()
    picture = axis.inset_axes((0.25, 0.5, 0.5, 0.48))
    picture.imshow(problem.images[0], interpolation="nearest")
    picture.set_axis_off()
    axis.text(0.02, 0.47, f"{problem.problem} ({problem.solution})", fontsize=8, va="top", parse_math=False)
    for place, (arm, completion) in zip((0.37, 0.18), said.items()):
        mark, colour, *_ = _judgement(completion, problem.solution)
        text = f"{mark} {ARMS_SHOWN[arm]}:\n{clipped(completion or '(nothing)', 2, 46)}"
        axis.text(0.02, place, drawable(text), fontsize=7.5, va="top", color=colour, parse_math=False)


def _judgement(completion: str, solution: str) -> tuple:
    if accuracy_reward(completion, solution) > 0:
        return RIGHT
    return UNTAGGED if is_right_untagged(completion, solution) else WRONG
