"""Liger's layers in the place of transformers' own: RMSNorm, rotary embedding, SwiGLU, each in one kernel on a GPU.

Never its loss, and not by its `apply_liger_kernel_to_qwen2_vl`, which brings the loss along and changes the classes of
all models. Here the layers of one model are exchanged, with their weights and under their names.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PACKAGE = "liger_kernel"


def choose_liger(name: str, device: torch.device) -> bool:
    """Whether to use Liger's layers: "auto" does on a GPU where the package is installed. ValueError if "on" cannot."""
    usable = device.type == "cuda" and importlib.util.find_spec(PACKAGE) is not None
    if name == "on" and not usable:
        raise ValueError("--liger on needs a CUDA device and the liger-kernel package; use --liger auto or off")
    return name != "off" and usable


def use_liger(model: Any) -> None:
    """Exchange the layers of the language model of a model of FAMILIES."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP

    def norm(old: Any) -> Any:
        new = LigerRMSNorm(len(old.weight), eps=old.variance_epsilon)
        new.weight = old.weight
        return new

    def mlp(old: Any) -> Any:
        with torch.device("meta"):
            new = LigerSwiGLUMLP(text.config)
        for name, layer in old.named_children():
            setattr(new, name, layer)
        return new

    text = model.get_decoder()
    text.norm = norm(text.norm)
    for layer in text.layers:
        layer.input_layernorm = norm(layer.input_layernorm)
        layer.post_attention_layernorm = norm(layer.post_attention_layernorm)
        layer.mlp = mlp(layer.mlp)
    text.train(model.training)
    _use_rotary(importlib.import_module(type(text).__module__))


def _use_rotary(module: Any) -> None:
    """The function that the attention of all models of a family calls: Liger's on a GPU, its own elsewhere."""
    from liger_kernel.transformers import liger_rotary_pos_emb

    own: Callable[..., tuple[Tensor, Tensor]] = module.apply_rotary_pos_emb
    if getattr(own, "by_liger", False):
        return

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        rotate = liger_rotary_pos_emb if q.is_cuda and not args else own
        return rotate(q, k, cos, sin, *args)

    apply_rotary_pos_emb.by_liger = True  # type: ignore[attr-defined]
    module.apply_rotary_pos_emb = apply_rotary_pos_emb
