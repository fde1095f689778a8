"""The estimators of the KL to the reference, part of the definition in `reference.py`: functions of ref_logp - logp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mr1fast.kernels.exponentials import saturating_exp

LOW_VAR_KL_LIMIT = 10.0


def _k1(d: Tensor) -> Tensor:
    """Unbiased, of either sign. (The names k1, k2 and k3 are Schulman's, http://joschu.net/blog/kl-approx.html.)"""
    return -d


def _abs(d: Tensor) -> Tensor:
    return d.abs()


def _k2(d: Tensor) -> Tensor:
    return d.square() / 2


def _k3(d: Tensor) -> Tensor:
    """Unbiased, at least 0. It grows with e^d: beyond d = 80 the exponential (and with it the slope) stays at e^80. It
    is then far beyond any use as an estimate; what matters is that loss and gradient stay finite and keep pulling the
    policy back.
    """
    return saturating_exp(d) - d - 1


def _low_var_kl(d: Tensor) -> Tensor:
    """verl's and EasyR1's, and OpenRLHF's k3: cut at 10, beyond which nothing pulls the policy back any more.

    (verl and EasyR1 cut d at 20 before; at 20 either way the estimate is above 10 already.)
    """
    kl = _k3(d)
    return torch.where(kl > LOW_VAR_KL_LIMIT, LOW_VAR_KL_LIMIT, kl)


ESTIMATORS = (_k1, _abs, _k2, _k3, _low_var_kl)  # in the order of their numbers in Triton and C++
KL_ESTIMATORS = tuple(estimator.__name__.removeprefix("_") for estimator in ESTIMATORS)


def kl_estimate(d: Tensor, estimator: str, clamp: float) -> Tensor:
    """An estimate of the KL from d = ref_logp - logp, which is cut to [-clamp, clamp] first; differentiable."""
    if clamp != math.inf:  # not by clamp(), which would give a NaN the gradient 0
        d = torch.where(d > clamp, clamp, torch.where(d < -clamp, -clamp, d))
    return ESTIMATORS[KL_ESTIMATORS.index(estimator)](d)
