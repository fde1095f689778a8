"""How good is a model on a data set? For the trainer, and for `python -m mr1fast.evaluate`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

from mr1fast.data.dataset import problems
from mr1fast.data.example import Example, Examples
from mr1fast.evaluation.result import Answered, EvalResult
from mr1fast.model import rollout
from mr1fast.model.load import encode_prompts, is_small
from mr1fast.model.prefix import Prefix, encode_prefix
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.rewards import accuracy_reward, extract_answer, format_reward


class EvaluationStopped(KeyboardInterrupt):
    """Ctrl-C in the middle of an evaluation; `result` is that of the problems which were done."""

    def __init__(self, result: EvalResult):
        super().__init__()
        self.result = result


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
) -> EvalResult:
    """Answer every problem of `dataset` greedily once and `sampled` times (0 for none) at `temperature`.

    max_completion_length: tokens. batch_size: problems at a time, None by the model's size. progress: what a progress
    bar is called, None for no bar. Depends on `seed` and no global random state, and leaves the model in the mode it
    was in. Raises EvaluationStopped (a KeyboardInterrupt) if it is interrupted when problems are done, and UserError if
    there is no problem.
    """
    total = len(dataset) * (1 + sampled)
    bar = tqdm(total=total, desc=progress, unit="completion", leave=False, disable=progress is None)
    generator = torch.Generator(model.device).manual_seed(seed)
    asked = _Asked(model, processor, max_completion_length, sampled, temperature, generator, bar)
    answered: list[Answered] = []
    left, training = problems(dataset), model.training
    model.eval()
    try:
        with bar:
            while batch := list(itertools.islice(left, batch_size or (64 if is_small(model) else 8))):
                answered += asked.answers(batch)
    except KeyboardInterrupt:
        if not answered:
            raise
        raise EvaluationStopped(EvalResult.of(answered)) from None
    finally:
        model.train(training)
    return EvalResult.of(answered)


@dataclass(frozen=True)
class _Asked:
    """A model that is asked problems, a batch at a time."""

    model: Qwen2VLForConditionalGeneration
    processor: Qwen2VLTextImageProcessor
    max_completion_length: int
    sampled: int
    temperature: float
    generator: torch.Generator
    bar: tqdm

    def answers(self, batch: Sequence[tuple[int, Example]]) -> list[Answered]:
        inputs = encode_prompts(self.processor, [example for _, example in batch])
        with torch.no_grad():
            prefix = encode_prefix(self.model, inputs)
        G = self.sampled
        greedy = self._complete(inputs, prefix, 1, 0.0)
        drawn = self._complete(inputs, prefix, G, self.temperature) if G else []
        return [
            _judged(index, example, greedy[row], drawn[row * G : (row + 1) * G])
            for row, (index, example) in enumerate(batch)
        ]

    def _complete(self, inputs: dict[str, Tensor], prefix: Prefix, num_generations: int, at: float) -> list[str]:
        completed = rollout.generate(
            self.model,
            inputs,
            num_generations=num_generations,
            temperature=at,
            max_new_tokens=self.max_completion_length,
            generator=self.generator,
            prefix=prefix,
        )
        self.bar.update(len(completed.completion_ids))
        return rollout.decode(self.processor.tokenizer, completed, rollout.end_tokens(self.model))


def _judged(index: int, example: Example, completion: str, drawn: Sequence[str]) -> Answered:
    return Answered(
        index=index,
        name=example.name,
        problem=example.problem,
        solution=example.solution,
        completion=completion,
        answer=extract_answer(completion),
        correct=accuracy_reward(completion, example.solution) > 0,
        formatted=format_reward(completion) > 0,
        sampled_correct=tuple(accuracy_reward(text, example.solution) > 0 for text in drawn),
    )
