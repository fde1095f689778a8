"""`linear`: GRPO's loss and the gradients of hidden states and weight, from hidden states [B, L, H] and weight [V, H].

The limit is three bare GEMMs over all rows at once into buffers that are there already: what remains of the work if
everything else costs nothing (recomputing designs need a fourth). All cases compute log-probabilities, entropies,
ratio, clipping, KL, loss and both gradients, unless linear_peers.py says otherwise of a peer; ratios around 1, beta
0.04, every token unmasked. `peak_extra_mib` holds the gradients too, and at first use the libraries' own buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import linear_peers as peers
from benchmarks.cases import Call, Case, Scene, device_for, without_gpu
from benchmarks.linear_inputs import Inputs, make_inputs
from mr1fast import grpo_loss, linear_grpo_loss, linear_token_logprobs

CPU_SHAPES = ((8, 128, 256, 151936), (8, 128, 1536, 32000))  # B, L, H, V; the first V is Qwen2-VL's
GPU_SHAPES = tuple((8, 1024, H, 151936) for H in (1536, 3584, 4096))
MEMORY_SHAPE = (8, 1024, 256, 151936)  # whose logits alone are 4.6 GiB in float32
QUICK_CPU_SHAPES = ((2, 64, 16, 1024),)
QUICK_GPU_SHAPES = ((2, 2, 16, 512),)
DTYPES = (torch.float32, torch.bfloat16)
FLOOR = "three GEMMs"


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(x: Inputs, backend: str, **changes: Any) -> Call:
    def run() -> None:
        keywords = x.keywords | changes
        linear_grpo_loss(x.hidden, x.weight, x.ids, x.advantages, backend=backend, **keywords).loss.backward()

    return Call(run, x.clear)


def ours_without_some(x: Inputs, backend: str, share: float) -> Call:
    """At beta 0, on-policy, with `share` of the rows at advantage 0, spread as evenly as can be over the batch."""
    N = x.ids.numel()
    silent = (torch.arange(N) * 7919 % N < share * N).view_as(x.ids).to(x.ids.device)
    advantages = x.advantages[:, None].expand(x.ids.shape).masked_fill(silent, 0)

    def run() -> None:
        linear_grpo_loss(x.hidden, x.weight, x.ids, advantages, backend=backend).loss.backward()

    return Call(run, x.clear)


def ours_scoring(x: Inputs, backend: str) -> Call:
    @torch.no_grad()
    def run() -> None:
        linear_token_logprobs(x.hidden, x.weight, x.ids, backend=backend)

    return Call(run)


def ours_on_logits(x: Inputs, backend: str) -> Call:
    def run() -> None:
        logits = nn.functional.linear(x.hidden, x.weight)
        grpo_loss(logits, x.ids, x.advantages, inplace=True, backend=backend, **x.keywords).loss.backward()

    return Call(run, x.clear)


# ---- limit ----------------------------------------------------------------------------------------------------------


def gemms(x: Inputs) -> Call:
    """hidden @ weight.T, dlogits @ weight, dlogits.T @ hidden, on at most 1024 (CPU) or 8192 rows of logits at once."""
    hidden, weight = x.hidden.detach().flatten(0, 1), x.weight.detach()
    rows = min(1024 if hidden.device.type == "cpu" else 8192, len(hidden))
    logits = torch.empty(rows, len(weight), dtype=hidden.dtype, device=hidden.device)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for block, gradient in zip(hidden.split(rows), dhidden.split(rows)):
            z = logits[: len(block)]
            torch.mm(block, weight.t(), out=z)
            torch.mm(z, weight, out=gradient)
            torch.mm(z.t(), block, out=dweight)

    return Call(run)


# ---- scenes ---------------------------------------------------------------------------------------------------------


def case(
    name: str,
    prepare: Callable[[Inputs], Call],
    flops: float,
    against: str,
    fresh_pages: bool = False,
    late: bool = False,
) -> Case:
    limit = None if name == FLOOR else FLOOR
    return Case(name, prepare, flops, "GFLOP/s", limit, against, fresh_pages, late)


def our_cases(flops: float, backend: str) -> tuple[Case, ...]:
    """flops: of the three GEMMs."""
    mine = f"mr1fast {backend}"
    return (
        case(mine, partial(ours, backend=backend), flops, mine, fresh_pages=True),
        case(f"{mine}, forward only", partial(ours_scoring, backend=backend), flops / 3, mine),
        case(FLOOR, gemms, flops, mine, fresh_pages=True),
    )


def saving_cases(flops: float, backend: str) -> tuple[Case, ...]:
    """What zero coefficients save, and what a ratio of whole completions costs."""
    mine = f"mr1fast {backend}"
    saving = (
        case(
            f"{mine}, beta 0, {share:.0%} of rows without gradient",
            partial(ours_without_some, backend=backend, share=share),
            flops,
            mine,
        )
        for share in (0.0, 0.5, 0.9)
    )
    sequence = partial(ours, backend=backend, importance_sampling_level="sequence")
    return (*saving, case(f"{mine}, sequence level (recomputes)", sequence, flops, mine))


def peer_cases(flops: float, mine: str, compiled: bool) -> tuple[Case, ...]:
    """compiled: Liger's chunked loss also as it comes, compiled."""
    liger_compiled = case("Liger chunked compiled", partial(peers.liger, compiled=True), flops, mine, late=True)
    return (
        case("TRL ChunkedLogProbFunction", peers.trl_chunked, flops, mine, fresh_pages=True),
        case("Liger chunked", partial(peers.liger, compiled=False), flops, mine, fresh_pages=True),
        *((liger_compiled,) if compiled else ()),
    )


def head_peer_cases(flops: float, mine: str) -> tuple[Case, ...]:
    """Heads of others, each with the objective behind it."""
    return (
        case("Liger scaled cross-entropy", partial(peers.liger_scaled_cross_entropy, entropy=False), flops, mine),
        case(
            "Liger scaled cross-entropy, entropy", partial(peers.liger_scaled_cross_entropy, entropy=True), flops, mine
        ),
        case("torch linear_cross_entropy", peers.torch_linear_cross_entropy, flops, mine),
        case("torch linear_cross_entropy, cross-entropy only", peers.torch_cross_entropy_only, flops, mine),
        case("Unsloth fused_linear_logprobs", peers.unsloth, flops, mine),
    )


def gpu_peer_cases(flops: float, mine: str) -> tuple[Case, ...]:
    """Those that compile or try many settings at their first call."""
    return (
        case("quack, cross-entropy only", peers.quack, flops, mine, late=True),
        case("cut-cross-entropy", peers.cut_cross_entropy, flops, mine, late=True),
    )


def logits_cases(flops: float, backend: str) -> tuple[Case, ...]:
    """What keeps the logits."""
    mine = f"mr1fast {backend}"
    return (
        case("logits, then mr1fast in place", partial(ours_on_logits, backend=backend), flops, mine, fresh_pages=True),
        case("logits, then torch eager", peers.eager, flops, mine, fresh_pages=True),
    )


def cpu_scene(B: int, L: int, H: int, V: int, dtype: torch.dtype, everything: bool = True) -> Scene:
    flops = 6.0 * B * L * H * V
    cases = our_cases(flops, "cpp")
    if everything:
        cases += saving_cases(flops, "cpp") + peer_cases(flops, "mr1fast cpp", True)
        cases += head_peer_cases(flops, "mr1fast cpp") + logits_cases(flops, "cpp")
    return _scene((B, L, H, V), dtype, cases, "cpu")


def gpu_scene(B: int, L: int, H: int, V: int, compiled: bool, device: str) -> Scene:
    flops = 6.0 * B * L * H * V
    mine = "mr1fast cuda"
    cases = (
        *our_cases(flops, "cuda"),
        case("mr1fast triton", partial(ours, backend="triton"), flops, mine),
        *peer_cases(flops, mine, compiled),
        *head_peer_cases(flops, mine),
        *gpu_peer_cases(flops, mine),
        *saving_cases(flops, "cuda"),
        *logits_cases(flops, "cuda"),
    )
    return _scene((B, L, H, V), torch.bfloat16, cases, device)


def _scene(shape: tuple[int, int, int, int], dtype: torch.dtype, cases: tuple[Case, ...], device: str) -> Scene:
    B, L, H, V = shape
    return Scene(
        "linear",
        f"{B * L} x {H} x {V}",
        str(dtype).removeprefix("torch."),
        lambda: make_inputs(*shape, dtype, device),
        cases,
        device,
        lambda: without_gpu(device),
    )


def scenes(quick: bool) -> list[Scene]:
    result = [cpu_scene(*shape, dtype) for shape in (QUICK_CPU_SHAPES if quick else CPU_SHAPES) for dtype in DTYPES]
    if not quick:
        result += [cpu_scene(*MEMORY_SHAPE, dtype, everything=False) for dtype in DTYPES]
    shapes = QUICK_GPU_SHAPES if quick else GPU_SHAPES
    device = device_for(quick)
    return result + [gpu_scene(*shape, shape is shapes[0] and device == "cuda", device) for shape in shapes]
