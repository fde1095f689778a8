"""`python -m mr1fast.kernels.cuda_check [LIBRARY] [DEVICE]`: the CUDA kernels against the reference, on the device.

cuda_build.py runs it on a library before anybody else may use it; without arguments it checks the one in use. Where the
device takes no process beside those that have it, it says so in its last line and exits with NOT_CHECKED.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from mr1fast.kernels import autograd, cuda
from mr1fast.kernels.cuda_build import NOT_CHECKED
from mr1fast.kernels.reference import LossBatch, LossSpec
from mr1fast.kernels.self_test import GRADIENT_FLOOR, assert_within_budget, random_batch

# In this order: only scalars; unaligned; clusters of different sizes (twice); too long for any cluster.
VOCABULARIES = (37, 1003, 32000, 151936, 10**6 + 8)
# From the messages of CUDA and torch: the device's memory is full, or a single process owns it (EXCLUSIVE_PROCESS).
TAKEN = ("out of memory", "busy or unavailable")


def gradient(inputs: dict[str, Any], logits: Tensor, level: str, backend: str) -> Tensor:
    """dloss/dlogits [B, L, V] of GRPO's loss with every term that it may have."""
    leaf = logits.detach().clone().requires_grad_()
    B, L, _ = leaf.shape
    dtype = torch.float64 if leaf.dtype == torch.float64 else torch.float32

    def constant(value: float) -> Tensor:
        return torch.full((), value, dtype=dtype, device=leaf.device)

    batch = LossBatch(
        ids=inputs["completion_ids"],
        token_weight=constant(1 / (B * L)).expand(B, L),
        beta=constant(0.1),
        mask=inputs["completion_mask"],
        advantages=inputs["advantages"].to(dtype)[:, None].expand(B, L),
        old_logps=inputs["old_per_token_logps"].to(dtype),
        ref_logps=inputs["ref_per_token_logps"].to(dtype),
        entropy_weight=constant(0.01 / (B * L)),
    )
    spec = LossSpec(importance_sampling_level=level)
    loss, *_ = autograd.grpo(leaf, batch, spec, reduction="mean", inplace=False, backend=backend)
    (found,) = torch.autograd.grad(loss, leaf)
    return found


def check(device: str, backend: str = "cuda") -> None:
    """Check the gradients of one pass and of two passes for every dtype and path; AssertionError if one is off."""
    for dtype in cuda.DTYPES:
        for V in VOCABULARIES:
            inputs = random_batch(2, 3, V, dtype=dtype, device=device)
            for level in ("token", "sequence"):
                exact = gradient(inputs, inputs["logits"].double(), level, "torch")
                peer = gradient(inputs, inputs["logits"], level, "torch")
                actual = gradient(inputs, inputs["logits"], level, backend)
                scale = exact.abs().max()
                name = f"{dtype}, V {V}, {level} level"
                assert_within_budget(name, actual / scale, exact / scale, peer / scale, GRADIENT_FLOOR[dtype])
                print(f"{name}: within the budget", flush=True)


def main() -> int:
    device = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    if not torch.cuda.is_available():
        print("there is no CUDA device", file=sys.stderr)
        return NOT_CHECKED
    if len(sys.argv) > 1:
        cuda.use(cuda.open_library(sys.argv[1]), device)
    try:
        check(f"cuda:{device}")
    except RuntimeError as error:  # a wrong gradient is an AssertionError
        reason = str(error).splitlines()[0]
        if not any(words in reason for words in TAKEN):
            raise
        print(reason, file=sys.stderr)
        return NOT_CHECKED
    return 0


if __name__ == "__main__":
    sys.exit(main())
