"""The CUDA backend around its kernels: finding nvcc, building, the cache, and what it says where it cannot run."""

import subprocess
import sys

import pytest

from benchmarks import compile_check_cuda
from mr1fast import grpo_loss
from mr1fast.kernels import cuda, cuda_build
from mr1fast.kernels.self_test import random_batch

NVCC = cuda_build.find_nvcc()


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc (a GPU is not needed)")
def test_the_kernels_compile_for_every_architecture_without_spills():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_check_cuda"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for arch in compile_check_cuda.ARCHITECTURES:
        for dtype in ("float32", "bfloat16", "float16"):
            names = [line for line in done.stdout.splitlines() if f"sm_{arch} " in line and f"<{dtype}" in line]
            assert len(names) == 4, f"one pass in a cluster, in two phases, without gradient, and backward: {names}"


def test_on_a_cpu_it_says_that_it_needs_a_gpu():
    batch = random_batch(2, 3, 8)
    with pytest.raises(ValueError, match="needs a CUDA device, the logits are on cpu"):
        grpo_loss(**batch, backend="cuda")


@pytest.fixture
def pretended_nvcc(tmp_path, monkeypatch):
    """Makes `build` run a shell script as nvcc; {output} is where it writes. Returns the function that sets it."""
    monkeypatch.setenv("MR1FAST_CACHE", str(tmp_path / "cache"))

    def pretend(script):
        nvcc = tmp_path / "nvcc"
        nvcc.write_text('#!/bin/sh\nfor output; do :; done\necho "$output" >> "$0.calls"\n' + script)
        nvcc.chmod(0o755)
        monkeypatch.setattr(cuda_build, "find_nvcc", lambda: str(nvcc))
        return nvcc.with_name("nvcc.calls")

    return pretend


def test_a_failing_compiler_is_quoted(pretended_nvcc):
    pretended_nvcc("echo 'error: no such architecture' >&2; exit 1")
    with pytest.raises(cuda_build.CannotBuild, match="no such architecture"):
        cuda_build.build(0, "90a")


def test_a_library_that_fails_its_check_is_not_kept(pretended_nvcc, monkeypatch, capfd):
    pretended_nvcc('echo nonsense > "$output"')
    monkeypatch.setattr(cuda_build.sys, "executable", "false")
    with pytest.raises(cuda_build.CannotBuild, match="failed their check on device 0"):
        cuda_build.build(0, "90a")
    assert "compiling the CUDA kernels for sm_90a" in capfd.readouterr().err
    assert not cuda_build.library_path("90a").exists()


def test_a_library_that_hangs_is_not_kept(pretended_nvcc, monkeypatch):
    monkeypatch.setattr(cuda_build, "CHECK_SECONDS", 0.01)
    pretended_nvcc('echo nonsense > "$output"')
    with pytest.raises(cuda_build.CannotBuild, match="did not come to an end"):
        cuda_build.build(0, "90a")


def test_a_checked_library_is_built_once(pretended_nvcc, monkeypatch):
    calls = pretended_nvcc('echo library > "$output"')
    monkeypatch.setattr(cuda_build.sys, "executable", "true")  # the check
    first = cuda_build.build(0, "90a")
    assert first == cuda_build.build(0, "90a")
    assert first.read_text() == "library\n"
    assert len(calls.read_text().splitlines()) == 1
    assert cuda_build.build(0, "80") != first


def test_without_nvcc_or_sources_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("MR1FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    with pytest.warns(UserWarning, match="nvcc was not found"):
        assert "install the CUDA toolkit" in cuda._find(9, 0, 0)
    monkeypatch.setattr(cuda_build, "source_folder", lambda: tmp_path)
    with pytest.warns(UserWarning, match="no backend='cuda' here"):
        assert "not part of this installation" in cuda._find(9, 0, 0)
    assert "8.0 or more" in cuda._find(7, 5, 0)


def test_nvcc_is_found_beside_no_torch_build(tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    cuda_build.find_nvcc.cache_clear()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_build.find_nvcc() == str(nvcc)
    cuda_build.find_nvcc.cache_clear()
    monkeypatch.undo()
    assert cuda_build.find_nvcc() == NVCC


def test_architectures():
    assert [cuda_build.architecture(*c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        "80", "89", "90a", "100a", "120a",
    ]  # fmt: skip
