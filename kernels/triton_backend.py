"""The `triton` backend as `dispatch` binds it: CUDA, or anywhere under TRITON_INTERPRET=1; float32, bfloat16, float16.

Triton is imported on the first call only: it takes a quarter of a second, and not every platform has it. The kernels
are in triton_loss.py (one pass) and triton_score.py, on the walk over a row in triton_rows.py and the objective in
triton_objective.py.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from mr1fast.kernels.reference import Outputs

INSTALLED = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot trace the question
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(logits: Tensor) -> str | None:
    if not INSTALLED:
        return "triton is not installed; `pip install triton` (Linux)"
    if logits.dtype not in DTYPES:
        return f"it supports float32, bfloat16 and float16 logits, got {logits.dtype}"
    if logits.shape[-1] == 0:
        return "the vocabulary is empty"
    if not logits.is_cuda and not _interpreted():
        return f"it needs a CUDA device (or TRITON_INTERPRET=1 in the environment), the logits are on {logits.device}"
    return None


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def grpo_forward(*args: Any) -> Outputs:
    """See `dispatch.Backend`."""
    from mr1fast.kernels import triton_loss

    outputs: Outputs = triton_loss.grpo_forward(*args)
    return outputs


def score_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `dispatch.Backend`."""
    from mr1fast.kernels import triton_score

    return triton_score.score_forward(*args)


def score_backward(*args: Any) -> None:
    """See `dispatch.Backend`."""
    from mr1fast.kernels import triton_score

    triton_score.score_backward(*args)
