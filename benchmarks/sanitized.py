"""`python -m benchmarks.sanitized [--large]`: one launch of every kernel and path, for tools that watch launches.

compute-sanitizer slows a kernel down a thousandfold, so the rows are few; --large takes N = 8192 rows of Qwen2-VL's
vocabulary in bf16, for ncu, which compares the bytes that moved with the 2 * N * V * 2 that must.
"""

from __future__ import annotations

import argparse

import torch

from mr1fast import grpo_loss, token_logprobs
from mr1fast.kernels.self_test import available_backends, random_batch

SMALL = ((2, 3, 37), (2, 3, 1003), (2, 3, 4096), (2, 2, 32000), (1, 2, 151936))  # B, L, V
LARGE = ((8, 1024, 151936),)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--large", action="store_true")
    large = parser.parse_args().large
    for backend in available_backends("cuda"):
        if backend == "torch":
            continue
        for B, L, V in LARGE if large else SMALL:
            for dtype in (torch.bfloat16,) if large else (torch.bfloat16, torch.float32):
                if large:
                    logits = torch.randn(B, L, V, dtype=dtype, device="cuda")
                    batch = random_batch(B, L, 8, device="cuda") | {"completion_mask": None}
                else:
                    batch = random_batch(B, L, V, dtype=dtype, device="cuda")
                    logits = batch["logits"]
                batch["logits"] = logits.requires_grad_()
                token_logprobs(logits.detach(), batch["completion_ids"], backend=backend)
                grpo_loss(**batch, beta=0.1, inplace=True, backend=backend).loss.backward()
                if not large:
                    fresh = torch.randn_like(logits).requires_grad_()
                    output = grpo_loss(
                        **(batch | {"logits": fresh}), beta=0.1, importance_sampling_level="sequence", backend=backend
                    )
                    output.loss.backward()
                torch.cuda.synchronize()
                print(f"{backend}: {B} x {L} x {V}, {dtype}: done", flush=True)


if __name__ == "__main__":
    main()
