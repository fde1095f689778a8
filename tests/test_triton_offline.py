"""The real compiler, without a GPU: Triton runs in processes of its own, where TRITON_INTERPRET is not set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")
pytestmark = pytest.mark.slow  # every test is a process of its own, most of them compile

ROOT = Path(__file__).parents[1]


def compiled(*command):
    """The finished process of `python *command`, in which Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280
    )


def test_every_kernel_compiles_without_spills_and_with_wide_loads():
    check = compiled("-m", "benchmarks.compile_check")
    assert check.returncode == 0, check.stdout + check.stderr
    assert check.stdout.splitlines()[-1].startswith("no spills"), check.stdout


def test_the_check_finds_a_spill_and_a_narrow_load():
    broken = (
        "from mr1fast.kernels import triton_rows as rows, triton_table\n"
        "from benchmarks import compile_check as check\n"
        "triton_table.TABLE[('loss', 2, 262144)] = (65536, 8, 1)\n"
        "cases = [name for name, _ in check.cases()]\n"
        "print(check.check((cases.index('loss, no gradient     bfloat16 V=151936'), 90)))\n"
        "rows.rows_aligned = lambda *tensors: False\n"
        "from mr1fast.kernels import triton_score\n"
        "triton_score.rows_aligned = rows.rows_aligned\n"
        "from benchmarks.offline import compile_offline, recorded_launches\n"
        "(launch,) = recorded_launches(check.score_call(960, check.torch.bfloat16))\n"
        "print(compile_offline(launch, 90).wide)\n"
    )
    said = compiled("-c", broken)
    assert "SPILLS" in said.stdout, said.stdout + said.stderr
    assert said.stdout.splitlines()[-1] == "False", said.stdout + said.stderr


def test_lengths_and_kl_weights_compile_nothing_again():
    said = compiled("-m", "benchmarks.specialisations")
    assert said.returncode == 0, said.stderr
    counts = {line[:26].strip(): [int(word) for word in line[26:].split()] for line in said.stdout.splitlines()[2:]}
    assert counts.pop("mr1fast, aligned rows") == [1, 1, 1, 1]
    assert counts.pop("mr1fast, unaligned rows") == [1, 1, 1, 1]
    assert counts.pop("mr1fast, packed rows") == [1, 1, 1, 1]
    assert counts.pop("mr1fast, capped rows") == [1, 1, 1, 1]
    assert all(line == [1, 20, 20, 400] for line in counts.values()), (
        "Liger has changed: the README quotes these counts"
    )


def test_the_grid_has_one_dimension():
    """A second one would end at 65,535: N = 70,000 tokens in one completion."""
    program = (
        "from benchmarks.compile_check import *\n"
        "from benchmarks.offline import recorded_launches\n"
        "for call in (loss_call(64, torch.bfloat16, B=1, L=70000), score_call(64, torch.bfloat16, B=1, L=70000)):\n"
        "    print(recorded_launches(call)[0].grid)\n"
    )
    said = compiled("-c", program)
    assert said.stdout.split("\n")[:2] == ["(70000,)", "(70000,)"], said.stdout + said.stderr


def test_the_tuner_refuses_without_a_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the tuner would run for minutes and rewrite the table")
    said = compiled("-m", "benchmarks.tune")
    assert said.returncode == 2
    assert "no GPU" in said.stderr
