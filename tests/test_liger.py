"""Liger's layers in our models. Its kernels need a GPU (tests/test_gpu.py); what is around them does not."""

import importlib.util

import pytest
import torch
from liger_kernel import transformers as liger
from torch.nn.functional import silu
from transformers.models.qwen2_vl import modeling_qwen2_vl

from mr1fast import train
from mr1fast.model.adapter import add_adapter
from mr1fast.model.liger import choose_liger, use_liger
from tests.tiny import tiny_inputs, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("installed", [True, False])
def test_when_it_is_used(installed, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    assert choose_liger("auto", GPU) is installed
    for name, device in (("off", GPU), ("off", CPU), ("auto", CPU)):
        assert choose_liger(name, device) is False
    if installed:
        assert choose_liger("on", GPU)
    for device in (CPU,) if installed else (CPU, GPU):
        with pytest.raises(ValueError, match="--liger on needs a CUDA device and the liger-kernel package"):
            choose_liger("on", device)


def test_on_without_a_gpu_ends_the_program(capsys, tmp_path):
    arguments = ["--task", "vc", "--liger", "on", "--device", "cpu", "--output-dir", str(tmp_path / "run")]
    assert train.main(arguments) == 2
    error = "error: --liger on needs a CUDA device and the liger-kernel package; use --liger auto or off\n"
    assert capsys.readouterr().err == error


def norm(self, x):
    x = x.float()
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.fixture
def plain_kernels(monkeypatch):
    """Liger's modules with the mathematics of its kernels, in torch."""
    monkeypatch.setattr(liger.LigerRMSNorm, "forward", norm)
    monkeypatch.setattr(
        liger.LigerSwiGLUMLP, "forward", lambda self, x: self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
    )
    monkeypatch.setattr(modeling_qwen2_vl, "apply_rotary_pos_emb", modeling_qwen2_vl.apply_rotary_pos_emb)


def test_the_layers_are_exchanged_with_their_weights(plain_kernels):
    model, inputs = tiny_model(), tiny_inputs()
    text = model.model.language_model
    for layer in text.layers:
        layer.input_layernorm.variance_epsilon = 0.1  # not Liger's default
    with torch.no_grad():
        before = model(**inputs).logits
    weights = dict(model.named_parameters())
    use_liger(model)
    use_liger(model)  # once more does no harm
    changed = {type(module) for module in text.modules()}
    assert {liger.LigerRMSNorm, liger.LigerSwiGLUMLP} <= changed
    assert not {modeling_qwen2_vl.Qwen2VLRMSNorm, modeling_qwen2_vl.Qwen2MLP} & changed
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert all(after[name] is weight for name, weight in weights.items())
    assert not any(module.training for module in model.modules())
    with torch.no_grad():  # the rotary embedding is Liger's on a GPU alone
        torch.testing.assert_close(model(**inputs).logits, before, atol=1e-6, rtol=1e-5)


def test_an_adapter_finds_its_layers_in_them(plain_kernels):
    model = tiny_model()
    use_liger(model)
    model.name_or_path = "tiny"
    adapted = add_adapter(model, rank=2, targets=("gate_proj", "down_proj"))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 2 * 2  # layers, targets, A and B
    assert adapted(**tiny_inputs()).logits.isfinite().all()
