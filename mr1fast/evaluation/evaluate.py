"""How good is a model on a data set? For the trainer, and for `python -m mr1fast.evaluate`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mr1fast.evaluation.result import EvalResult, Sample

if TYPE_CHECKING:
    from mr1fast.data.example import Example, Examples
    from mr1fast.model.policy import Policy
    from mr1fast.model.prefix import Prefix


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
    samples: list[Sample] | None = None,
) -> EvalResult:
    """Answer every problem of `dataset` greedily once and `sampled` times (0 for none) at `temperature`.

    max_completion_length: tokens. batch_size: problems at a time, None by the model's size. progress: what a progress
    bar is called, None for no bar. samples: an empty list that holds what there is if the evaluation is interrupted.
    Depends on `seed` and no global random state, and leaves the policy in the mode it was in.
    """
    import torch
    from tqdm import tqdm

    from mr1fast.model.load import is_small
    from mr1fast.model.rollout import Sampler
    from mr1fast.rewards import accuracy_reward, extract_answer, format_reward

    if batch_size is None:
        batch_size = 64 if is_small(policy.model) else 8
    generator = torch.Generator(policy.device).manual_seed(seed)
    sampler = Sampler(policy, max_completion_length=max_completion_length, generator=generator)
    training = policy.model.training
    total = len(dataset) * (1 + sampled)
    bar = tqdm(total=total, desc=progress, unit="completion", leave=False, disable=progress is None)

    def complete(examples: list[Example], prefix: Prefix, num_generations: int, at: float) -> list[str]:
        rollout = sampler.generate(examples, num_generations=num_generations, temperature=at, prefix=prefix)
        bar.update(len(rollout.completions))
        return rollout.completions

    samples = [] if samples is None else samples
    policy.model.eval()
    try:
        problems = _distinct(dataset)
        while batch := list(itertools.islice(problems, batch_size)):
            examples = [example for _, example in batch]
            with torch.no_grad():
                prefix = policy.encode_prefix(policy.encode(examples))
            greedy = complete(examples, prefix, 1, 0.0)
            random = complete(examples, prefix, sampled, temperature) if sampled else []
            for row, ((index, example), completion) in enumerate(zip(batch, greedy)):
                samples.append(
                    Sample(
                        index=index,
                        name=example.name,
                        problem=example.problem,
                        solution=example.solution,
                        completion=completion,
                        answer=extract_answer(completion),
                        correct=accuracy_reward(completion, example.solution) > 0,
                        formatted=format_reward(completion) > 0,
                        sampled_correct=tuple(
                            accuracy_reward(text, example.solution) > 0
                            for text in random[row * sampled : (row + 1) * sampled]
                        ),
                    )
                )
    finally:
        bar.close()
        policy.model.train(training)
    return EvalResult.of(samples)


def _distinct(dataset: Examples) -> Iterator[tuple[int, Example]]:
    """Each problem once: a data set gives the next one again in place of one whose image turns out to be broken."""
    seen: set[str] = set()
    for index in range(len(dataset)):
        example = dataset[index]
        if example.name not in seen:
            seen.add(example.name)
            yield index, example
