"""The loss from log-probabilities that somebody else computed, and what packed rows need before it."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from mr1fast.checks import described
from mr1fast.kernels import autograd
from mr1fast.kernels.completions import Completions
from mr1fast.kernels.reference import compute_dtype
from mr1fast.losses import arguments
from mr1fast.losses.keywords import completed, spelled_out
from mr1fast.losses.layout import check_cu_seqlens, layout_of, shaped
from mr1fast.losses.logits import GRPOLossOutput
from mr1fast.losses.options import LossOptions


@spelled_out
def grpo_loss_from_logps(
    per_token_logps: Tensor,
    advantages: Tensor | None = None,
    *,
    entropies: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> GRPOLossOutput:
    """`grpo_loss` for trainers that compute the log-probabilities themselves: the objective alone, ordinary autograd.

    `grpo_loss(logits, ids, ...)` is this function of `token_logprobs(logits, ids, entropy=True)`, in one pass.

    Args:
        per_token_logps: [B, L] (packed [T] or [1, T]) float32, bfloat16, float16 or float64, of the policy that is
            trained; anything at masked positions. -inf is the log-probability of a banned token.
        advantages: [B] or [B, L]; or None, with rewards.
        entropies: like per_token_logps, required with entropy_coef (then differentiable, too) and with
            top_entropy_quantile.
        **options: those of `mr1fast.losses.options.LossOptions`; `temperature`, `logit_scale` and
            `final_logit_softcapping`, which are in the log-probabilities already, change nothing. They are:

    Returns:
        GRPOLossOutput; its `loss` is differentiable, as often as one likes, in per_token_logps and in entropies.

    Raises:
        ValueError: a bad argument, by name.
    """
    values = completed(grpo_loss_from_logps, options)
    logps, layout = layout_of("per_token_logps", per_token_logps, cu_seqlens=values["cu_seqlens"])
    dtype = compute_dtype(logps.dtype)
    no_ids = torch.zeros((), dtype=torch.int64, device=logps.device).expand(layout.shape)
    spec, batch = arguments.loss_call(dtype, layout, no_ids, advantages, values)
    if entropies is not None:
        entropies = layout.per_token("entropies", entropies)
    elif values["entropy_coef"] != 0 or values["top_entropy_quantile"] < 1:
        name = "top_entropy_quantile" if values["entropy_coef"] == 0 else "entropy_coef"
        raise ValueError(f"entropies must be given with {name} {values[name]}, got None")

    def live(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if batch.mask is None else torch.where(batch.mask, tensor.to(dtype), 0)

    scored = (live(logps), None if entropies is None else live(entropies))
    outputs = autograd.objective(*scored, batch, spec, values["reduction"])
    return GRPOLossOutput.of(outputs, layout, batch, spec, advantages)


def shift_packed(
    cu_seqlens: Tensor, input_ids: Tensor, completion_mask: Tensor | None = None, *per_token: Tensor
) -> tuple[Tensor, ...]:
    """From the usual packed layout, in which position t predicts token t + 1, to ours, in which it predicts its own.

    >>> ids, mask = shift_packed(cu_seqlens, input_ids, is_completion)
    >>> grpo_loss(model(input_ids).logits, ids, advantages, completion_mask=mask, cu_seqlens=cu_seqlens)

    Args:
        cu_seqlens: [S + 1], as in `grpo_loss`.
        input_ids: [T] or [1, T], what the model was given.
        completion_mask: likewise, not 0 where a token of the input counts; None for all of them.
        per_token: further tensors [T] or [1, T], such as old log-probabilities, with one value for each input token.

    Returns:
        (ids, mask, *per_token) as [T], each moved to the position before it. The last position of a sequence predicts
        nothing: it is masked (and 0 in all of them). The logits or hidden states stay as they are.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must be a tensor [T] or [1, T], got {described(input_ids)}")
    T = input_ids.shape[-1]
    check_cu_seqlens(cu_seqlens, T, input_ids.device)
    mask = torch.ones_like(input_ids, dtype=torch.bool) if completion_mask is None else completion_mask
    number = Completions.of((1, T), cu_seqlens).of_token
    assert number is not None
    is_last = torch.cat([number[0, 1:] != number[0, :-1], number.new_ones(min(T, 1), dtype=torch.bool)])

    def shifted(name: str, tensor: Tensor) -> Tensor:
        row = shaped(name, tensor, [(T,), (1, T)], input_ids.device).reshape(T)
        return row.roll(-1).masked_fill(is_last, 0)

    others = (shifted(f"per_token[{i}]", tensor) for i, tensor in enumerate(per_token))
    return shifted("input_ids", input_ids), shifted("completion_mask", mask), *others
