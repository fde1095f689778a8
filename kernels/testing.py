"""What tests and benchmarks share: random inputs for the loss head, and the error budget the kernels are held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mr1fast.kernels import dispatch


def available_backends(device: str = "cpu") -> list[str]:
    """The backends that can run on float32 logits there."""
    logits = torch.zeros(1, 1, 8, device=device)
    return ["torch", *(backend.name for backend in dispatch.BACKENDS if backend.why_not(logits) is None)]


def random_batch(
    B: int,
    L: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    scale: float = 2.0,
) -> dict[str, Any]:
    """Logits [B, L, V], completion_ids, advantages [B], ragged completion_mask, old and reference log-probs.

    The old log-probs differ from the current ones by enough for about half of the tokens to be clipped at 0.2.
    The last completion is masked altogether if there are three or more.
    """
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    logits = (normal(B, L, V) * scale).to(dtype)
    ids = torch.randint(0, V, (B, L), generator=g, device=device)
    lengths = torch.randint(1, L + 1, (B,), generator=g, device=device)
    lengths[0] = L
    if B >= 3:
        lengths[-1] = 0
    logps = torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0].float()
    return {
        "logits": logits,
        "completion_ids": ids,
        "advantages": normal(B),
        "completion_mask": torch.arange(L, device=device) < lengths[:, None],
        "old_per_token_logps": logps + 0.3 * normal(B, L),
        "ref_per_token_logps": logps + 0.5 * normal(B, L),
    }


def assert_within_budget(name: str, actual: Tensor, exact: Tensor, torch_same_dtype: Tensor, floor: float) -> None:
    """|actual - float64| <= 2 |torch in the same dtype - float64| + floor * (1 + |float64|), in the maximum norm."""
    exact = exact.double()
    finite = exact.isfinite()
    assert torch.equal(actual.double()[~finite].nan_to_num(), exact[~finite].nan_to_num()), f"{name}: inf or NaN differ"
    if not finite.any():
        return
    exact = exact[finite]
    error = (actual.double()[finite] - exact).abs().max().item()
    peer = (torch_same_dtype.double()[finite] - exact).abs().max().item()
    budget = 2 * peer + floor * (1 + exact.abs().max().item())
    assert error <= budget, f"{name}: off by {error:.3g}, budget {budget:.3g} (torch in the same dtype: {peer:.3g})"
