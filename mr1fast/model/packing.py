"""Prompts and their completions as one row of tokens: each token once, and no padding.

Shapes: P prompts, G completions each, B = P * G with the completions of a prompt adjacent, L tokens (padded on the
right), N tokens of completions that count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mr1fast.model.segments import Segments
from mr1fast.model.varlen import SharedPrefix


@dataclass(frozen=True)
class Packed:
    """First the tokens of all prompts, then those of all completions, T in all.

    The last token of a completion predicts nothing, and is left out. Completions of a prompt that are the same, as is
    usual when answers are short, are one.
    """

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [3, 1, T] int64, as if each completion followed its prompt alone
    layout: SharedPrefix
    predicting: Tensor  # [N] int64: the place in the row that predicts each counted token of the completions

    @classmethod
    def of(cls, inputs: dict[str, Tensor], completion_ids: Tensor, completion_mask: Tensor) -> Packed:
        """`inputs`: of `Policy.place`. The mask [B, L] says which tokens count."""
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        device, P, B = ids.device, ids.shape[0], completion_ids.shape[0]
        shown = inputs["attention_mask"].bool()
        prompt_lengths = shown.sum(1)  # [P]

        steps = torch.arange(completion_ids.shape[1], device=device)
        run = (completion_mask * steps).amax(1)  # [B], tokens before the last that counts
        prompt = torch.arange(P, device=device).repeat_interleave(B // P)
        before = completion_ids[:, :-1].masked_fill(steps[:-1] >= run[:, None], -1)
        distinct, of = torch.cat([prompt[:, None], before], 1).unique(dim=0, return_inverse=True)
        prompt, before = distinct[:, 0], distinct[:, 1:]
        there = before >= 0
        lengths = there.sum(1)  # of the distinct completions
        next_position = inputs["next_position"][prompt][:, None] + steps[:-1]

        rows, t = completion_mask.nonzero(as_tuple=True)
        total = int(prompt_lengths.sum())
        first = total + lengths.cumsum(0) - lengths
        last_of_prompt = prompt_lengths.cumsum(0)[torch.arange(B, device=device) // (B // P)] - 1
        predicting = torch.where(t == 0, last_of_prompt[rows], first[of[rows]] + t - 1)

        of_prompts = torch.zeros(P, dtype=torch.long, device=device).index_add_(0, prompt, lengths)
        prompt_list, list_of_prompts = prompt_lengths.tolist(), of_prompts.tolist()
        itself = Segments([*prompt_list, *filter(None, lengths.tolist())], causal=True, device=device)
        shared = Segments(list_of_prompts, prompt_list, causal=False, device=device) if any(list_of_prompts) else None
        return cls(
            torch.cat([ids[shown], before[there]])[None],
            torch.cat([positions.transpose(0, 1)[:, shown], next_position[there].expand(3, -1)], 1)[:, None],
            SharedPrefix(total, itself, shared),
            predicting,
        )
