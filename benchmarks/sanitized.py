"""`python -m benchmarks.sanitized [--large]`: one launch of every kernel and path, for tools that watch launches.

compute-sanitizer slows a kernel down a thousandfold, so the rows are few; --large takes N = 8192 rows of Qwen2-VL's
vocabulary in bf16, for ncu, which compares the bytes that moved with the 2 * N * V * 2 that must. Run it once without
such a tool before: what is compiled at first use need not be compiled under it. On a machine without a GPU it runs the
smallest ones on what there is (Triton in its interpreter, with TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import torch

from mr1fast import grpo_loss, token_logprobs
from mr1fast.kernels.self_test import available_backends, random_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ((1, 2, 151936), (2, 2, 32000), (2, 3, 4096), (2, 3, 1003), (2, 3, 37))  # B, L, V
LARGE = ((8, 1024, 151936),)


def launch(backend: str, batch: dict[str, Any], sequence_level: bool) -> None:
    """Scoring, the one pass in place, and, at sequence level, the two passes."""
    logits = batch["logits"].requires_grad_()
    token_logprobs(logits.detach(), batch["completion_ids"], backend=backend)
    grpo_loss(**batch, beta=0.1, inplace=True, backend=backend).loss.backward()
    if sequence_level:
        batch = batch | {"logits": torch.randn_like(logits).requires_grad_()}
        grpo_loss(**batch, beta=0.1, importance_sampling_level="sequence", backend=backend).loss.backward()


def large_batch(B: int, L: int, V: int) -> dict[str, Any]:
    """Every token unmasked; the log-probabilities of a small vocabulary, whose values do not matter here."""
    logits = torch.randn(B, L, V, dtype=torch.bfloat16, device=DEVICE)
    return random_batch(B, L, 8, device=DEVICE) | {"completion_mask": None, "logits": logits}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--large", action="store_true")
    large = parser.parse_args().large
    shapes = LARGE if large else SMALL if DEVICE == "cuda" else SMALL[-2:]
    backends = [name for name in available_backends(DEVICE) if name != "torch"]
    for (B, L, V), backend in product(shapes, backends):
        for dtype in (torch.bfloat16,) if large else (torch.bfloat16, torch.float32):
            batch = large_batch(B, L, V) if large else random_batch(B, L, V, dtype=dtype, device=DEVICE)
            launch(backend, batch, sequence_level=not large)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            print(f"{backend}: {B} x {L} x {V}, {dtype}: done", flush=True)


if __name__ == "__main__":
    main()
