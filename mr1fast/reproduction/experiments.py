"""The paper's table and figures as lists of arms and of comparisons between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mr1fast.reproduction.arms import ARMS, BASE, OTHER, TEST_OF, TESTS, Arm, Test, label, tests_of


@dataclass(frozen=True)
class Run:
    """An arm on a task with a seed. The base is no one's training: its task and seed are those of `BASE_RUN`."""

    task: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return "base" if self == BASE_RUN else f"{self.task}-{self.arm}-{self.seed}"

    @property
    def recipe(self) -> Arm:
        return BASE if self == BASE_RUN else ARMS[self.arm]

    @property
    def tests(self) -> tuple[Test, ...]:
        return TESTS if self == BASE_RUN else tests_of(self.task)


BASE_RUN = Run("", BASE.name, 0)


@dataclass(frozen=True)
class Comparison:
    """The difference of two arms, or of the means of several, trained on one task, in accuracy on one test.

    The base on the right is a constant: it is not trained, so it has no seed.
    """

    task: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    test: Test

    @property
    def title(self) -> str:
        left, right = (" and ".join(map(label, side)) for side in (self.left, self.right))
        return f"{left} − {right}"


def compared(tests: str, pairs: Iterable[tuple[str, str]], tasks: Sequence[str] = ("vc", "gr")) -> list[Comparison]:
    """tests: "own" for the test of the task that is trained on, "other" for that of the other one."""
    where = {"own": TEST_OF, "other": {task: TEST_OF[other] for task, other in OTHER.items()}}[tests]
    return [
        Comparison(task, tuple(left.split("+")), tuple(right.split("+")), where[task])
        for task in tasks
        for left, right in pairs
    ]


@dataclass(frozen=True)
class Experiment:
    """arms: by the task that they are trained on. comparisons: all that are looked at, corrected together.

    question: what it asks, in a sentence. seeds: how many of the seeds it takes, None for all.
    """

    name: str
    title: str
    question: str
    arms: dict[str, tuple[str, ...]]
    comparisons: tuple[Comparison, ...] = ()
    seeds: int | None = None

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """The base first, then seed by seed."""
        trained = [
            Run(task, arm, seed) for seed in seeds[: self.seeds] for task, arms in self.arms.items() for arm in arms
        ]
        return [BASE_RUN, *trained]


MAIN = ("sft", "sft-reasoning", "grpo-mean", "grpo-d")
WEIGHTS = ("grpo-0", "grpo-0.04", "grpo-0.1", "grpo-mean", "grpo-0.5", "grpo-1")
ALPHAS = ("alpha-0", "alpha-0.25", "grpo-mean", "alpha-0.75", "alpha-1")  # grpo-mean has α = 0.5
CONTROLS = ("grpo-mean", "grpo-d", "reversed", "grpo-rated", "grpo-mean-constant-rate", "grpo-d-constant-rate")
BEYOND = tuple(f"{name}-{arm}" for name in ("reuse", "noise", "long", "hack") for arm in ("grpo", "grpo-d"))

_MAIN_PAIRS = [
    ("grpo-mean", "base"),
    ("grpo-d", "base"),
    ("grpo-d", "grpo-mean"),
    ("grpo-mean", "sft"),
    ("grpo-mean", "sft-reasoning"),
    ("grpo-d", "sft"),
    ("grpo-d", "sft-reasoning"),
]
_SCHEDULE_PAIRS = [
    ("grpo-d", "grpo-mean"),
    ("grpo-d", "grpo-rated"),
    ("grpo-d", "reversed"),
    ("grpo-d-constant-rate", "grpo-mean-constant-rate"),
]
_WEIGHT_PAIRS = [("grpo-mean+grpo-0.5", "grpo-0+grpo-1"), ("grpo-mean", "grpo-0"), ("grpo-mean", "grpo-1")]
_BEYOND_PAIRS = [
    *((f"{name}-grpo-d", f"{name}-grpo") for name in ("reuse", "noise", "long", "hack")),
    ("closed-loop", "grpo-mean"),
    ("adaptive", "grpo-mean"),
]

_ALL = [
    Experiment(
        "table1",
        "Table 1: accuracy on the task that is trained on",
        "Is GRPO-D ahead of SFT, and SFT ahead of GRPO?",
        {"vc": (*MAIN, "grpo-0.04"), "gr": (*MAIN, "grpo-0.04")},
        tuple(compared("own", _MAIN_PAIRS)),
    ),
    Experiment(
        "fig1",
        "Fig. 1: SFT and GRPO while they train",
        "Does SFT learn faster, and lose the other task sooner?",
        {"vc": ("sft", "grpo-mean"), "gr": ("sft", "grpo-mean")},
    ),
    Experiment(
        "fig3",
        "Fig. 3: the same problems answered by SFT and by GRPO-D",
        "What do their answers look like?",
        {"vc": ("sft", "grpo-d"), "gr": ("sft", "grpo-d")},
        seeds=1,
    ),
    Experiment(
        "fig4",
        "Fig. 4: the weight α of the format reward",
        "Does a reward for the form help, and is there a best weight?",
        {"gr": ALPHAS},
        tuple(compared("own", [("grpo-mean", "alpha-0"), ("alpha-1", "grpo-mean")], ["gr"])),
    ),
    Experiment(
        "fig5",
        "Fig. 5: rewards over the steps",
        "Does the schedule change how the rewards rise?",
        {"vc": ("grpo-mean", "grpo-d"), "gr": ("grpo-mean", "grpo-d")},
    ),
    Experiment(
        "fig6",
        "Fig. 6: constant KL weights",
        "Is there a best constant weight, with less accuracy on both sides of it?",
        {"gr": (*WEIGHTS, "grpo-d")},
        tuple(compared("own", _WEIGHT_PAIRS, ["gr"]) + compared("other", _WEIGHT_PAIRS, ["gr"])),
    ),
    Experiment(
        "fig7",
        "Fig. 7: trained on one task, tested on the other",
        "Does training on one task help the other, and more so with GRPO-D than with SFT?",
        {"vc": MAIN, "gr": MAIN},
        tuple(compared("other", _MAIN_PAIRS)),
    ),
    Experiment(
        "controls",
        "Controls: the schedule against constants of the same mean, its reversal and a constant rate; tags alone",
        "Is it the schedule, or its mean? And is it the answers, or the tags?",
        {"vc": (*CONTROLS, "tags"), "gr": (*CONTROLS, "tags")},
        tuple(
            compared("own", [*_SCHEDULE_PAIRS, ("grpo-mean", "tags")])
            + compared("other", [*_SCHEDULE_PAIRS, ("grpo-mean", "tags")])
        ),
    ),
    Experiment(
        "beyond",
        "Beyond the paper: six settings in which the schedule could matter",
        "Off-policy updates, wrong answers, long runs, a reward that can be hacked, weights that follow the training.",
        {"gr": (*BEYOND, "closed-loop", "adaptive", "grpo-mean")},
        tuple(compared("own", _BEYOND_PAIRS, ["gr"]) + compared("other", _BEYOND_PAIRS, ["gr"])),
        seeds=3,
    ),
]
EXPERIMENTS: dict[str, Experiment] = {one.name: one for one in _ALL}
# What `all` is: the paper's, and the controls that it takes to read them.
DEFAULT = tuple(name for name in EXPERIMENTS if name != "beyond")


def runs_of(names: Iterable[str], seeds: Sequence[int], arms: Sequence[str] | None = None) -> list[Run]:
    """The runs that these experiments need, each once, seed by seed, so that one that is interrupted is balanced.

    arms: only these (and the base).
    """
    found = {run: None for name in names for run in EXPERIMENTS[name].runs(seeds)}
    kept = [run for run in found if run == BASE_RUN or arms is None or run.arm in arms]
    return sorted(kept, key=lambda run: (run != BASE_RUN, seeds.index(run.seed) if run != BASE_RUN else 0))
