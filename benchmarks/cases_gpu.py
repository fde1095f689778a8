"""`gpu` and `shapes`: the loss head from logits on a CUDA device, beside its peers and a copy on the device.

`gpu` is Qwen2-VL's vocabulary in bfloat16, with all peers; `shapes` is all else, without those that compile or tune for
minutes. Without a device every case is reported as not measured; quick ones then run on the CPU, Triton in its
interpreter (TRITON_INTERPRET=1), to see that the calls are right.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import Call, Case, Scene, device_for, without_gpu
from benchmarks.cases_loss import (
    BETA,
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
from mr1fast.kernels.self_test import model_output

SHAPES = ((8, 1024, 151936), (16, 1024, 32000), (64, 1024, 256))  # B, L, V
QUICK_SHAPES = ((2, 2, 512),)


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

    return Call(lambda: fused_selective_log_softmax(x.longer, x.ids, temperature=1.0, mask=x.mask), x.restore_longer)


def liger_triton(x: Inputs, inplace: bool) -> Call:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def run() -> None:
        loss, *_ = triton_grpo_loss(
            model_output(x.longer),
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

    return Call(run, x.restore_longer)


def flash_linear_attention(x: Inputs, inplace: bool) -> Call:
    """Less than the others do: on-policy, without old log-probabilities, and no entropies. Its first call tries 48
    settings."""
    from fla.modules.grpo import fused_grpo_loss

    def run() -> None:
        logits = model_output(x.longer)
        per_token = fused_grpo_loss(logits, x.ref_logps, x.ids, x.advantages, beta=BETA, inplace=inplace)
        per_token.mean().backward()  # every completion is as long

    return Call(run, x.restore_longer)


def backends() -> list[str]:
    """The backends that are written for a GPU, whether or not they can run here."""
    return [backend.name for backend in dispatch.BACKENDS if backend.name in ("triton", "cuda")]


def gpu_cases(nbytes: int, everything: bool) -> tuple[Case, ...]:
    """nbytes: of the logits. everything: also what compiles or tunes for long."""
    in_place, scoring = (f"mr1fast {backends()[0]}, {kind}" for kind in ("in place", "scoring"))

    def case(
        name: str, prepare: Any, passes: int, limit: str | None, against: str = in_place, late: bool = False
    ) -> Case:
        return Case(name, prepare, passes * nbytes, limit=limit, against=against, late=late)

    mine = [
        kind
        for name in backends()
        for kind in (
            case(f"mr1fast {name}, in place", partial(ours, backend=name, inplace=True), 2, "read-modify-write"),
            case(f"mr1fast {name}, scoring", partial(ours_scoring, backend=name), 1, "read", scoring),
            case(f"mr1fast {name}, new buffer", partial(ours, backend=name, inplace=False), 2, "memcpy"),
            case(f"mr1fast {name}, forward only", partial(ours_forward_only, backend=name), 1, "read"),
        )
    ]
    late = [
        case("torch.compile", compiled, 2, "memcpy", late=True),
        case(
            "flash-linear-attention, in place",
            partial(flash_linear_attention, inplace=True),
            2,
            "read-modify-write",
            late=True,
        ),
        case(
            "flash-linear-attention, new buffer", partial(flash_linear_attention, inplace=False), 2, "memcpy", late=True
        ),
    ]
    return (
        *mine,
        case("mr1fast cuda two-phase, in place", two_phase, 2, "read-modify-write"),
        case("memcpy", memcpy, 2, None),
        case("read-modify-write", read_modify_write, 2, None),
        case("read", read, 1, None),
        case("TRL kernels, scoring", trl_scoring, 1, "read", scoring),
        case("Liger triton, scoring", liger_scoring, 1, "read", scoring),
        case("TRL kernels", trl_functions, 2, "memcpy"),
        case("Liger triton, in place", partial(liger_triton, inplace=True), 2, "read-modify-write"),
        case("Liger triton, new buffer", partial(liger_triton, inplace=False), 2, "memcpy"),
        case("torch eager", eager, 2, "memcpy"),
        *(late if everything else ()),
    )


def why_not(nbytes: int) -> str | None:
    if reason := without_gpu("cuda"):
        return reason
    total = torch.cuda.get_device_properties(0).total_memory
    # source, logits, copy, a longer one, and what the hungriest peer (eager: float32 log-probabilities, gradients) adds
    needed = 14 * nbytes
    return None if needed < total else f"it needs {needed / 2**30:.0f} GiB, the device has {total / 2**30:.0f}"


def scene(group: str, B: int, L: int, V: int, dtype: torch.dtype, device: str) -> Scene:
    nbytes = B * L * V * dtype.itemsize
    return Scene(
        group,
        f"{B * L} x {V}",
        str(dtype).removeprefix("torch."),
        lambda: make_inputs(B, L, V, dtype, device),
        gpu_cases(nbytes, everything=group == "gpu" and device == "cuda"),
        device=device,
        why_not=lambda: why_not(nbytes) if device == "cuda" else None,
    )


def scenes(quick: bool) -> list[Scene]:
    flagship, *others = QUICK_SHAPES if quick else SHAPES
    device = device_for(quick)
    return [
        scene("gpu", *flagship, torch.bfloat16, device),
        scene("shapes", *flagship, torch.float32, device),
        *(scene("shapes", *shape, dtype, device) for shape in others for dtype in (torch.bfloat16, torch.float32)),
    ]
