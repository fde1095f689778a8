"""`gpu`: the loss head from logits on a CUDA device, beside TRL's and Liger's Triton kernels and a copy on the device.

Without a device every case is reported as not measured.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import Call, Case, Scene
from benchmarks.cases_loss import (
    BETA,
    DTYPES,
    Inputs,
    compiled,
    eager,
    make_inputs,
    memcpy,
    ours,
    ours_forward_only,
    read,
    read_modify_write,
    trl_functions,
)
from mr1fast.kernels import dispatch

SHAPES = ((8, 1024, 151936), (16, 1024, 32000), (64, 1024, 256))  # B, L, V
QUICK_SHAPES = ((2, 64, 4096),)


def liger_triton(x: Inputs, inplace: bool) -> Call:
    """Liger's triton_grpo_loss. It wants [B, L + 1, V] and ignores the last position: prepared once, not timed."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    B, L, V = x.logits.shape
    longer = torch.zeros(B, L + 1, V, dtype=x.logits.dtype, device=x.logits.device)

    def restore() -> None:
        longer[:, :L].copy_(x.source)

    def run() -> None:
        logits = longer.detach().requires_grad_()
        loss, *_ = triton_grpo_loss(
            logits,
            x.old_logps,
            x.ref_logps,
            x.ids,
            x.advantages,
            completion_mask=x.mask,
            temperature=1.0,
            beta=BETA,
            eps_low=0.2,
            eps_high=0.2,
            inplace=inplace,
            loss_type="grpo",
            reduce=True,
        )
        loss.backward()

    return Call(run, restore)


def backends() -> list[str]:
    """The backends that are written for a GPU, whether or not they can run here."""
    return [backend.name for backend in dispatch.BACKENDS if backend.name in ("triton", "cuda")]


def gpu_cases(nbytes: int) -> tuple[Case, ...]:
    reference = f"mr1fast {backends()[0]}, in place"

    def case(name: str, prepare: Any, passes: int, limit: str | None) -> Case:
        return Case(name, prepare, passes * nbytes, limit=limit, against=reference)

    mine = [
        kind
        for name in backends()
        for kind in (
            case(f"mr1fast {name}, in place", lambda x, n=name: ours(x, n, True), 2, "read-modify-write"),
            case(f"mr1fast {name}, new buffer", lambda x, n=name: ours(x, n, False), 2, "memcpy"),
            case(f"mr1fast {name}, forward only", lambda x, n=name: ours_forward_only(x, n), 1, "read"),
        )
    ]
    return (
        *mine,
        case("TRL kernels", trl_functions, 2, "memcpy"),
        case("Liger triton, in place", lambda x: liger_triton(x, True), 2, "read-modify-write"),
        case("Liger triton, new buffer", lambda x: liger_triton(x, False), 2, "memcpy"),
        case("torch eager", eager, 2, "memcpy"),
        case("torch.compile", compiled, 2, "memcpy"),
        case("memcpy", memcpy, 2, None),
        case("read-modify-write", read_modify_write, 2, None),
        case("read", read, 1, None),
    )


def why_not(nbytes: int) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    total = torch.cuda.get_device_properties(0).total_memory
    # source, logits, copy, and what the hungriest peer (eager: float32 log-probabilities and gradients) adds
    needed = 14 * nbytes
    return None if needed < total else f"it needs {needed / 2**30:.0f} GiB, the device has {total / 2**30:.0f}"


def scenes(quick: bool) -> list[Scene]:
    result = []
    for B, L, V in QUICK_SHAPES if quick else SHAPES:
        for dtype in DTYPES:
            nbytes = B * L * V * dtype.itemsize
            result.append(
                Scene(
                    "gpu",
                    f"{B * L} x {V}",
                    str(dtype).removeprefix("torch."),
                    lambda B=B, L=L, V=V, dtype=dtype: make_inputs(B, L, V, dtype, "cuda"),  # type: ignore[misc]
                    gpu_cases(nbytes),
                    device="cuda",
                    why_not=lambda nbytes=nbytes: why_not(nbytes),  # type: ignore[misc]
                )
            )
    return result
