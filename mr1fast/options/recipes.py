"""The defaults that depend on the task and on the size of the model that training starts from.

One rule: a small model (the embedded one, or a folder with a model of its size, such as one trained from it) uses the
recipe of its task, and with local data the recipe of visual counting; every other model uses R1-V's. The name of a
folder does not matter, and a name on the Hugging Face hub counts as large, so that nothing need be downloaded first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mr1fast.data.tasks import TASKS

TASK_NAMES = tuple(TASKS)
SMALL_MODEL = 10_000_000  # parameters; the smallest Qwen2-VL that was published has two billion

DEFAULT_EVAL_SAMPLES = 400  # problems of a task, whose drawings never end

R1_V = "r1-v"
RECIPES: dict[str, dict[str, Any]] = {
    **{name: task.recipe for name, task in TASKS.items()},
    R1_V: {"prompts_per_step": 16, "learning_rate": 1e-6, "max_steps": 200, "max_completion_length": 512},
}
KL_DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo-d": {"beta_min": 0.0, "beta_max": 0.04, "kl_schedule": "paper", "explore_fraction": 0.3},
    "grpo": {"beta": 0.04},
    "sft": {},
}


def recipe_name(model: str | None, task: str | None) -> str:
    """The key in RECIPES for a model, None being the embedded one, and a task, None being local data."""
    return (task or "vc") if is_small_folder(model) else R1_V


def default_pieces(recipe: str) -> int | None:
    """`gradient_accumulation_steps`: 1 for small models; None for large ones, whose pieces the planner chooses."""
    return None if recipe == R1_V else 1


def lora_learning_rate(full: float) -> float:
    """The default for an adapter, given that for all weights: ten times as much (LoRA Without Regret, 2025)."""
    return float(f"{10 * full:.12g}")


def default_eval_batch_size(small: bool) -> int:
    """`eval_batch_size`, the problems that are answered at once, by whether the model is small."""
    return 64 if small else 8


def is_small_folder(model: str | None) -> bool:
    """For an adapter's folder, whether its base is small."""
    if model is None:
        return True
    model = adapter_base(model) or model
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # a name on the hub; or no model, which loading it will say
    return isinstance(config, dict) and is_small(config)


def adapter_base(folder: str | Path) -> str | None:
    """The model that an adapter's folder names as its base; None if the folder does not hold an adapter.

    A relative path is taken from that folder if it leads to something there, else from the current one.
    """
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    if not isinstance(base, str) or not base:
        return None
    beside = Path(folder) / base
    return str(beside) if beside.exists() else base


def is_small(config: Mapping[str, Any]) -> bool:
    """Whether this config.json describes a model with fewer than SMALL_MODEL parameters."""
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    try:
        vocabulary, hidden = int(text["vocab_size"]), int(text["hidden_size"])
        layers, intermediate = int(text["num_hidden_layers"]), int(text["intermediate_size"])
        blocks, width = int(vision["depth"]), int(vision.get("embed_dim") or vision["hidden_size"])  # or Qwen2.5-VL's
    except (KeyError, TypeError, ValueError):
        return False
    # Counts the matrices; norms and biases are negligible. A head that is not tied counts as a second embedding.
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * hidden * (4 * hidden + 3 * intermediate) + 12 * blocks * width**2 < SMALL_MODEL
