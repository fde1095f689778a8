"""`loss`: GRPO's loss and its gradient from logits on the CPU, ours beside what others have and what memory allows.

Every case computes the same: per-token log-probabilities and entropies, ratio, clipping, KL, loss, and dloss/dlogits
(those that say "forward only" excepted), ratios around 1, beta 0.04, every token unmasked. What works on [B, L] is
`reference.objective` for all but ours and Liger's: it is a thousandth of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Call, Case, Scene
from mr1fast import grpo_loss, linear_grpo_loss
from mr1fast.kernels import reference
from mr1fast.kernels.reference import LossBatch, LossSpec
from mr1fast.kernels.self_test import model_output

SHAPES = ((4, 128, 151936), (8, 256, 32000), (64, 256, 256))  # B, L, V; the first V is Qwen2-VL's
QUICK_SHAPES = ((2, 4, 1024), (4, 8, 256))
DTYPES = (torch.float32, torch.bfloat16)
BETA = 0.04
HIDDEN = 16  # Liger's chunked loss starts from hidden states: narrow ones, so that it is the loss that is measured


@dataclass
class Inputs:
    """logits [B, L, V], which in-place cases overwrite, and `source`, from which they are restored."""

    source: Tensor
    logits: Tensor
    copy: Tensor  # like the logits, its memory warm
    ids: Tensor  # [B, L]
    advantages: Tensor  # [B]
    mask: Tensor  # [B, L], all ones
    old_logps: Tensor  # [B, L]
    ref_logps: Tensor
    batch: LossBatch

    def restore(self) -> None:
        self.logits.copy_(self.source)

    @cached_property
    def longer(self) -> Tensor:
        """The logits [B, L + 1, V] for Liger and flash-linear-attention, which ignore the last position."""
        return torch.cat((self.source, torch.zeros_like(self.source[:, :1])), 1)

    def restore_longer(self) -> None:
        self.longer[:, :-1].copy_(self.source)

    def leaf(self) -> Tensor:
        return model_output(self.logits)

    def keywords(self) -> dict[str, Any]:
        return {"old_per_token_logps": self.old_logps, "ref_per_token_logps": self.ref_logps, "beta": BETA}


def make_inputs(B: int, L: int, V: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    source = torch.empty(B, L, V, dtype=dtype, device=device)
    for b in range(B):
        source[b] = normal(L, V).mul_(3)
    ids = torch.randint(0, V, (B, L), generator=generator, device=device)
    advantages = normal(B)
    logps = torch.stack(
        [torch.log_softmax(row.float(), -1).gather(-1, i[:, None])[:, 0] for row, i in zip(source, ids)]
    )
    old_logps, ref_logps = logps + 0.1 * normal(B, L), logps + 0.1 * normal(B, L)
    mask = torch.ones(B, L, dtype=torch.bool, device=device)
    batch = loss_batch(ids, advantages, old_logps, ref_logps)
    logits, copy = source.clone(), torch.zeros_like(source)
    return Inputs(source, logits, copy, ids, advantages, mask, old_logps, ref_logps, batch)


def loss_batch(
    ids: Tensor, advantages: Tensor, old_logps: Tensor | None, ref_logps: Tensor, mask: Tensor | None = None
) -> LossBatch:
    """For `reference.objective`: "grpo", KL weight BETA. Shapes [B, L], advantages [B]; mask None for all ones."""
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return LossBatch(
        ids=ids,
        mask=mask,
        token_weight=(1 / (len(ids) * kept.sum(1, keepdim=True).clamp(min=1))).expand(ids.shape),
        beta=torch.full((), BETA, device=ids.device),
        advantages=advantages[:, None].expand(ids.shape),
        old_logps=old_logps,
        ref_logps=ref_logps,
    )


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(x: Inputs, backend: str, inplace: bool) -> Call:
    def run() -> None:
        grpo_loss(x.leaf(), x.ids, x.advantages, inplace=inplace, backend=backend, **x.keywords()).loss.backward()

    return Call(run, x.restore)


def ours_forward_only(x: Inputs, backend: str) -> Call:
    @torch.no_grad()
    def run() -> None:
        grpo_loss(x.logits, x.ids, x.advantages, backend=backend, **x.keywords())

    return Call(run, x.restore)


# ---- peers ----------------------------------------------------------------------------------------------------------


def loss_of(logps: Tensor, entropies: Tensor, batch: LossBatch) -> Tensor:
    return reference.aggregate(reference.objective(logps, batch, LossSpec())[0], entropies, batch)


def eager_loss(logits: Tensor, batch: LossBatch) -> Tensor:
    """As TRL's trainers write it: selected log-probabilities and, without gradient, entropies of log_softmax."""
    log_probs = torch.log_softmax(logits.float(), -1)
    with torch.no_grad():
        entropies = -(log_probs.exp() * log_probs).sum(-1)
    return loss_of(log_probs.gather(-1, batch.ids[..., None]).squeeze(-1), entropies, batch)


def eager(x: Inputs) -> Call:
    return Call(lambda: eager_loss(x.leaf(), x.batch).backward(), x.restore)


def compiled(x: Inputs) -> Call:
    loss = torch.compile(eager_loss, dynamic=False)
    return Call(lambda: loss(x.leaf(), x.batch).backward(), x.restore)


def trl_functions(x: Inputs) -> Call:
    """What GRPOTrainer calls; on a GPU these are TRL's own Triton kernels."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def run() -> None:
        logps, entropies = selective_log_softmax_and_entropy(x.leaf(), x.ids, entropy_requires_grad=False)
        loss_of(logps.float(), entropies, x.batch).backward()

    return Call(run, x.restore)


def _hidden_and_weight(x: Inputs) -> tuple[Tensor, Tensor]:
    B, L, V = x.logits.shape
    generator = torch.Generator(x.logits.device).manual_seed(1)
    return tuple(
        torch.randn(size, HIDDEN, generator=generator, device=x.logits.device).to(x.logits.dtype).requires_grad_()
        for size in (B * L, V)
    )  # type: ignore[return-value]


def liger(x: Inputs, compiled: bool) -> Call:
    """Liger's chunked loss, from hidden states; it computes no entropies. Chunks of one completion, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight = _hidden_and_weight(x)
    hidden = hidden.detach().view(*x.ids.shape, HIDDEN).requires_grad_()
    loss = LigerFusedLinearGRPOLoss(beta=BETA, compiled=compiled, loss_type="grpo", use_ref_model=True)

    def run() -> None:
        output = loss(
            hidden,
            weight,
            x.ids,
            x.mask,
            x.advantages,
            ref_per_token_logps=x.ref_logps,
            old_per_token_logps=x.old_logps,
        )
        output[0].backward()
        hidden.grad = weight.grad = None

    return Call(run)


def ours_from_hidden(x: Inputs, backend: str) -> Call:
    hidden, weight = _hidden_and_weight(x)
    hidden = hidden.detach().view(*x.ids.shape, HIDDEN).requires_grad_()

    def run() -> None:
        linear_grpo_loss(hidden, weight, x.ids, x.advantages, backend=backend, **x.keywords()).loss.backward()
        hidden.grad = weight.grad = None

    return Call(run)


# ---- limits ---------------------------------------------------------------------------------------------------------


def memcpy(x: Inputs) -> Call:
    return Call(lambda: x.copy.copy_(x.logits), x.restore)


def read_modify_write(x: Inputs) -> Call:
    words = x.logits.view(torch.float32)  # whatever the dtype: the limit is memory, not conversion
    return Call(lambda: words.mul_(1.0), x.restore)


def read(x: Inputs) -> Call:
    words = x.logits.view(torch.int32)
    return Call(lambda: words.amax(), x.restore)


def loss_cases(nbytes: int, backend: str, peers: tuple[Case, ...]) -> tuple[Case, ...]:
    """Ours, the peers and the limits; nbytes is the size of the logits."""
    in_place = f"mr1fast {backend}, in place"
    from_hidden = f"mr1fast {backend}, from hidden {HIDDEN}"

    def case(name: str, prepare: Callable[[Any], Call], passes: int, limit: str | None, **more: Any) -> Case:
        return Case(name, prepare, passes * nbytes, limit=limit, **({"against": in_place} | more))

    return (
        case(in_place, lambda x: ours(x, backend, True), 2, "read-modify-write", fresh_pages=True),
        case(f"mr1fast {backend}, new buffer", lambda x: ours(x, backend, False), 2, "memcpy", fresh_pages=True),
        case(f"mr1fast {backend}, forward only", lambda x: ours_forward_only(x, backend), 1, "read"),
        *(case(p.name, p.prepare, 2, "memcpy", fresh_pages=p.fresh_pages) for p in peers),
        case(from_hidden, lambda x: ours_from_hidden(x, backend), 2, None, against=from_hidden),
        case(f"Liger chunked, from hidden {HIDDEN}", lambda x: liger(x, False), 2, None, against=from_hidden),
        case(f"Liger chunked compiled, from hidden {HIDDEN}", lambda x: liger(x, True), 2, None, against=from_hidden),
        case("memcpy", memcpy, 2, None),
        case("read-modify-write", read_modify_write, 2, None),
        case("read", read, 1, None),
    )


def scenes(quick: bool) -> list[Scene]:
    peers = (
        Case("torch eager", eager, 0, fresh_pages=True),
        Case("torch.compile", compiled, 0, fresh_pages=True),
        Case("TRL functions", trl_functions, 0, fresh_pages=True),
    )
    return [
        Scene(
            "loss",
            f"{B * L} x {V}",
            str(dtype).removeprefix("torch."),
            lambda B=B, L=L, V=V, dtype=dtype: make_inputs(B, L, V, dtype, "cpu"),  # type: ignore[misc]
            loss_cases(B * L * V * dtype.itemsize, "cpp", peers),
        )
        for B, L, V in (QUICK_SHAPES if quick else SHAPES)
        for dtype in DTYPES
    ]
