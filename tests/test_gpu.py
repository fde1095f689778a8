"""The kernels on a CUDA device: against the float64 oracle, at sizes beyond 32 bits, compiled once, in place.

Run by `benchmarks/device.sh`; without a device nothing here can run.
"""

from itertools import product

import pytest
import torch
from test_loss import OPTIONS, check

from mr1fast import grpo_loss
from mr1fast.kernels.testing import available_backends, random_batch

HAS_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]

KERNELS = ("triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_both_backends_run_here():
    assert set(available_backends("cuda")) == {"torch", *KERNELS}


# Each set of flags is a compilation to Triton: there, most options run with one loss type.
COMBINATIONS = [
    (option, loss_type, backend)
    for option, loss_type, backend in product(OPTIONS, ("grpo", "cispo", "sapo"), KERNELS)
    if backend == "cuda" or loss_type == "grpo" or option == "bias_correction"
]


@pytest.mark.parametrize(("option", "loss_type", "backend"), COMBINATIONS)
def test_options(option, loss_type, backend, poisoned_memory):
    batch = random_batch(6, 2, 16384, seed=len(option))
    settings = {"loss_type": loss_type, "max_completion_length": 7}
    if loss_type == "cispo":
        settings["epsilon_high"] = 1.1
    check(batch, backend, "cuda", **(settings | OPTIONS[option](batch)))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 37, 1003, 4096, 32000, 50257, 151936, 10**6 + 8])
def test_vocabularies(V, dtype, level, backend, poisoned_memory):
    if backend == "triton" and V not in (37, 4096, 151936):
        pytest.skip("another compilation of code that the interpreter runs at every size")
    batch = random_batch(2, 3, V, dtype=dtype)
    check(batch, backend, "cuda", beta=0.1, entropy_coef=0.01, importance_sampling_level=level)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("first", [0, 1, 8])
def test_rows_inside_longer_ones(first, backend):
    batch = random_batch(3, 4, 20000, dtype=torch.bfloat16, device="cuda")
    whole = torch.full((3, 5, 20016), 7.0, dtype=torch.bfloat16, device="cuda")
    view = whole[:, :4, first : first + 20000]
    view.copy_(batch["logits"])
    gradients = []
    for logits, inplace in ((batch["logits"], False), (view, True)):
        leaf = logits.detach().requires_grad_()
        grpo_loss(**(batch | {"logits": leaf}), beta=0.1, inplace=inplace, backend=backend).loss.backward()
        gradients.append(leaf.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-7)
    view.zero_()
    assert (whole[:, 4] == 7).all()
    assert (whole[..., :first] == 7).all()
    assert (whole[..., first + 20000 :] == 7).all()


def last_rows_agree(logits, backend):
    """In place on all rows of [1, L, V], and on a copy of the last three: the same bits."""
    ids = torch.randint(logits.shape[-1], logits.shape[:2], device="cuda")
    few, few_ids = logits[:, -3:].clone(), ids[:, -3:].clone()
    results = []
    for rows, row_ids in ((logits, ids), (few, few_ids)):
        rows.requires_grad_()
        advantages = torch.ones(1, device="cuda")
        # luspo: a token's weight does not depend on how many there are.
        output = grpo_loss(rows, row_ids, advantages, loss_type="luspo", inplace=True, backend=backend)
        output.loss.backward()
        results.append((output.per_token_logps[:, -3:], rows.detach()[:, -3:]))
    for first, second in zip(*results):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", KERNELS)
def test_more_logits_than_32_bits_count(backend):
    V = 151936
    last_rows_agree(torch.randn(1, 2**31 // V + 20, V, dtype=torch.bfloat16, device="cuda"), backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("V", [256, 16384])
def test_seventy_thousand_tokens(V, backend):
    last_rows_agree(torch.randn(1, 70_000, V, dtype=torch.bfloat16, device="cuda"), backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_in_place_needs_no_memory_of_the_logits_size(backend):
    batch = random_batch(4, 64, 151936, dtype=torch.bfloat16, device="cuda")
    logits = batch["logits"].requires_grad_()
    grpo_loss(**batch, beta=0.1, inplace=True, backend=backend)  # whatever is allocated once
    with torch.no_grad():
        logits.normal_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grpo_loss(**batch, beta=0.1, inplace=True, backend=backend).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.01 * logits.numel() * logits.element_size()


def test_lengths_and_kl_weights_compile_nothing_again():
    from mr1fast.kernels.triton_loss import grpo_loss_fwd_kernel

    def compiled():
        return sum(len(cache[0]) for cache in grpo_loss_fwd_kernel.device_caches.values())

    counts = []
    for step in range(1, 21):
        batch = random_batch(2, step, 4096, dtype=torch.bfloat16, device="cuda", seed=step)
        grpo_loss(**batch, beta=step / 100, temperature=1 + step / 50, epsilon_low=step / 50, backend="triton")
        counts.append(compiled())
    assert counts[0] == counts[-1] > 0


@pytest.mark.parametrize("backend", KERNELS)
def test_torch_compile_takes_the_whole_graph(backend):
    batch = random_batch(3, 4, 32000, dtype=torch.bfloat16, device="cuda")
    leaf = batch.pop("logits").requires_grad_()

    def step(logits, beta):
        return grpo_loss(logits * 1, beta=beta, backend=backend, **batch).loss

    beta = torch.tensor(0.1, device="cuda")
    expected = torch.autograd.grad(step(leaf, beta), leaf)
    actual = torch.autograd.grad(torch.compile(step, fullgraph=True)(leaf, beta), leaf)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-6)
