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

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mr1fast.checks import choice
from mr1fast.integrations import SHARED_LOSS_TYPES
from mr1fast.losses.hidden import linear_grpo_loss, linear_token_logprobs
from mr1fast.losses.layout import floating
from mr1fast.losses.logits import GRPOLossOutput, grpo_loss, token_logprobs
from mr1fast.losses.vespo import vespo_weights


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
    _refuse_unsupported(loss_type, importance_sampling_level, delta, use_bias_correction_kl)
    floating("logits", logits, "B", "L+1", "V")
    B, L = completion_ids.shape
    if logits.shape[:2] != (B, L + 1):
        raise ValueError(f"logits must be [B, L+1, V] with B = {B} and L = {L}, got {list(logits.shape)}")
    mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
    no_kl = not isinstance(beta, Tensor) and beta == 0
    if loss_type == "vespo":
        logps = fused_selective_log_softmax(logits, completion_ids, temperature, mask)
        k_and_lambda = (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg)
        vllm_is_ratio = _vespo_weights(logps, old_logp, advantages, mask, vllm_is_ratio, k_and_lambda)
        loss_type, old_logp, eps_high = _VESPO_AS

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
        importance_sampling_ratio=_one_more(_per_completion(vllm_is_ratio)),
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        token_weight=_one_more(_padding_weight(mask)) if loss_type == "luspo" and reduce else None,
        max_completion_length=L if max_completion_length is None else max_completion_length,
        num_items_in_batch=_normaliser(loss_type, mask, num_items_in_batch),
        temperature=temperature,
        inplace=inplace,
        reduction="mean" if reduce else "none",
    )
    if reduce:
        return out.loss, _metrics(out, mask)
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


class LigerFusedLinearGRPOLoss(nn.Module):
    """`mr1fast.linear_grpo_loss` in the shape of `liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`.

    `compiled` and `chunk_size` are accepted and have no effect: nothing here is compiled, and the rows of a block are
    chosen by their size in bytes. Raises ValueError for a bad setting, by name.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        _refuse_unsupported(loss_type, importance_sampling_level, None, use_bias_correction_kl)
        positive = {"sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg}
        for name, value in {**positive, "delta": delta}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input,
        lin_weight,
        selected_token_ids,
        attention_mask,
        advantages,
        bias=None,
        ref_per_token_logps=None,
        old_per_token_logps=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        vllm_is_ratio=None,
        num_items_in_batch=None,
    ):
        """(loss, metrics), metrics = (mean KL, clip ratio), or (clip ratio,) where beta is 0.

        _input, ref_input: [B, T, H]; lin_weight, ref_weight: [V, H]; selected_token_ids, attention_mask,
        ref_per_token_logps, old_per_token_logps: [B, T]; advantages [B]. Without a reference (`use_ref_model=False`)
        the policy is its own: the KL is 0.
        """
        has_kl = isinstance(self.beta, Tensor) or self.beta != 0
        if self.use_ref_model and ref_per_token_logps is not None and ref_input is not None:
            warnings.warn(
                "Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.", stacklevel=2
            )
        if not (has_kl and self.use_ref_model):
            ref_per_token_logps = None
        elif ref_per_token_logps is None:
            if ref_input is None:
                raise ValueError("ref_per_token_logps or ref_input must be given with use_ref_model=True, got neither")
            ref_per_token_logps = self._score(ref_input, ref_weight, ref_bias, selected_token_ids, attention_mask)
        loss_type, epsilon_high = self.loss_type, self.epsilon_high
        if loss_type == "vespo":
            logps = self._score(_input, lin_weight, bias, selected_token_ids, attention_mask)
            k_and_lambda = (self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg)
            vllm_is_ratio = _vespo_weights(
                logps, old_per_token_logps, advantages, attention_mask, vllm_is_ratio, k_and_lambda
            )
            loss_type, old_per_token_logps, epsilon_high = _VESPO_AS
        out = linear_grpo_loss(
            _input,
            lin_weight,
            selected_token_ids,
            advantages,
            lm_head_bias=bias,
            completion_mask=attention_mask,
            old_per_token_logps=old_per_token_logps,
            ref_per_token_logps=ref_per_token_logps,
            beta=0.0 if ref_per_token_logps is None else self.beta,
            epsilon_low=self.epsilon_low,
            epsilon_high=epsilon_high,
            delta=None if loss_type in ("cispo", "sapo") else self.delta,
            loss_type=loss_type,
            importance_sampling_level=self.importance_sampling_level,
            use_bias_correction_kl=self.use_bias_correction_kl,
            importance_sampling_ratio=_per_completion(vllm_is_ratio),
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            token_weight=_padding_weight(attention_mask) if loss_type == "luspo" else None,
            max_completion_length=self.max_completion_length,
            num_items_in_batch=_normaliser(loss_type, attention_mask, num_items_in_batch),
            temperature=self.temperature,
        )
        metrics = _metrics(out, attention_mask)
        if has_kl and out.kl is None:
            metrics.insert(0, torch.zeros_like(out.loss.detach()))
        return out.loss, tuple(metrics)

    @torch.no_grad()
    def _score(self, hidden, weight, bias, ids, mask) -> Any:
        return linear_token_logprobs(hidden, weight, ids, lm_head_bias=bias, temperature=self.temperature, mask=mask)


class LigerFusedLinearGRPOFunction:
    """`LigerFusedLinearGRPOLoss` as `liger_kernel.chunked_loss.grpo_loss.LigerFusedLinearGRPOFunction.apply`.

    It is no autograd function of its own: `apply` calls the loss, through which gradients flow.
    """

    @staticmethod
    def apply(
        _input,
        weight,
        selected_token_ids,
        attention_mask,
        advantages,
        bias=None,
        ref_per_token_logps=None,
        old_per_token_logps=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        beta=0.04,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type="dapo",
        max_completion_length=None,
        importance_sampling_level="token",
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        temperature=1.0,
        compiled=True,
        use_ref_model=True,
        chunk_size=1,
        vllm_is_ratio=None,
        delta=None,
        use_bias_correction_kl=False,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        num_items_in_batch=None,
    ):
        """(loss, metrics) of `LigerFusedLinearGRPOLoss`, whose settings and tensors these are, in Liger's order."""
        loss = LigerFusedLinearGRPOLoss(
            beta,
            compiled,
            use_ref_model,
            chunk_size,
            epsilon_low,
            epsilon_high,
            loss_type,
            max_completion_length,
            importance_sampling_level,
            sapo_temperature_pos,
            sapo_temperature_neg,
            temperature,
            delta,
            use_bias_correction_kl,
            vespo_k_pos,
            vespo_lambda_pos,
            vespo_k_neg,
            vespo_lambda_neg,
        )
        return loss(
            _input,
            weight,
            selected_token_ids,
            attention_mask,
            advantages,
            bias,
            ref_per_token_logps,
            old_per_token_logps,
            ref_input,
            ref_weight,
            ref_bias,
            vllm_is_ratio,
            num_items_in_batch,
        )


# loss_type, old log-probabilities and epsilon_high: CISPO, whose own ratio is 1 then.
_VESPO_AS = ("cispo", None, 1.0)


def _vespo_weights(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ratio: Tensor | None,
    k_and_lambda: tuple[float, float, float, float],
) -> Tensor:
    k_pos, lambda_pos, k_neg, lambda_neg = k_and_lambda
    weights = vespo_weights(
        logps,
        old_logps,
        advantages,
        completion_mask=mask,
        importance_sampling_ratio=ratio,
        k_pos=k_pos,
        lambda_pos=lambda_pos,
        k_neg=k_neg,
        lambda_neg=lambda_neg,
    )
    return weights[:, None]


def _padding_weight(mask: Tensor) -> Tensor:
    """[B, L], the length of a completion over the padded one, by which Liger's luspo multiplies TRL's."""
    return (mask.sum(1, keepdim=True, dtype=torch.float32) / max(mask.shape[1], 1)).expand(mask.shape)


def _refuse_unsupported(
    loss_type: str, importance_sampling_level: str, delta: float | None, use_bias_correction_kl: bool
) -> None:
    choice("loss_type", loss_type, (*SHARED_LOSS_TYPES, "vespo"))
    if loss_type in ("cispo", "sapo", "vespo"):
        if importance_sampling_level == "sequence":
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type={loss_type!r}. Use "
                "importance_sampling_level='token' instead."
            )
        if delta is not None:
            raise ValueError(f"delta (two-sided clipping) is not supported for loss_type={loss_type!r}.")
    if loss_type == "vespo" and use_bias_correction_kl:
        raise ValueError("use_bias_correction_kl must be False with loss_type='vespo', whose ratio is not the tokens'")


def _one_more(values: Any) -> Any:
    """[B, L] -> [B, L + 1] with 0 at the end; None, [B] and [B, 1] as they are."""
    if values is None or values.dim() == 1 or values.shape[1] == 1:
        return values
    return nn.functional.pad(values, (0, 1))


def _per_completion(ratio: Tensor | None) -> Tensor | None:
    return ratio[:, None] if ratio is not None and ratio.dim() == 1 else ratio


def _normaliser(loss_type: str, mask: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | None:
    """Tokens per process, over all processes where no number is given: 0-d float32, at least 1."""
    if loss_type not in ("dapo", "cispo"):
        return None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    else:
        items = mask.sum(dtype=torch.float32)
        if distributed:
            torch.distributed.all_reduce(items)
    return (items / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1)


def _metrics(out: GRPOLossOutput, mask: Tensor) -> list[Tensor]:
    """[mean KL,] clip ratio over the unmasked tokens, also at sequence level (TRL: over completions)."""
    tokens = mask.sum(dtype=torch.float32).clamp(min=1)
    values = [out.is_low_clipped | out.is_high_clipped]
    return [value.sum() / tokens for value in ([] if out.kl is None else [out.kl]) + values]
