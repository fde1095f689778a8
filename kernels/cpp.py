"""The `cpp` backend: csrc/grpo_cpu.cpp through the ops that `mr1fast._C` registers. CPU, float32, bfloat16, float16.

One visit of each row of logits, with AVX-512, AVX2 or portable code chosen at run time; MR1FAST_CPU (grpo_cpu.h),
set before the first call, asks for a lesser one. The three functions are those of `dispatch.Backend`; `num_threads` of
torch applies, and the results have the same bits whatever it is.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from mr1fast.kernels.reference import LogitMap, LossBatch, LossSpec, Outputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load() -> str | None:
    """Load the extension; None, or why it is not there."""
    try:
        importlib.import_module("mr1fast._C")
    except ModuleNotFoundError:
        return (
            "the C++ extension was not built; install a C++ compiler, then run "
            "`pip install --no-build-isolation -e .` with torch already installed"
        )
    except ImportError as error:  # built against another torch or Python, or a library is missing
        return f"the C++ extension does not load ({error}); rebuild it with `pip install --no-build-isolation -e .`"
    return None


MISSING = _load()


def why_not(logits: Tensor) -> str | None:
    if MISSING is not None:
        return MISSING
    if logits.device.type != "cpu":
        return f"it runs on the CPU, the logits are on {logits.device}"
    if logits.dtype not in DTYPES:
        return f"it supports float32, bfloat16 and float16 logits, got {logits.dtype}"
    if logits.shape[-1] == 0:
        return "the vocabulary is empty"
    return None


def _rows(logits: Tensor) -> Tensor:
    """Logits whose last stride is 1; a copy only if it is not."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def grpo_forward(logits: Tensor, batch: LossBatch, spec: LossSpec, grad: Tensor | None) -> Outputs:
    """See `dispatch.Backend`."""
    rows = logits if grad is logits else _rows(logits)
    settings = (spec.switches, spec.numbers, spec.temperature, spec.final_logit_softcapping)
    outputs: Outputs = torch.ops.mr1fast_native.grpo_forward(rows, *batch, *settings, grad)
    return outputs if batch.ref_logps is not None else (*outputs[:4], None, *outputs[5:])


def score_forward(
    logits: Tensor, ids: Tensor, mask: Tensor | None, logit_map: LogitMap
) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, entropies, lse), float32 [B, L]."""
    scored: tuple[Tensor, Tensor, Tensor]
    scored = torch.ops.mr1fast_native.score_forward(_rows(logits), ids, mask, *logit_map)
    return scored


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
    torch.ops.mr1fast_native.score_backward(
        logits if grad is logits else _rows(logits),
        ids,
        mask,
        lse,
        entropies,
        grad_logps,
        grad_entropies,
        *logit_map,
        grad,
    )
