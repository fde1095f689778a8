"""How good is a model on a data set? For the trainer, and for `python -m mr1fast.evaluate`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mr1fast.evaluation.result import EvalResult, Sample

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration

    from mr1fast.data.example import Example, Examples
    from mr1fast.model.processor import Qwen2VLTextImageProcessor


def evaluate(
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLTextImageProcessor,
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
    Depends on `seed` and no global random state, and leaves the model in the mode it was in.
    """
    import torch
    from tqdm import tqdm

    from mr1fast.model.load import encode_prompts, is_small
    from mr1fast.model.prefix import Prefix, encode_prefix
    from mr1fast.model.rollout import decode, end_tokens, generate
    from mr1fast.rewards import accuracy_reward, extract_answer, format_reward

    if batch_size is None:
        batch_size = 64 if is_small(model) else 8
    generator = torch.Generator(model.device).manual_seed(seed)
    eos, training = end_tokens(model), model.training
    total = len(dataset) * (1 + sampled)
    bar = tqdm(total=total, desc=progress, unit="completion", leave=False, disable=progress is None)

    def complete(inputs: dict[str, torch.Tensor], prefix: Prefix, num_generations: int, at: float) -> list[str]:
        rollout = generate(
            model,
            inputs,
            num_generations=num_generations,
            temperature=at,
            max_new_tokens=max_completion_length,
            generator=generator,
            prefix=prefix,
        )
        bar.update(len(rollout.completion_ids))
        return decode(processor.tokenizer, rollout, eos)

    samples = [] if samples is None else samples
    model.eval()
    try:
        problems = _distinct(dataset)
        while batch := list(itertools.islice(problems, batch_size)):
            examples = [example for _, example in batch]
            inputs = encode_prompts(processor, examples)
            with torch.no_grad():
                prefix = encode_prefix(model, inputs)
            greedy = complete(inputs, prefix, 1, 0.0)
            random = complete(inputs, prefix, sampled, temperature) if sampled else []
            for row, ((index, example), completion) in enumerate(zip(batch, greedy)):
                samples.append(
                    Sample(
                        index=index,
                        name=example.name,
                        problem=example.problem,
                        solution=example.solution,
                        completion=completion,
                        answer=extract_answer(completion),
                        correct=accuracy_reward(completion, example.solution, choices=example.choices) > 0,
                        formatted=format_reward(completion) > 0,
                        sampled_correct=tuple(
                            accuracy_reward(text, example.solution, choices=example.choices) > 0
                            for text in random[row * sampled : (row + 1) * sampled]
                        ),
                    )
                )
    finally:
        bar.close()
        model.train(training)
    return EvalResult.of(samples)


def _distinct(dataset: Examples) -> Iterator[tuple[int, Example]]:
    """Each problem once: a data set gives the next one again in place of one whose image turns out to be broken."""
    seen: set[str] = set()
    for index in range(len(dataset)):
        example = dataset[index]
        if example.name not in seen:
            seen.add(example.name)
            yield index, example
