"""Our head behind TRL's own seam, `trl.trainer.utils._ChunkedLogProbFunction`, against TRL's function."""

import pytest
import tiny_trl
import torch
import trl.trainer.utils
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl import RLOOConfig, RLOOTrainer
from trl.kernels import ChunkedLogProbFunction as TRLs
from trl.trainer.utils import add_fused_lm_head

from mr1fast.integrations import trl_head
from mr1fast.integrations.trl import ChunkedLogProbFunction

pytestmark = pytest.mark.usefixtures("one_thread")

N, H, V = 9, 6, 23


@pytest.fixture
def scored(monkeypatch):
    """The calls of our head, each whether with a gradient."""
    calls = []
    head = trl_head.linear_token_logprobs
    monkeypatch.setattr(
        trl_head, "linear_token_logprobs", lambda *a, **k: calls.append(torch.is_grad_enabled()) or head(*a, **k)
    )
    return calls


def inputs(hidden_dtype=torch.float32, weight_dtype=torch.float32, has_bias=True):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    leaves = [hidden.to(hidden_dtype), weight.to(weight_dtype), bias.to(weight_dtype) if has_bias else None]
    return [None if leaf is None else leaf.requires_grad_() for leaf in leaves], torch.randint(V, (N,))


def gradients(function, settings, softcapping=None, **kinds):
    (hidden, weight, bias), targets = inputs(**kinds)
    logps, entropies, *others = function.apply(hidden, weight, bias, targets, 0.8, 8, softcapping, 1.5, settings)
    loss = (logps * torch.linspace(-1, 1, N)).sum() + (0 if entropies is None else entropies.sum() / 3)
    loss.backward()
    found = [None if leaf is None else leaf.grad for leaf in (hidden, weight, bias)]
    return [logps, entropies, *found], others


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("softcapping", [None, 2.0])
def test_values_and_gradients_equal_trls(scored, softcapping, has_bias, outputs):
    ours, others = gradients(ChunkedLogProbFunction, outputs, softcapping, has_bias=has_bias)
    theirs, _ = gradients(TRLs, outputs, softcapping, has_bias=has_bias)
    assert scored == [True]
    assert others == [None, None, None]
    for mine, his in zip(ours, theirs, strict=True):
        assert (mine is None) == (his is None)
        if his is not None:
            assert mine.dtype == his.dtype
            torch.testing.assert_close(mine, his, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("hidden", "weight"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_dtypes_that_trl_takes(hidden, weight):
    kinds = {"hidden_dtype": getattr(torch, hidden), "weight_dtype": getattr(torch, weight), "has_bias": False}
    ours, _ = gradients(ChunkedLogProbFunction, ("entropy",), **kinds)
    theirs, _ = gradients(TRLs, ("entropy",), **kinds)
    for mine, his in zip(ours[:4], theirs[:4], strict=True):
        assert mine.dtype == his.dtype
        torch.testing.assert_close(mine, his, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("scale", "outputs"), [(0.0, ()), (1.0, ("is_top1",))])
def test_what_our_head_has_not_is_trls(scored, scale, outputs):
    (hidden, weight, bias), targets = inputs()
    call = (hidden, weight, bias, targets, 0.8, 8, None, scale, outputs)
    for mine, his in zip(ChunkedLogProbFunction.apply(*call), TRLs.apply(*call), strict=True):
        assert mine is his is None or torch.equal(mine, his)
    assert scored == []


@pytest.mark.parametrize(
    ("config", "model_class"), [(Qwen2Config, Qwen2ForCausalLM), (Gemma2Config, Gemma2ForCausalLM)]
)
def test_through_trls_fused_forward(monkeypatch, scored, config, model_class):
    """Gemma 2 caps its logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    model = model_class(config(vocab_size=V, num_key_value_heads=1, **sizes))
    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, V, (2, 7))
    labels = ids.masked_fill(torch.arange(7) < torch.tensor([[3], [5]]), -100)

    def run():
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.log_probs.square().sum() + out.entropy.sum()).backward()
        return [out.loss, out.log_probs, out.entropy, *(p.grad for p in model.parameters() if p.grad is not None)]

    theirs = run()
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
    torch.testing.assert_close(run(), theirs, rtol=1e-4, atol=1e-6)
    assert scored == [True]


def test_a_trainer_that_has_no_integration(monkeypatch, scored, tmp_path):
    model = tiny_trl.build(tmp_path / "model")
    theirs, _ = tiny_trl.train(model, RLOOTrainer, RLOOConfig, tmp_path, max_steps=2, beta=0.1)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
    ours, _ = tiny_trl.train(model, RLOOTrainer, RLOOConfig, tmp_path, max_steps=2, beta=0.1)
    assert sum(scored) == 2
    for mine, his in zip(ours, theirs, strict=True):
        for name in set(his) - {"step_time"}:
            assert mine[name] == pytest.approx(his[name], rel=1e-4, abs=2e-5, nan_ok=True), name
