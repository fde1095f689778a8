"""curves.png and samples.png of a run. A picture that fails does not end the run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from mr1fast.data.dataset import problems
from mr1fast.data.example import Example
from mr1fast.data.tasks import TASKS
from mr1fast.evaluation.answers import read_answers
from mr1fast.evaluation.evaluate import evaluate
from mr1fast.evaluation.result import Answered
from mr1fast.model.policy import Policy
from mr1fast.training.setup import Setup

if TYPE_CHECKING:
    from mr1fast.evaluation.samples import BeforeAfter

PICTURED = 8  # problems of each task in samples.png
Place = tuple[str, int]  # of a problem: the name of its data set, and its index there


@dataclass(frozen=True)
class Unfinished:
    """A model in the middle of its training."""

    name: str  # of its task
    policy: Policy
    step: int


def draw_pictures(setup: Setup, unfinished: Unfinished | None = None) -> None:
    """Draw curves.png, and samples.png of the models so far."""
    try:
        from mr1fast.evaluation.curves import draw_curves  # matplotlib takes its time
        from mr1fast.evaluation.samples import draw_samples

        draw_curves([setup.folder.path], setup.folder.curves)
        shown, title = samples(setup, unfinished)
        if shown:
            draw_samples(setup.folder.samples, shown, title)
    except Exception as error:
        print(f"the pictures could not be drawn: {error}", file=sys.stderr)


def samples(setup: Setup, unfinished: Unfinished | None = None) -> tuple[list[BeforeAfter], str]:
    """The first problems of the test splits as they were answered before and after, and a title.

    The answers are those of the evaluations; only a model whose training was stopped has to give its own now.
    """
    from mr1fast.evaluation.samples import BeforeAfter

    shown, titles = [], []
    for name in setup.names:
        asked = _first_problems(setup, name)
        when, title = "after training", TASKS[name].title if name in setup.config.tasks else name
        if unfinished is not None and unfinished.name == name:
            when = f"after {unfinished.step} step{'s' * (unfinished.step != 1)}"
            title += f" ({when} of {setup.config.for_task(name).max_steps})"
            after = _answers_now(setup, unfinished, asked)
        else:
            after = _answers(setup, f"trained on {name}")
        before = _answers(setup, "before training")
        both = [place for place in asked if place in before and place in after]
        shown += [BeforeAfter(asked[place], before[place], after[place], when) for place in both]
        titles += [title] if both else []
    text = f"{' and '.join(titles)}, trained with {setup.config.method}"
    return shown, text[:1].upper() + text[1:]


def _first_problems(setup: Setup, name: str) -> dict[Place, Example]:
    """Of the task's own test split; without one, as many of each of the others."""
    tests = [setup.tests[name]] if name in setup.tests else list(setup.tests.values())
    each = -(-PICTURED // max(len(tests), 1))
    found = [((test.name, index), example) for test in tests for index, example in islice(problems(test), each)]
    return dict(found[:PICTURED])


def _answers(setup: Setup, when: str) -> dict[Place, Answered]:
    folder = setup.folder.answers(when)
    return {(data, one.index): one for data in setup.tests for one in read_answers(folder / f"{data}.jsonl")}


def _answers_now(setup: Setup, unfinished: Unfinished, asked: dict[Place, Example]) -> dict[Place, Answered]:
    longest = setup.config.for_task(unfinished.name).max_completion_length
    result = evaluate(unfinished.policy, list(asked.values()), max_completion_length=longest, sampled=0)
    return dict(zip(asked, result.answered, strict=True))
