"""From a batch to its loss and log-probabilities. The language-model head only runs inside the fused loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mr1fast.losses.hidden import linear_grpo_loss, linear_token_logprobs
from mr1fast.losses.logits import GRPOLossOutput
from mr1fast.losses.weights import loss_weights
from mr1fast.model.checks import image_starts
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix
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
    token_weight: Tensor | None = None  # [B, L] float32, see `weighted`
    sampling_per_token_logps: Tensor | None = None  # [B, L] float32, of the sampler; good for the first update only

    def hidden(self, policy: Policy, prefix: Prefix | None = None) -> Tensor:
        """[N, H], of the N tokens that count, one completion after another; differentiable.

        prefix: of these prompts by this policy, if they have run.
        """
        return policy.completion_hidden(self.inputs, self.completion_ids, self.completion_mask, prefix)

    def packed(self, per_token: _Tensor) -> _Tensor:
        """[N] of [B, L], of what counts."""
        return None if per_token is None else per_token[self.completion_mask]

    def padded(self, per_token: Tensor) -> Tensor:
        """[B, L] of [N], 0 where masked."""
        return per_token.new_zeros(self.completion_mask.shape).masked_scatter(self.completion_mask, per_token)

    def take(self, prompts: Sequence[int]) -> Batch:
        """These prompts, each with all of its completions, in this order."""
        if list(prompts) == [*range(len(self.inputs["input_ids"]))]:
            return self
        tensors, rows = {name: getattr(self, name) for name in _OF_COMPLETIONS}, self.rows_of(prompts)
        taken: dict[str, Any] = {name: None if values is None else values[rows] for name, values in tensors.items()}
        return dataclasses.replace(self, inputs=take_prompts(self.inputs, prompts), **taken)

    def rows_of(self, prompts: Sequence[int]) -> Tensor:
        """int64, the completions of these prompts."""
        G = self.num_generations
        return torch.tensor([prompt * G + i for prompt in prompts for i in range(G)], device=self.completion_ids.device)


_OF_COMPLETIONS = (
    "completion_ids",
    "completion_mask",
    "advantages",
    "ref_per_token_logps",
    "old_per_token_logps",
    "token_weight",
    "sampling_per_token_logps",
)


def batch_on(device: torch.device, values: dict[str, Any]) -> Batch:
    """The batch with these values, as `vars` gives them, on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: move(tensor) for name, tensor in value.items()}
        return value.to(device) if isinstance(value, Tensor) else value

    return Batch(**move(values))


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


@dataclass(frozen=True)
class Whole:
    """A step's batch, of which each process has a share: what the loss's normalisers count."""

    completions: int
    tokens: int
    max_completion_length: int


def weighted(batch: Batch, loss: Mapping[str, Any], whole: Whole) -> tuple[Batch, dict[str, Any]]:
    """A share of a step's batch, each token with its weight in the loss, and keywords with which pieces add up.

    Whatever the normaliser counts, tokens or completions, it counts them in the whole batch.
    """
    ids, mask = batch.completion_ids, batch.completion_mask
    keywords = {name: value for name, value in loss.items() if name != "scale_rewards"}  # that is for the advantages
    tokens = max(whole.tokens, 1)
    weight = loss_weights(
        ids,
        mask,
        loss_type=loss["loss_type"],
        max_completion_length=whole.max_completion_length,
        num_items_in_batch=tokens,
        num_sequences=whole.completions,
    )
    if keywords.get("entropy_coef"):  # a mean over tokens
        keywords["entropy_coef"] /= tokens
    return dataclasses.replace(batch, token_weight=weight), {**keywords, "reduction": "sum"}


def grpo_batch_loss(
    policy: Policy,
    batch: Batch,
    prefix: Prefix | None = None,
    *,
    beta: float,
    temperature: float,
    **keywords: Any,
) -> GRPOLossOutput:
    """The loss of a batch, by default the paper's; `weighted` gives the keywords for a piece of one.

    Per-token outputs are [N], of the tokens that count. prefix: see `Batch.hidden`.
    """
    assert batch.advantages is not None
    return linear_grpo_loss(
        batch.hidden(policy, prefix),
        policy.head_weight,
        batch.packed(batch.completion_ids),
        batch.advantages,
        cu_seqlens=torch.nn.functional.pad(batch.completion_mask.sum(1).cumsum(0), (1, 0)),
        old_per_token_logps=batch.packed(batch.old_per_token_logps),
        ref_per_token_logps=batch.packed(batch.ref_per_token_logps),
        token_weight=batch.packed(batch.token_weight),
        beta=beta,
        temperature=temperature,
        **keywords,
    )


def sft_batch_loss(policy: Policy, batch: Batch) -> Tensor:
    """The negative log-likelihood (nats), 0-d, of tokens with the weights that `weighted` has given them."""
    assert batch.token_weight is not None
    return -(_packed_logps(policy, batch, 1.0) * batch.packed(batch.token_weight)).sum()


def pieces_of(batch: Batch, *, equal: int | None = None, most_tokens: int | None = None) -> list[Sequence[int]]:
    """The prompts in pieces that pass through the model at a time, each prompt with all of its completions.

    equal: pieces of equally many prompts. most_tokens: pieces of at most so many tokens (see `tokens_of`), or of a
    single prompt that has more. The longest come first, so that what does not fit in memory fails at the first step.
    None of both: a prompt at a time.
    """
    sizes = tokens_of(batch)
    if equal is not None:
        each = len(sizes) // equal
        return [range(first, first + each) for first in range(0, len(sizes), each)]
    pieces: list[list[int]] = []
    room: list[int] = []
    for prompt in sorted(range(len(sizes)), key=lambda prompt: -sizes[prompt]):
        fitting = next((i for i, left in enumerate(room) if sizes[prompt] <= left), None)
        if fitting is None:
            pieces.append([])
            room.append(most_tokens or 0)
        chosen = -1 if fitting is None else fitting
        pieces[chosen].append(prompt)
        room[chosen] -= sizes[prompt]
    return [sorted(piece) for piece in pieces]


def is_one_piece(batch: Batch, *, equal: int | None, most_tokens: int | None) -> bool:
    """Whether `pieces_of` returns the whole batch, and of any with these inputs and no longer completions."""
    return equal == 1 if equal is not None else sum(tokens_of(batch)) <= (most_tokens or 0)


def tokens_of(batch: Batch) -> list[int]:
    """[P] What passes through the model for a prompt: its tokens, those of its completions, its images' patches."""
    inputs = batch.inputs
    tokens = inputs["attention_mask"].sum(1) + batch.completion_mask.unflatten(0, (-1, batch.num_generations)).sum(
        (1, 2)
    )
    if "image_grid_thw" in inputs:
        patches = inputs["image_grid_thw"].prod(1)
        image = image_starts(inputs["mm_token_type_ids"] == 1).nonzero()[:, 0]  # [images], the prompt of each
        tokens = tokens.index_add(0, image, patches)
    return tokens.tolist()
