"""LoRA through PEFT: make an adapter, load it from a folder, switch it off for a while, merge it.

An adapter's folder holds adapter_config.json, which names the base, adapter_model.safetensors, and the processor.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from mr1fast.checks import described, not_one_of
from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig
from mr1fast.options.fields import option_string

# All linear layers of the language model. A pattern, because some vision towers have layers of the same names.
LANGUAGE_LAYERS = r".*\.language_model\..*_proj"
# Ways to initialise LoRA that also change the weights under it.
CHANGES_THE_BASE = ("corda", "loftq", "olora", "pissa")


def add_adapter(
    model: nn.Module, *, rank: int, alpha: float | None = None, targets: Sequence[str] = (), seed: int = 0
) -> peft.PeftModel:
    """The model with a new LoRA adapter, which changes nothing yet. Only its weights are trained; they are float32.

    alpha: the adapter is scaled by alpha / rank; None is 2 * rank. targets: names of linear layers, as PEFT's
    target_modules; if there are none, all linear layers of the language model. Raises UserError for a name that no
    linear layer has.
    """
    target_weights(model, targets)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=list(targets) or LANGUAGE_LAYERS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _inject(model, config, "--lora-targets")


def target_weights(model: nn.Module, targets: Sequence[str]) -> list[nn.Parameter]:
    """The weights that `add_adapter` puts adapters on. Raises UserError for a name that no linear layer has."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear.pop("lm_head", None)  # the loss takes its weight, and would not see an adapter
    if not targets:
        return [layer.weight for name, layer in linear.items() if re.fullmatch(LANGUAGE_LAYERS, name)]  # type: ignore[misc]
    for target in targets:
        if not any(_is_named(name, target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(not_one_of("--lora-targets: a layer", target, known))
    found = [layer for name, layer in linear.items() if any(_is_named(name, target) for target in targets)]
    return [layer.weight for layer in found]  # type: ignore[misc]


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def load_adapter(model: nn.Module, folder: Path) -> peft.PeftModel:
    """The base with the adapter in this folder, which can be trained further. Raises UserError if it does not fit."""
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode, base = False, config.base_model_name_or_path
        weights = peft.load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # what PEFT meets in other people's folders can be of any type
        raise UserError(f"the adapter {str(folder)!r} cannot be loaded: {_one_line(error)}") from error
    if getattr(config, "megatron_config", None):  # with it, PEFT imports the module that megatron_core names
        raise UserError(f"the adapter {str(folder)!r} cannot be loaded: it is for Megatron (it has a megatron_config)")
    _check_reversible(config, folder)
    adapted = _inject(model, config, f"the adapter {str(folder)!r}")
    misfit = f"the adapter {str(folder)!r} does not fit its base {base!r}"
    advice = "base_model_name_or_path in its adapter_config.json must be the model that it was trained on"
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


def _check_reversible(config: peft.PeftConfig, folder: Path) -> None:
    """Raises UserError if the base cannot be had back by switching the adapter off, as the KL term needs it."""
    start, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
    why = f"it changes biases of the base, too (bias is {described(bias)})" if bias != "none" else ""
    if isinstance(start, str) and start.startswith(CHANGES_THE_BASE):
        why = f"it changes weights of the base, too (init_lora_weights is {described(start)})"
    if why:
        advice = "merge it into the base (PEFT's merge_and_unload), save that, and give it as --model"
        raise UserError(f"the adapter {str(folder)!r} cannot be trained further, because {why}: {advice}")


def check_lora(config: TrainConfig, model: nn.Module, frozen: Collection[nn.Parameter]) -> None:
    """Raises UserError if the options of LoRA do not fit the model, or the adapter that it has."""
    if not config.trains_adapter:
        return
    if isinstance(model, peft.PeftModel):
        there = _lora_settings(model)
        targets = ",".join(sorted(config.lora_target_names)) or None
        given = {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha, "lora_targets": targets}
        for name, wanted in given.items():
            if wanted is not None and wanted != there.get(name):
                raise UserError(
                    f"--model {config.model} is an adapter, which is trained further as it is: its {name} is "
                    f"{there.get(name)}; leave out {option_string(name)} {wanted}"
                )
        trained = [weight for weight in model.parameters() if weight.requires_grad]
    else:
        trained = target_weights(model, config.lora_target_names)
    if set(trained) <= set(frozen):
        raise UserError(f"--freeze {config.freeze} leaves nothing to train: the adapter is on no other part")


def _lora_settings(model: peft.PeftModel) -> dict[str, Any]:
    """The values of the options of LoRA that would make such an adapter as the model has; {} if it is not LoRA."""
    config = model.active_peft_config
    if not isinstance(config, peft.LoraConfig):
        return {}
    targets = config.target_modules
    listed = targets if isinstance(targets, str) else ",".join(sorted(targets or ()))
    return {"lora_rank": config.r, "lora_alpha": config.lora_alpha, "lora_targets": listed}


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes what its base does; a model without an adapter does so anyway."""
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


def save_adapter(model: peft.PeftModel, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors. weights: of the whole model, by name, if not its own."""
    # To decide whether to save embeddings, which are never trained, PEFT would look at the base's folder or at the hub.
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in


def merged(model: peft.PeftModel) -> Any:
    """The base with the adapter in its weights. The adapted model cannot be used any more."""
    return model.merge_and_unload()


def _inject(model: nn.Module, config: peft.PeftConfig, what: str) -> peft.PeftModel:
    """Put layers as `config` says into the model. The config gets the base's absolute path, good from any folder."""
    path = str(model.name_or_path)
    path = os.path.abspath(path) if os.path.isdir(path) else path
    config.base_model_name_or_path = model.name_or_path = path  # type: ignore
    try:
        with warnings.catch_warnings():  # PEFT asks for something that transformers will drop
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return peft.get_peft_model(model, config)  # type: ignore[arg-type, return-value]
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{what} cannot be used with this model: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
