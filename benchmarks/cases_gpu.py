"""`gpu`: the loss head from logits on a CUDA device, beside TRL's and Liger's Triton kernels and a copy on the device.

Without a device every case is reported as not measured.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

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
from mr1fast import token_logprobs
from mr1fast.kernels import cuda, dispatch

SHAPES = ((8, 1024, 151936), (16, 1024, 32000), (64, 1024, 256))  # B, L, V
QUICK_SHAPES = ((2, 64, 4096),)


def two_phase(x: Inputs) -> Call:
    """Our cuda backend without clusters, in place: what unaligned rows take, and older devices."""
    if reason := cuda.why_not(x.logits):
        raise RuntimeError(reason)
    call, clusters = ours(x, "cuda", True), cuda.RowsCall

    def run() -> None:
        with mock.patch.object(cuda, "RowsCall", partial(clusters, two_phase=1)):
            call.run()

    return Call(run, call.reset)


def ours_scoring(x: Inputs, backend: str) -> Call:
    @torch.no_grad()
    def run() -> None:
        token_logprobs(x.logits, x.ids, entropy=True, backend=backend)

    return Call(run, x.restore)


def trl_scoring(x: Inputs) -> Call:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    @torch.no_grad()
    def run() -> None:
        selective_log_softmax_and_entropy(x.logits, x.ids)

    return Call(run, x.restore)


def liger_scoring(x: Inputs) -> Call:
    """Less than the others do: it has no entropies."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    longer = _with_another_position(x.source)
    return Call(lambda: fused_selective_log_softmax(longer, x.ids, temperature=1.0, mask=x.mask))


def _with_another_position(logits: Tensor) -> Tensor:
    """[B, L + 1, V]: what Liger wants, though it ignores the last position."""
    return torch.cat((logits, torch.zeros_like(logits[:, :1])), 1)


def liger_triton(x: Inputs, inplace: bool) -> Call:
    """Liger's triton_grpo_loss."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    longer = _with_another_position(x.source)

    def restore() -> None:
        longer[:, :-1].copy_(x.source)

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
    in_place, scoring = (f"mr1fast {backends()[0]}, {kind}" for kind in ("in place", "scoring"))

    def case(name: str, prepare: Any, passes: int, limit: str | None, against: str = in_place) -> Case:
        return Case(name, prepare, passes * nbytes, limit=limit, against=against)

    mine = [
        kind
        for name in backends()
        for kind in (
            case(f"mr1fast {name}, in place", lambda x, n=name: ours(x, n, True), 2, "read-modify-write"),
            case(f"mr1fast {name}, new buffer", lambda x, n=name: ours(x, n, False), 2, "memcpy"),
            case(f"mr1fast {name}, forward only", lambda x, n=name: ours_forward_only(x, n), 1, "read"),
            case(f"mr1fast {name}, scoring", lambda x, n=name: ours_scoring(x, n), 1, "read", scoring),
        )
    ]
    return (
        *mine,
        case("mr1fast cuda two-phase, in place", two_phase, 2, "read-modify-write"),
        case("TRL kernels, scoring", trl_scoring, 1, "read", scoring),
        case("Liger triton, scoring", liger_scoring, 1, "read", scoring),
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
