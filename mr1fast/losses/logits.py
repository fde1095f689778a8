"""The public loss functions. Names and conventions follow TRL 1.16, formulas are in `kernels/reference.py`.

Shapes: B completions, L tokens, V vocabulary, H hidden. Completions of one prompt are adjacent in B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from mr1fast import checks
from mr1fast.kernels import advantages as kernel_advantages
from mr1fast.kernels import autograd, dispatch
from mr1fast.kernels.advantages import EPS, SCALE_REWARDS
from mr1fast.kernels.normalisers import token_count
from mr1fast.losses import arguments
from mr1fast.losses.kl_weight import KLSchedule
from mr1fast.losses.options import LossOptions, checked, completed, spelled_out


@dataclass(frozen=True)
class GRPOLossOutput:
    """What a loss function returns. Only `loss` is differentiable; the rest is [B, L], 0 where masked.

    loss: float32 0-d, or [B, L] with reduction="none" (float64 for float64 input, as all that follow).
    per_token_logps: log-probability of each completion token, at the given temperature.
    entropies: entropy of each token's distribution, in nats.
    kl: k3 estimate of the KL to the reference (after bias correction); None without reference log-probs.
    is_low_clipped, is_high_clipped: bool, whether the ratio is below (above) the clip range and its gradient is cut.
    completion_mask: bool, or None for all ones.
    clipped_per_completion: whether the flags have one value per completion, repeated for its tokens (sequence level).
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
        """Means over unmasked tokens (at sequence level, clip ratios over completions), by TRL's names; syncs once."""
        tokens = token_count(self.is_low_clipped, self.completion_mask)

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


@spelled_out
def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    inplace: bool = False,
    backend: str = "auto",
    **options: Unpack[LossOptions],
) -> GRPOLossOutput:
    """GRPO-D's loss (OThink-MR1, arXiv 2503.16081) and its relatives, from logits.

    Args:
        logits: [B, L, V] float32, bfloat16 or float16 (float64 on "torch" only), any strides in B and L;
            `logits[:, t]` predicts `completion_ids[:, t]`. A logit of -inf is a banned token. float16 logits are read
            once more, in backward, so that a loss scale (GradScaler) is in the gradient before it is rounded.
        completion_ids: [B, L] int64; anything at masked positions.
        advantages: [B] or [B, L]; or None, with rewards.
        inplace: write the gradient over the logits, which are then consumed; if no gradient is needed, they stay
            untouched. It saves memory if a model computed the logits; a leaf gets a copy of the gradient.
        backend: "auto", "torch", "cpp", "triton" or "cuda". Only "auto" chooses; any other raises if it cannot run.
        **options: those of `mr1fast.losses.options.LossOptions`, which are:

    Beyond a log-ratio (or ref_logp - logp) of 80, exp and its slope stay at e^80: float32's exp overflows at 88.7, and
    further factors would give inf and then NaN gradients (see `kernels/reference.py`).

    Backward may run once; on a CPU it may run again (retain_graph) if its first incoming gradient was 1. Its result can
    be differentiated again (create_graph) only with backend="torch".

    Raises:
        ValueError: a bad argument, by name; on the CPU also an unmasked id out of range.
        RuntimeError: the logits were consumed by an earlier in-place call, or a second derivative was asked for.
    """
    shape = arguments.logits_shape(logits, checks.flag("inplace", inplace))
    values = completed(grpo_loss, options)
    spec, batch = arguments.loss_call(logits, shape, completion_ids, advantages, values)
    outputs = autograd.grpo(logits, batch, spec, reduction=values["reduction"], inplace=inplace, backend=backend)
    return GRPOLossOutput.of(outputs, batch.mask, spec.importance_sampling_level, advantages)


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
    rewards: Tensor, num_generations: int, *, scale_rewards: str = "group", eps: float = EPS
) -> Tensor:
    """Group-relative advantages (R - mean) / (std + eps), float32 [B] (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    rewards [B], with the `num_generations` completions of a prompt adjacent. scale_rewards "group" divides by the
    (unbiased) standard deviation of the group, "batch" by that of the whole batch, "none" does not divide. A NaN reward
    counts as missing: mean and std leave it out, and its advantage is 0. Equal rewards have advantages of exactly 0;
    everything is computed in float64.
    Raises ValueError if B is not a multiple of num_generations.
    """
    arguments.floating("rewards", rewards, "[B]")
    eps = checks.number("eps", eps, at_least=0)
    checks.choice("scale_rewards", scale_rewards, SCALE_REWARDS)
    num_generations = checks.integer("num_generations", num_generations, at_least=1)
    group_size = arguments.group_size(rewards.shape[0], num_generations)
    return kernel_advantages.group_advantages(rewards, group_size, scale_rewards, eps)


class GRPOLoss(nn.Module):
    """`grpo_loss` as a module, with its settings fixed and its KL weight taken from a schedule.

    >>> criterion = GRPOLoss(kl_schedule=KLSchedule(1000, beta_min=0.0, beta_max=0.02), epsilon_high=0.28)
    >>> criterion(logits, completion_ids, advantages, ref_per_token_logps=ref).loss.backward()
    >>> criterion.kl_schedule.step()  # once per optimizer step

    Its state_dict resumes the schedule.
    """

    @spelled_out
    def __init__(
        self,
        *,
        kl_schedule: KLSchedule | None = None,
        inplace: bool = False,
        backend: str = "auto",
        **options: Unpack[LossOptions],
    ):
        """Args:
            kl_schedule: provides beta; None to use the option `beta`.
            inplace, backend: as in `grpo_loss`.
            **options: those of `mr1fast.losses.options.LossOptions`, which a call may override. They are:

        Raises:
            ValueError: an unknown option, a wrong value, or both `kl_schedule` and `beta`.
        """
        super().__init__()
        if not isinstance(kl_schedule, KLSchedule | None):
            raise ValueError(f"kl_schedule must be a KLSchedule or None, got {kl_schedule!r}")
        _check_beta(kl_schedule, options)
        checked(GRPOLoss, options)
        self.kl_schedule = kl_schedule
        self.loss_keywords: dict[str, Any] = {
            **options,
            "inplace": checks.flag("inplace", inplace),
            "backend": checks.choice("backend", backend, dispatch.NAMES),
        }

    def forward(
        self, logits: Tensor, completion_ids: Tensor, advantages: Tensor | None = None, **options: Any
    ) -> GRPOLossOutput:
        """`grpo_loss` with the module's options, which those given here override."""
        _check_beta(self.kl_schedule, options)
        keywords = {**self.loss_keywords, **options}
        if self.kl_schedule is not None:
            keywords["beta"] = self.kl_schedule.value
        return grpo_loss(logits, completion_ids, advantages, **keywords)

    def get_extra_state(self) -> Tensor:
        """The values of the schedule's state, float64: a tensor, because safetensors can save nothing else."""
        state = [] if self.kl_schedule is None else list(self.kl_schedule.state_dict().values())
        return torch.tensor(state, dtype=torch.float64)

    def set_extra_state(self, state: Tensor | dict[str, float]) -> None:
        if self.kl_schedule is None:
            return
        if isinstance(state, Tensor):  # earlier versions saved the dict itself
            state = dict(zip(self.kl_schedule.state_dict(), state.tolist()))
        self.kl_schedule.load_state_dict(state)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.loss_keywords.items())


def _check_beta(kl_schedule: KLSchedule | None, options: Mapping[str, Any]) -> None:
    if kl_schedule is not None and "beta" in options:
        raise ValueError("beta must not be given together with kl_schedule, which provides it")
