"""The loss from hidden states: what head and hidden states may be, PyTorch's machinery around it, bad arguments."""

import os

import pytest
import torch
from linear_cases import EVERY, B, H, L, V, case, chunk_of

from mr1fast import grpo_loss, linear_grpo_loss
from mr1fast.kernels import linear, linear_op
from mr1fast.kernels.reference import LossBatch, LossSpec, flat

pytestmark = pytest.mark.usefixtures("small_blocks")


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


@pytest.mark.slow  # two more processes import torch
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


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), *EVERY[1:]])
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


@pytest.mark.skipif("cpp" not in EVERY, reason="the registered ops need a backend that is not torch; see test_cpp")
def test_opcheck():
    (hidden, weight, bias), batch = case()
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    head = (hidden.detach(), weight.detach(), bias.detach())
    advantages = batch["advantages"][:, None].expand(B, L)
    weight_and_beta = (torch.full((B, L), 1 / 30), torch.tensor(0.0))
    old = batch["old_per_token_logps"]
    options = flat(LossBatch(ids, *weight_and_beta, mask, advantages, old_logps=old), LossSpec())
    how = ("cpp", torch.float32, 1000)
    torch.library.opcheck(linear_op.linear_grpo_op, (*head, *options, *how, True, True, False))
    logit_map = (0.9, 3.0, torch.rand(B, L) + 0.5)
    torch.library.opcheck(linear_op.linear_score_op, (*head, ids, mask, *logit_map, *how))
    _, entropies, lse = linear_op.linear_score_op(*head, ids, mask, *logit_map, *how)
    scored = (lse, entropies, torch.randn(B, L), None)
    torch.library.opcheck(
        linear_op.linear_score_backward_op, (*head, ids, mask, *scored, *logit_map, *how, True, False, True)
    )


@pytest.mark.parametrize("backend", EVERY)
def test_id_out_of_range(backend):
    head, batch = case()
    batch["completion_ids"][0, 0] = V
    for level in ("token", "sequence"):
        with pytest.raises(ValueError, match=r"completion_ids \(ids\) must lie in"):
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
    hidden, weight = torch.zeros(1, 1000, 4), torch.zeros(1000, 4)
    head = linear.Head.of(hidden, weight, None, linear.How("torch", torch.float32, 300 * 4000))
    assert head.buffer(1000).shape == (256, 1000)
    assert head.buffer(10).shape == (10, 1000)
    head = linear.Head.of(hidden, weight, None, linear.How("torch", torch.float32, 1))
    assert head.buffer(1000).shape == (64, 1000)


def test_gradients_are_contiguous_whatever_the_hidden_states_are():
    """The kernel that scales them on a GPU relies on it."""
    hidden, weight = torch.zeros(1, 4, 50).transpose(1, 2), torch.zeros(9, 4)
    head = linear.Head.of(hidden, weight, None, linear.How("torch", torch.float32, None))
    assert not head.hidden.is_contiguous()
    gradients = linear.Gradients(head, (True, True, False))
    gradients.add(torch.arange(50), torch.ones(50, 9), last=True)
    assert gradients.hidden.is_contiguous()
    assert gradients.weight.is_contiguous()
