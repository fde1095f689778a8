"""Prompts with their sampled and rewarded completions, and which of them a step trains on.

Where all rewards of a group agree, its advantages are 0 and nothing can be learnt from it. Dynamic sampling (DAPO,
arXiv 2503.14476, section 3.2) replaces such groups by those of further prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from mr1fast.data.example import Example
from mr1fast.model.prefix import Prefix
from mr1fast.model.rollout import Rollout
from mr1fast.options.learning_options import MOST_BATCHES
from mr1fast.training.batch import Batch
from mr1fast.training.metrics import SAME, completion_metrics, cut_off, group_std, reward_metrics
from mr1fast.training.processes import Processes


@dataclass(frozen=True)
class Groups:
    """P prompts with G completions each, B = P * G, and what these were rewarded with."""

    rows: list[int]  # of the data set
    examples: list[Example]  # [P]
    rollout: Rollout  # [B]
    scores: dict[str, Tensor]  # of each reward [B], see `scoring.score`
    total: Tensor  # [B] float32, weighted sums; NaN where absent

    @property
    def num_generations(self) -> int:
        return len(self.total) // len(self.rows)

    @property
    def repeated(self) -> list[Example]:
        """[B], the example of each completion."""
        return [example for example in self.examples for _ in range(self.num_generations)]

    @property
    def completion_mask(self) -> Tensor:
        """[B, L]."""
        return self.rollout.completion_mask

    def that_ended(self, end_ids: Tensor) -> Tensor:
        """The same without the tokens of completions that were cut off."""
        return self.completion_mask & ~cut_off(self.rollout.completion_ids, self.completion_mask, end_ids)[:, None]

    def metrics(self, end_ids: Tensor, processes: Processes) -> dict[str, float]:
        """Of these and the groups of the other processes."""
        ids, mask, G = self.rollout.completion_ids, self.completion_mask, self.num_generations
        scores = {name: processes.whole_tensor(values, G) for name, values in self.scores.items()}
        rewards = reward_metrics(scores, processes.whole_tensor(self.total, G), G)
        ends = [processes.whole_tensor(values, G) for values in (mask.sum(1), cut_off(ids, mask, end_ids))]
        return rewards | completion_metrics(*ends)

    @property
    def teach(self) -> list[bool]:
        """[P]: whether rewards differ within the group."""
        differs: list[bool] = (group_std(self.total, self.num_generations) >= SAME).tolist()
        return differs

    def joined(self, more: Groups) -> Groups:
        """These, and then others."""
        L = max(part.rollout.completion_ids.shape[1] for part in (self, more))

        def both(name: str) -> Tensor:
            parts = [getattr(part.rollout, name) for part in (self, more)]
            return torch.cat([torch.nn.functional.pad(part, (0, L - part.shape[1])) for part in parts])

        return Groups(
            self.rows + more.rows,
            self.examples + more.examples,
            Rollout(
                both("completion_ids"),
                both("completion_mask"),
                both("per_token_logps"),
                self.rollout.completions + more.rollout.completions,
            ),
            {name: torch.cat([values, more.scores[name]]) for name, values in self.scores.items()},
            torch.cat([self.total, more.total]),
        )

    def take(self, prompts: Sequence[int]) -> Groups:
        """These prompts, in this order."""
        G, rollout = self.num_generations, self.rollout
        kept = [prompt * G + i for prompt in prompts for i in range(G)]
        return Groups(
            [self.rows[prompt] for prompt in prompts],
            [self.examples[prompt] for prompt in prompts],
            Rollout(
                rollout.completion_ids[kept],
                rollout.completion_mask[kept],
                rollout.per_token_logps[kept],
                [rollout.completions[i] for i in kept],
            ),
            {name: values[kept] for name, values in self.scores.items()},
            self.total[kept],
        )


@dataclass(frozen=True)
class StepData:
    """What a step trains on: the batch, and the texts, rewards and metrics behind it."""

    batch: Batch
    completions: list[str]  # [B]
    rewards: list[float]  # [B], weighted sums; empty for supervised fine-tuning
    metrics: dict[str, float]
    rows: list[int] = field(default_factory=list)  # [P], of the data set
    prefix: Prefix | None = None  # of the prompts, as the policy ran them to sample; good for the first update only


def refill(groups: Groups, sample: Callable[[int, int], Groups]) -> tuple[Groups, list[int]]:
    """All groups that were sampled, and which of them to train on: as many as there were at first.

    sample: given how many prompts there have been, the groups of so many further ones. A group whose rewards agree
    stays in its place if, within MOST_BATCHES, no other is found.
    """
    P = len(groups.rows)
    chosen = list(range(P))
    while True:
        teach = groups.teach
        lacking = [place for place, prompt in enumerate(chosen) if not teach[prompt]]
        more = min(len(lacking), MOST_BATCHES * P - len(groups.rows))
        if not more:
            return groups, chosen
        further = range(len(groups.rows), len(groups.rows) + more)
        groups = groups.joined(sample(len(groups.rows), more))
        found = [prompt for prompt in further if groups.teach[prompt]]
        for place, prompt in zip(lacking, found):
            chosen[place] = prompt


class Shortage:
    """Counts the groups that could not be replaced, and says so the first time."""

    said = False

    def metrics(self, sampled: Groups, kept: Groups) -> dict[str, float]:
        P, unfilled = len(kept.rows), kept.teach.count(False)
        if unfilled and not self.said:
            self.said = True
            tqdm.write(
                f"warning: --dynamic-sampling: after {len(sampled.rows)} prompts, {MOST_BATCHES} times those of a "
                f"step, all rewards still agree in {unfilled} of {P} groups, which stay in the step; "
                "dynamic_sampling/unfilled in the metrics counts them",
                file=sys.stderr,
            )
        return {"dynamic_sampling/prompts": len(sampled.rows), "dynamic_sampling/unfilled": unfilled}
