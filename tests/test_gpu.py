"""The kernels on a CUDA device: against the float64 oracle, at sizes beyond 32 bits, compiled once, in place.

Run by `benchmarks/device.sh`; without a device nothing here can run.
"""

from itertools import product

import linear_cases
import pytest
import torch
from loss_cases import OF_KERNELS, OF_LOSS_TYPE, OPTIONS, check, cuda_path

from mr1fast import grpo_loss
from mr1fast.kernels.self_test import available_backends, model_output, random_batch

HAS_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]

DEVICE, KERNELS = "cuda", ("triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_both_backends_run_here():
    assert set(available_backends(DEVICE)) == {"torch", *KERNELS}


@pytest.mark.skipif(
    HAS_GPU and torch.cuda.get_device_capability() < (9, 0), reason="clusters need compute capability 9.0"
)
def test_qwen2_vls_logits_take_a_cluster():
    """Every other test here would pass on the two-phase kernels, too."""
    assert "cluster" in cuda_path(torch.empty(2, 3, 151936, dtype=torch.bfloat16, device=DEVICE))


# Each set of flags is a compilation to Triton: there, most options run with one loss type.
COMBINATIONS = [
    (option, loss_type, backend)
    for (option, loss_type), backend in product(OF_KERNELS, KERNELS)
    if backend == "cuda" or loss_type == "grpo" or option == "old_and_ref"
]


@pytest.mark.parametrize(("option", "loss_type", "backend"), COMBINATIONS)
def test_options(option, loss_type, backend, poisoned_memory):
    batch = random_batch(6, 2, 16384, seed=len(option))
    settings = {"loss_type": loss_type} | OF_LOSS_TYPE.get(loss_type, {})
    check(batch, backend, **(settings | OPTIONS[option](batch)))


# So is each vocabulary, of code that the interpreter runs at every size.
VOCABULARIES = [
    (V, backend)
    for V, backend in product((1, 37, 1003, 4096, 32000, 50257, 151936, 10**6 + 8), KERNELS)
    if backend == "cuda" or V in (37, 4096, 151936)
]


@pytest.mark.parametrize(("V", "backend"), VOCABULARIES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabularies(dtype, level, V, backend, poisoned_memory):
    batch = random_batch(2, 3, V, dtype=dtype)
    check(batch, backend, beta=0.1, entropy_coef=0.01, importance_sampling_level=level)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("first", [0, 1, 8])
def test_rows_inside_longer_ones(first, backend):
    batch = random_batch(3, 4, 20000, dtype=torch.bfloat16, device=DEVICE)
    whole = torch.full((3, 5, 20016), 7.0, dtype=torch.bfloat16, device=DEVICE)
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
    ids = torch.randint(logits.shape[-1], logits.shape[:2], device=DEVICE)
    few, few_ids = logits[:, -3:].clone(), ids[:, -3:].clone()
    results = []
    for rows, row_ids in ((logits, ids), (few, few_ids)):
        rows.requires_grad_()
        advantages = torch.ones(1, device=DEVICE)
        # luspo: a token's weight does not depend on how many there are.
        output = grpo_loss(rows, row_ids, advantages, loss_type="luspo", inplace=True, backend=backend)
        output.loss.backward()
        results.append((output.per_token_logps[:, -3:], rows.detach()[:, -3:]))
    for first, second in zip(*results):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", KERNELS)
def test_more_logits_than_32_bits_count(backend):
    V = 151936
    last_rows_agree(torch.randn(1, 2**31 // V + 20, V, dtype=torch.bfloat16, device=DEVICE), backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("V", [256, 16384])
def test_seventy_thousand_tokens(V, backend):
    last_rows_agree(torch.randn(1, 70_000, V, dtype=torch.bfloat16, device=DEVICE), backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_in_place_needs_no_memory_of_the_logits_size(backend):
    batch = random_batch(4, 64, 151936, dtype=torch.bfloat16, device=DEVICE)
    logits = batch.pop("logits")

    def step():
        logits.normal_()
        grpo_loss(model_output(logits), beta=0.1, inplace=True, backend=backend, **batch).loss.backward()

    step()  # whatever is allocated once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.01 * logits.numel() * logits.element_size()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("V", "dtype"), [(1003, torch.float32), (16384, torch.float32), (16384, torch.bfloat16)])
def test_incoming_gradient_scales(V, dtype, inplace, backend):
    batch = random_batch(3, 4, V, dtype=dtype, device=DEVICE)
    logits = batch.pop("logits")
    gradients = []
    for factor in (1, 0.25):  # a power of two rounds nothing
        leaf = logits.clone().requires_grad_()
        loss = grpo_loss(leaf * 1, beta=0.1, inplace=inplace, backend=backend, **batch).loss
        (loss * factor).backward()
        gradients.append(leaf.grad)
    assert gradients[0].any()
    assert torch.equal(gradients[1], gradients[0] * 0.25)


# ---- from hidden states ---------------------------------------------------------------------------------------------

# float32 weights of a bfloat16 model keep gradients that are not rounded to bfloat16.
HEADS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "master weights": {"dtype": torch.bfloat16, "master_weights": True},
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("settings", ["grpo", "beta 0"])  # at 0, tokens without advantage and clipped ones fall out
def test_from_hidden_states(settings, head, blocks, bias, backend, small_blocks, poisoned_memory):
    settings = linear_cases.SETTINGS[settings]
    linear_cases.check(settings, backend, blocks, **HEADS[head], bias=bias, V=16384)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("blocks", [1, 4])
def test_token_logprobs_from_hidden_states(blocks, backend, small_blocks, poisoned_memory):
    linear_cases.check_token_logprobs(backend, linear_cases.chunk_of(blocks, V=16384), V=16384)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_incoming_gradient_scales_from_hidden_states(dtype, backend):
    head, batch = linear_cases.case(dtype=dtype, V=16384)
    gradients = []
    for factor in (1, 0.25):
        loss = linear_cases.from_hidden(head, batch, backend, beta=0.1).loss
        gradients.append(torch.autograd.grad(loss * factor, head))
    for one, quarter in zip(*gradients):
        assert one.any()
        torch.testing.assert_close(quarter, one * 0.25)


# ---- compilation ----------------------------------------------------------------------------------------------------


def test_lengths_and_kl_weights_compile_nothing_again():
    from mr1fast.kernels.triton_loss import grpo_loss_fwd_kernel

    def compiled():
        return sum(len(cache[0]) for cache in grpo_loss_fwd_kernel.device_caches.values())

    counts = []
    for step in range(1, 21):
        batch = random_batch(2, step, 4096, dtype=torch.bfloat16, device=DEVICE, seed=step)
        grpo_loss(**batch, beta=step / 100, temperature=1 + step / 50, epsilon_low=step / 50, backend="triton")
        counts.append(compiled())
    assert counts[0] == counts[-1] > 0


@pytest.mark.parametrize("backend", KERNELS)
def test_torch_compile_takes_the_whole_graph(backend):
    batch = random_batch(3, 4, 32000, dtype=torch.bfloat16, device=DEVICE)
    leaf = batch.pop("logits").requires_grad_()

    def step(logits, beta):
        return grpo_loss(logits * 1, beta=beta, backend=backend, **batch).loss

    beta = torch.tensor(0.1, device=DEVICE)
    expected = torch.autograd.grad(step(leaf, beta), leaf)
    actual = torch.autograd.grad(torch.compile(step, fullgraph=True)(leaf, beta), leaf)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-6)
