"""The CUDA backend around its kernels: finding nvcc, building, the cache, and what it says where it cannot run."""

import platform
import re
import subprocess
import sys

import pytest

from benchmarks import compile_check_cuda
from mr1fast import grpo_loss
from mr1fast.kernels import cuda, cuda_build, cuda_check
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
            assert len(names) == 8, f"cluster, two phases, no gradient, backward, each without and with a cap: {names}"
    (line,) = (line for line in done.stdout.splitlines() if re.match(r"cluster_fwd_kernel<bfloat16> +sm_90a", line))
    statistics, without_bonus, with_bonus = map(float, re.findall(r"\d+\.\d", line))
    assert 5 < statistics < 9.5, "the inner loops were found, and an exponent is one multiply-add"
    assert 3 < without_bonus < 6.5 < with_bonus < 8.5


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
        version = 'if [ "$1" = --version ]; then echo "release 13.0, V13.0.88"; exit; fi'
        nvcc.write_text(f'#!/bin/sh\n{version}\nfor output; do :; done\necho "$output" >> "$0.calls"\n{script}')
        nvcc.chmod(0o755)
        monkeypatch.setattr(cuda_build, "find_nvcc", lambda: str(nvcc))
        return nvcc.with_name("nvcc.calls")

    return pretend


def test_a_failing_compiler_is_quoted(pretended_nvcc):
    pretended_nvcc("echo 'error: no such architecture' >&2; exit 1")
    with pytest.raises(cuda_build.CannotBuild, match="no such architecture"):
        cuda_build.build(0, "90a")


def test_a_library_that_fails_its_check_is_not_kept(pretended_nvcc, tmp_path, monkeypatch, capfd):
    pretended_nvcc('echo nonsense > "$output"')
    monkeypatch.setattr(cuda_build.sys, "executable", "false")
    with pytest.raises(cuda_build.CannotBuild, match="failed their check on device 0"):
        cuda_build.build(0, "90a")
    assert "compiling the CUDA kernels for sm_90a" in capfd.readouterr().err
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_library_that_hangs_is_not_kept(pretended_nvcc, monkeypatch):
    monkeypatch.setattr(cuda_build, "CHECK_SECONDS", 0.01)
    pretended_nvcc('echo nonsense > "$output"')
    with pytest.raises(cuda_build.CannotBuild, match="did not finish"):
        cuda_build.build(0, "90a")


def test_a_checked_library_is_built_once(pretended_nvcc, monkeypatch):
    calls = pretended_nvcc('echo library > "$output"')
    monkeypatch.setattr(cuda_build.sys, "executable", "true")  # the check
    first = cuda_build.build(0, "90a")
    assert first == cuda_build.build(0, "90a")
    assert first.read_text() == "library\n"
    assert len(calls.read_text().splitlines()) == 1
    assert cuda_build.build(0, "80") != first
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)  # gone by now
    assert cuda_build.build(0, "90a") == first


def test_the_librarys_name_says_what_it_depends_on(pretended_nvcc, monkeypatch):
    pretended_nvcc('echo library > "$output"')
    monkeypatch.setattr(cuda_build.sys, "executable", "true")
    name = cuda_build.build(0, "90a").name
    assert name.startswith(f"grpo_cuda_{platform.machine()}_sm_90a_nvcc_13.0.88_")
    monkeypatch.setattr(cuda_build, "FLAGS", (*cuda_build.FLAGS, "-lineinfo"))
    assert cuda_build.build(0, "90a").name not in ("", name)


def test_where_the_device_takes_no_second_process_the_check_is_skipped_once(
    pretended_nvcc, tmp_path, monkeypatch, capfd
):
    calls = pretended_nvcc('echo library > "$output"')
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 'CUDA error: devices are busy' >&2\nexit {cuda_build.NOT_CHECKED}\n")
    python.chmod(0o755)
    monkeypatch.setattr(cuda_build.sys, "executable", str(python))
    first = cuda_build.build(0, "90a")
    assert (
        "used unchecked, because device 0 took no second process (CUDA error: devices are busy)"
        in capfd.readouterr().err
    )
    assert cuda_build.build(0, "90a") == first
    assert not capfd.readouterr().err
    assert len(calls.read_text().splitlines()) == 1


BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be reported later"


@pytest.mark.parametrize(
    "message", [BUSY, "CUDA out of memory. Tried to allocate 20.00 MiB.", "CUDA error: out of memory"]
)
def test_the_check_says_that_it_could_not_run(message, monkeypatch, capsys):
    def check(device):
        raise RuntimeError(message)

    monkeypatch.setattr(cuda_check.sys, "argv", ["cuda_check"])
    monkeypatch.setattr(cuda_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_check, "check", check)
    assert cuda_check.main() == cuda_build.NOT_CHECKED
    assert capsys.readouterr().err.splitlines() == [message.splitlines()[0]]


def test_the_check_does_not_excuse_other_errors(monkeypatch):
    def check(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_check.sys, "argv", ["cuda_check"])
    monkeypatch.setattr(cuda_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_check, "check", check)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cuda_check.main()


def test_the_check_itself(monkeypatch, capsys):
    """Of another backend, since there may be no device; and it finds a gradient that is off."""
    monkeypatch.setattr(cuda_check, "VOCABULARIES", (37,))
    cuda_check.check("cpu", "cpp")
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(cuda.DTYPES)
    right = cuda_check.gradient
    monkeypatch.setattr(cuda_check, "gradient", lambda *args: right(*args) * (1.1 if args[-1] == "cpp" else 1.0))
    with pytest.raises(AssertionError, match="off by"):
        cuda_check.check("cpu", "cpp")


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
