"""What a comparison of a backend with the reference needs: random inputs of the loss, and the error budget.

Freshly compiled CUDA kernels are tested with it on the user's machine (cuda_check.py), and all backends in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mr1fast.kernels import dispatch

# The tolerance for a gradient, relative to its largest element: one rounding of the dtype.
GRADIENT_FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def available_backends(device: str = "cpu") -> list[str]:
    """The backends that can run on float32 logits there."""
    logits = torch.zeros(1, 1, 8, device=device)
    return ["torch", *(backend.name for backend in dispatch.BACKENDS if backend.why_not(logits) is None)]


def every_backend() -> list[str]:
    """The backends that can run on this machine, each on its `device_of`."""
    names = available_backends("cpu") + (available_backends("cuda") if torch.cuda.is_available() else [])
    return list(dict.fromkeys(names))


def device_of(backend: str) -> str:
    """The device on which a backend is tested: the GPU if it runs only there. Interpreted Triton runs on the CPU."""
    return "cpu" if backend in ("auto", *available_backends("cpu")) else "cuda"


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


class _ModelOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trigger: Tensor, logits: Tensor) -> Tensor:
        return logits.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def model_output(logits: Tensor) -> Tensor:
    """The logits as a model returns them: the output of a Function, whose gradient flows on into the model.

    The gradient of a leaf would be kept in `.grad`, and copied if it is in the leaf's own memory.
    """
    output: Tensor = _ModelOutput.apply(torch.zeros((), requires_grad=True), logits)
    return output


def assert_within_budget(name: str, actual: Tensor, exact: Tensor, torch_same_dtype: Tensor, floor: float) -> None:
    """|actual - float64| <= 2 |torch in the same dtype - float64| + floor * (1 + |float64|), in the maximum norm.

    Where float64 is infinite or NaN, `actual` must be the same.
    """
    actual, exact, torch_same_dtype = actual.double(), exact.double(), torch_same_dtype.double()
    assert actual.shape == exact.shape == torch_same_dtype.shape, f"{name}: shapes differ"
    finite = exact.isfinite()
    torch.testing.assert_close(
        actual[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )
    if not finite.any():
        return
    exact = exact[finite]
    error = (actual[finite] - exact).abs().max().item()
    peer = (torch_same_dtype[finite] - exact).abs().max().item()
    budget = 2 * peer + floor * (1 + exact.abs().max().item())
    assert budget < float("inf"), f"{name}: torch in the same dtype is off by {peer}, which allows anything"
    assert error <= budget, f"{name}: off by {error:.3g}, budget {budget:.3g} (torch in the same dtype: {peer:.3g})"
