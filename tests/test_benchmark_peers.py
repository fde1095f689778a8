"""Every peer of the benchmarks gets the same work: its gradient against that of the loss written out in torch.

Peers that run on a GPU only are replaced by torch under the signatures they have in the versions named here, so that it
is the arguments that are checked.
"""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch

from benchmarks import cases_gpu, cases_loss, cases_packed, linear_peers
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
    "TRL, unmasked rows": linear_peers.trl_unmasked,
    "Unsloth": linear_peers.unsloth,
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

    def fused_linear_logprobs(  # unsloth-zoo 2026.10.9
        hidden, weight, targets, *, bias=None, mask=None, temperature=1.0, return_entropy=False, rows_per_chunk=None
    ):
        log_probs = (hidden @ weight.T).log_softmax(-1)
        logps = log_probs.gather(-1, targets[..., None])[..., 0]
        return (logps, -(log_probs.exp() * log_probs).sum(-1)) if return_entropy else logps

    stand_in("unsloth_zoo.fused_losses.fused_linear", fused_linear_logprobs)
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


# ---- packed ---------------------------------------------------------------------------------------------------------


def test_lengths_are_like_those_of_rollouts():
    lengths = cases_packed.lengths_of(16, 192).float()
    assert lengths.max() == 192
    assert lengths.mean() / 192 == pytest.approx(1 / 3, abs=0.01)
    logarithms = lengths.log()
    assert logarithms.mean().item() == pytest.approx(logarithms.quantile(0.5).item(), abs=0.02)  # symmetric


def test_every_packed_case_has_the_gradient_of_the_padded_loss():
    """All but the limit, which has more tokens."""
    for scene in cases_packed.scenes(quick=True):
        x = scene.inputs()
        mask = x.layout.mask
        padded = x.padded
        found = {}
        for case in scene.cases:
            call = case.prepare(x)
            call.reset()
            call.run()
            if isinstance(x, cases_packed.HiddenInputs):
                hidden = x.rows.grad if x.rows.grad is not None else padded.hidden.grad[mask]
                found[case.name] = hidden, padded.weight.grad
            elif "eager" not in case.name:  # which has its gradient elsewhere
                rows = x.rows if "packed" in case.name else padded.logits[mask]
                found[case.name] = (rows.clone(),)
            call.reset()
        tolerance = 1e-4 if scene.dtype == "float32" else 0.03
        wanted = found.pop("mr1fast cpp, padded")
        assert not torch.allclose(found.pop(cases_packed.FULL)[0], wanted[0], rtol=0.1)
        for name, gradients in found.items():
            for got, want in zip(gradients, wanted, strict=True):
                assert (got - want).norm() <= tolerance * want.norm(), (scene.title, name)


# ---- from logits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs():
    return cases_loss.make_inputs(B, L, V, torch.float32, "cpu")


def eager_gradient(x, **changes):
    leaf = x.source.clone().requires_grad_()
    cases_loss.eager_loss(leaf, x.batch._replace(**changes)).backward()
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
