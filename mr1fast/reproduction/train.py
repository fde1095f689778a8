"""One arm on a small model: train it, test it, and say all that the tables and figures need."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch

from mr1fast.data.dataset import load_split
from mr1fast.data.example import Example, Examples
from mr1fast.evaluation.evaluate import evaluate
from mr1fast.evaluation.result import EvalResult
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TaskConfig, TrainConfig
from mr1fast.reproduction.arms import SETTING, STEPS, TEST_OF, TESTS, TRAIN_SAMPLES, Arm, Test
from mr1fast.reproduction.encoded import EncodedOnce, RunOnce
from mr1fast.reproduction.experiments import BASE_RUN, Run
from mr1fast.training.trainer import Trainer

WATCH_STEPS = 10  # between tests on the way
WATCHED = 100  # problems of each of these
ON_THE_WAY = {test.name for test in TEST_OF.values()}  # the two that Fig. 1 draws
SHOWN = 8  # completions of each test that are kept, for fig3
KEPT = ("loss", "kl", "beta", "entropy", "rewards/accuracy_reward/mean", "rewards/format_reward/mean")
WRONG_ANSWERS = 0.2  # of "noise"


# ---- what no option of the trainer says ------------------------------------------------------------------------------


class ConstantRate(Trainer):
    """After the warm-up the learning rate stays at its peak: the falling one weakens Eq. 3's late weight."""

    @property
    def learning_rate(self) -> float:
        return self.config.learning_rate * min(1.0, (self.finished_steps + 1) / (self.config.warmup_steps + 1))


class ClosedLoop(Trainer):
    """The KL weight is beta_max times the batch's accuracy: little while there is much to learn."""

    @property
    def beta(self) -> float:
        accuracy = 0.0 if self.step_data is None else self.step_data.metrics["rewards/accuracy_reward/mean"]
        return self.config.beta_max * accuracy


@dataclass
class Noisy:
    """Examples of which a fifth, always the same ones, have the answer of another one."""

    examples: Examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        rng = random.Random(f"noise/{index}")
        example = self.examples[index]
        if rng.random() >= WRONG_ANSWERS:
            return example
        return replace(example, solution=self.examples[rng.randrange(len(self))].solution)


TWISTS: dict[str, type[Trainer]] = {
    "": Trainer,
    "constant-rate": ConstantRate,
    "closed-loop": ClosedLoop,
    "noise": Trainer,
}


# ---- an arm ----------------------------------------------------------------------------------------------------------


def config_of(run: Run, steps: int = STEPS) -> TaskConfig:
    setting = {**SETTING, "max_steps": steps, **run.recipe.options}
    return TrainConfig(task=run.task, seed=run.seed, **setting).for_task(run.task)


def result_of_run(run: Run, model: str, steps: int = STEPS, tests: Sequence[Test] | None = None) -> dict[str, Any]:
    """Train and test; with the base, test alone. The result is for a JSON file.

    steps: of the usual setting; an arm may have a number of its own. tests: by default the run's.
    """
    tests = run.tests if tests is None else tests
    torch.set_num_threads(1)  # a model of this size is slower on more threads
    started = time.perf_counter()
    policy, curve, watched = _policy(model), [], []
    on_the_way = [test for test in tests if test.name in ON_THE_WAY]
    if run != BASE_RUN:
        config = config_of(run, steps)
        trainer = _trainer(run.recipe, config, policy, model, run.task)
        for step in range(1, config.max_steps + 1):
            metrics = trainer.step()
            curve.append({"step": step} | {name: round(metrics[name], 5) for name in KEPT if name in metrics})
            if _is_watched(run) and step % WATCH_STEPS == 0 and step < config.max_steps:
                figures = {test.name: _tested(policy, test, WATCHED).figures() for test in on_the_way}
                watched.append({"step": step, **figures})
    results = {test.name: _tested(policy, test, test.problems) for test in tests}
    first = {test.name: EvalResult.of(results[test.name].answered[:WATCHED]).figures() for test in on_the_way}
    return {
        "curve": curve,
        # The end is judged by the same problems as what comes before it.
        "watched": [*watched, {"step": len(curve), **first}] if _is_watched(run) else [],
        "tests": {name: result.figures() for name, result in results.items()},
        "completions": {name: [one.completion for one in r.answered[:SHOWN]] for name, r in results.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def _is_watched(run: Run) -> bool:
    """Fig. 1's arms, and the base, where their curves begin. Tests on the way do not change the training."""
    return run == BASE_RUN or run.arm in ("sft", "grpo-mean")


def _trainer(arm: Arm, config: TaskConfig, policy: Policy, model: str, task: str) -> Trainer:
    reference = _base(model) if config.needs_reference else None
    examples = _drawings(task, config.seed)
    return TWISTS[arm.twist](config, policy, reference, Noisy(examples) if arm.twist == "noise" else examples)


@cache
def _base(model: str) -> RunOnce:
    return RunOnce(load_model(model), load_processor(model))


def _policy(model: str) -> Policy:
    """The base, to be trained. Copied, as a process runs several arms."""
    base = _base(model)
    return EncodedOnce(copy.deepcopy(base.model).requires_grad_(True), base.processor, base.known)


@lru_cache(maxsize=2)  # arms are run seed by seed
def _drawings(task: str, seed: int) -> list[Example]:
    split = load_split(task, "train", count=TRAIN_SAMPLES[task], sample_seed=seed, reworded=True)
    return [split[index] for index in range(len(split))]


@cache
def _problems(test: Test) -> list[Example]:
    split = load_split(test.task, test.split, count=test.problems, reworded=True)
    return [split[index] for index in range(len(split))]


def _tested(policy: Policy, test: Test, count: int) -> EvalResult:
    longest = SETTING["max_completion_length"]
    return evaluate(policy, _problems(test)[:count], max_completion_length=longest, sampled=0, batch_size=100)


def two_steps(run: Run, model: str) -> dict[str, Any]:
    """Of a training and of its tests: its part of a fingerprint, see `runner.fingerprint`."""
    result = result_of_run(run, model, steps=2, tests=[replace(test, problems=8) for test in TESTS])
    _problems.cache_clear()
    numbers = {name: round(value, 3) + 0.0 for name, value in result["curve"][-1].items()}  # no -0.0
    return {"numbers": numbers, "completions": result["completions"], "tests": result["tests"]}
