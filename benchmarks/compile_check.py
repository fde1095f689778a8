"""`python -m benchmarks.compile_check`: compile every Triton kernel in every configuration of its table, without a GPU.

For sm_80, sm_90 and sm_100; prints registers, spills, shared memory, and the widths of the global loads (bytes x how
often they stand in the PTX). Exits 1 if a kernel spills, loads its rows less than 16 bytes at a time although they are
aligned, has shuffles between threads in its walk over a row, or finds a row by an offset of 32 bits (N * V passes 2^31
at 14k rows of a large vocabulary). Results are kept in Triton's own cache, so that a second run takes seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mr1fast.kernels.loss_types import ONE_PASS_LOSS_TYPES
from mr1fast.kernels.reference import LogitMap, LossBatch, LossSpec
from mr1fast.kernels.triton_table import TABLE

ARCHITECTURES = (80, 90, 100)
DTYPES = {2: torch.bfloat16, 4: torch.float32}  # float16 compiles like bfloat16
WORKERS = 2
# A loss type for each policy term but PPO's.
OTHER_TERMS = tuple({LossSpec(loss_type=name).policy: name for name in reversed(ONE_PASS_LOSS_TYPES)}.values())[-2::-1]
PLAIN = LogitMap()


def loss_call(
    V: int,
    dtype: torch.dtype,
    *,
    B: int = 2,
    L: int = 3,
    beta: float = 0.1,
    full: bool = False,
    rewards: str | None = None,
    gradient: bool = True,
    spec: LossSpec | None = None,
    unaligned: bool = False,
    settings_of_tokens: bool = False,
) -> Callable[[], object]:
    """A call of the one pass: on-policy against a reference or, `full`, with everything that a call may have.

    Unaligned rows are a view of longer ones that leaves out their first column.
    """
    from mr1fast.kernels import triton_loss

    logits, ids, per_token = _tensors(V + unaligned, dtype, B, L)
    logits = logits[..., int(unaligned) :]
    optional = per_token if full else None
    batch = LossBatch(
        ids,
        token_weight=per_token,
        beta=per_token if settings_of_tokens else torch.tensor(beta),
        mask=ids == 0 if full else None,
        advantages=None if rewards else per_token,
        rewards=torch.zeros(B) if rewards else None,
        num_generations=B,
        scale_rewards=rewards or "group",
        old_logps=optional,
        ref_logps=per_token,
        is_ratio=optional,
        entropy_weight=torch.zeros(()) if full else None,
        epsilons_low=per_token if settings_of_tokens else None,
        epsilons_high=per_token if settings_of_tokens else None,
        temperatures=per_token if settings_of_tokens else None,
    )
    spec = spec or LossSpec(use_bias_correction_kl=full)
    return lambda: triton_loss.grpo_forward(logits, batch, spec, logits if gradient else None)


def score_call(
    V: int, dtype: torch.dtype, *, B: int = 2, L: int = 3, logit_map: LogitMap = PLAIN
) -> Callable[[], object]:
    from mr1fast.kernels import triton_score

    logits, ids, _ = _tensors(V, dtype, B, L)
    return lambda: triton_score.score_forward(logits, ids, ids == 0, logit_map)


def score_backward_call(
    V: int, dtype: torch.dtype, *, entropy: bool, logit_map: LogitMap = PLAIN
) -> Callable[[], object]:
    from mr1fast.kernels import triton_score

    logits, ids, x = _tensors(V, dtype, 2, 3)
    return lambda: triton_score.score_backward(
        logits, ids, ids == 0, x, x, x, x if entropy else None, logit_map, logits
    )


def scale_call(V: int, dtype: torch.dtype) -> Callable[[], object]:
    from mr1fast.kernels import triton_score

    logits, _, x = _tensors(V, dtype, 2, 3)
    return lambda: triton_score.scale_unless_one(logits, x[0, 0])


def _tensors(V: int, dtype: torch.dtype, B: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, L, V], ids [B, L], and one float32 [B, L] to stand for every small tensor."""
    logits = torch.zeros(B, L, V, dtype=dtype)
    return logits, torch.zeros(B, L, dtype=torch.int64), torch.zeros(B, L)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) for each entry of the table and each set of flags that changes the code of its kernel much."""
    for op, itemsize, limit in TABLE:
        V, dtype = limit - 64, DTYPES[itemsize]  # the longest rows of the entry that leave a partial tile
        at = f"{str(dtype)[6:]:8} V={V:6}"
        if op == "loss":
            yield f"loss             {at}", loss_call(V, dtype)
            yield f"loss, all flags  {at}", loss_call(V, dtype, full=True)
        elif op == "score":
            yield f"score            {at}", score_call(V, dtype)
        else:
            yield f"backward         {at}", score_backward_call(V, dtype, entropy=False)
            yield f"backward, both   {at}", score_backward_call(V, dtype, entropy=True)
            yield f"scale            {at}", scale_call(V, dtype)
    variants: dict[str, dict[str, Any]] = {
        **{name: {"spec": LossSpec(loss_type=name)} for name in OTHER_TERMS},
        "group": {"rewards": "group"},
        "batch": {"rewards": "batch"},
        "no gradient": {"gradient": False},
        "softcap": {"spec": LossSpec(final_logit_softcapping=30.0)},
        "of tokens": {"settings_of_tokens": True, "spec": LossSpec(kl_estimator="low_var_kl", kl_clamp=5.0)},
    }
    for name, settings in variants.items():
        yield f"loss, {name:15} bfloat16 V=151936", loss_call(151936, torch.bfloat16, full=True, **settings)
    capped = LogitMap(softcap=30.0, temperatures=torch.ones(2, 3))
    yield "score, softcap        bfloat16 V=256000", score_call(256000, torch.bfloat16, logit_map=capped)
    backward = score_backward_call(256000, torch.bfloat16, entropy=True, logit_map=capped)
    yield "backward, softcap     bfloat16 V=256000", backward


def check(job: tuple[int, int]) -> tuple[str, bool]:
    """(one line of the table, whether it is as it should be) for a case's number and an architecture."""
    from benchmarks.offline import compile_offline, recorded_launches

    torch.set_num_threads(1)
    number, arch = job
    name, call = list(cases())[number]
    (launch,) = recorded_launches(call)
    found = compile_offline(launch, arch)
    loads = ", ".join(f"{width} x{count}" for width, count in found.loads.items())
    problems = ["SPILLS"] * (found.spill_bytes > 0) + ["NARROW LOADS"] * (not found.wide)
    problems += ["SHUFFLES IN A LOOP"] * (found.loop_shuffles > 0) + ["32-BIT OFFSETS"] * (not found.int64_offsets)
    line = (
        f"{name}  sm_{arch:<4}{launch.options['num_warps']:5}{launch.options.get('STAGES', 1):7}{found.registers:10}"
        f"{found.spill_bytes:7}{found.shared_bytes:8}  {loads}  {' '.join(problems)}"
    )
    return line.rstrip(), not problems


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    wanted = parser.parse_args().filter
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 replaces the compiler that this command checks; unset it")
    import triton

    numbers = [number for number, (name, _) in enumerate(cases()) if wanted in name]
    print(f"triton {triton.__version__}, {len(numbers)} cases x {len(ARCHITECTURES)} architectures")
    print(
        f"{'kernel':40}{'for':7}{'warps':>5}{'stages':>7}{'registers':>10}{'spill':>7}{'shared':>8}"
        "  loads, bytes x count"
    )
    good = True
    with ProcessPoolExecutor(WORKERS) as pool:
        for line, fine in pool.map(check, product(numbers, ARCHITECTURES)):
            print(line, flush=True)
            good &= fine
    print(
        "no spills, no shuffles in loops, every row load 16 bytes wide, every offset 64 bits"
        if good
        else "FAILED: see the capitals above"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
