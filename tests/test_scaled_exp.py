"""The trial in benchmarks/scaled_exp.py: is it the gradient at all, also of tokens that are nearly certain?"""

import pytest
import torch

from benchmarks import scaled_exp
from mr1fast.kernels.self_test import every_backend

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def float32_case():
    hidden, weight, ids, coef = scaled_exp.case(5.0, N=130, H=64, V=300)
    hidden, weight = hidden.float(), weight.float()
    hidden[:3] = 0.6 * weight[ids[:3]]
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    logp = (leaves[0] @ leaves[1].T / TEMPERATURE).log_softmax(1)
    logps, entropies = logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    gradients = torch.autograd.grad((coef * logps).sum(), leaves)
    assert 1e-9 < (1 - logps[:3].exp()).max() < 1e-3
    return (hidden, weight, ids, lambda logps: coef, TEMPERATURE), (logps.detach(), entropies.detach(), *gradients)


def check(found, exact):
    for actual, expected in zip(found, exact):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=3e-5)
    certain, expected = found[2][:3].double(), exact[2][:3]
    assert ((certain - expected).norm(dim=1) < 1e-4 * expected.norm(dim=1)).all()


def test_in_torch(float32_case):
    args, exact = float32_case
    check(scaled_exp.scaled_exp(*args), exact)


@pytest.mark.skipif("triton" not in every_backend(), reason="Triton cannot run here, not even interpreted")
def test_in_triton(float32_case):
    args, exact = float32_case
    check(scaled_exp.scaled_exp(*args, scaled_exp.exponentials_in_triton), exact)


def test_it_rounds_less_than_logits_in_16_bits():
    hidden, weight, ids, coef = scaled_exp.case(10.0, H=64, V=1000)
    args = hidden, weight, ids, lambda logps: coef.to(logps.dtype), TEMPERATURE
    exact = scaled_exp.softmax_gradients(hidden.double(), weight.double(), *args[2:], "exact")
    as_it_is = scaled_exp.softmax_gradients(*args, "as it is")
    for ours, theirs, expected in zip(scaled_exp.scaled_exp(*args), as_it_is, exact):
        assert (ours - expected).norm() < 0.1 * (theirs - expected).norm()
