"""A batch of hidden states, head and completions, small enough for float64 and many blocks."""

import torch

from mr1fast import token_logprobs
from mr1fast.kernels.testing import available_backends, random_batch

B, L, V, H = 6, 5, 43, 11
BACKENDS = available_backends()
EVERY = [name for name in BACKENDS if name != "triton"]  # the interpreter is too slow for the whole matrix


def chunk_of(blocks, dtype=torch.float32, rows=B * L):
    return max(rows // blocks, 1) * V * dtype.itemsize


def case(*, dtype=torch.float32, seed=0, scale=1.0):
    """(hidden, weight, bias), leaves, and the batch; completion 1 has no advantage, the last one is fully masked."""
    batch = random_batch(B, L, V, seed=seed)
    batch["advantages"][1] = 0
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=g) * scale for shape in ((B, L, H), (V, H), (V,)))
    logits = batch.pop("logits")
    shift = token_logprobs(hidden @ weight.T + bias, batch["completion_ids"]) - token_logprobs(
        logits, batch["completion_ids"]
    )
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        batch[name] += shift
    hidden[~batch["completion_mask"]] = torch.nan  # must never be looked at
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], batch
