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
from mr1fast.kernels.completions import Completions
from mr1fast.kernels.normalisers import token_count
from mr1fast.kernels.reference import LossBatch, LossSpec, compute_dtype
from mr1fast.losses import arguments
from mr1fast.losses.keywords import checked, completed, spelled_out
from mr1fast.losses.kl_weight import KLSchedule
from mr1fast.losses.layout import Layout, floating
from mr1fast.losses.options import LossOptions


@dataclass(frozen=True)
class GRPOLossOutput:
    """What a loss function returns. Only `loss` is differentiable; the rest is [B, L] (packed [T]), 0 where masked.

    loss: float32 0-d, or [B, L] with reduction="none" (float64 for float64 input, as all that follow).
    per_token_logps: log-probability of each completion token, at the given temperature.
    entropies: entropy of each token's distribution, in nats; None where `grpo_loss_from_logps` was given none.
    kl: estimate of the KL to the reference (after bias correction); None without reference log-probs.
    is_low_clipped, is_high_clipped: bool, whether the ratio is below (above) the clip range and its gradient is cut.
    completion_mask: bool, or None for all ones.
    clipped_per_completion: whether the flags have one value per completion, repeated for its tokens (sequence level).
    cu_seqlens: [S + 1] if packed, or None.
    """

    loss: Tensor
    per_token_logps: Tensor
    entropies: Tensor | None
    kl: Tensor | None
    is_low_clipped: Tensor
    is_high_clipped: Tensor
    completion_mask: Tensor | None = None
    clipped_per_completion: bool = False
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(
        cls,
        outputs: autograd.LossOutputs,
        layout: Layout,
        batch: LossBatch,
        spec: LossSpec,
        advantages: Tensor | None,
    ) -> GRPOLossOutput:
        of_completions = advantages is None or layout.is_per_completion(advantages)
        mask = batch.mask
        if layout.packed:
            loss, *per_token = (None if output is None else layout.returned(output) for output in (*outputs, mask))
            outputs, mask = (loss, *per_token[:-1]), per_token[-1]  # type: ignore[assignment]
        return cls(
            *outputs,
            completion_mask=mask,
            clipped_per_completion=spec.importance_sampling_level != "token" and of_completions,
            cu_seqlens=layout.cu_seqlens,
        )

    def metrics(self) -> dict[str, float]:
        """Means over unmasked tokens (at sequence level, clip ratios over completions), by TRL's names; syncs once."""
        tokens = token_count(self.is_low_clipped, self.completion_mask)

        def clip_ratio(flags: Tensor) -> Tensor:
            if not self.clipped_per_completion:
                return flags.sum() / tokens
            flags = flags if self.cu_seqlens is None else flags[None]
            completions = Completions.of(flags.shape, self.cu_seqlens)
            return (completions.sums(flags) > 0).sum() / max(completions.size, 1)

        values = {
            "clip_ratio/low_mean": clip_ratio(self.is_low_clipped),
            "clip_ratio/high_mean": clip_ratio(self.is_high_clipped),
            "clip_ratio/region_mean": clip_ratio(self.is_low_clipped | self.is_high_clipped),
        }
        for name, per_token in (("entropy", self.entropies), ("kl", self.kl)):
            if per_token is not None:
                values[name] = per_token.sum() / tokens
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
        logits: [B, L, V] float32, bfloat16 or float16 (float64 on "torch" only), any strides in B and L; packed
            [T, V] or [1, T, V], see cu_seqlens. `logits[:, t]` predicts `completion_ids[:, t]`. A logit of -inf is a
            banned token. float16 logits are read once more, in backward, so that a loss scale (GradScaler) is in the
            gradient before it is rounded.
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
    values = completed(grpo_loss, options)
    overwritten = checks.flag("inplace", inplace)
    logits, layout = arguments.logits_rows(logits, overwritten, cu_seqlens=values["cu_seqlens"])
    ids = arguments.token_ids(completion_ids, layout, "completion_ids")
    spec, batch = arguments.loss_call(compute_dtype(logits.dtype), layout, ids, advantages, values)
    outputs = autograd.grpo(logits, batch, spec, reduction=values["reduction"], inplace=inplace, backend=backend)
    return GRPOLossOutput.of(outputs, layout, batch, spec, advantages)


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
    inplace_backward: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of `ids` [B, L] under `logits` [B, L, V], float32 [B, L]; with `entropy` also the entropies.

    Both are differentiable, so any objective can stand on top. 0 (and no gradient) where `mask` [B, L] is 0.
    Packed: logits [T, V] (with cu_seqlens also [1, T, V]) and [T] in place of [B, L]; cu_seqlens [S + 1] is needed only
    beside a temperature for each completion, [S].
    temperature, logit_scale and final_logit_softcapping: what the logits go through first, as in `grpo_loss`.
    inplace_backward: backward writes the gradient over the logits, which are then consumed.
    """
    overwritten = checks.flag("inplace_backward", inplace_backward)
    logits, layout = arguments.logits_rows(logits, overwritten, cu_seqlens=cu_seqlens, needs_cu_seqlens=False)
    checked_mask = arguments.token_mask(mask, layout, "mask")
    scored = autograd.token_logprobs(
        logits,
        arguments.token_ids(ids, layout, "ids"),
        checked_mask,
        arguments.logit_map(
            compute_dtype(logits.dtype),
            layout,
            checked_mask,
            temperature=temperature,
            logit_scale=logit_scale,
            final_logit_softcapping=final_logit_softcapping,
        ),
        inplace_backward=inplace_backward,
        backend=backend,
    )
    logps, entropies = map(layout.returned, scored)
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
    floating("rewards", rewards, "B")
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
