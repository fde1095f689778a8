"""From a batch to its loss and log-probabilities. The language-model head only runs inside the fused loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mr1fast.losses.hidden import linear_grpo_loss, linear_token_logprobs
from mr1fast.losses.logits import GRPOLossOutput
from mr1fast.model.policy import Policy
from mr1fast.model.prompts import take_prompts

_Tensor = TypeVar("_Tensor", Tensor, Tensor | None)


@dataclass(frozen=True)
class Batch:
    """What a step trains on: prompts, their completions, and what the loss needs to know of each."""

    inputs: dict[str, Tensor]  # of P prompts, see `Policy.place`
    num_generations: int  # G
    completion_ids: Tensor  # [B, L] int64
    completion_mask: Tensor  # [B, L] bool
    advantages: Tensor | None = None  # [B] float32; None for supervised fine-tuning
    ref_per_token_logps: Tensor | None = None  # [B, L] float32, of the frozen reference; None where the KL weight is 0
    old_per_token_logps: Tensor | None = None  # [B, L] float32, of the policy that sampled; None while it is still that
    sampling_per_token_logps: Tensor | None = None  # [B, L] float32, of the sampler; good for the first update only

    def hidden(self, policy: Policy) -> Tensor:
        """[N, H], of the N tokens that count, one completion after another; differentiable."""
        return policy.completion_hidden(self.inputs, self.completion_ids, self.completion_mask)

    def packed(self, per_token: _Tensor) -> _Tensor:
        """[N] of [B, L], of what counts."""
        return None if per_token is None else per_token[self.completion_mask]

    def padded(self, per_token: Tensor) -> Tensor:
        """[B, L] of [N], 0 where masked."""
        return per_token.new_zeros(self.completion_mask.shape).masked_scatter(self.completion_mask, per_token)

    def take(self, prompts: Sequence[int]) -> Batch:
        """These prompts, each with all of its completions, in this order."""
        G = self.num_generations
        rows = torch.tensor([prompt * G + i for prompt in prompts for i in range(G)], device=self.completion_ids.device)
        tensors = {name: getattr(self, name) for name in _OF_COMPLETIONS}
        taken: dict[str, Any] = {name: None if values is None else values[rows] for name, values in tensors.items()}
        return dataclasses.replace(self, inputs=take_prompts(self.inputs, prompts), **taken)


_OF_COMPLETIONS = (
    "completion_ids",
    "completion_mask",
    "advantages",
    "ref_per_token_logps",
    "old_per_token_logps",
    "sampling_per_token_logps",
)


def batch_logps(policy: Policy, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [B, L] float32 of the completions' tokens, 0 where masked; differentiable."""
    return batch.padded(_packed_logps(policy, batch, temperature))


def _packed_logps(policy: Policy, batch: Batch, temperature: float) -> Tensor:
    """[N] float32, of the tokens that count; differentiable."""
    logps = linear_token_logprobs(
        batch.hidden(policy), policy.head_weight, batch.packed(batch.completion_ids), temperature=temperature
    )
    assert isinstance(logps, Tensor)
    return logps


def grpo_batch_loss(
    policy: Policy, batch: Batch, *, beta: float, temperature: float, num_sequences: int | None = None
) -> GRPOLossOutput:
    """The paper's loss of a batch, a mean over completions; its per-token outputs are packed, [N].

    num_sequences: the completions of the whole step, of which this batch is a piece: the losses, and the gradients, of
    all pieces then add up to those of the step.
    """
    assert batch.advantages is not None
    lengths = batch.completion_mask.sum(1)
    return linear_grpo_loss(
        batch.hidden(policy),
        policy.head_weight,
        batch.packed(batch.completion_ids),
        batch.advantages,
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        old_per_token_logps=batch.packed(batch.old_per_token_logps),
        ref_per_token_logps=batch.packed(batch.ref_per_token_logps),
        beta=beta,
        temperature=temperature,
        num_sequences=num_sequences,
    )


def sft_batch_loss(policy: Policy, batch: Batch, *, num_sequences: int | None = None) -> Tensor:
    """Mean over completions of the negative log-likelihood per token (nats), 0-d. num_sequences: see above."""
    lengths = batch.completion_mask.sum(1)
    weight = (1 / lengths.clamp(min=1)).repeat_interleave(lengths)
    return -(_packed_logps(policy, batch, 1.0) * weight).sum() / (num_sequences or len(lengths))


def split_batch(batch: Batch, pieces: int) -> list[Batch]:
    """The batch in pieces of equally many prompts, each with all of its completions."""
    prompts = batch.inputs["input_ids"].shape[0]
    assert prompts % pieces == 0
    size = prompts // pieces
    return [batch] if pieces == 1 else [batch.take(range(i * size, (i + 1) * size)) for i in range(pieces)]
