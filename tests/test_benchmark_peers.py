"""Every peer of the benchmarks gets the same work: its gradient against that of the loss written out in torch.

Peers that run on a GPU only are replaced by torch under the signatures they have in the versions named here, so that it
is the arguments that are checked.
"""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch

from benchmarks import cases_gpu, cases_loss, linear_peers
from benchmarks.cases_linear import ours
from benchmarks.linear_inputs import make_inputs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="shown on a CPU")

B, L, H, V = 2, 3, 16, 64


def gradients(prepare):
    """Of hidden states and weight."""
    x = make_inputs(B, L, H, V, torch.float32, "cpu")
    prepare(x).run()
    return x.hidden.grad, x.weight.grad


GRPO = {
    "ours": partial(ours, backend="cpp"),
    "TRL": linear_peers.trl_chunked,
    "Liger chunked": partial(linear_peers.liger, compiled=False),
    "Liger scaled": partial(linear_peers.liger_scaled_cross_entropy, entropy=False),
    "Liger scaled, entropy": partial(linear_peers.liger_scaled_cross_entropy, entropy=True),
    "torch": linear_peers.torch_linear_cross_entropy,
    "cut-cross-entropy": linear_peers.cut_cross_entropy,
}
CROSS_ENTROPY = {"torch": linear_peers.torch_cross_entropy_only, "quack": linear_peers.quack}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    def stand_in(path, function):
        module = ModuleType(path)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, path.split(".")[0], ModuleType(path.split(".")[0]))
        monkeypatch.setitem(sys.modules, path, module)

    def linear_cross_entropy(  # cut-cross-entropy 25.1.1
        e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
    ):
        assert e.shape[:-1] == targets.shape
        loss = torch.nn.functional.cross_entropy((e @ c.T).flatten(0, -2), targets.flatten(), reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss

    def chunked_linear_cross_entropy(  # quack-kernels 0.6.5
        x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None
    ):
        assert x.ndim == 2
        assert reduction in ("mean", "sum")
        return torch.nn.functional.cross_entropy(x @ weight.T, target, reduction=reduction)

    def fused_grpo_loss(  # fla-core 0.6.0
        logits, ref_logp, input_ids, advantages, beta=0.1, completion_mask=None, save_kl=False, inplace=False
    ):
        length = logits.shape[1] - 1
        logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, -length:, None])[..., 0]
        kl = (ref_logp - logps).exp() - (ref_logp - logps) - 1
        return beta * kl - (logps - logps.detach()).exp() * advantages[:, None]

    stand_in("cut_cross_entropy", linear_cross_entropy)
    stand_in("quack.linear_cross_entropy", chunked_linear_cross_entropy)
    stand_in("fla.modules.grpo", fused_grpo_loss)


@pytest.mark.parametrize("peer", GRPO)
def test_from_hidden_states(peer):
    torch.testing.assert_close(gradients(GRPO[peer]), gradients(linear_peers.eager), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("peer", CROSS_ENTROPY)
def test_cross_entropy_only(peer):
    x = make_inputs(B, L, H, V, torch.float32, "cpu")
    torch.nn.functional.cross_entropy((x.hidden @ x.weight.T).flatten(0, 1), x.ids.flatten()).backward()
    expected = x.hidden.grad, x.weight.grad
    torch.testing.assert_close(gradients(CROSS_ENTROPY[peer]), expected, rtol=1e-4, atol=1e-6)


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions")
    with pytest.raises(RuntimeError, match=r"it came with torch 2\.13, this is"):
        linear_peers.torch_linear_cross_entropy(None)


# ---- from logits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs():
    return cases_loss.make_inputs(B, L, V, torch.float32, "cpu")


def eager_gradient(x, **changes):
    leaf = x.source.clone().requires_grad_()
    for name, value in changes.items():
        object.__setattr__(x.batch, name, value)
    cases_loss.eager_loss(leaf, x.batch).backward()
    return leaf.grad


def test_trl_from_logits(inputs):
    leaf = inputs.source.clone().requires_grad_()
    inputs.leaf = lambda: leaf
    cases_loss.trl_functions(inputs).run()
    torch.testing.assert_close(leaf.grad, eager_gradient(inputs), rtol=1e-4, atol=1e-6)


def test_liger_from_logits(inputs):
    call = cases_gpu.liger_triton(inputs, inplace=True)
    call.run()
    torch.testing.assert_close(inputs.longer[:, :-1], eager_gradient(inputs), rtol=1e-4, atol=1e-6)
    call.reset()
    assert torch.equal(inputs.longer[:, :-1], inputs.source)
    logps = inputs.source.log_softmax(-1).gather(-1, inputs.ids[..., None])[..., 0]
    torch.testing.assert_close(cases_gpu.liger_scoring(inputs).run(), logps, rtol=1e-4, atol=1e-5)


def test_flash_linear_attention_from_logits(inputs, monkeypatch):
    leaf = inputs.longer.clone().requires_grad_()
    monkeypatch.setattr(cases_gpu, "model_output", lambda logits: leaf)
    cases_gpu.flash_linear_attention(inputs, inplace=False).run()
    expected = eager_gradient(inputs, old_logps=None)
    torch.testing.assert_close(leaf.grad[:, :-1], expected, rtol=1e-4, atol=1e-6)
