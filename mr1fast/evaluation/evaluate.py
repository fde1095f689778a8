"""How good is a model on a data set? For the trainer, and for `python -m mr1fast.evaluate`."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from mr1fast.data.dataset import problems
from mr1fast.data.example import Example, Examples
from mr1fast.errors import UserError
from mr1fast.evaluation.result import Answered, EvalResult
from mr1fast.model.load import is_small
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix
from mr1fast.model.rollout import Sampler
from mr1fast.rewards import accuracy_reward, extract_answer, format_reward, judged_as_r1v


class EvaluationStopped(KeyboardInterrupt):
    """Ctrl-C in the middle of an evaluation; `result` covers the problems answered until then."""

    def __init__(self, result: EvalResult):
        super().__init__()
        self.result = result


def evaluate(
    policy: Policy,
    dataset: Examples,
    *,
    max_completion_length: int,
    sampled: int = 1,
    temperature: float = 1.0,
    batch_size: int | None = None,
    progress: str | None = None,
    seed: int = 0,
) -> EvalResult:
    """Answer every problem of `dataset` greedily once and `sampled` times (0 for none) at `temperature`.

    max_completion_length: tokens. batch_size: problems at a time; None to choose by the model's size. progress: title
    of a progress bar, None for no bar. The result depends on `seed`, not on global random state; the policy keeps
    its mode. Raises EvaluationStopped (a KeyboardInterrupt) if interrupted after some problems are answered, and
    UserError if there is no problem.
    """
    total = len(dataset) * (1 + sampled)
    bar = tqdm(total=total, desc=progress, unit="completion", leave=False, disable=progress is None)
    generator = torch.Generator(policy.device).manual_seed(seed)
    sampler = Sampler(policy, max_completion_length=max_completion_length, generator=generator)
    asked = _Asked(policy, sampler, sampled, temperature, bar)
    answered: list[Answered] = []
    left, training = problems(dataset), policy.model.training
    policy.model.eval()
    try:
        with bar:
            while batch := list(itertools.islice(left, batch_size or (64 if is_small(policy.model) else 8))):
                answered += asked.answers(batch)
        answered = _judged_as_r1v(answered)
    except KeyboardInterrupt:
        if not answered:
            raise
        raise EvaluationStopped(EvalResult.of(answered)) from None
    finally:
        policy.model.train(training)
    return EvalResult.of(answered)


@dataclass(frozen=True)
class _Asked:
    """A policy that is asked problems, a batch at a time."""

    policy: Policy
    sampler: Sampler
    sampled: int
    temperature: float
    bar: tqdm

    def answers(self, batch: Sequence[tuple[int, Example]]) -> list[Answered]:
        examples = [example for _, example in batch]
        with torch.no_grad():
            prefix = self.policy.encode_prefix(self.policy.encode(examples))
        G = self.sampled
        greedy = self._complete(examples, prefix, 1, 0.0)
        drawn = self._complete(examples, prefix, G, self.temperature) if G else []
        return [
            _judged(index, example, greedy[row], drawn[row * G : (row + 1) * G])
            for row, (index, example) in enumerate(batch)
        ]

    def _complete(self, examples: list[Example], prefix: Prefix, num_generations: int, at: float) -> list[str]:
        rollout = self.sampler.generate(examples, num_generations=num_generations, temperature=at, prefix=prefix)
        self.bar.update(len(rollout.completions))
        return rollout.completions


def _judged_as_r1v(answered: list[Answered]) -> list[Answered]:
    """With R1-V's verdicts, which depend on all solutions; without, where math-verify cannot be asked for them."""
    try:
        verdicts = judged_as_r1v([one.completion for one in answered], [one.solution for one in answered])
    except UserError as error:  # no reason to lose the other figures
        warnings.warn(f"no accuracy as R1-V counts: {error}", stacklevel=2)
        verdicts = None
    if verdicts is None:
        return answered
    return [replace(one, correct_as_r1v=verdict) for one, verdict in zip(answered, verdicts)]


def _judged(index: int, example: Example, completion: str, drawn: Sequence[str]) -> Answered:
    return Answered(
        index=index,
        name=example.name,
        problem=example.problem,
        solution=example.solution,
        completion=completion,
        answer=extract_answer(completion),
        correct=accuracy_reward(completion, example.solution, choices=example.choices) > 0,
        formatted=format_reward(completion) > 0,
        sampled_correct=tuple(accuracy_reward(text, example.solution, choices=example.choices) > 0 for text in drawn),
    )
