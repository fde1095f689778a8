"""mr1fast: GRPO-D (OThink-MR1, arXiv 2503.16081) with fused loss kernels.

>>> from mr1fast import grpo_loss
>>> out = grpo_loss(logits, completion_ids, advantages, ref_per_token_logps=ref, beta=0.04)
>>> out.loss.backward()
"""

from mr1fast.kl_weight import KLSchedule, kl_weight
from mr1fast.loss import (
    GRPOLoss,
    GRPOLossOutput,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
)

__version__ = "0.1.0"

__all__ = [
    "GRPOLoss",
    "GRPOLossOutput",
    "KLSchedule",
    "group_advantages",
    "grpo_loss",
    "kl_weight",
    "linear_grpo_loss",
    "linear_token_logprobs",
    "token_logprobs",
]
