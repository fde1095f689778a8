"""Configurations of models to plan and to measure: Qwen2-VL's as published, and smaller ones in its proportions."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLConfig

from mr1fast.options.preset import sizes_of

PIXELS = 401_408  # R1-V's and the paper's largest image: 512 tokens
TEXT: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def config(text: dict[str, Any], vision: dict[str, Any], tied: bool = True) -> Qwen2VLConfig:
    """Qwen2-VL-2B's but for what is given."""
    text = {**TEXT, "tie_word_embeddings": tied, **text}
    vision = VISION | {"hidden_size": text["hidden_size"]} | vision
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def published(name: str) -> Qwen2VLConfig:
    folder = sizes_of(name)
    assert folder is not None, name
    return Qwen2VLConfig.from_pretrained(folder)


QWEN_2B, QWEN_7B = published("Qwen/Qwen2-VL-2B-Instruct"), published("Qwen/Qwen2-VL-7B-Instruct")


def in_proportion(layers: int, vocabulary: int) -> Qwen2VLConfig:
    """A quarter as wide as 2B, with so many layers in language model and vision tower each."""
    text = {
        "hidden_size": 384,
        "intermediate_size": 2240,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
    return config(text, {"depth": layers, "embed_dim": 384, "num_heads": 6})
