"""LoRA through PEFT: adapters that are made, loaded from a folder, taken off for a while, and merged.

An adapter folder has adapter_config.json, which names the base, adapter_model.safetensors, and the processor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from mr1fast.checks import not_one_of
from mr1fast.errors import UserError

# All linear layers of the language model, as a pattern: the vision tower's have such names, too, in other models.
LANGUAGE_LAYERS = r".*\.language_model\..*_proj"


def add_adapter(
    model: nn.Module, *, rank: int, alpha: float | None = None, targets: Sequence[str] = (), seed: int = 0
) -> peft.PeftModel:
    """A model with new LoRA weights, which change nothing yet; they are float32, and alone are trained.

    alpha: 2 * rank if it is None; the adapter is scaled by alpha / rank. targets: names of linear layers, as PEFT's
    target_modules; all of the language model if there are none. Raises UserError for a name that no linear layer has.
    """
    check_targets(model, targets)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=list(targets) or LANGUAGE_LAYERS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _inject(model, config, "--lora-targets")


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises UserError for a name that no linear layer has. The loss would not see an adapter on the head."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise UserError(not_one_of("--lora-targets: a layer", target, known))


def load_adapter(model: nn.Module, folder: Path) -> peft.PeftModel:
    """The base with the adapter of this folder, which may be trained on. Raises UserError where it does not fit."""
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode, base = False, config.base_model_name_or_path
        weights = peft.load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # what PEFT meets in other people's folders can be of any type
        raise UserError(f"the adapter {str(folder)!r} cannot be loaded: {_one_line(error)}") from error
    adapted = _inject(model, config, f"the adapter {str(folder)!r}")
    misfit = f"the adapter {str(folder)!r} does not fit its base {base!r}"
    advice = "give adapter_config.json the base that it was trained on"
    try:
        found: Any = peft.set_peft_model_state_dict(adapted, weights)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{misfit}: {_one_line(error)}; {advice}") from error
    wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    strangers, missing = sorted(found.unexpected_keys), sorted(wanted - set(weights))
    if strangers or missing:
        what = f"it has {strangers[0]}, for which there is no layer" if strangers else f"it lacks {missing[0]}"
        raise UserError(f"{misfit}: {what}; {advice}")
    return adapted


def lora_settings(model: nn.Module) -> tuple[int, float] | None:
    """Rank and alpha of the adapter on a model, None where there is no LoRA."""
    config = model.active_peft_config if isinstance(model, peft.PeftModel) else None
    return (config.r, config.lora_alpha) if isinstance(config, peft.LoraConfig) else None


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base, if there is an adapter on it."""
    if not isinstance(model, peft.PeftModel):
        yield
        return
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for weight, requires_grad in trained:  # PEFT would leave every adapter trainable
            weight.requires_grad_(requires_grad)


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    # Without embeddings, for which PEFT would look at the base's folder, or at the hub.
    model.save_pretrained(str(folder), save_embedding_layers=False)


def merged(model: peft.PeftModel) -> Any:
    """The base with the adapter in its weights, in place of both."""
    return model.merge_and_unload()


def _inject(model: nn.Module, config: peft.PeftConfig, what: str) -> peft.PeftModel:
    """`config` takes the path of the base in full, since adapters are read in other folders."""
    path = str(model.name_or_path)
    path = os.path.abspath(path) if os.path.isdir(path) else path
    config.base_model_name_or_path = model.name_or_path = path  # type: ignore
    try:
        return peft.get_peft_model(model, config)  # type: ignore[arg-type, return-value]
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{what} cannot be used with this model: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
