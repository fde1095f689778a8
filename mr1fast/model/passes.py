"""The hidden states of given completions: in one packed pass, or plainly, one whole padded sequence each.

Both take inputs of `Policy.place` for P prompts, completion_ids and completion_mask [B, L], and return [N, H] for the N
tokens of the mask, differentiable. body: runs the model without its head. checkpointing: each layer runs again in
backward instead of keeping its activations. prefix: of these prompts, if they have run, with their graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mr1fast.model.hooks import checkpointed, shared_attention
from mr1fast.model.packing import Packed
from mr1fast.model.prefix import Prefix
from mr1fast.model.prompts import take_prompts


def packed_hidden(
    model: Any,
    body: Callable[..., Any],
    inputs: dict[str, Tensor],
    completion_ids: Tensor,
    completion_mask: Tensor,
    prefix: Prefix | None,
    *,
    checkpointing: bool,
) -> Tensor:
    """Prompts and completions as one row: linear layers and vision tower see each token once, and no padding."""
    packed = Packed.of(inputs, completion_ids, completion_mask, prefix)
    if prefix is not None:
        inputs = {}  # whose images have run as well
        if packed.input_ids.numel() == 0:
            return prefix.last_hidden.index_select(0, packed.predicting)
    attention = partial(shared_attention, model)
    with attention(), checkpointed(model, on=checkpointing, within=attention):
        hidden = body(
            input_ids=packed.input_ids,
            attention_mask={"full_attention": None},  # the layout says who attends to whom
            position_ids=packed.position_ids,
            pixel_values=inputs.get("pixel_values"),
            image_grid_thw=inputs.get("image_grid_thw"),
            shared_prefix=packed.layout,
            use_cache=False,
        ).last_hidden_state[0]
    if prefix is not None:
        hidden = torch.cat([prefix.last_hidden, hidden])
    return hidden.index_select(0, packed.predicting)


def plain_hidden(
    model: Any,
    body: Callable[..., Any],
    inputs: dict[str, Tensor],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    checkpointing: bool,
) -> Tensor:
    """Every completion after a prompt with images of its own, as transformers would run them."""
    (P, T), (B, L) = inputs["input_ids"].shape, completion_ids.shape
    inputs = take_prompts(inputs, [prompt for prompt in range(P) for _ in range(B // P)])
    positions = inputs["next_position"][:, None] + torch.arange(L, device=completion_ids.device)
    with checkpointed(model, on=checkpointing):
        hidden = body(
            input_ids=torch.cat([inputs["input_ids"], completion_ids], 1),
            attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(completion_ids)], 1),
            position_ids=torch.cat([inputs["position_ids"].transpose(0, 1), positions.expand(3, B, L)], 2),
            pixel_values=inputs.get("pixel_values"),
            image_grid_thw=inputs.get("image_grid_thw"),
            use_cache=False,
        ).last_hidden_state
    return hidden[:, T - 1 : -1].flatten(0, 1).index_select(0, completion_mask.flatten().nonzero()[:, 0])
