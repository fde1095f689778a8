"""The loss from hidden states: parity with the logits path and float64, memory, and what head and hidden may be."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mr1fast import grpo_loss, linear_grpo_loss, linear_token_logprobs, token_logprobs
from mr1fast.kernels import linear, linear_op, op
from mr1fast.kernels.reference import LossSpec
from mr1fast.kernels.testing import assert_within_budget, available_backends, random_batch

B, L, V, H = 6, 5, 43, 11
BACKENDS = available_backends()
EVERY = [name for name in BACKENDS if name != "triton"]  # the interpreter is too slow for the whole matrix
FIELDS = ("per_token_logps", "entropies", "kl", "is_low_clipped", "is_high_clipped")
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks as small as chunk_bytes asks for."""
    monkeypatch.setattr(linear, "MIN_ROWS", {"cpu": 1, "gpu": 1})
    monkeypatch.setattr(linear, "ALIGN_ROWS", 1)


@pytest.fixture
def unregistered(monkeypatch):
    """A TorchDispatchMode sees a registered op as one call; here it sees what the op does."""
    for name in ("grpo", "score", "score_backward"):
        monkeypatch.setattr(linear_op, f"linear_{name}_op", getattr(linear_op, f"_run_{name}"))


def chunk_of(blocks, dtype=torch.float32, rows=B * L):
    return max(rows // blocks, 1) * V * dtype.itemsize


def case(*, dtype=torch.float32, seed=0, scale=1.0):
    """(hidden, weight, bias), leaves, and the batch; completion 1 has no advantage, the last one is fully masked."""
    batch = random_batch(B, L, V, seed=seed)
    batch["advantages"][1] = 0
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=g) * scale for shape in ((B, L, H), (V, H), (V,)))
    logits = batch.pop("logits")
    shift = token_logprobs(hidden @ weight.T + bias, batch["completion_ids"]) - token_logprobs(
        logits, batch["completion_ids"]
    )
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        batch[name] += shift
    hidden[~batch["completion_mask"]] = torch.nan  # must never be looked at
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], batch


def plain(head, batch, dtype, **settings):
    """(output, gradients) of the logits path in torch, in `dtype`."""
    head = [t.detach().to(dtype).requires_grad_() for t in head]
    hidden = head[0].masked_fill(~batch["completion_mask"][..., None], 0)
    output = grpo_loss(hidden @ head[1].T + head[2], backend="torch", **batch, **settings)
    return output, torch.autograd.grad(output.loss.sum(), head)


SETTINGS = {
    "grpo": {"beta": 0.04},
    "beta 0": {"beta": 0.0},
    "entropy": {"beta": 0.0, "entropy_coef": 0.05},
    "delta": {"beta": 0.04, "delta": 1.1, "use_bias_correction_kl": True},
    "bnpo": {"beta": 0.04, "loss_type": "bnpo", "temperature": 0.8},
    "dr_grpo": {"beta": 0.04, "loss_type": "dr_grpo", "max_completion_length": 9},
    "dapo": {"beta": 0.04, "loss_type": "dapo", "num_items_in_batch": 17, "epsilon_high": 0.28},
    "luspo": {"beta": 0.04, "loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5},
    "sapo": {"beta": 0.1, "loss_type": "sapo"},
    "sequence": {"beta": 0.04, "importance_sampling_level": "sequence"},
    "none": {"beta": 0.04, "reduction": "none"},
    "correction": {"beta": 0.1, "importance_sampling_ratio": torch.linspace(0.5, 1.5, B)[:, None]},
    "on-policy": {"beta": 0.1, "old_per_token_logps": None},
    "rewards": {"advantages": None, "rewards": torch.tensor([1.0, 0, 2, 1, 1, 1]), "num_generations": 3},
}


def check(settings, backend, blocks, dtype):
    head, batch = case(dtype=dtype)
    batch |= settings
    exact, exact_gradients = plain(head, batch, torch.float64)
    peer, peer_gradients = plain(head, batch, dtype)
    output = linear_grpo_loss(
        head[0], head[1], lm_head_bias=head[2], chunk_bytes=chunk_of(blocks, dtype), backend=backend, **batch
    )
    gradients = torch.autograd.grad(output.loss.sum(), head)
    assert_within_budget("loss", output.loss.detach(), exact.loss.detach(), peer.loss.detach(), FLOOR[dtype])
    for name, actual, wanted, other in zip(("hidden", "weight", "bias"), gradients, exact_gradients, peer_gradients):
        assert actual.dtype == dtype
        assert_within_budget(f"gradient of {name}", actual, wanted, other, FLOOR[dtype])
    for name in FIELDS:
        wanted, other = getattr(exact, name), getattr(peer, name)
        if wanted.dtype != torch.bool:
            assert_within_budget(name, getattr(output, name), wanted, other, FLOOR[dtype])
        elif dtype != torch.bfloat16:  # in which a ratio may round to the other side of the clip range
            assert torch.equal(getattr(output, name), wanted)
        assert not getattr(output, name).requires_grad


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
def test_parity_in_tiles(settings, dtype, blocks, monkeypatch, poisoned_memory):
    """The vocabulary in pieces, the last of them smaller."""
    monkeypatch.setattr(linear, "TILE", 16)
    check(SETTINGS[settings], EVERY[-1], blocks, dtype)


@pytest.mark.parametrize("settings", ["beta 0", "entropy", "sequence"])
def test_parity_in_triton(settings):
    assert "triton" in BACKENDS
    check(SETTINGS[settings], "triton", 3, torch.float32)


@pytest.mark.parametrize("backend", EVERY)
def test_token_logprobs(backend, poisoned_memory):
    """Log-probabilities and entropies with an objective of one's own that leaves most tokens without a gradient."""
    head, batch = case()
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    g = torch.Generator().manual_seed(3)
    factors = torch.randn(2, B, L, generator=g) * (torch.rand(B, L, generator=g) < 0.3)

    def run(score):
        logps, entropies = score()
        loss = (logps * factors[0] + entropies * factors[1]).sum()
        return logps.detach(), entropies.detach(), *torch.autograd.grad(loss, head)

    for chunk_bytes in (None, chunk_of(4), 1):
        actual = run(
            lambda chunk_bytes=chunk_bytes: linear_token_logprobs(
                head[0], head[1], ids, lm_head_bias=head[2], temperature=0.7, mask=mask, entropy=True,
                chunk_bytes=chunk_bytes, backend=backend,
            )
        )  # fmt: skip
        hidden = head[0].masked_fill(~mask[..., None], 0)
        wanted = run(
            lambda hidden=hidden: token_logprobs(
                hidden @ head[1].T + head[2], ids, temperature=0.7, mask=mask, entropy=True, backend="torch"
            )
        )
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def gemm_rows(call):
    """How many rows of [rows, V] logits each GEMM of `call` touched: {"logits": .., "hidden": .., "weight": ..}."""
    counts = {"logits": 0, "hidden": 0, "weight": 0}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
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
    wanted = plain([*head[:2], torch.zeros(V)], batch, torch.float64, importance_sampling_level=level)[1]

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


def test_scaled_and_repeated_backward():
    head, batch = case()
    one = torch.autograd.grad(linear_grpo_loss(*head[:2], **batch).loss, head[:2])
    output = linear_grpo_loss(*head[:2], **batch)
    torch.testing.assert_close(torch.autograd.grad(output.loss, head[:2], retain_graph=True), one)
    torch.testing.assert_close(
        torch.autograd.grad(output.loss * 3, head[:2], retain_graph=True), tuple(3 * g for g in one)
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


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


def test_tied_weight():
    head, batch = case()
    weight = head[1].detach().requires_grad_()

    def hidden_of(weight):
        return torch.tanh(weight[batch["completion_ids"]])

    linear_grpo_loss(hidden_of(weight), weight, **batch).loss.backward()
    (wanted,) = torch.autograd.grad(grpo_loss(hidden_of(weight) @ weight.T, **batch).loss, weight)
    torch.testing.assert_close(weight.grad, wanted)


def test_lora_on_the_head_through_the_merged_weight():
    head, batch = case()
    base = head[1].detach()
    a, b = torch.randn(2, H, requires_grad=True), torch.randn(V, 2, requires_grad=True)
    hidden = head[0].masked_fill(~batch["completion_mask"][..., None], 0)
    actual = torch.autograd.grad(linear_grpo_loss(head[0], base + 0.5 * b @ a, **batch).loss, (a, b))
    logits = hidden @ base.T + 0.5 * (hidden @ a.T) @ b.T
    torch.testing.assert_close(actual, torch.autograd.grad(grpo_loss(logits, **batch).loss, (a, b)))


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("master_weights", [False, True])
def test_float32_weight_of_bfloat16_gemms(master_weights, level, backend):
    """Under autocast, or as 16-bit hidden states come with it: a gradient not rounded to bfloat16 in between."""
    head, batch = case()
    settings = {"importance_sampling_level": level, "backend": backend, "chunk_bytes": chunk_of(4, torch.bfloat16)}
    if master_weights:
        head[0] = head[0].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=not master_weights):
        output = linear_grpo_loss(*head[:2], **batch, **settings)
    output.loss.backward()
    rounded = [t.detach().bfloat16().requires_grad_() for t in head[:2]]
    wanted = linear_grpo_loss(*rounded, **batch, **settings)
    wanted.loss.backward()
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    for tensor, other in zip(head[:2], rounded):
        assert tensor.grad.dtype == tensor.dtype
        torch.testing.assert_close(tensor.grad.bfloat16(), other.grad)
    assert not torch.equal(head[1].grad, head[1].grad.bfloat16().float())


def test_sharded_weight(tmp_path):
    """A DTensor on two ranks with different tokens: each rank's shard of the average of the ranks' gradients."""
    torch.multiprocessing.spawn(_sharded_rank, (str(tmp_path / "store"),), nprocs=2)


def _sharded_rank(rank, store):
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        (_, weight, _), _ = case()
        wanted = torch.zeros(V, H)
        for seed in range(2):
            (hidden, _, _), batch = case(seed=seed)
            whole = weight.detach().requires_grad_()
            linear_grpo_loss(hidden, whole, **batch).loss.backward()
            wanted += whole.grad / 2
        (hidden, _, _), batch = case(seed=rank)
        sharded = distribute_tensor(weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
        linear_grpo_loss(hidden, sharded, **batch).loss.backward()
        torch.testing.assert_close(sharded.grad.full_tensor(), wanted)
        assert sharded.grad.placements == (Shard(0),)
    finally:
        distributed.destroy_process_group()
    os._exit(0)  # on the ordinary way out, PyTorch 2.13 with gloo aborts one time in five


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    head, batch = case()
    wanted = torch.autograd.grad(linear_grpo_loss(*head[:2], **batch).loss, head[:2])
    loss = torch.utils.checkpoint.checkpoint(
        lambda *head: linear_grpo_loss(*head, **batch).loss, *head[:2], use_reentrant=use_reentrant
    )
    loss.backward()
    torch.testing.assert_close((head[0].grad, head[1].grad), wanted)


@pytest.mark.parametrize("backend", [EVERY[0], EVERY[-1]])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compile_fullgraph(level, backend):
    head, batch = case()

    def step(hidden, weight, beta):
        output = linear_grpo_loss(
            hidden, weight, beta=beta, backend=backend, importance_sampling_level=level, chunk_bytes=2000, **batch
        )
        return output.loss, output.per_token_logps

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for beta in (0.0, 0.1):
        expected = torch.autograd.grad(step(*head[:2], torch.tensor(beta))[0] * 2, head[:2])
        loss, logps = compiled(*head[:2], torch.tensor(beta))
        torch.testing.assert_close(torch.autograd.grad(loss * 2, head[:2]), expected)
        assert not logps.requires_grad


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the registered ops need a backend that is not torch; see test_cpp")
def test_opcheck():
    (hidden, weight, bias), batch = case()
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    head = (hidden.detach(), weight.detach(), bias.detach())
    advantages = batch["advantages"][:, None].expand(B, L)
    tensors = (ids, mask, advantages, None, 1, "group", batch["old_per_token_logps"], None, None)
    tensors += (torch.full((B, L), 1 / 30), None, torch.tensor(0.0))
    how = ("cpp", torch.float32, 1000)
    torch.library.opcheck(linear_op.linear_grpo_op, (*head, *tensors, *op.flat(LossSpec()), *how, True, True, False))
    torch.library.opcheck(linear_op.linear_score_op, (*head, ids, mask, 0.9, *how))
    _, entropies, lse = linear_op.linear_score_op(*head, ids, mask, 0.9, *how)
    scored = (lse, entropies, torch.randn(B, L), None)
    torch.library.opcheck(linear_op.linear_score_backward_op, (*head, ids, mask, *scored, 0.9, *how, True, False, True))


@pytest.mark.parametrize("backend", EVERY)
def test_id_out_of_range(backend):
    head, batch = case()
    batch["completion_ids"][0, 0] = V
    for level in ("token", "sequence"):
        with pytest.raises(ValueError, match="completion_ids must lie in"):
            linear_grpo_loss(*head[:2], backend=backend, importance_sampling_level=level, **batch)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lm_head_weight": torch.zeros(V, H + 1)}, "lm_head_weight must be"),
        ({"lm_head_weight": torch.zeros(0, H)}, "lm_head_weight must be"),
        ({"lm_head_weight": torch.zeros(V, H).bfloat16()}, "lm_head_weight must be torch.float32"),
        ({"lm_head_bias": torch.zeros(V, 1)}, "lm_head_bias must be"),
        ({"hidden": torch.zeros(B, H)}, "hidden must be"),
        ({"chunk_bytes": 0}, "chunk_bytes must be"),
        ({"backend": "cuda9"}, "backend must be"),
        ({"loss_type": "gspo"}, "loss_type must be"),
    ],
)
def test_bad_arguments(bad, message):
    (hidden, weight, _), batch = case()
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(**({"hidden": hidden, "lm_head_weight": weight} | batch | bad))


def test_block_size(monkeypatch):
    """Blocks of equal size, aligned, within the budget, and never too small for a GEMM."""
    monkeypatch.undo()
    head = linear.Head.of(torch.zeros(1, 1000, 4), torch.zeros(1000, 4), None, torch.float32, 300 * 4000)
    assert head.buffer(1000).shape == (256, 1000)
    assert head.buffer(10).shape == (10, 1000)
    head = linear.Head.of(torch.zeros(1, 1000, 4), torch.zeros(1000, 4), None, torch.float32, 1)
    assert head.buffer(1000).shape == (64, 1000)
