"""`linear`: GRPO's loss and the gradients of hidden states and weight, from hidden states [B, L, H] and weight [V, H].

The limit is three bare GEMMs over all rows at once into buffers that are there already: what remains of the work if
everything else costs nothing (recomputing designs need a fourth). All cases compute log-probabilities, entropies
(Liger excepted), ratio, clipping, KL, loss and both gradients; ratios around 1, beta 0.04, every token unmasked. What
works on [B, L] is `reference.objective` for all but ours and Liger's, as in cases_loss.py. `peak_extra_mib` holds the
gradients too, and at first use the libraries' own buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Call, Case, Scene
from benchmarks.cases_loss import BETA, eager_loss, loss_batch, loss_of
from mr1fast import grpo_loss, linear_grpo_loss, linear_token_logprobs
from mr1fast.kernels.reference import LossBatch

CPU_SHAPES = ((8, 128, 256, 151936), (8, 128, 1536, 32000))  # B, L, H, V; the first V is Qwen2-VL's
GPU_SHAPES = tuple((8, 1024, H, 151936) for H in (1536, 3584, 4096))
MEMORY_SHAPE = (8, 1024, 256, 151936)  # whose logits alone are 4.6 GiB in float32
QUICK_SHAPES = ((2, 64, 16, 1024),)
DTYPES = (torch.float32, torch.bfloat16)
FLOOR = "three GEMMs"


@dataclass
class Inputs:
    """hidden [B, L, H] and weight [V, H], leaves; `batch` for the peers' objective, `keywords` for ours."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor  # [B, L]
    advantages: Tensor  # [B]
    keywords: dict[str, Any]
    batch: LossBatch

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_inputs(B: int, L: int, H: int, V: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = normal(B, L, H).to(dtype).requires_grad_()
    weight = normal(V, H).mul_(3 * H**-0.5).to(dtype).requires_grad_()
    ids = torch.randint(0, V, (B, L), generator=generator, device=device)
    advantages = normal(B)
    with torch.no_grad():
        logps = linear_token_logprobs(hidden, weight, ids)
    assert isinstance(logps, Tensor)
    keywords: dict[str, Any] = {
        "old_per_token_logps": logps + 0.1 * normal(B, L),
        "ref_per_token_logps": logps + 0.1 * normal(B, L),
        "beta": BETA,
    }
    batch = loss_batch(ids, advantages, keywords["old_per_token_logps"], keywords["ref_per_token_logps"])
    return Inputs(hidden, weight, ids, advantages, keywords, batch)


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


# ---- peers ----------------------------------------------------------------------------------------------------------


def eager(x: Inputs) -> Call:
    def run() -> None:
        eager_loss(nn.functional.linear(x.hidden, x.weight), x.batch).backward()

    return Call(run, x.clear)


def trl_chunked(x: Inputs) -> Call:
    """As TRL's patched forward calls it, with its own tile size; of the optional outputs the entropies only."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def run() -> None:
        logps, entropies, *_ = ChunkedLogProbFunction.apply(
            x.hidden.flatten(0, 1),
            x.weight,
            None,
            x.ids.flatten(),
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            1.0,
            ("entropy",),
        )
        loss_of(logps.view(x.ids.shape), entropies.view(x.ids.shape).detach(), x.batch).backward()

    return Call(run, x.clear)


def liger(x: Inputs, compiled: bool) -> Call:
    """Chunks of one completion, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=BETA, compiled=compiled, loss_type="grpo", use_ref_model=True)
    mask = torch.ones_like(x.ids)

    def run() -> None:
        output = loss(
            x.hidden,
            x.weight,
            x.ids,
            mask,
            x.advantages,
            ref_per_token_logps=x.keywords["ref_per_token_logps"],
            old_per_token_logps=x.keywords["old_per_token_logps"],
        )
        output[0].backward()

    return Call(run, x.clear)


def cut_cross_entropy(x: Inputs) -> Call:
    """The cross-entropy of each token is its negative log-probability; it computes no entropies."""
    from cut_cross_entropy import linear_cross_entropy

    def run() -> None:
        logps = -linear_cross_entropy(x.hidden, x.weight, x.ids, reduction="none").float()
        loss_of(logps, torch.zeros_like(logps), x.batch).backward()

    return Call(run, x.clear)


def quack(x: Inputs) -> Call:
    """Less than the others do: the gradients of the mean cross-entropy, as it offers no loss per token."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run() -> None:
        chunked_linear_cross_entropy(x.hidden.flatten(0, 1), x.weight, x.ids.flatten()).backward()

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


def cases(flops: float, backend: str, everything: bool) -> tuple[Case, ...]:
    """flops: of the three GEMMs. everything: peers that keep the logits too, and what zero coefficients save."""
    mine = f"mr1fast {backend}"

    def case(name: str, prepare: Callable[[Any], Call], gemm_count: int = 3, fresh: bool = False) -> Case:
        limit = None if name == FLOOR else FLOOR
        work = flops * gemm_count / 3
        return Case(name, prepare, work, unit="GFLOP/s", limit=limit, against=mine, fresh_pages=fresh)

    few = (
        case(mine, lambda x: ours(x, backend), fresh=True),
        case(f"{mine}, forward only", lambda x: ours_scoring(x, backend), 1),
        case(FLOOR, gemms, fresh=True),
    )
    if not everything:
        return few
    saving = [
        case(
            f"{mine}, beta 0, {share:.0%} of rows without gradient",
            partial(ours_without_some, backend=backend, share=share),
        )
        for share in (0.0, 0.5, 0.9)
    ]
    return (
        *few,
        *saving,
        case(f"{mine}, sequence level (recomputes)", lambda x: ours(x, backend, importance_sampling_level="sequence")),
        case("TRL ChunkedLogProbFunction", trl_chunked, fresh=True),
        case("Liger chunked", lambda x: liger(x, False), fresh=True),
        case("Liger chunked compiled", lambda x: liger(x, True)),
        case("logits, then mr1fast in place", lambda x: ours_on_logits(x, backend), fresh=True),
        case("logits, then torch eager", eager, fresh=True),
    )


def scenes(quick: bool) -> list[Scene]:
    def scene(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, everything: bool = True) -> Scene:
        B, L, H, V = shape
        cuda = device == "cuda"
        of_device = cases(6.0 * B * L * H * V, "triton" if cuda else "cpp", everything)
        if cuda:
            more: dict[str, Callable[[Inputs], Call]] = {
                "mr1fast cuda": partial(ours, backend="cuda"),
                "cut-cross-entropy": cut_cross_entropy,
                "quack, cross-entropy only": quack,
            }
            of_device += tuple(
                Case(name, prepare, of_device[0].work, "GFLOP/s", FLOOR, of_device[0].name)
                for name, prepare in more.items()
            )
        return Scene(
            "linear",
            f"{B * L} x {H} x {V}",
            str(dtype).removeprefix("torch."),
            lambda: make_inputs(B, L, H, V, dtype, device),
            of_device,
            device,
            lambda: "there is no CUDA device" if cuda and not torch.cuda.is_available() else None,
        )

    result = [scene(shape, dtype, "cpu") for shape in (QUICK_SHAPES if quick else CPU_SHAPES) for dtype in DTYPES]
    if not quick:
        result += [scene(MEMORY_SHAPE, dtype, "cpu", everything=False) for dtype in DTYPES]
    result += [scene(shape, torch.bfloat16, "cuda") for shape in (QUICK_SHAPES if quick else GPU_SHAPES)]
    return result
