"""`reference.py` behind the three functions of `dispatch.Backend`, for callers that go block by block (linear.py).

Everything comes from autograd on the reference: there is no derivative written out here. Eager only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mr1fast.kernels import reference
from mr1fast.kernels.dispatch import Backend
from mr1fast.kernels.reference import LogitMap, LossBatch, LossSpec, Outputs


def grpo_forward(logits: Tensor, batch: LossBatch, spec: LossSpec, grad: Tensor | None) -> Outputs:
    """See `dispatch.Backend`."""
    with torch.enable_grad():
        z = logits.detach().requires_grad_(grad is not None)
        logps, entropies = reference.score(z, batch.ids, batch.mask, LogitMap.of(batch, spec))
        leaf = logps.detach().requires_grad_()
        per_token_loss, kl, is_low, is_high = reference.objective(leaf, batch, spec)
        (coef,) = torch.autograd.grad((per_token_loss * batch.token_weight).sum(), leaf)
    loss = reference.aggregate(per_token_loss, entropies, batch).detach()
    if grad is not None:
        bonus = None if batch.entropy_weight is None else (-batch.entropy_weight).expand_as(entropies)
        _differentiate(logps, entropies, z, coef, bonus, grad)
    kl = None if kl is None else kl.detach()
    return loss, per_token_loss.detach(), logps.detach(), entropies.detach(), kl, is_low, is_high, coef


def score_forward(
    logits: Tensor, ids: Tensor, mask: Tensor | None, logit_map: LogitMap
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dispatch.Backend`."""
    logps, entropies = reference.score(logits, ids, mask, logit_map)
    return logps, entropies, torch.logsumexp(logit_map(logits.to(logps.dtype)), -1)


def score_backward(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropies: Tensor,
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    logit_map: LogitMap,
    grad: Tensor,
) -> None:
    """See `dispatch.Backend`."""
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        logps, entropies = reference.score(z, ids, mask, logit_map)
    _differentiate(logps, entropies, z, grad_logps, grad_entropies, grad)


def _differentiate(
    logps: Tensor, entropies: Tensor, z: Tensor, grad_logps: Tensor, grad_entropies: Tensor | None, grad: Tensor
) -> None:
    """Write the gradient of `z` into `grad`, which may be the same memory."""
    if grad_entropies is None:
        (gradient,) = torch.autograd.grad(logps, z, grad_logps)
    else:
        (gradient,) = torch.autograd.grad((logps, entropies), z, (grad_logps, grad_entropies))
    grad.copy_(gradient)


TORCH = Backend("torch", lambda logits: None, grpo_forward, score_forward, score_backward)
