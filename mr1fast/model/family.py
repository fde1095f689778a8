"""Which models can be trained, and what depends on which of them it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from mr1fast.checks import described
from mr1fast.errors import UserError

Model = Qwen2VLForConditionalGeneration | Qwen2_5_VLForConditionalGeneration


@dataclass(frozen=True)
class Family:
    """Models with the same layout: `model.visual`, `model.language_model`, `lm_head`, M-RoPE by `get_rope_index`."""

    name: str
    model_class: type[Any]  # a Model
    processor_class: str  # what other programs load the processor with


# By the model_type in config.json.
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", Qwen2VLForConditionalGeneration, "Qwen2VLProcessor"),
    "qwen2_5_vl": Family("Qwen2.5-VL", Qwen2_5_VLForConditionalGeneration, "Qwen2_5_VLProcessor"),
}


def known() -> str:
    """For error messages."""
    return f"not of these families: {', '.join(one.name for one in FAMILIES.values())}"


def family(path: str | Path, model_type: Any) -> Family:
    """The family of the model at that path. Raises UserError for any other model."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{str(path)!r} holds a model of type {described(model_type)}, which is {known()}")
    return FAMILIES[model_type]
