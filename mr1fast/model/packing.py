"""Prompts and their completions as one row of tokens: each token once, and no padding.

Shapes: P prompts, G completions each, B = P * G with the completions of a prompt adjacent, L tokens (padded on the
right), N tokens of completions that count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mr1fast.model.prefix import Prefix
from mr1fast.model.segments import Segments
from mr1fast.model.varlen import SharedPrefix


@dataclass(frozen=True)
class Packed:
    """First the tokens of all prompts, unless these have run before, then those of all completions, T in all.

    The last token of a completion predicts nothing, and is left out. Completions of a prompt that are the same, as is
    usual when answers are short, are one.
    """

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [3, 1, T] int64, as if each completion followed its prompt alone
    layout: SharedPrefix
    # [N] int64: the place that predicts each counted token of the completions, in the row or, if the prompts have run
    # before, in their P last tokens with the row behind them.
    predicting: Tensor

    @classmethod
    def of(
        cls, inputs: dict[str, Tensor], completion_ids: Tensor, completion_mask: Tensor, prefix: Prefix | None = None
    ) -> Packed:
        """`inputs`: of `Policy.place`. The mask [B, L] says which tokens count. prefix: of prompts that have run."""
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
        in_row = shown if prefix is None else torch.zeros_like(shown)
        total = int(in_row.sum())
        last_of_prompt = torch.arange(P, device=device) if total == 0 else prompt_lengths.cumsum(0) - 1
        first = (total or P) + lengths.cumsum(0) - lengths
        predicting = torch.where(t == 0, last_of_prompt[rows // (B // P)], first[of[rows]] + t - 1)

        of_prompts = torch.zeros(P, dtype=torch.long, device=device).index_add_(0, prompt, lengths)
        list_of_prompts = of_prompts.tolist()
        alone = filter(None, [*in_row.sum(1).tolist(), *lengths.tolist()])
        itself = Segments([*alone], causal=True, device=device)
        shared = None
        if any(list_of_prompts):
            shared = Segments(list_of_prompts, prompt_lengths.tolist(), causal=False, device=device)
        return cls(
            torch.cat([ids[in_row], before[there]])[None],
            torch.cat([positions.transpose(0, 1)[:, in_row], next_position[there].expand(3, -1)], 1)[:, None],
            SharedPrefix(total, itself, shared, None if prefix is None else prefix.packed_key_values()),
            predicting,
        )
