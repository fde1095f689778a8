"""What is particular to the `cpp` backend: threads, denormals, memory, and its absence.

That it computes the right thing is tests/test_loss.py's matrix and, for its own ways, test_cpp_values.py.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mr1fast import grpo_loss, token_logprobs
from mr1fast.kernels.self_test import random_batch

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def loss_and_gradient(batch, backend="cpp", **settings):
    """(loss, logps, entropies, kl, gradient); the batch's logits stay as they are."""
    keywords = {"beta": 0.1} | {name: value for name, value in batch.items() if name != "logits"} | settings
    logits = batch["logits"].detach().requires_grad_()
    output = grpo_loss(logits, backend=backend, **keywords)
    output.loss.backward()
    return output.loss.detach(), output.per_token_logps, output.entropies, output.kl, logits.grad


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | environment,
        capture_output=True,
        text=True,
    )


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"entropy_coef": 0.1}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, settings, restore_threads):
    batch = random_batch(4, 40, 5003, dtype=dtype)  # enough for every thread to be woken
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(loss_and_gradient(batch | {"logits": batch["logits"].clone()}, **settings))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_denormals_cost_nothing_and_the_mode_is_restored(restore_threads):
    torch.set_num_threads(1)
    batch = random_batch(1, 40, 20000)
    near, far = batch["logits"], batch["logits"].clone()
    far[..., 1:] -= 93.0  # exp of these is denormal, once the first logit is the largest
    far[..., 0] = 0.0

    def seconds(logits):
        times = []
        for _ in range(7):
            start = time.thread_time()
            loss_and_gradient(batch | {"logits": logits})
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds(far) < 4 * seconds(near)
    denormal = torch.tensor([1e-40])
    assert (denormal * 1.0).item() != 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [31, 4096, 20011])
def test_new_buffer_and_in_place_agree_bit_for_bit(V, dtype, poisoned_memory):
    batch = random_batch(2, 5, V, dtype=dtype)
    new = loss_and_gradient(batch)
    in_place = loss_and_gradient(batch | {"logits": batch["logits"].clone()}, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(new, in_place))


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_strided_logits(inplace, dtype):
    batch = random_batch(3, 4, 333, dtype=dtype)
    expected = loss_and_gradient(batch)
    surround = torch.full((4, 5, 3 * 333 + 7), 7.0, dtype=dtype)
    views = {
        "a slice in every dimension": surround[1:, :-1, 333:666],
        "L before B": torch.empty(4, 3, 333, dtype=dtype).transpose(0, 1),
        "an odd offset": torch.empty(4000, dtype=dtype)[1:3997].view(3, 4, 333),
    }
    for name, view in views.items():
        view.copy_(batch["logits"])
        actual = loss_and_gradient(batch | {"logits": view}, inplace=inplace)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected)), name
        assert torch.equal(view, expected[-1] if inplace else batch["logits"]), name
    surround[1:, :-1, 333:666] = 7.0
    assert (surround == 7.0).all(), "written beside the logits"


def test_offsets_beyond_2_31_elements():
    """Three rows 2^30 elements apart: 4 GiB of address space, of which a few pages are touched."""
    batch = random_batch(1, 3, 1024, dtype=torch.bfloat16)
    expected = loss_and_gradient(batch)
    apart = torch.empty(2**31 + 1024, dtype=torch.bfloat16).as_strided((1, 3, 1024), (0, 2**30, 1))
    apart.copy_(batch["logits"])
    actual = loss_and_gradient(batch | {"logits": apart}, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    assert torch.equal(apart, expected[-1])


def test_more_than_2_31_logits():
    """One row, seen 20,000 times; all but the first and the last are masked and hence not read."""
    rows, V = 20_000, 151_936
    row = random_batch(1, 1, V, dtype=torch.bfloat16)["logits"]
    ids = torch.zeros(1, rows, dtype=torch.int64)
    mask = torch.zeros(1, rows, dtype=torch.bool)
    ids[0, -1], mask[0, 0], mask[0, -1] = V - 1, True, True
    logps, entropies = token_logprobs(row.expand(1, rows, V), ids, mask=mask, entropy=True, backend="cpp")
    few, few_entropies = token_logprobs(row.expand(1, 2, V), torch.tensor([[0, V - 1]]), entropy=True, backend="cpp")
    assert torch.equal(logps[mask], few[0])
    assert torch.equal(entropies[mask], few_entropies[0])
    assert (logps[~mask] == 0).all()


def test_masked_rows_do_not_matter():
    batch = random_batch(3, 6, 500)
    expected = loss_and_gradient(batch)
    batch["logits"] = torch.where(batch["completion_mask"][..., None], batch["logits"], torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradient(batch), expected))


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
def test_masked_rows_are_not_read():
    """The pages of masked rows are made unreadable: a load from them would end the process."""
    done = python(
        """
import ctypes, mmap, torch, test_cpp
from mr1fast.kernels.self_test import random_batch
L, V = 6, mmap.PAGESIZE // 4
batch = random_batch(1, L, V)
batch["completion_mask"] = torch.tensor([[True, False, True, True, False, False]])
expected = test_cpp.loss_and_gradient(batch)
memory = mmap.mmap(-1, L * mmap.PAGESIZE)
rows = torch.frombuffer(memory, dtype=torch.float32).view(1, L, V)
rows.copy_(batch["logits"])
libc = ctypes.CDLL(None, use_errno=True)
def protect(row, how):
    assert libc.mprotect(ctypes.c_void_p(rows[0, row].data_ptr()), ctypes.c_size_t(mmap.PAGESIZE), how) == 0
for row in (1, 4, 5):
    protect(row, 0)
actual = test_cpp.loss_and_gradient(batch | {"logits": rows})
assert all(torch.equal(a, b) for a, b in zip(actual, expected))
print("not read", flush=True)
protect(4, mmap.PROT_READ)
protect(5, mmap.PROT_READ)
batch["completion_mask"][0, 1] = True
test_cpp.loss_and_gradient(batch | {"logits": rows})
print("read", flush=True)
"""
    )
    assert done.stdout.strip() == "not read", done.stderr
    assert done.returncode != 0, "reading the page must have been fatal"


# ---- building and its absence ---------------------------------------------------------------------------------------


def test_without_the_extension():
    done = python(
        """
import sys
sys.modules["mr1fast._C"] = None
import torch, mr1fast
x, ids, advantages = torch.randn(1, 2, 9), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1)
mr1fast.grpo_loss(x, ids, advantages, backend="auto")
mr1fast.grpo_loss(x, ids, advantages, backend="cpp")
"""
    )
    assert "ValueError: backend='cpp' cannot run here: the C++ extension was not built" in done.stderr
    assert "install a C++ compiler" in done.stderr


@pytest.mark.parametrize("missing", ["compiler", pytest.param("torch", marks=pytest.mark.slow)])
def test_install_without(missing, tmp_path):
    """The build succeeds in pure Python and says what will be missing."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "*.egg-info", "__pycache__", "runs", "results")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    (tmp_path / "stubs").mkdir()
    environment = {"CC": "no-such-compiler", "CXX": "no-such-compiler", "PYTHONPATH": ""}
    if missing == "torch":
        (tmp_path / "stubs" / "torch.py").write_text("raise ImportError('no torch here')")
        environment = {"PYTHONPATH": str(tmp_path / "stubs")}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reason = "torch is not importable at build time" if missing == "torch" else "no-such-compiler"
    assert "mr1fast is installed without its C++ extension, and backend='cpp' will not be available" in done.stderr
    assert reason in done.stderr
    built = list((tmp_path / "build").rglob("mr1fast/losses/logits.py"))
    assert built
    assert not list((tmp_path / "build").rglob("*.so"))
