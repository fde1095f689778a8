"""How good is a model on a data set? For the trainer, and for `python -m mr1fast.evaluate`."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mr1fast.data.dataset import nothing_to_ask, problem_at
from mr1fast.data.example import Example, Examples
from mr1fast.errors import UserError
from mr1fast.evaluation.answers import append_answers, read_answers
from mr1fast.evaluation.result import Answered, EvalResult
from mr1fast.model.load import is_small
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix
from mr1fast.model.rollout import Sampler
from mr1fast.options.recipes import default_eval_batch_size
from mr1fast.rewards import accuracy_reward, extract_answer, format_reward, is_right_untagged, judged_as_r1v


def evaluate(
    policy: Policy,
    dataset: Examples,
    *,
    max_completion_length: int,
    sampled: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int | None = None,
    progress: str | None = None,
    seed: int = 0,
    file: Path | None = None,
    divide: Divide | None = None,
) -> EvalResult:
    """Answer every problem of `dataset` greedily once and `sampled` times (0 for none) at `temperature`.

    top_k, top_p: of the sampled ones, see `Sampler.generate`. max_completion_length: tokens. batch_size: problems at a
    time; None to choose by the model's size. progress: title of a progress bar, None for no bar. The result depends on
    `seed`, not on batches or global random state; the policy keeps its mode. file: gets the answers of each batch as
    soon as they are there, see `answers`; a problem that it has the answers to already is not asked again. divide: see
    `Divide`. Raises UserError if there is no problem.
    """
    divide = divide or Divide()
    indices = divide.share(range(len(dataset)))
    bar = tqdm(total=len(indices) * (1 + sampled), desc=progress, unit="completion", leave=False, disable=not progress)
    sampler = Sampler(policy, max_completion_length=max_completion_length)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    asked = _Asked(policy, sampler, seed, sampled, sampling, bar)
    known = {one.index: one for one in (read_answers(file) if file else ())}
    answered: list[Answered] = []

    def unanswered() -> Iterator[tuple[int, Example]]:
        for index in indices:
            if (example := problem_at(dataset, index)) is None:
                continue
            if (one := known.get(index)) is not None and one.answers(example, sampled):
                answered.append(one)
                bar.update(1 + sampled)
            else:
                yield index, example

    left, training = unanswered(), policy.model.training
    policy.model.eval()
    try:
        with bar:
            while batch := list(itertools.islice(left, batch_size or default_eval_batch_size(is_small(policy.model)))):
                new = asked.answers(batch)
                answered += new
                if file is not None and divide.alone:
                    append_answers(file, new)
    finally:
        policy.model.train(training)
    answered = divide.whole(answered)
    if not answered:
        raise UserError(nothing_to_ask(dataset))
    if file is not None and divide.writes:
        append_answers(file, [one for one in answered if one.index not in known])
    return result_of(answered)


@dataclass(frozen=True)
class Divide:
    """How an evaluation is divided among processes: as it is here, not at all.

    share: the indices that this process asks. whole: the answers of all, given its own. alone: it is the only process,
    which writes answers as soon as it has them. writes: it is the one of several that writes them in the end.
    """

    share: Callable[[Sequence[int]], Sequence[int]] = list
    whole: Callable[[list[Answered]], list[Answered]] = list
    alone: bool = True
    writes: bool = False


def result_of(answered: Sequence[Answered]) -> EvalResult:
    """The figures of these problems, with R1-V's verdicts where they can be had."""
    return EvalResult.of(_judged_as_r1v(sorted(answered, key=lambda one: one.index)))


@dataclass(frozen=True)
class _Asked:
    """A policy that is asked problems, a batch at a time."""

    policy: Policy
    sampler: Sampler
    seed: int
    sampled: int
    sampling: dict[str, Any]  # keywords of Sampler.generate
    bar: tqdm

    def answers(self, batch: Sequence[tuple[int, Example]]) -> list[Answered]:
        examples = [example for _, example in batch]
        with torch.no_grad():
            prefix = self.policy.encode_prefix(self.policy.encode(examples))
        G = self.sampled
        # By problem, so that an evaluation that is interrupted and goes on draws as one in a piece does.
        streams = [f"{self.seed}/{index}" for index, _ in batch]
        greedy = self._complete(examples, prefix, 1, {"temperature": 0.0})
        drawn = self._complete(examples, prefix, G, {**self.sampling, "streams": streams}) if G else []
        return [
            _judged(index, example, greedy[row], drawn[row * G : (row + 1) * G])
            for row, (index, example) in enumerate(batch)
        ]

    def _complete(self, examples: list[Example], prefix: Prefix, G: int, sampling: dict[str, Any]) -> list[str]:
        rollout = self.sampler.generate(examples, num_generations=G, prefix=prefix, **sampling)
        self.bar.update(len(rollout.completions))
        return rollout.completions


def _judged_as_r1v(answered: Sequence[Answered]) -> list[Answered]:
    """With R1-V's verdicts, which depend on all solutions; without, where math-verify cannot be asked for them."""
    try:
        verdicts = judged_as_r1v([one.completion for one in answered], [one.solution for one in answered])
    except UserError as error:  # no reason to lose the other figures
        warnings.warn(f"no accuracy as R1-V counts: {error}", stacklevel=2)
        verdicts = None
    if verdicts is None:
        return list(answered)
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
        right_untagged=is_right_untagged(completion, example.solution, choices=example.choices),
    )
