"""mr1fast: GRPO-D (OThink-MR1, arXiv 2503.16081) with fused loss kernels.

>>> from mr1fast import grpo_loss
>>> out = grpo_loss(logits, completion_ids, advantages, ref_per_token_logps=ref, beta=0.04)
>>> out.loss.backward()
"""

from typing import TYPE_CHECKING, Any

from mr1fast.losses.kl_weight import KLSchedule, kl_weight

if TYPE_CHECKING:
    from mr1fast.losses.hidden import linear_grpo_loss, linear_token_logprobs
    from mr1fast.losses.logits import GRPOLoss, GRPOLossOutput, group_advantages, grpo_loss, token_logprobs
    from mr1fast.losses.logps import grpo_loss_from_logps, shift_packed
    from mr1fast.losses.rollout import rollout_correction
    from mr1fast.losses.vespo import vespo_weights

__version__ = "0.1.0"

__all__ = [
    "GRPOLoss",
    "GRPOLossOutput",
    "KLSchedule",
    "group_advantages",
    "grpo_loss",
    "grpo_loss_from_logps",
    "kl_weight",
    "linear_grpo_loss",
    "linear_token_logprobs",
    "rollout_correction",
    "shift_packed",
    "token_logprobs",
    "vespo_weights",
]


def __getattr__(name: str) -> Any:
    """torch is imported with the first loss function, so that the programs can reject a bad option at once."""
    if name in __all__:
        from mr1fast.losses import hidden, logits, logps, rollout, vespo

        modules = (logits, hidden, logps, rollout, vespo)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
    raise AttributeError(f"module 'mr1fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
