"""Which backend runs a call: an ordered table, first match wins.

Every backend but `torch` (the reference, differentiated by autograd) offers the same three functions; see `Backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mr1fast.kernels import cpp, cuda, triton_backend
from mr1fast.kernels.reference import Outputs


@dataclass(frozen=True)
class Backend:
    """One implementation of the loss head.

    why_not(logits) -> None if it can run on such logits here, else one sentence that says why it cannot.

    grpo_forward(logits, batch, spec, grad) -> reference.Outputs
        The one pass. `grad` is None, or a tensor like the logits (or the logits themselves) that receives
        dloss/dlogits (which autograd.py asks for in float32 and bfloat16 only).
    score_forward(logits, ids, mask, logit_map) -> (logps, entropies, lse), float32 [B, L]
    score_backward(logits, ids, mask, lse, entropies, grad_logps, grad_entropies, logit_map, grad) -> None
        Writes the gradient into `grad`, which may be the logits; grad_entropies may be None.
    """

    name: str
    why_not: Callable[[Tensor], str | None]
    grpo_forward: Callable[..., Outputs]
    score_forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    score_backward: Callable[..., None]


BACKENDS: tuple[Backend, ...] = (
    Backend("cpp", cpp.why_not, cpp.grpo_forward, cpp.score_forward, cpp.score_backward),
    Backend("cuda", cuda.why_not, cuda.grpo_forward, cuda.score_forward, cuda.score_backward),
    Backend(
        "triton",
        triton_backend.why_not,
        triton_backend.grpo_forward,
        triton_backend.score_forward,
        triton_backend.score_backward,
    ),
)
NAMES = ("auto", "torch", *(backend.name for backend in BACKENDS))


def find(name: str) -> Backend:
    return next(backend for backend in BACKENDS if backend.name == name)


def resolve(name: str, logits: Tensor) -> str:
    """The backend to run: `name` itself or, for "auto", the first that can. Raises ValueError if `name` cannot run."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "auto":
        return next((backend.name for backend in BACKENDS if backend.why_not(logits) is None), "torch")
    if name != "torch" and (reason := find(name).why_not(logits)):
        raise ValueError(f"backend={name!r} cannot run here: {reason}")
    return name
