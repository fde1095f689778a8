"""A loss in pieces: the weight that each token has in the mean over the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mr1fast.kernels import loss_types


def loss_weights(
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    loss_type: str,
    max_completion_length: int,
    num_items_in_batch: int | None = None,
    num_sequences: int | None = None,
) -> Tensor:
    """[B, L] float32, what a loss of this type multiplies each token's loss by, for ids and mask [B, L].

    Given as `token_weight`, with reduction="sum", they make the losses of parts of the batch add up to that of the
    whole, whatever its normaliser counts. num_items_in_batch, num_sequences: tokens and completions of the whole, if
    this is a part of it.
    """
    return loss_types.token_weight(
        completion_ids,
        completion_mask,
        torch.float32,
        loss_type,
        max_completion_length,
        num_items_in_batch,
        num_sequences=num_sequences,
    )
