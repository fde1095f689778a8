"""Liger Kernel's GRPO losses by name and signature (0.8.5), computed by mr1fast. Liger itself is not needed.

    from liger_kernel.transformers.grpo_loss import triton_grpo_loss         # before
    from mr1fast.integrations.liger import triton_grpo_loss                  # after

Signatures, defaults and return values are Liger's, and so are the numbers, except where Liger departs from the method:

- `delta` below `1 + eps_high`: Liger counts clipping before that bound, TRL and mr1fast after it.
- A log-ratio beyond 80 saturates here and overflows there (see `mr1fast.grpo_loss`).
- `luspo` in LigerFusedLinearGRPOLoss: Liger's sum has the loss of masked positions in it, and here it has not.

`luspo` divides by B * L, padding included, as Liger does; `mr1fast.grpo_loss` and TRL average over completions. `vespo`
reads the logits twice, as its weight is known only once all of a completion is scored; together with
`use_bias_correction_kl` it raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mr1fast.integrations.liger_linear import LigerFusedLinearGRPOFunction as LigerFusedLinearGRPOFunction
from mr1fast.integrations.liger_linear import LigerFusedLinearGRPOLoss as LigerFusedLinearGRPOLoss
from mr1fast.integrations.liger_terms import (
    VESPO_AS,
    loss_metrics,
    normaliser,
    padding_weight,
    per_completion,
    refuse_unsupported,
    vespo_column,
)
from mr1fast.losses.layout import floating
from mr1fast.losses.logits import grpo_loss, token_logprobs


def triton_grpo_loss(
    logits,
    old_logp,
    ref_logp,
    completion_ids,
    advantages,
    completion_mask=None,
    temperature=0.9,
    beta=0.04,
    eps_low=0.2,
    eps_high=0.4,
    inplace=True,
    loss_type="dapo",
    max_completion_length=None,
    importance_sampling_level="token",
    reduce=False,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vllm_is_ratio=None,
    delta=None,
    use_bias_correction_kl=False,
    num_items_in_batch=None,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
):
    """`mr1fast.grpo_loss` in the shape of `liger_kernel.transformers.grpo_loss.triton_grpo_loss`.

    Args:
        logits: [B, L + 1, V], the last position unused. With `inplace` they are consumed: by the call itself with
            `reduce=True` (Liger: by backward), by backward with `reduce=False`.
        old_logp, ref_logp: [B, L] or None; ref_logp is needed unless beta is 0.
        completion_ids, completion_mask: [B, L]; no mask means all ones.
        advantages: [B].
        eps_high: for "cispo" the upper bound of the ratio itself.
        max_completion_length: "dr_grpo"'s normaliser; None means L.
        vllm_is_ratio: [B], [B, 1] or [B, L]; multiplies the policy term.
        num_items_in_batch: tokens in all of the processes' batches; None means those of this call.

    Returns:
        With `reduce`: (loss, metrics), metrics = [mean KL, clip ratio], or [clip ratio] where beta is 0.
        Without: (per-token loss, per-token KL or None where beta is 0, is_clipped), float32 [B, L], 0 where masked.

    Raises:
        ValueError: a bad argument, by name.
    """
    refuse_unsupported(loss_type, importance_sampling_level, delta, use_bias_correction_kl)
    floating("logits", logits, "B", "L+1", "V")
    B, L = completion_ids.shape
    if logits.shape[:2] != (B, L + 1):
        raise ValueError(f"logits must be [B, L+1, V] with B = {B} and L = {L}, got {list(logits.shape)}")
    mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
    no_kl = not isinstance(beta, Tensor) and beta == 0
    if loss_type == "vespo":
        logps = fused_selective_log_softmax(logits, completion_ids, temperature, mask)
        k_and_lambda = (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg)
        vllm_is_ratio = vespo_column(logps, old_logp, advantages, mask, vllm_is_ratio, k_and_lambda)
        loss_type, old_logp, eps_high = VESPO_AS

    # The unused last position becomes a masked one: slicing it off would make autograd copy the gradient of all logits.
    out = grpo_loss(
        logits,
        _one_more(completion_ids),
        _one_more(advantages),
        completion_mask=_one_more(mask),
        old_per_token_logps=_one_more(old_logp),
        ref_per_token_logps=None if no_kl else _one_more(ref_logp),
        beta=beta,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
        delta=delta,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        use_bias_correction_kl=use_bias_correction_kl,
        importance_sampling_ratio=_one_more(per_completion(vllm_is_ratio)),
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        token_weight=_one_more(padding_weight(mask)) if loss_type == "luspo" and reduce else None,
        max_completion_length=L if max_completion_length is None else max_completion_length,
        num_items_in_batch=normaliser(loss_type, mask, num_items_in_batch),
        temperature=temperature,
        inplace=inplace,
        reduction="mean" if reduce else "none",
    )
    if reduce:
        return out.loss, loss_metrics(out, mask)
    is_clipped = (out.is_low_clipped | out.is_high_clipped)[:, :L].float()
    return out.loss[:, :L], None if out.kl is None else out.kl[:, :L], is_clipped


def fused_selective_log_softmax(logits, input_ids, temperature=0.9, mask=None):
    """`mr1fast.token_logprobs` in the shape of `liger_kernel.ops.grpo_loss.fused_selective_log_softmax`.

    logits: [B, L + 1, V], the last position unused; input_ids and mask: the last L columns of [B, >= L]. Returns
    float32 [B, L], 0 where masked, without a gradient.
    """
    L = logits.shape[1] - 1
    mask = None if mask is None else mask[:, -L:]
    with torch.no_grad():
        return token_logprobs(logits[:, :-1], input_ids[:, -L:], temperature=temperature, mask=mask)


def _one_more(values: Any) -> Any:
    """[B, L] -> [B, L + 1] with 0 at the end; None, [B] and [B, 1] as they are."""
    if values is None or values.dim() == 1 or values.shape[1] == 1:
        return values
    return nn.functional.pad(values, (0, 1))
