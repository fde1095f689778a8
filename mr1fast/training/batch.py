"""From a batch to its loss and log-probabilities. The language-model head only runs inside the fused loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mr1fast.losses.hidden import linear_grpo_loss, linear_token_logprobs
from mr1fast.losses.logits import GRPOLossOutput
from mr1fast.losses.weights import loss_weights
from mr1fast.model.checks import image_starts
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix


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
    prefix: Prefix | None = None  # of the prompts, with the graph, from sampling; good for the first update only


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
    hidden = policy.completion_hidden(policy.encode_prefix(batch.inputs), batch.completion_ids)
    logps = linear_token_logprobs(
        hidden, policy.head_weight, batch.completion_ids, temperature=temperature, mask=batch.completion_mask
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
    policy: Policy, batch: Batch, *, beta: float, temperature: float, **keywords: Any
) -> GRPOLossOutput:
    """The loss of a batch, by default the paper's; `weighted` gives the keywords for a piece of one."""
    assert batch.advantages is not None
    hidden = policy.completion_hidden(batch.prefix or policy.encode_prefix(batch.inputs), batch.completion_ids)
    return linear_grpo_loss(
        hidden,
        policy.head_weight,
        batch.completion_ids,
        batch.advantages,
        completion_mask=batch.completion_mask,
        old_per_token_logps=batch.old_per_token_logps,
        ref_per_token_logps=batch.ref_per_token_logps,
        token_weight=batch.token_weight,
        beta=beta,
        temperature=temperature,
        **keywords,
    )


def sft_batch_loss(policy: Policy, batch: Batch, *, num_sequences: int | None = None) -> Tensor:
    """Mean over completions of the negative log-likelihood per token (nats), 0-d.

    num_sequences: the completions of the whole step, of which this batch is a piece: the losses of all then add up.
    """
    lengths = batch.completion_mask.sum(1).clamp(min=1)
    return -(batch_logps(policy, batch).sum(1) / lengths).sum() / (num_sequences or len(lengths))


def split_batch(batch: Batch, pieces: int) -> list[Batch]:
    """The batch in pieces of equally many prompts, each with all of its completions."""
    if pieces == 1:
        return [batch]
    prompts = batch.inputs["input_ids"].shape[0]
    assert prompts % pieces == 0
    size = prompts // pieces
    rows = size * batch.num_generations

    def piece(i: int) -> Batch:
        tensors = {name: getattr(batch, name) for name in _OF_COMPLETIONS}
        part: dict[str, Any] = {
            name: None if tensor is None else tensor[i * rows : (i + 1) * rows] for name, tensor in tensors.items()
        }
        return dataclasses.replace(batch, inputs=slice_prompts(batch.inputs, i * size, (i + 1) * size), **part)

    return [piece(i) for i in range(pieces)]


def slice_prompts(inputs: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The prompts start <= p < stop with their images."""
    rows = {
        name: tensor[start:stop] for name, tensor in inputs.items() if name not in ("pixel_values", "image_grid_thw")
    }
    if "image_grid_thw" in inputs:
        counts = image_starts(inputs["mm_token_type_ids"] == 1).sum(1)  # [P], of images
        images = slice(int(counts[:start].sum()), int(counts[:stop].sum()))
        patches = torch.cat([torch.zeros(1, dtype=torch.long), inputs["image_grid_thw"].prod(1).cpu().cumsum(0)])
        if images.stop > images.start:
            rows["image_grid_thw"] = inputs["image_grid_thw"][images]
            rows["pixel_values"] = inputs["pixel_values"][patches[images.start] : patches[images.stop]]
    return rows
