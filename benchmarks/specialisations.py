"""`python -m benchmarks.specialisations`: how often a training run compiles the loss kernels, counted without a GPU.

Completion lengths and KL weights change from step to step. Each distinct specialisation key is one compilation. Ours
are counted for rows that are 16-byte aligned and for rows that are not; Liger's `triton_grpo_loss` (if liger-kernel is
installed) takes both numbers as tl.constexpr.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable
from itertools import product

import torch

LENGTHS = tuple(range(1, 21))
BETAS = tuple(k / 100 for k in range(1, 21))  # 0 would be another flag set for Liger: not counted against it
VOCABULARY = 4096  # the counts do not depend on it; Liger's forward allocates [B, L + 1, V]

Call = Callable[[int, float], Callable[[], object]]  # (length, beta) -> what launches the kernels


def compilations(call: Call, lengths: Iterable[int], betas: Iterable[float], kernels: Iterable[str]) -> dict[str, int]:
    """How many distinct compilations of each of the kernels all pairs of length and beta need."""
    from benchmarks.offline import recorded_launches, specialisation_key

    keys: dict[str, set[str]] = {name: set() for name in kernels}
    for length, beta in product(lengths, betas):
        for launch in recorded_launches(call(length, beta)):
            if launch.kernel.__name__ in keys:
                keys[launch.kernel.__name__].add(specialisation_key(launch))
    assert all(keys.values()), f"never launched: {[name for name, found in keys.items() if not found]}"
    return {name: len(found) for name, found in keys.items()}


def ours(*, aligned: bool = True, packed: bool = False, capped: bool = False) -> Call:
    """The one pass on full batches, in place. Unaligned rows: a view without the first column. Packed: [1, T].

    Capped: with a soft cap that moves with beta, as does the temperature.
    """
    from benchmarks.compile_check import loss_call
    from mr1fast.kernels.reference import LossSpec

    def call(length: int, beta: float) -> Callable[[], object]:
        B = 1 if packed else 2  # how many completions are packed is in no argument of the kernel
        changes = {"temperature": 1 + beta, "final_logit_softcapping": 30 + beta} if capped else {}
        spec = LossSpec(use_bias_correction_kl=True, **changes)
        shape = {"B": B, "L": length, "unaligned": not aligned}
        return loss_call(VOCABULARY, torch.bfloat16, beta=beta, full=True, spec=spec, **shape)

    return call


def liger(length: int, beta: float) -> Callable[[], object]:
    """Forward and backward of Liger's loss, as a training step calls it."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    logits = torch.zeros(2, length + 1, VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    ids, values = torch.zeros(2, length, dtype=torch.int64), torch.zeros(2, length)

    def step() -> None:
        loss, _, _ = triton_grpo_loss(
            logits, values, values, ids, torch.zeros(2), torch.ones(2, length), beta=beta, inplace=False
        )
        loss.sum().backward()

    return step


def table() -> list[tuple[str, int, int, int, int]]:
    """(kernel, and compilations for one call, 20 KL weights, 20 lengths, all 400 pairs)."""
    counted: list[tuple[Call, dict[str, str]]] = [
        (ours(aligned=True), {"grpo_loss_fwd_kernel": "mr1fast, aligned rows"}),
        (ours(aligned=False), {"grpo_loss_fwd_kernel": "mr1fast, unaligned rows"}),
        (ours(packed=True), {"grpo_loss_fwd_kernel": "mr1fast, packed rows"}),
        (ours(capped=True), {"grpo_loss_fwd_kernel": "mr1fast, capped rows"}),
    ]
    if importlib.util.find_spec("liger_kernel") is not None:
        names = {"_grpo_loss_fwd_kernel": "Liger, forward", "_grpo_loss_bwd_kernel": "Liger, backward"}
        counted.append((liger, names))
    ranges = ((LENGTHS[-1:], BETAS[:1]), (LENGTHS[-1:], BETAS), (LENGTHS, BETAS[:1]), (LENGTHS, BETAS))
    rows = []
    for call, names in counted:
        counts = [compilations(call, *lengths_and_betas, names) for lengths_and_betas in ranges]
        for kernel, name in names.items():
            one, by_beta, by_length, both = (count[kernel] for count in counts)
            rows.append((name, one, by_beta, by_length, both))
    return rows


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    import triton

    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET=1 replaces the compiler that this command asks; unset it")
    print(f"triton {triton.__version__}: compilations needed")
    print(f"{'kernel':26}{'one call':>10}{'20 betas':>10}{'20 lengths':>12}{'both':>8}")
    for name, one, by_beta, by_length, both in table():
        print(f"{name:26}{one:10}{by_beta:10}{by_length:12}{both:8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
