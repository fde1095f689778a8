"""The loss as an op: torch.compile, checkpointing, autocast, opcheck, and the misuse of inplace."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from mr1fast import grpo_loss, linear_grpo_loss, linear_token_logprobs, token_logprobs
from mr1fast.kernels import ops
from mr1fast.kernels.reference import LossBatch, LossSpec, flat
from mr1fast.kernels.self_test import available_backends, random_batch

# Compiled graphs call the kernels natively; the interpreter is no part of that.
KERNELS = [name for name in available_backends() if name not in ("torch", "triton")]
EVERY = ["torch", *KERNELS]
# A kernel is one node of the graph; the reference is all of its operations, each of which is traced and compiled.
COMPILED = [pytest.param("torch", marks=pytest.mark.slow), *KERNELS]


def head(batch, *, seed=0, width=16, dtype=torch.float32):
    """(hidden, lm_head weight), both leaves, and the batch without logits."""
    g = torch.Generator().manual_seed(seed)
    B, L, V = batch["logits"].shape
    hidden = torch.randn(B, L, width, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, width, generator=g) / 4).to(dtype).requires_grad_()
    return hidden, weight, {name: value for name, value in batch.items() if name != "logits"}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("level", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_compile_fullgraph_and_beta_as_a_tensor(level, inplace, backend):
    hidden, weight, batch = head(random_batch(3, 4, 40))

    def step(hidden, weight, beta):
        output = grpo_loss(
            hidden @ weight.T, beta=beta, inplace=inplace, backend=backend, importance_sampling_level=level, **batch
        )
        return output.loss, output.per_token_logps

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for beta in (0.0, 0.04, 0.1):
        expected = torch.autograd.grad(step(hidden, weight, torch.tensor(beta))[0] * 2, (hidden, weight))
        loss, logps = compiled(hidden, weight, torch.tensor(beta))
        actual = torch.autograd.grad(loss * 2, (hidden, weight))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
        assert not logps.requires_grad
    assert counter.frame_count == 1, "beta as a tensor must not compile again"


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compile_with_any_length(masked, backend):
    """One graph of three losses, each with another kind of normaliser."""

    def step(hidden, weight, batch):
        logits, settings = hidden @ weight.T, {"beta": 0.1, "max_completion_length": 9, "backend": backend}
        losses = [grpo_loss(logits, loss_type=name, **settings, **batch).loss for name in ("grpo", "bnpo", "dr_grpo")]
        return losses[0] + losses[1] + losses[2]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for L in (4, 5, 7, 9):
        hidden, weight, batch = head(random_batch(3, L, 40, seed=L))
        batch |= {} if masked else {"completion_mask": None}
        expected = torch.autograd.grad(step(hidden, weight, batch), (hidden, weight))
        actual = torch.autograd.grad(compiled(hidden, weight, batch), (hidden, weight))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_around_head_and_loss(use_reentrant, inplace, backend):
    hidden, weight, batch = head(random_batch(3, 4, 40))

    def step(hidden):
        return grpo_loss(hidden @ weight.T, beta=0.1, inplace=inplace, backend=backend, **batch).loss

    expected = torch.autograd.grad(step(hidden), (hidden, weight))
    checkpoint(step, hidden, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("inplace", [False, True])
def test_autocast(inplace, backend):
    hidden, weight, batch = head(random_batch(3, 4, 40))
    with torch.autocast("cpu", torch.bfloat16):
        logits = hidden @ weight.T
        assert logits.dtype == torch.bfloat16
        output = grpo_loss(logits, beta=0.1, inplace=inplace, backend=backend, **batch)
    output.loss.backward()
    assert output.loss.dtype == hidden.grad.dtype == torch.float32
    exact = grpo_loss((hidden @ weight.T), beta=0.1, **batch)
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("with_ref", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_opcheck(with_ref, backend):
    batch = random_batch(3, 4, 40)
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    loss_batch = LossBatch(
        ids,
        token_weight=torch.full((3, 4), 1 / 12),
        beta=torch.tensor(0.1),
        mask=mask,
        advantages=batch["advantages"][:, None].expand(3, 4),
        old_logps=batch["old_per_token_logps"],
        ref_logps=batch["ref_per_token_logps"] if with_ref else None,
        entropy_weight=torch.tensor(0.01),
    )
    options = (*flat(loss_batch, LossSpec(delta=1.5)), backend)
    for need_gradient in (True, False):
        torch.library.opcheck(ops.grpo_loss_op, (batch["logits"], *options, need_gradient))
    torch.library.opcheck(ops.grpo_loss_inplace_op, (batch["logits"].clone(), *options))
    logit_map = (0.9, 3.0, torch.rand(3, 4) + 0.5)
    torch.library.opcheck(ops.score_op, (batch["logits"], ids, mask, *logit_map, backend))
    scored = ops.score_op(batch["logits"], ids, mask, *logit_map, backend)
    scored = (scored[2], scored[1], torch.randn(3, 4), torch.randn(3, 4))
    torch.library.opcheck(ops.score_backward_op, (batch["logits"], ids, mask, *scored, *logit_map, backend))
    torch.library.opcheck(
        ops.score_backward_inplace_op, (batch["logits"].clone(), ids, mask, *scored, *logit_map, backend)
    )
    torch.library.opcheck(ops.scale_op, (torch.randn(3, 4), torch.tensor(2.0)))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("view", [False, True])
def test_logits_used_again_after_an_inplace_call(view, backend):
    hidden, weight, batch = head(random_batch(3, 4, 40))

    def logits_of():
        whole = (torch.cat([hidden, hidden[:, :1]], 1) if view else hidden) @ weight.T
        return whole, (whole[:, :-1] if view else whole)

    whole, logits = logits_of()
    grpo_loss(logits, inplace=True, backend=backend, **batch)
    for inplace in (True, False):
        with pytest.raises(RuntimeError, match="already consumed"):
            grpo_loss(whole[:, : logits.shape[1]] if view else logits, inplace=inplace, backend=backend, **batch)
    # A use before the loss that needs the old values in backward.
    whole, logits = logits_of()
    other = (whole**2).sum()
    output = grpo_loss(logits, inplace=True, backend=backend, **batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (output.loss + other).backward()
    if not view:  # a use after the loss
        whole, logits = logits_of()
        output = grpo_loss(logits, inplace=True, backend=backend, **batch)
        with pytest.raises(RuntimeError, match=r"replaced these logits by their gradient"):
            (output.loss + logits.sum()).backward()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("view", [False, True])
def test_logits_used_again_after_a_backward_in_place(view, backend):
    hidden, weight, batch = head(random_batch(3, 4, 40))
    ids = batch["completion_ids"]
    objectives = [
        lambda logits: (
            grpo_loss(logits, inplace=True, importance_sampling_level="sequence", backend=backend, **batch).loss
        ),
        lambda logits: token_logprobs(logits, ids, inplace_backward=True, backend=backend).sum(),
    ]
    for objective in objectives:
        whole = (torch.cat([hidden, hidden[:, :1]], 1) if view else hidden) @ weight.T
        logits = whole[:, :4]
        loss = objective(logits)
        token_logprobs(logits, ids, backend=backend)  # until backward they are what they were
        loss.backward()
        with pytest.raises(RuntimeError, match="already consumed"), torch.no_grad():
            grpo_loss(logits, backend=backend, **batch)
        with pytest.raises(RuntimeError, match="already consumed"):
            token_logprobs(whole[:, :4], ids, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_checkpoint_around_the_inplace_loss_alone(backend):
    hidden, weight, batch = head(random_batch(3, 4, 40))
    logits = hidden @ weight.T

    def step(logits):
        return grpo_loss(logits, inplace=True, backend=backend, **batch).loss

    with pytest.raises(RuntimeError, match=r"already consumed|modified by an inplace operation"):
        checkpoint(step, logits, use_reentrant=False).backward()


@pytest.mark.parametrize("backend", KERNELS)
def test_inplace_reuse_of_a_buffer_that_was_filled_again(backend):
    batch = random_batch(3, 4, 40)
    source = batch.pop("logits")
    buffer = torch.empty_like(source).requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            buffer.copy_(source)
        buffer.grad = None
        grpo_loss(buffer, inplace=True, backend=backend, beta=0.1, **batch).loss.backward()
        leaf = source.clone().requires_grad_()
        grpo_loss(leaf, backend="torch", beta=0.1, **batch).loss.backward()
        torch.testing.assert_close(buffer.grad, leaf.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", KERNELS)
def test_inplace_overwrites_and_allocates_nothing_of_the_logits_size(backend):
    batch = random_batch(3, 4, 40)
    logits = batch.pop("logits") * 1
    leaf = logits.clone().requires_grad_()
    grpo_loss(leaf, backend="torch", beta=0.1, **batch).loss.backward()
    live = logits.requires_grad_() * 1
    pointer = live.data_ptr()
    grpo_loss(live, inplace=True, backend=backend, beta=0.1, **batch)
    assert live.data_ptr() == pointer
    torch.testing.assert_close(live.detach(), leaf.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("linear", [False, True])
def test_backward_twice(linear, backend):
    batch = random_batch(3, 4, 40)
    if linear:
        leaf, weight, batch = head(batch)
        loss = linear_grpo_loss(leaf, weight, backend=backend, beta=0.1, **batch).loss
    else:
        leaf = batch.pop("logits").requires_grad_()
        loss = grpo_loss(leaf, backend=backend, beta=0.1, **batch).loss
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = once.clone()
    (twice,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (doubled,) = torch.autograd.grad(loss * 2, leaf, retain_graph=True)
    assert torch.equal(once, kept), "what was handed out must not change"
    assert torch.equal(twice, kept)
    assert torch.equal(doubled, 2 * kept)
    if linear or backend != "torch":
        loss = loss + 0
        other = (linear_grpo_loss(leaf, weight, backend=backend, **batch) if linear else grpo_loss(leaf, **batch)).loss
        torch.autograd.grad(other * 2, leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(other, leaf)


def losses_of_a_leaf(backend):
    """name -> (the leaf, a scalar made of it), for every autograd Function of the fused losses."""
    batch = random_batch(3, 4, 40)
    hidden, weight, rest = head(batch)
    ids, sequence = batch["completion_ids"], {"importance_sampling_level": "sequence"}
    leaf = batch["logits"].requires_grad_()
    return {
        "one pass": (leaf, grpo_loss(leaf, backend=backend, beta=0.1, **rest).loss),
        "in place": (leaf, grpo_loss(leaf * 1, backend=backend, inplace=True, beta=0.1, **rest).loss),
        "two passes": (leaf, grpo_loss(leaf, backend=backend, beta=0.1, **sequence, **rest).loss),
        "score": (leaf, token_logprobs(leaf, ids, backend=backend).square().sum()),
        "hidden": (hidden, linear_grpo_loss(hidden, weight, backend=backend, beta=0.1, **rest).loss),
        "weight": (weight, linear_grpo_loss(hidden, weight, backend=backend, beta=0.1, **rest).loss),
        "hidden, two passes": (hidden, linear_grpo_loss(hidden, weight, backend=backend, **sequence, **rest).loss),
        "hidden, score": (hidden, linear_token_logprobs(hidden, weight, ids, backend=backend).square().sum()),
    }


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", losses_of_a_leaf("torch"))
def test_a_second_derivative_raises(name, backend):
    leaf, loss = losses_of_a_leaf(backend)[name]
    (wanted,) = torch.autograd.grad(loss * 2, leaf)
    leaf, loss = losses_of_a_leaf(backend)[name]
    (gradient,) = torch.autograd.grad(loss * 2, leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), wanted)
    for penalised in (gradient.sum(), loss + 0.1 * gradient.square().sum()):
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again .*create_graph"):
            torch.autograd.grad(penalised, leaf, retain_graph=True)


@pytest.mark.parametrize("name", ["one pass", "two passes", "score"])
def test_a_second_derivative_in_torch(name):
    """Against a difference quotient along a direction, in float64."""
    batch = random_batch(3, 4, 40) | {"beta": 0.1, "loss_type": "sapo"}
    logits = batch.pop("logits").double().requires_grad_()
    level = "sequence" if name == "two passes" else "token"

    def gradient_at(logits, **grad_settings):
        if name == "score":
            value = token_logprobs(logits, batch["completion_ids"], backend="torch").square().sum()
        else:
            value = grpo_loss(logits, backend="torch", importance_sampling_level=level, **batch).loss
        return torch.autograd.grad(value, logits, **grad_settings)[0]

    direction = torch.randn_like(logits)
    (actual,) = torch.autograd.grad(gradient_at(logits, create_graph=True), logits, direction)
    step = 1e-6
    ahead, behind = ((logits.detach() + sign * step * direction).requires_grad_() for sign in (1, -1))
    torch.testing.assert_close(actual, (gradient_at(ahead) - gradient_at(behind)) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 2.0**16), (torch.bfloat16, 1 / 3)])
def test_a_factor_of_the_loss(dtype, factor, linear, backend):
    """GradScaler's first loss scale is beyond float16's range, and small gradients below it without the scale."""
    batch = random_batch(4, 8, 500, dtype=dtype, scale=6.0)
    batch["old_per_token_logps"] = batch["ref_per_token_logps"] = None
    if linear:
        leaf, weight, batch = head(batch, dtype=dtype)
        logits = (leaf @ weight.T).detach().double()
    else:
        leaf = batch.pop("logits").requires_grad_()
        logits = leaf.detach().double()
    logits.requires_grad_()
    (grpo_loss(logits, backend="torch", **batch).loss * factor).backward()
    exact = logits.grad @ weight.detach().double() if linear else logits.grad
    compute = linear_grpo_loss if linear else grpo_loss
    args = (leaf, weight) if linear else (leaf,)
    (compute(*args, backend=backend, **batch).loss * factor).backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[~batch["completion_mask"]] == 0).all()
    error = (leaf.grad.double() - exact).norm() / exact.norm()
    assert error < {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype], error
    bias = (leaf.grad.double() / exact - 1)[exact.abs() > 1e-3 * exact.abs().max()].median()
    assert abs(bias) < 5e-4, "a factor rounded before the product is off by up to 2e-3 everywhere"


@pytest.mark.parametrize("backend", EVERY)
def test_without_gradient_inplace_leaves_the_logits_alone(backend):
    batch = random_batch(3, 4, 40)
    logits = batch.pop("logits")
    kept = logits.clone()
    with torch.inference_mode():
        for _ in range(2):
            inside = grpo_loss(logits * 1, inplace=True, backend=backend, beta=0.1, **batch)
            token_logprobs(logits * 1, batch["completion_ids"], inplace_backward=True, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            outside = grpo_loss(logits, inplace=True, backend=backend, beta=0.1, **batch)
    assert torch.equal(logits, kept)
    assert torch.equal(inside.loss, outside.loss)


@pytest.mark.parametrize("backend", KERNELS)
def test_token_logprobs_inplace_backward_runs_once(backend):
    batch = random_batch(3, 4, 40)
    leaf = batch["logits"].requires_grad_()
    logps = token_logprobs(leaf * 1, batch["completion_ids"], inplace_backward=True, backend=backend)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()
