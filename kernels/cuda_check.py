"""`python -m mr1fast.kernels.cuda_check [LIBRARY] [DEVICE]`: the CUDA kernels against the reference, on the device.

cuda_build.py runs it on a library before anybody else may use it; without arguments it checks the one in use. Where the
device takes no process beside those that have it, it says so in its last line and exits with NOT_CHECKED.
"""

from __future__ import annotations

import sys

import torch

from mr1fast.kernels import cuda
from mr1fast.kernels.cuda_build import NOT_CHECKED
from mr1fast.kernels.self_test import GRADIENT_FLOOR, assert_within_budget, random_batch

# Scalars only; unaligned; clusters of different sizes; too long for any cluster.
VOCABULARIES = (37, 1003, 32000, 151936, 10**6 + 8)
# From the messages of CUDA and torch: a full card, and one that one process has to itself (EXCLUSIVE_PROCESS).
TAKEN = ("out of memory", "busy or unavailable")


def gradient(batch: dict, logits: torch.Tensor, level: str, backend: str) -> torch.Tensor:
    from mr1fast import grpo_loss

    leaf = logits.detach().clone().requires_grad_()
    keywords = batch | {"logits": leaf, "importance_sampling_level": level, "entropy_coef": 0.01}
    grpo_loss(**keywords, beta=0.1, backend=backend).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def check(device: str, backend: str = "cuda") -> None:
    """Gradients of the one pass and of the two-pass way, every dtype and path; AssertionError if one is off."""
    for dtype in cuda.DTYPES:
        for V in VOCABULARIES:
            batch = random_batch(2, 3, V, dtype=dtype, device=device)
            for level in ("token", "sequence"):
                exact = gradient(batch, batch["logits"].double(), level, "torch")
                peer = gradient(batch, batch["logits"], level, "torch")
                actual = gradient(batch, batch["logits"], level, backend)
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
