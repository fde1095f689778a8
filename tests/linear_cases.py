"""Batches of hidden states, head and completions, and how a backend is held to the logits path and float64 on them."""

import torch
from loss_cases import on

from mr1fast import grpo_loss, linear_grpo_loss, linear_token_logprobs, token_logprobs
from mr1fast.kernels.self_test import assert_within_budget, available_backends, device_of, random_batch

B, L, V, H = 6, 5, 43, 11  # small enough for float64 and many blocks
EVERY = [name for name in available_backends() if name != "triton"]  # the interpreter is too slow for the whole matrix
FIELDS = ("per_token_logps", "entropies", "kl", "is_low_clipped", "is_high_clipped")
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float64: 1e-12}

SETTINGS = {
    "grpo": {"beta": 0.04},
    "beta 0": {"beta": 0.0},
    "entropy": {"beta": 0.0, "entropy_coef": 0.05},
    "delta": {"beta": 0.04, "delta": 1.1, "use_bias_correction_kl": True},
    "scale": {"beta": 0.04, "logit_scale": 2.5},
    "softcap": {"beta": 0.04, "final_logit_softcapping": 2.0, "temperature": torch.linspace(0.5, 1.5, B)},
    "bnpo": {"beta": 0.04, "loss_type": "bnpo", "temperature": 0.8},
    "dr_grpo": {"beta": 0.04, "loss_type": "dr_grpo", "max_completion_length": 9},
    "dapo": {"beta": 0.04, "loss_type": "dapo", "num_items_in_batch": 17, "epsilon_high": 0.28},
    "luspo": {"beta": 0.04, "loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5},
    "sapo": {"beta": 0.1, "loss_type": "sapo"},
    "dppo_tv": {"beta": 0.1, "loss_type": "dppo_tv", "epsilon_high": 0.01},
    "gmpo": {"beta": 0.1, "loss_type": "gmpo", "top_entropy_quantile": 0.5},
    "sequence": {"beta": 0.04, "importance_sampling_level": "sequence"},
    "none": {"beta": 0.04, "reduction": "none"},
    "correction": {"beta": 0.1, "importance_sampling_ratio": torch.linspace(0.5, 1.5, B)[:, None]},
    "on-policy": {"beta": 0.1, "old_per_token_logps": None},
    "rewards": {"advantages": None, "rewards": torch.tensor([1.0, 0, 2, 1, 1, 1]), "num_generations": 3},
}


def chunk_of(blocks, dtype=torch.float32, rows=B * L, V=V):
    """Bytes of logits, so many that `rows` of them take that many blocks or more."""
    return max(rows // blocks, 1) * V * dtype.itemsize


def case(*, dtype=torch.float32, seed=0, scale=1.0, V=V):
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


def logits_of(head, mask):
    """With zeros where the hidden states are masked."""
    hidden, weight, *bias = head
    return torch.nn.functional.linear(hidden.masked_fill(~mask[..., None], 0), weight, *bias)


def plain(head, batch, dtype, **settings):
    """(output, gradients) of the logits path in torch, in `dtype`; the head is (hidden, weight) or has a bias, too."""
    head = [t.detach().to(dtype).requires_grad_() for t in head]
    output = grpo_loss(logits_of(head, batch["completion_mask"]), backend="torch", **batch, **settings)
    return output, torch.autograd.grad(output.loss.sum(), head)


def from_hidden(head, batch, backend, **settings):
    """The output of linear_grpo_loss where that backend runs."""
    hidden, weight, *bias = (t.to(device_of(backend)) for t in head)
    keywords = on(device_of(backend), batch | settings)
    return linear_grpo_loss(hidden, weight, lm_head_bias=bias[0] if bias else None, backend=backend, **keywords)


def check(settings, backend, blocks, dtype, *, V=V, bias=True, master_weights=False):
    """dtype is that of the hidden states and of the head, but for master weights, which are float32."""
    head, batch = case(dtype=torch.float32 if master_weights else dtype, V=V)
    head = [head[0].detach().to(dtype).requires_grad_(), *head[1 : 3 if bias else 2]]
    batch |= settings
    exact, exact_gradients = plain(head, batch, torch.float64)
    peer, peer_gradients = plain(head, batch, dtype)
    output = from_hidden(
        head, batch, backend, chunk_bytes=chunk_of(blocks, dtype, int(batch["completion_mask"].sum()), V)
    )
    gradients = torch.autograd.grad(output.loss.sum(), head)
    assert_within_budget("loss", output.loss.detach().cpu(), exact.loss.detach(), peer.loss.detach(), FLOOR[dtype])
    names = ("hidden", "weight", "bias")
    for name, tensor, actual, wanted, other in zip(names, head, gradients, exact_gradients, peer_gradients):
        assert actual.dtype == tensor.dtype
        assert_within_budget(f"gradient of {name}", actual, wanted, other, FLOOR[dtype])
    if master_weights and (blocks > 1 or device_of(backend) == "cuda"):  # a CPU's GEMM rounds its output
        assert not torch.equal(gradients[1], gradients[1].to(dtype).float()), "a sum over blocks is not rounded"
    for name in FIELDS:
        actual, wanted, other = getattr(output, name), getattr(exact, name), getattr(peer, name)
        assert not actual.requires_grad
        if wanted.dtype != torch.bool:
            assert_within_budget(name, actual.cpu(), wanted, other, FLOOR[dtype])
        elif dtype != torch.bfloat16:  # in which a ratio may round to the other side of the clip range
            assert torch.equal(actual.cpu(), wanted)


def check_token_logprobs(backend, chunk_bytes, *, V=V, **settings):
    """Log-probabilities and entropies with an objective of one's own that leaves most tokens without a gradient."""
    head, batch = case(V=V)
    g = torch.Generator().manual_seed(3)
    factors = torch.randn(2, B, L, generator=g) * (torch.rand(B, L, generator=g) < 0.3)
    settings = {"temperature": 0.7, "entropy": True} | settings

    def results(logps, entropies):
        logps, entropies = logps.cpu(), entropies.cpu()
        loss = (logps * factors[0] + entropies * factors[1]).sum()
        return logps.detach(), entropies.detach(), *torch.autograd.grad(loss, head)

    ids, mask = batch["completion_ids"], batch["completion_mask"]
    wanted = results(*token_logprobs(logits_of(head, mask), ids, mask=mask, backend="torch", **settings))
    hidden, weight, bias, ids, mask = (t.to(device_of(backend)) for t in (*head, ids, mask))
    there = on(device_of(backend), settings)
    actual = results(
        *linear_token_logprobs(
            hidden, weight, ids, lm_head_bias=bias, mask=mask, chunk_bytes=chunk_bytes, backend=backend, **there
        )
    )
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
