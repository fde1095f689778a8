"""The trainer's options, declared one by one: name, type, default, bounds, and what --help says about them.

They are in three files, by question; `config` says what they mean together.
"""

from __future__ import annotations

from dataclasses import dataclass

from mr1fast.options.learning_options import LearningOptions
from mr1fast.options.problem_options import ProblemOptions
from mr1fast.options.recipes import R1_V, RECIPES
from mr1fast.options.run_options import RunOptions

# The headings of --help, in this order.
GROUPS = {
    "model": "model and method",
    "data": "data",
    "reward": "rewards",
    "sampling": "sampling",
    "loss": "loss and its KL term",
    "optimizer": "optimizer",
    "evaluation": "evaluation",
    "engine": "engine",
    "files": "files and checkpoints",
    "logging": "logging (may be changed when a run is resumed)",
    "device": "device (may be changed when a run is resumed)",
}
# The options that may differ by task, since recipes differ by task: one value for all tasks, or {task: value}.
BY_TASK = (*RECIPES[R1_V], "gradient_accumulation_steps")


@dataclass(frozen=True)
class TrainOptions(RunOptions, LearningOptions, ProblemOptions):  # a dataclass has the fields of its last base first
    """Every option of `python -m mr1fast.train` with its help; None where the default depends on other options."""
