"""The exponential of a log-ratio, which must not overflow."""

import torch
from torch import Tensor

# float32's exp overflows at 88.7. Log-ratios are cut off at 80, which leaves a factor of e^8.7 for what multiplies them
# (advantage, KL weight, 1 / temperature), so that no product overflows to inf and no gradient becomes inf * 0 = NaN.
EXP_LIMIT = 80.0
NEG_INF = float("-inf")


def saturating_exp(x: Tensor) -> Tensor:
    """exp(min(x, EXP_LIMIT)), whose derivative is its value everywhere: bounded, but never flat.

    With a flat bound, nothing would pull a token that is far from the reference back towards it.
    """
    return torch.exp(torch.where(x <= EXP_LIMIT, x, EXP_LIMIT + (x - x.detach())))
