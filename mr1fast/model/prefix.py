"""What the completions of a prompt share: its keys and values, computed once.

Shapes: P prompts of T tokens (padded on the left), G completions each, B = P * G with the completions of a prompt
adjacent, L tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prefix:
    """What completions need of their prompts; on the graph unless computed under no_grad."""

    key_values: list[tuple[Tensor, Tensor]]  # of each layer, [P, key-value heads, T, head dim]
    last_hidden: Tensor  # [P, H], which predicts the first token of a completion
    attention_mask: Tensor  # [P, T] bool
    next_position: Tensor  # [P] int64, the M-RoPE position of the first token of a completion

    def packed_key_values(self) -> list[tuple[Tensor, Tensor]]:
        """The same one prompt after another, without padding: [tokens, key-value heads, head dim] of each layer."""
        there = self.attention_mask.flatten().nonzero()[:, 0]

        def rows(part: Tensor) -> Tensor:
            return part.transpose(1, 2).flatten(0, 1).index_select(0, there)

        return [(rows(keys), rows(values)) for keys, values in self.key_values]

    def take(self, prompts: Tensor) -> Prefix:
        """The prefixes of N completions, whose prompts are `prompts` [N] int64."""
        key_values = [
            (keys.index_select(0, prompts), values.index_select(0, prompts)) for keys, values in self.key_values
        ]
        return Prefix(key_values, self.last_hidden[prompts], self.attention_mask[prompts], self.next_position[prompts])

    def prompts_of(self, completions: int) -> Tensor:
        """The prompt [B] of each of this many completions, where those of a prompt are adjacent."""
        P = self.last_hidden.shape[0]
        return torch.arange(P, device=self.last_hidden.device).repeat_interleave(completions // P)
