"""What a Triton launch is made of: its grid, tiles and alignment, and the table that `benchmarks.tune` rewrites."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from benchmarks import tune
from mr1fast import grpo_loss
from mr1fast.kernels import triton_table
from mr1fast.kernels.self_test import device_of, random_batch
from mr1fast.kernels.triton_rows import rows_aligned, tile_settings
from mr1fast.kernels.triton_score import scale_unless_one
from mr1fast.kernels.triton_table import TABLE

DEVICE = device_of("triton")


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("V", [1, 17, 1024, 1025, 50000, 151936, 10**6])
@pytest.mark.parametrize("op", ["loss", "score", "score_backward"])
def test_a_tile_is_loads_by_threads_by_width(op, V, aligned, itemsize):
    settings = tile_settings(op, V, itemsize, aligned)
    assert settings["W"] == (16 // itemsize if aligned else 1)
    assert settings["T"] == 32 * settings["num_warps"]
    assert settings["C"] & (settings["C"] - 1) == 0, "Triton's shapes are powers of two"
    elements = settings["C"] * settings["T"] * settings["W"]
    largest = max(block for (name, size, _), (block, _, _) in TABLE.items() if (name, size) == (op, itemsize))
    assert elements <= max(largest, settings["T"] * settings["W"])


def test_rows_are_aligned_by_address_and_strides():
    logits = torch.zeros(3, 4, 64, dtype=torch.bfloat16)
    assert rows_aligned(logits)
    assert rows_aligned(logits[:, 1:, 8:])
    assert not rows_aligned(logits[..., 1:])  # 2 bytes off
    assert not rows_aligned(torch.zeros(3, 4, 65, dtype=torch.bfloat16))
    assert rows_aligned(torch.zeros(1, 1, 65, dtype=torch.bfloat16))  # one row: its stride is never used
    assert not rows_aligned(logits, logits[..., 1:])


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("V", [64, 4096 + 24])
def test_a_view_of_longer_rows(V, first):
    """Views that are 16-byte aligned and views that are not take different widths to the same numbers."""
    batch = random_batch(2, 3, V, device=DEVICE)
    whole = torch.zeros(2, 3, V + 4, device=DEVICE)
    view = whole[..., first : first + V]
    view.copy_(batch["logits"])
    gradients = []
    for logits, backend in ((batch["logits"], "torch"), (view, "triton")):
        leaf = logits.detach().requires_grad_()
        assert leaf.stride() == logits.stride()
        grpo_loss(**(batch | {"logits": leaf}), beta=0.1, backend=backend).loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
@pytest.mark.parametrize("V", [11, 64, 4096 + 24])
def test_scaling_of_a_gradient(V, factor, dtype):
    """Called here, since `op.scaled` takes this kernel for tensors on a GPU only."""
    whole = torch.randn(2, 3, V + 8, device=DEVICE).to(dtype)
    expected = whole.clone()
    expected[..., 8:] *= factor
    scale_unless_one(whole[..., 8:], torch.tensor(factor, device=DEVICE))
    assert torch.equal(whole, expected)


def test_candidates_of_the_tuner_are_launchable():
    for key in TABLE:
        for block, warps, stages in tune.candidates(key):
            assert block & (block - 1) == 0
            assert 1 <= block // (32 * warps * (16 // key[1])) <= 8
            assert 1 <= stages <= 3
        assert TABLE[key] in list(tune.candidates(key)), f"the tuner would not even try what stands in the table: {key}"


def test_the_tuner_writes_the_file_that_stands_there():
    text = Path(triton_table.__file__).read_text(encoding="utf-8")
    origin = text.split('"""')[1].split("\n\n", 1)[1].strip()
    assert tune.rendered(TABLE, origin) == text
