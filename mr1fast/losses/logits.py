"""The public loss functions. Names and conventions follow TRL 1.16, formulas are in `kernels/reference.py`.

Shapes: B completions, L tokens, V vocabulary, H hidden. Completions of one prompt are adjacent in B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mr1fast import checks
from mr1fast.kernels import autograd, reference
from mr1fast.losses import arguments
from mr1fast.losses.kl_weight import KLSchedule


@dataclass(frozen=True)
class GRPOLossOutput:
    """What a loss function returns. Only `loss` is differentiable; the rest is [B, L], 0 where masked.

    loss: float32 0-d, or [B, L] with reduction="none" (float64 for float64 input, as all that follow).
    per_token_logps: log-probability of each completion token, at the given temperature.
    entropies: entropy of each token's distribution, in nats.
    kl: k3 estimate of the KL to the reference (after bias correction); None without reference log-probs.
    is_low_clipped, is_high_clipped: bool, ratio out of the clip range on the side where the gradient is cut.
    completion_mask: bool, or None for all ones.
    clipped_per_completion: the flags are one value per completion, repeated (sequence level).
    """

    loss: Tensor
    per_token_logps: Tensor
    entropies: Tensor
    kl: Tensor | None
    is_low_clipped: Tensor
    is_high_clipped: Tensor
    completion_mask: Tensor | None = None
    clipped_per_completion: bool = False

    @classmethod
    def of(
        cls,
        outputs: autograd.LossOutputs,
        mask: Tensor | None,
        importance_sampling_level: str,
        advantages: Tensor | None,
    ) -> GRPOLossOutput:
        per_completion = importance_sampling_level == "sequence" and (advantages is None or advantages.dim() == 1)
        return cls(*outputs, completion_mask=mask, clipped_per_completion=per_completion)

    def metrics(self) -> dict[str, float]:
        """Means over unmasked tokens under TRL's names (clip ratios at sequence level: over completions); one sync."""
        tokens = reference.token_count(self.is_low_clipped, self.completion_mask)

        def clip_ratio(flags: Tensor) -> Tensor:
            if self.clipped_per_completion:
                return flags.any(1).sum() / max(flags.shape[0], 1)
            return flags.sum() / tokens

        values = {
            "entropy": self.entropies.sum() / tokens,
            "clip_ratio/low_mean": clip_ratio(self.is_low_clipped),
            "clip_ratio/high_mean": clip_ratio(self.is_high_clipped),
            "clip_ratio/region_mean": clip_ratio(self.is_low_clipped | self.is_high_clipped),
        }
        if self.kl is not None:
            values["kl"] = self.kl.sum() / tokens
        return dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist()))


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    num_generations: int | None = None,
    scale_rewards: str = "group",
    completion_mask: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    beta: float | Tensor = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    use_bias_correction_kl: bool = False,
    importance_sampling_ratio: Tensor | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    entropy_coef: float = 0.0,
    max_completion_length: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> GRPOLossOutput:
    """GRPO-D's loss (OThink-MR1, arXiv 2503.16081) and its relatives, from logits.

    Args:
        logits: [B, L, V] float32, bfloat16 or float16 (float64 on "torch" only), any strides in B and L;
            `logits[:, t]` predicts `completion_ids[:, t]`. A logit of -inf is a banned token. float16 logits are read
            once more, in backward, so that a loss scale (GradScaler) is in the gradient before it is rounded.
        completion_ids: [B, L] int64; anything at masked positions.
        advantages: [B] or [B, L]; or None, with
        rewards: [B], from which group-relative advantages are computed (see `group_advantages`), together with
            num_generations and scale_rewards ("group", "batch" or "none").
        completion_mask: [B, L] bool or int, 0 where a token does not count; None for all ones.
        old_per_token_logps: [B, L], of the policy that sampled; None for on-policy (ratio 1, gradient flows).
        ref_per_token_logps: [B, L], of the frozen reference; required unless beta is the float 0.0.
        beta: KL weight, a float >= 0 or a 0-d tensor on any device. It may change at every call at no cost.
        epsilon_low, epsilon_high: clip range of the ratio, [1 - epsilon_low, 1 + epsilon_high]; for "cispo"
            epsilon_high is the upper bound of the ratio itself.
        delta: upper bound of the unclipped ratio (two-sided clipping), or None.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo" or "sapo".
        importance_sampling_level: "token", or "sequence" (GSPO: one ratio per completion).
        use_bias_correction_kl: multiply the KL by the ratio, as TRL does by default (the paper does not).
        importance_sampling_ratio: [B, L] or [B, 1], correction for a rollout engine; multiplies the policy term.
        sapo_temperature_pos, sapo_temperature_neg: "sapo"'s temperatures for positive and other advantages.
        entropy_coef: the loss is lowered by entropy_coef * mean entropy of the unmasked tokens.
        max_completion_length: "dr_grpo"'s normaliser, in tokens.
        num_items_in_batch: "dapo"'s and "cispo"'s normaliser, in tokens; None for the number of unmasked tokens.
        temperature: the logits are divided by it.
        inplace: write the gradient over the logits (which are consumed); without gradient they stay untouched. It
            saves the memory where the logits come out of a model; a leaf's `.grad` is a copy that autograd makes.
        reduction: "mean", or "none" for the [B, L] loss without normaliser.
        backend: "auto", "torch", "cpp", "triton" or "cuda". Only "auto" chooses; a named one raises if it cannot run.

    Beyond a log-ratio (or ref_logp - logp) of 80, exp and its slope stay at e^80: float32's exp ends at 88.7, and a
    factor more would make inf, then NaN gradients (see `kernels/reference.py`).

    Backward may run once; on a CPU again (retain_graph), if the first time its incoming gradient was 1.

    Raises:
        ValueError: a bad argument, by name; on the CPU also an unmasked id out of range.
        RuntimeError: logits that an earlier in-place call has consumed.
    """
    shape = arguments.logits_shape(logits, checks.flag("inplace", inplace))
    spec, batch = arguments.loss_settings(
        logits,
        shape,
        completion_ids,
        advantages,
        rewards=rewards,
        num_generations=num_generations,
        scale_rewards=scale_rewards,
        completion_mask=completion_mask,
        old_per_token_logps=old_per_token_logps,
        ref_per_token_logps=ref_per_token_logps,
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        use_bias_correction_kl=use_bias_correction_kl,
        importance_sampling_ratio=importance_sampling_ratio,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        entropy_coef=entropy_coef,
        max_completion_length=max_completion_length,
        num_items_in_batch=num_items_in_batch,
        temperature=temperature,
        reduction=reduction,
    )
    outputs = autograd.grpo(logits, batch, spec, reduction=reduction, inplace=inplace, backend=backend)
    return GRPOLossOutput.of(outputs, batch.mask, importance_sampling_level, advantages)


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of `ids` [B, L] under `logits` [B, L, V], float32 [B, L]; with `entropy` also the entropies.

    Both are differentiable, so any objective can stand on top. 0 (and no gradient) where `mask` [B, L] is 0.
    inplace_backward: backward writes the gradient over the logits, which are then consumed.
    """
    shape = arguments.logits_shape(logits, checks.flag("inplace_backward", inplace_backward))
    ids = arguments.token_ids(ids, shape, logits, "ids")
    mask = arguments.token_mask(mask, shape, logits, "mask")
    temperature = checks.number("temperature", temperature, above=0)
    logps, entropies = autograd.token_logprobs(
        logits, ids, mask, temperature, inplace_backward=inplace_backward, backend=backend
    )
    return (logps, entropies) if checks.flag("entropy", entropy) else logps


def group_advantages(
    rewards: Tensor, num_generations: int, *, scale_rewards: str = "group", eps: float = 1e-4
) -> Tensor:
    """Group-relative advantages (R - mean) / (std + eps), float32 [B] (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    rewards [B], with the `num_generations` completions of a prompt adjacent. scale_rewards "group" divides by the
    (unbiased) standard deviation of the group, "batch" by that of the batch, "none" by nothing. A NaN reward is absent:
    left out of mean and std, advantage 0. Raises ValueError if B is not a multiple of num_generations.
    """
    arguments.floating("rewards", rewards, "[B]")
    checks.number("eps", eps, at_least=0)
    arguments.check_groups(rewards.shape[0], num_generations, scale_rewards)
    return reference.group_advantages(rewards, num_generations, scale_rewards, eps)


class GRPOLoss(nn.Module):
    """`grpo_loss` as a module, with its settings fixed and its KL weight taken from a schedule.

    >>> criterion = GRPOLoss(kl_schedule=KLSchedule(1000, beta_min=0.0, beta_max=0.02), epsilon_high=0.28)
    >>> criterion(logits, completion_ids, advantages, ref_per_token_logps=ref).loss.backward()
    >>> criterion.kl_schedule.step()  # once per optimizer step

    Its state_dict resumes the schedule. Raises ValueError if `kl_schedule` and `beta` are both given.
    """

    def __init__(self, *, kl_schedule: KLSchedule | None = None, **loss_keywords: Any):
        super().__init__()
        if not isinstance(kl_schedule, KLSchedule | None):
            raise ValueError(f"kl_schedule must be a KLSchedule or None, got {kl_schedule!r}")
        _check_beta(kl_schedule, loss_keywords)
        self.kl_schedule = kl_schedule
        self.loss_keywords = loss_keywords

    def forward(
        self, logits: Tensor, completion_ids: Tensor, advantages: Tensor | None = None, **per_batch_tensors: Any
    ) -> GRPOLossOutput:
        _check_beta(self.kl_schedule, per_batch_tensors)
        keywords = {**self.loss_keywords, **per_batch_tensors}
        if self.kl_schedule is not None:
            keywords["beta"] = self.kl_schedule.value
        return grpo_loss(logits, completion_ids, advantages, **keywords)

    def get_extra_state(self) -> dict[str, float]:
        return {} if self.kl_schedule is None else self.kl_schedule.state_dict()

    def set_extra_state(self, state: dict[str, float]) -> None:
        if self.kl_schedule is not None:
            self.kl_schedule.load_state_dict(state)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.loss_keywords.items())


def _check_beta(kl_schedule: KLSchedule | None, keywords: dict[str, Any]) -> None:
    if kl_schedule is not None and "beta" in keywords:
        raise ValueError("beta must not be given together with kl_schedule, which provides it")
