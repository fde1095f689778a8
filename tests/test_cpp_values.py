"""The `cpp` backend's values against float64, with every instruction set that this machine can be asked for."""

import itertools
from pathlib import Path

import pytest
import torch
from test_cpp import DTYPES, loss_and_gradient, python

from mr1fast.kernels.self_test import GRADIENT_FLOOR, assert_within_budget, random_batch

# What this machine can be asked for; x86-64-v3 and above have AVX2.
INSTRUCTION_SETS = {"AVX512": ("avx512", "avx2", "portable"), "AVX2": ("avx2", "portable")}.get(
    torch.backends.cpu.get_cpu_capability(), ("portable",)
)
if Path("/proc/cpuinfo").exists() and "avx512_bf16" in Path("/proc/cpuinfo").read_text():
    INSTRUCTION_SETS = ("avx512_bf16", *INSTRUCTION_SETS)


def check_against_float64(batch, **settings):
    exact = loss_and_gradient(batch | {"logits": batch["logits"].double()}, "torch", **settings)
    peer = loss_and_gradient(batch, "torch", **settings)
    actual = loss_and_gradient(batch | {"logits": batch["logits"].clone()}, **settings)
    for name, a, e, p in zip(("loss", "logps", "entropies", "kl"), actual, exact, peer):
        assert_within_budget(name, a, e, p, 5e-6)
    scale = exact[-1].abs().max()
    floor = GRADIENT_FLOOR[batch["logits"].dtype]
    assert_within_budget("gradient", actual[-1] / scale, exact[-1] / scale, peer[-1] / scale, floor)


# ---- what each instruction set is asked -----------------------------------------------------------------------------


def check_banned_and_far():
    """Logits of -inf, of the least finite value, and 90 to 105 below the maximum, where exp leaves float32."""
    for dtype in (torch.float32, torch.bfloat16):
        batch = random_batch(2, 3, 5000, dtype=dtype)
        logits = batch["logits"]
        logits[0, :, ::3] = -torch.inf
        logits[1, :, 1::2] = torch.finfo(dtype).min
        logits[1, 0, 100:600] = logits[1, 0].max() - torch.linspace(85, 105, 500).to(dtype)
        logits[0, 0, :2048] = -torch.inf  # a whole block
        logits.scatter_(-1, batch["completion_ids"][..., None], 1.0)
        batch |= {"old_per_token_logps": None, "ref_per_token_logps": torch.full((2, 3), -9.0)}
        check_against_float64(batch)
        check_against_float64(batch, entropy_coef=0.1)


def check_soft_cap():
    """At lengths with and without a rest, of logits below, around and far beyond the cap, of either sign, banned."""
    for dtype, V, scale in itertools.product(DTYPES, (5, 64, 5003), (0.01, 10.0, 1000.0)):
        batch = random_batch(2, 3, V, dtype=dtype, scale=scale)
        batch["logits"][0, :, 2::3] = -torch.inf
        batch["logits"][1, :, -1] = torch.finfo(dtype).min
        batch["completion_ids"][0] = 1
        batch |= {"old_per_token_logps": None, "ref_per_token_logps": torch.full((2, 3), -3.0)}
        settings = {"final_logit_softcapping": 12.0, "temperature": torch.tensor([0.7, 1.5])}
        check_against_float64(batch, **settings)
        check_against_float64(batch, entropy_coef=0.1, **settings)


def check_signs_and_nan():
    """Logits of one sign, of both, zeros; and NaN of either sign is never lost, wherever it stands."""
    for dtype, V in itertools.product(DTYPES, (5, 64, 2048, 5003)):
        batch = random_batch(2, 3, V, dtype=dtype)
        positive = batch["logits"].abs() + 1
        for logits in (positive, -positive, positive - 0.5 * positive.max(), 0 * positive, -0.0 * positive):
            check_against_float64(batch | {"logits": logits})
        integers, negative_nan = {
            torch.float32: (torch.int32, -(2**22)),
            torch.bfloat16: (torch.int16, -(2**6)),
            torch.float16: (torch.int16, -(2**9)),
        }[dtype]
        for where, sign, base in itertools.product((0, V // 2, V - 1), (1, -1), (batch["logits"], -positive)):
            logits = base.clone()
            logits[:, :, where] = torch.nan
            if sign < 0:
                logits.view(integers)[:, :, where] = negative_nan
            loss, logps, _, _, gradient = loss_and_gradient(batch | {"logits": logits})
            mask = batch["completion_mask"]
            assert loss.isnan()
            assert logps[mask].isnan().all()
            assert gradient[mask].isnan().all()


def check_guessed_maximum():
    """Exponentials are relative to the largest of a row's first logits: right, too high, too low, or banned."""
    for dtype, V in itertools.product(DTYPES, (40, 2048, 7001)):
        batch = random_batch(3, 3, V, dtype=dtype) | {"completion_mask": None}
        logits = batch["logits"]
        first = min(64, V // 2)
        logits[0, 0, :first] -= 1000.0  # beyond what float32's exp holds
        logits[0, 1, :first] += 300.0
        logits[0, 2, :first] = -torch.inf
        logits[1, 0] += torch.arange(V) // 1024 * 21.0  # every block's maximum is above the one before
        logits[1, 1, V // 3] = 40.0  # one that outweighs all others
        logits[1, 2, first:] += 22.0  # about as much too low as is let pass
        logits[2, 0, ::2] = -torch.inf
        logits[2, 1, -1] = 1000.0
        logits[2, 2, first:] = -torch.inf
        batch["completion_ids"] = logits.argmax(-1)
        for settings in ({}, {"inplace": True}, {"entropy_coef": 0.1}, {"temperature": 0.5}):
            changed = batch | {"logits": logits.clone(), "old_per_token_logps": None}
            check_against_float64(changed, **settings)


def test_guessed_maximum():
    check_guessed_maximum()


@pytest.mark.parametrize("V", [65536 + 7, 80000])
def test_long_rows_in_place(V):
    """Their exponentials take the logits' place."""
    batch = random_batch(2, 3, V)
    batch["logits"][0, 0] -= 90.0
    batch["logits"][0, 1, ::3] = -torch.inf
    batch["logits"][0, 2, 5000:5100] = 50.0
    ids = batch["completion_ids"]
    batch["logits"].scatter_(-1, ids[..., None], 1.0)
    exact = loss_and_gradient(batch | {"logits": batch["logits"].double()}, "torch")
    actual = loss_and_gradient(batch | {"logits": batch["logits"].clone()}, inplace=True)
    for a, e in zip(actual, exact):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-5, atol=2e-6)


def test_banned_and_far_logits():
    check_banned_and_far()


def test_signs_and_nan():
    check_signs_and_nan()


# ---- instruction sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "portable")) for name in INSTRUCTION_SETS]
)
def test_instruction_set(name):
    code = f"""
import itertools, torch, test_cpp_values as values
from mr1fast.kernels.self_test import random_batch
assert torch.ops.mr1fast_native.instruction_set() == {name!r}
settings = ({{}}, {{"entropy_coef": 0.1, "temperature": 0.7}})
for dtype, V, more in itertools.product(values.DTYPES, (1, 33, 64, 257, 6151), settings):
    values.check_against_float64(random_batch(2, 3, V, dtype=dtype, seed=V), **more)
values.check_banned_and_far()
values.check_guessed_maximum()
values.check_signs_and_nan()
"""
    done = python(code, MR1FAST_CPU=name, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


def test_unknown_instruction_set_is_refused():
    done = python("import mr1fast.kernels.cpp, torch; torch.ops.mr1fast_native.instruction_set()", MR1FAST_CPU="mmx")
    assert done.returncode != 0
    assert "MR1FAST_CPU must be one of avx512_bf16, avx512, avx2, portable that" in done.stderr
    assert "got mmx" in done.stderr
