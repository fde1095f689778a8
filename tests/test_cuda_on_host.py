"""The CUDA kernels themselves, run on a CPU: csrc/grpo_cuda.cu compiled by g++ against tests/cuda_on_host.h.

What this cannot show is speed, and what only the hardware decides (memory ordering, PTX). `benchmarks/device.sh` does.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loss_cases import OF_KERNELS, OF_LOSS_TYPE, OF_SCORING, OPTIONS, check, cuda_path, run

from mr1fast import grpo_loss, linear_grpo_loss, token_logprobs
from mr1fast.kernels import cuda, dispatch, reference
from mr1fast.kernels.self_test import random_batch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulation uses glibc's fibers")

HERE = Path(__file__).parent
CLUSTERS, NO_CLUSTERS = 1, 0
BLOCK = 1 << 20  # bytes of shared memory that a block may have
# A multiprocessor that takes three blocks of 1.5 KB: rows of 130 to 1000 elements are split among 1 to 8 blocks.
SMALL = 4608


def compiled(source, output):
    compiler = shutil.which("g++")
    assert compiler, "the CUDA kernels are tested with g++"
    folders = [f"-I{folder}" for folder in (source.parent, HERE, HERE.parent / "csrc")]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", *folders]
    subprocess.run([compiler, *flags, str(source), "-o", str(output)], check=True)
    return cuda.open_library(str(output))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Compiled once: pytest-xdist's workers share the folder above their own."""
    import fcntl

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    built = folder / "cuda_on_host.so"
    with open(folder / "cuda_on_host.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            compiled(HERE / "cuda_on_host.cpp", built)
    return cuda.open_library(str(built))


@pytest.fixture
def on_host(library, monkeypatch):
    """backend="cuda" on CPU tensors; call it to describe the machine (shared memory in bytes)."""
    backends = tuple(
        replace(backend, why_not=lambda logits: None) if backend.name == "cuda" else backend
        for backend in dispatch.BACKENDS
    )
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    monkeypatch.setattr(cuda, "_library", lambda logits: library)

    def machine(clusters, shared_per_processor=SMALL, seed=0, *, shared_per_block=BLOCK, shared_reserved=0):
        library.mr1_host_machine(clusters, shared_per_block, shared_per_processor, shared_reserved, seed)

    machine(CLUSTERS)
    return machine


def test_paths(on_host):
    """Aligned rows go to the smallest cluster that holds them; all else is two-phase."""
    assert "two-phase" in cuda_path(torch.zeros(2, 3, 8))  # short
    assert "cluster of 1," in cuda_path(torch.zeros(2, 3, 128))
    assert "cluster of 2," in cuda_path(torch.zeros(2, 3, 384))
    assert "cluster of 8," in cuda_path(torch.zeros(2, 3, 1600))
    assert "two-phase" in cuda_path(torch.zeros(2, 3, 130))  # 8 bytes beyond the last 16
    assert "two-phase" in cuda_path(torch.zeros(2, 3, 132)[..., 1:129])
    assert "cluster" in cuda_path(torch.zeros(2, 3, 132)[..., 4:])
    assert "two-phase" in cuda_path(torch.zeros(2, 3, 10**6))  # too long for eight blocks, even one at a time
    on_host(NO_CLUSTERS)
    assert "two-phase, 32 threads, rows in a block: 8" in cuda_path(torch.zeros(2, 3, 384))
    assert "two-phase, 64 threads, rows in a block: 1" in cuda_path(torch.zeros(2, 3, 1600))


def test_paths_on_a_h100(on_host):
    on_host(CLUSTERS, 233472, shared_per_block=232448, shared_reserved=1024)  # what the driver reports
    big = torch.empty(1, 1, 151936, dtype=torch.bfloat16)
    assert "cluster of 4," in cuda_path(big)
    assert "cluster of 8," in cuda_path(big.float())


# What a token's loss is made of is the same code (cuda_token.cuh) on both paths, which read and write the logits.
ON_PATHS = [
    (option, loss_type, clusters)
    for number, (option, loss_type) in enumerate(OF_KERNELS)
    for clusters in (CLUSTERS, NO_CLUSTERS)
    if (option in OF_SCORING and loss_type == "grpo") or number % 2 == clusters
]


@pytest.mark.parametrize(("option", "loss_type", "clusters"), ON_PATHS)
def test_float32(option, loss_type, clusters, on_host, poisoned_memory):
    on_host(clusters, seed=len(option))
    batch = random_batch(6, 2, 456, seed=len(option))
    settings = {"loss_type": loss_type} | OF_LOSS_TYPE.get(loss_type, {})
    check(batch, "cuda", **(settings | OPTIONS[option](batch)))


@pytest.mark.parametrize("clusters", [CLUSTERS, NO_CLUSTERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 2, 37, 64, 131, 392, 1000, 1999])
def test_shapes(V, dtype, clusters, on_host, poisoned_memory):
    on_host(clusters, seed=V)
    batch = random_batch(2, 2, V, dtype=dtype, seed=1)
    check(batch, "cuda", beta=0.2, entropy_coef=0.01)
    check(batch, "cuda", beta=0.2, completion_mask=None, importance_sampling_level="sequence")


@pytest.mark.parametrize("resident", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_threads_gives_the_same_bits(seed, resident, on_host):
    batch = random_batch(2, 3, 800, dtype=torch.bfloat16)
    results = []
    for order in (0, seed + 1):
        on_host(CLUSTERS, resident * 1300, seed=order)
        output, gradient = run(grpo_loss, batch["logits"], batch, backend="cuda", beta=0.1, entropy_coef=0.1)
        results.append((output["loss"], output["entropies"], gradient))
    for first, second in zip(*results):
        assert torch.equal(first, second)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("first", [0, 1, 8])
@pytest.mark.parametrize("clusters", [CLUSTERS, NO_CLUSTERS])
def test_views_and_their_surroundings(clusters, first, inplace, on_host):
    """Rows inside longer ones, aligned or not: the same result, and nothing around them is touched."""
    on_host(clusters)
    batch = random_batch(3, 4, 400)
    exact = batch["logits"].double().requires_grad_()
    grpo_loss(**(batch | {"logits": exact}), beta=0.1, backend="torch").loss.backward()
    whole = torch.full((3, 5, 416), 7.0)
    view = whole[:, :4, first : first + 400]
    view.copy_(batch["logits"])
    leaf = view.detach().requires_grad_()
    grpo_loss(**(batch | {"logits": leaf}), beta=0.1, inplace=inplace, backend="cuda").loss.backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    view.zero_()
    assert (whole[:, 4] == 7).all()
    assert (whole[..., :first] == 7).all()
    assert (whole[..., first + 400 :] == 7).all()


@pytest.mark.parametrize("clusters", [CLUSTERS, NO_CLUSTERS])
def test_banned_tokens_and_nan(clusters, on_host):
    on_host(clusters)
    batch = random_batch(2, 4, 400)
    batch["completion_mask"][:] = True
    batch["logits"][..., 200:] = -float("inf")  # whole parts of the row
    batch["completion_ids"] %= 200
    check(batch, "cuda", beta=0.1, entropy_coef=0.2)
    batch["completion_ids"][0, 1] = 300
    output, gradient = run(grpo_loss, batch["logits"], batch, backend="cuda", beta=0.1)
    assert output["per_token_logps"][0, 1] == -float("inf")
    assert (gradient[0, 1] == 0).all()
    assert output["loss"].isfinite()
    batch["completion_ids"][0, 1] = 3
    batch["logits"][1, 2, 399] = float("nan")
    output, gradient = run(grpo_loss, batch["logits"], batch, backend="cuda", beta=0.1)
    assert output["per_token_logps"][1, 2].isnan()
    assert output["per_token_logps"].isnan().sum() == 1
    assert output["loss"].isnan()


@pytest.mark.parametrize("clusters", [CLUSTERS, NO_CLUSTERS])
def test_masked_positions_may_hold_anything(clusters, on_host):
    on_host(clusters)
    batch = random_batch(3, 4, 400)
    clean, clean_gradient = run(grpo_loss, batch["logits"], batch, backend="cuda", beta=0.1)
    masked = ~batch["completion_mask"]
    batch["completion_ids"][masked] = -100
    for name in ("logits", "old_per_token_logps", "ref_per_token_logps"):
        batch[name][masked] = float("nan")
    output, gradient = run(grpo_loss, batch["logits"], batch, backend="cuda", beta=0.1)
    assert torch.equal(output["loss"], clean["loss"])
    assert torch.equal(gradient, clean_gradient)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_equal_rewards_give_no_gradient(scale_rewards, on_host):
    batch = random_batch(14, 1, 16) | {"completion_mask": None, "advantages": None}
    settings = {"rewards": torch.full((14,), 0.3), "num_generations": 7, "scale_rewards": scale_rewards}
    output, gradient = run(grpo_loss, batch["logits"], batch, backend="cuda", **settings)
    assert output["loss"].item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_huge_logits(temperature, on_host):
    batch = random_batch(3, 3, 400, scale=300.0)
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    results = []
    for logits, backend in ((batch["logits"].double(), "torch"), (batch["logits"], "cuda")):
        leaf = logits.clone().requires_grad_()
        logps, entropies = token_logprobs(leaf, ids, mask=mask, temperature=temperature, entropy=True, backend=backend)
        (logps.sin() * entropies.cos()).sum().backward()
        results.append((logps.detach().double(), entropies.detach().double(), leaf.grad.double()))
    for exact, actual in zip(*results):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=2e-4)


@pytest.mark.slow  # compiles the kernels once more
@pytest.mark.parametrize(
    ("barrier", "symptoms"),
    [
        ("  cluster_wait();", "before it had begun"),
        ("    if (!alone) wait_for_cluster(&shared.parts_arrived);\n", "another loss|after it had ended"),
        ("  barrier();\n  const Plan", "another loss|deadlock|after it had ended"),
    ],
)
def test_the_emulation_finds_a_missing_barrier(barrier, symptoms, on_host, tmp_path):
    """It is worth something only if it fails where a GPU would."""
    batch = random_batch(2, 2, 800)
    good, _ = run(grpo_loss, batch["logits"], batch, backend="cuda", beta=0.1)
    before, after = (HERE.parent / "csrc" / "cuda_cluster.cuh").read_text().split(barrier)
    for name in ("grpo_cuda.cu", "cuda_cluster.cuh"):  # the broken one beside the file that includes it
        shutil.copy(HERE.parent / "csrc" / name, tmp_path)
    (tmp_path / "cuda_cluster.cuh").write_text(before + barrier.partition(";")[2] + after)
    shim = (HERE / "cuda_on_host.cpp").read_text()
    (tmp_path / "shim.cpp").write_text(shim.replace("../csrc/grpo_cuda.cu", "grpo_cuda.cu"))
    broken = compiled(tmp_path / "shim.cpp", tmp_path / "broken.so")
    broken.mr1_host_machine(CLUSTERS, BLOCK, SMALL, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_library", lambda logits: broken)
        try:
            bad, _ = run(grpo_loss, batch["logits"], batch, backend="cuda", beta=0.1)
            symptom = "" if torch.equal(bad["loss"], good["loss"]) else "another loss"
        except RuntimeError as error:
            symptom = str(error)
    assert re.search(symptoms, symptom)


@pytest.mark.parametrize("clusters", [CLUSTERS, NO_CLUSTERS])
def test_from_hidden_states(clusters, on_host):
    on_host(clusters)
    batch = random_batch(3, 4, 400)
    batch.pop("logits")
    results = []
    for backend in ("torch", "cuda"):
        torch.manual_seed(0)
        hidden, weight = torch.randn(3, 4, 16, requires_grad=True), torch.randn(400, 16, requires_grad=True)
        loss = linear_grpo_loss(hidden, weight, **batch, beta=0.1, backend=backend).loss
        results.append(torch.autograd.grad(loss, (hidden, weight)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [-1, 400])
@pytest.mark.parametrize("clusters", [CLUSTERS, NO_CLUSTERS])
def test_the_kernels_refuse_an_id_out_of_range(clusters, bad, on_host, monkeypatch):
    """On a GPU nobody has looked at the ids before them."""
    on_host(clusters)
    monkeypatch.setattr(reference, "check_ids", lambda *arguments: None)
    batch = random_batch(3, 4, 400)
    batch["completion_ids"][-1, -1] = bad
    run(grpo_loss, batch["logits"], batch, backend="cuda")  # masked there: nobody minds
    batch["completion_mask"][-1, -1] = True
    for level in ("token", "sequence"):
        with pytest.raises(RuntimeError, match="completion_ids out of range"):
            run(grpo_loss, batch["logits"], batch, backend="cuda", importance_sampling_level=level)
    scored = [torch.ones(3, 4) for _ in range(3)]
    with pytest.raises(RuntimeError, match="mr1_score_backward: completion_ids out of range"):
        cuda.score_backward(
            batch["logits"], batch["completion_ids"], None, *scored, None, reference.LogitMap(), batch["logits"]
        )


def test_the_call_is_laid_out_as_in_c(library):
    assert library.mr1_sizeof_call() == ctypes.sizeof(cuda.RowsCall)
