"""The loss from hidden states: parity with the logits path and float64, what is computed, and the memory."""

import pytest
import torch
from linear_cases import EVERY, SETTINGS, B, H, L, V, case, check, check_token_logprobs, chunk_of, plain
from torch.utils._python_dispatch import TorchDispatchMode

from mr1fast import linear_grpo_loss, linear_token_logprobs
from mr1fast.kernels import cpp, linear_op
from mr1fast.kernels.self_test import every_backend

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def unregistered(monkeypatch):
    """A TorchDispatchMode sees a registered op as one call; here it sees what the op does."""
    for name in ("linear_grpo_op", "linear_score_op", "linear_score_backward_op"):
        monkeypatch.setattr(linear_op, name, getattr(linear_op, name)._init_fn)


@pytest.mark.parametrize("blocks", [1, 3, 30])
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("settings", SETTINGS)
def test_parity(settings, backend, blocks):
    check(SETTINGS[settings], backend, blocks, torch.float32)


@pytest.mark.parametrize("blocks", [1, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("settings", ["grpo", "beta 0", "sequence"])
def test_parity_in_other_types(settings, backend, dtype, blocks):
    if dtype == torch.float64 and backend != "torch":
        head, batch = case(dtype=dtype)
        with pytest.raises(ValueError, match="float64"):
            linear_grpo_loss(head[0], head[1], backend=backend, **batch)
        return
    check(SETTINGS[settings], backend, blocks, dtype)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", ["beta 0", "sequence"])
@pytest.mark.parametrize("threads", [1, 3])
def test_parity_with_the_vocabulary_in_pieces(threads, settings, dtype, blocks, restore_threads, poisoned_memory):
    """Which head_gemms.cpp multiplies one by one: two of 128 and a rest."""
    torch.set_num_threads(threads)
    check(SETTINGS[settings], EVERY[-1], blocks, dtype, V=300)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_parity_without_the_extension(bias, dtype, blocks, monkeypatch, poisoned_memory):
    monkeypatch.setattr(cpp, "MISSING", "it was not built")
    check(SETTINGS["grpo"], "torch", blocks, dtype, bias=bias)


@pytest.mark.skipif("triton" not in every_backend(), reason="Triton cannot run here, not even interpreted")
@pytest.mark.parametrize("settings", ["beta 0", "entropy", "sequence"])
def test_parity_in_triton(settings):
    check(SETTINGS[settings], "triton", 3, torch.float32)


@pytest.mark.parametrize("chunk_bytes", [None, chunk_of(4), 1])
@pytest.mark.parametrize("backend", EVERY)
def test_token_logprobs(backend, chunk_bytes, poisoned_memory):
    check_token_logprobs(backend, chunk_bytes)
    of_logits = {"temperature": torch.rand(B, L) + 0.5, "final_logit_softcapping": 3.0, "logit_scale": 0.5}
    check_token_logprobs(backend, chunk_bytes, **of_logits)


def gemm_rows(call):
    """How many rows of [rows, V] logits each GEMM of `call` touched: {"logits": .., "hidden": .., "weight": ..}."""
    counts = {"logits": 0, "hidden": 0, "weight": 0}
    ours = {"mr1fast_native.head_logits": "logits", "mr1fast_native.head_weight_gradient": "weight"}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if name := ours.get(str(func.overloadpacket)):
                counts[name] += args[0].shape[0]
            elif func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                a, b = args[-2:]
                if a.shape[0] == V:
                    counts["weight"] += a.shape[1]
                else:
                    counts["logits" if b.shape[1] == V else "hidden"] += a.shape[0]
            return func(*args, **(kwargs or {}))

    with Recorder():
        call()
    return counts


@pytest.mark.parametrize("blocks", [1, 4])
def test_rows_without_gradient_stay_out_of_the_gemms(blocks, unregistered):
    head, batch = case()
    unmasked = int(batch["completion_mask"].sum())
    silent = ~batch["completion_mask"] | (batch["advantages"] == 0)[:, None]

    def call(**settings):
        return linear_grpo_loss(
            *(t.detach().requires_grad_() for t in head[:2]), chunk_bytes=chunk_of(blocks), **{**batch, **settings}
        )

    output = call()
    clipped = output.is_low_clipped | output.is_high_clipped
    live = int((~silent & ~clipped).sum())
    assert 0 < live < int((~silent).sum()) < unmasked, "the case must have clipped and zero-advantage tokens"
    assert gemm_rows(lambda: call()) == {"logits": unmasked, "hidden": live, "weight": live}
    assert gemm_rows(lambda: call(beta=0.1)) == dict.fromkeys(("logits", "hidden", "weight"), unmasked)
    assert gemm_rows(lambda: call(advantages=torch.zeros(B))) == {"logits": unmasked, "hidden": 0, "weight": 0}
    assert output.per_token_logps[1][batch["completion_mask"][1]].all(), "reported for tokens without a gradient too"


def test_two_passes_recompute_rows_with_a_gradient_only(unregistered):
    head, batch = case()
    logps = linear_token_logprobs(head[0], head[1], batch["completion_ids"], mask=batch["completion_mask"])
    counts = gemm_rows(lambda: (logps[0].sum() + 0 * logps.sum()).backward())
    assert counts == dict.fromkeys(("logits", "hidden", "weight"), L)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_only_what_is_needed_is_computed(level, needed, unregistered):
    head, batch = case()
    tensors = [t.detach().requires_grad_(need) for t, need in zip(head[:2], needed)]
    wanted = plain(head[:2], batch, torch.float64, importance_sampling_level=level)[1]

    def call():
        output = linear_grpo_loss(*tensors, importance_sampling_level=level, **batch)
        if any(needed):
            output.loss.backward()
        assert output.loss.requires_grad == any(needed)

    counts = gemm_rows(call)
    assert (counts["hidden"] > 0, counts["weight"] > 0) == needed
    for tensor, gradient in zip(tensors, wanted):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, gradient.float(), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert gemm_rows(lambda: linear_grpo_loss(*head[:2], **batch))["hidden"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_tensor_of_all_logits(dtype, level, unregistered):
    """The largest tensor of a call, backward included, is one block or one [V, H], however many tokens there are."""
    sizes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            sizes.extend(t.nelement() for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor))
            return output

    N, V, H = 512, 2048, 8
    ids = torch.randint(0, V, (8, N // 8))
    advantages = torch.linspace(-1, 1, 8)
    advantages[2] = 0
    hidden, weight = (torch.randn(*s).to(dtype).requires_grad_() for s in ((8, N // 8, H), (V, H)))
    rows = 32
    settings = {"chunk_bytes": rows * V * dtype.itemsize, "importance_sampling_level": level}
    with Recorder():
        linear_grpo_loss(hidden, weight, ids, advantages, **settings).loss.backward()
    assert max(sizes) <= rows * V
    assert weight.grad is not None


def test_gradient_of_the_weight_is_handed_over_and_not_copied():
    head, batch = case()
    output = linear_grpo_loss(*head[:2], **batch)
    gradient = output.loss.grad_fn.saved_tensors[1]
    address = gradient.data_ptr()
    del gradient
    output.loss.backward()
    assert head[1].grad.data_ptr() == address


def test_weight_gradient_does_not_round_from_block_to_block():
    """Where all rows push one way, a bfloat16 sum over blocks stops growing; float32 does not."""
    rows, V = 2048, 8
    hidden = torch.ones(1, rows, 4, dtype=torch.bfloat16)
    weight = torch.zeros(V, 4, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(1, rows, dtype=torch.int64)
    linear_grpo_loss(hidden, weight, ids, torch.ones(1), chunk_bytes=2 * V * 2).loss.backward()
    assert weight.grad[0].tolist() == [-0.875] * 4


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3, 3)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_nothing_to_train_on(level, shape, backend):
    hidden, weight = torch.randn(*shape, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    ids, mask = torch.full(shape, -100), torch.zeros(shape)
    output = linear_grpo_loss(
        hidden, weight, ids, torch.randn(shape[0]), completion_mask=mask, backend=backend,
        importance_sampling_level=level,
    )  # fmt: skip
    output.loss.backward()
    assert output.loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
