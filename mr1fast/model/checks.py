"""What can be wrong with a model, each said in one sentence before it becomes a traceback or, worse, a wrong number."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mr1fast.checks import described
from mr1fast.errors import UserError
from mr1fast.model.family import FAMILIES, Model, family
from mr1fast.model.files import read_json
from mr1fast.options.recipes import adapter_base

# Fields of config.json, each with the token of the tokenizer whose id it must hold.
VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
# Fields of the two parts of config.json that say how large a model is.
TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
VISION_SIZES = ("depth", "embed_dim", "hidden_size", "num_heads", "patch_size", "spatial_merge_size")
# Parts of the names of weights that change what other weights mean, so that it would be wrong to leave them out.
FOREIGN_WEIGHTS = {
    "lora_": "an adapter that is not merged into its base; merge it (PEFT's merge_and_unload) and save that",
    **dict.fromkeys(
        ("qweight", "absmax", "quant_", ".SCB", "weight_scale"),
        "quantised weights, which cannot be trained here; give the model that they were made from",
    ),
}


def check_folder(path: str | Path) -> None:
    """Raise UserError unless the folder (or the hub name, which is not looked at) may hold a model of FAMILIES."""
    folder = Path(path)
    if not os.path.exists(folder):  # False, too, for a name that is too long, of which Path.exists() makes an error
        if isinstance(path, Path) or path.startswith((".", "/")) or path.count("/") != 1:
            raise UserError(f"model folder {str(path)!r} does not exist")
        if os.path.exists(folder.parent):
            why = f"it is not looked up on the hub, because there is a folder {str(folder.parent)!r}"
            raise UserError(f"model folder {path!r} does not exist; {why}")
        return
    config = read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{str(path)!r} holds no model: it has no config.json in Hugging Face format")
    family(path, config.get("model_type"))
    check_not_quantised(path, config)
    _check_ids(folder, config)


def check_not_quantised(path: str | Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config") or _text_config(config).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        what = "quantised weights cannot be trained here; give the model that they were made from"
        raise UserError(f"model {str(path)!r} is quantised{f' ({method})' if method else ''}: {what}")


def check_weights(path: str | Path, model: Model, found: dict[str, Any]) -> None:
    """Raise UserError for weights that are missing or have the wrong shape; transformers would use random ones instead.

    `found`: what transformers reports about loading. Weights that the model has no place for only cause a warning.
    """
    known = FAMILIES[model.config.model_type].name
    missing, unknown = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    stranger = f"{_count(unknown, 'weight')} that {known} does not know ({_some(unknown)})"
    for part, meaning in FOREIGN_WEIGHTS.items():
        if any(part in name for name in unknown):
            raise UserError(f"model {str(path)!r} has {stranger}: it holds {meaning}")
    if missing:
        what = f"model {str(path)!r} lacks {len(missing)} of its {len(model.state_dict())} weights ({_some(missing)})"
        advice = "save it again, or give the config.json that belongs to it"
        raise UserError(f"{what}, and has {stranger}" if unknown else f"{what}: {advice}")
    if found["mismatched_keys"]:
        name, stored, wanted = min(found["mismatched_keys"])
        what = f"{name} has the shape {list(stored)}, but config.json asks for {list(wanted)}"
        raise UserError(f"model {str(path)!r} does not fit its config.json: {what}")
    if unknown:
        warnings.warn(f"model {str(path)!r} has {stranger}, left out", stacklevel=3)


def check_finite(path: str | Path, model: nn.Module) -> None:
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise UserError(
            f"model {str(path)!r} has NaN or infinite numbers in {_count(broken, 'weight')} ({_some(broken)})"
        )


def check_fit(config: Any, processor: Any) -> None:
    """Raise UserError unless the model with this config and the processor agree on tokens and patches."""
    tokenizer, vocabulary = processor.tokenizer, config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        what = f"the tokenizer has {len(tokenizer)} tokens, but the model has embeddings for {vocabulary}"
        raise UserError(f"{what}: give the model's own tokenizer, or call the model's resize_token_embeddings")
    for field, token in VISION_TOKENS.items():
        ours, theirs = tokenizer.convert_tokens_to_ids(token), getattr(config, field)
        if ours != theirs:
            what = f"{field} is {theirs} in config.json, but {token} is {ours}"
            raise UserError(f"model and tokenizer do not match: {what} in the tokenizer")
    if tokenizer.pad_token in VISION_TOKENS.values():
        raise UserError(
            f"the tokenizer pads with {tokenizer.pad_token}, which stands for an image: set another pad_token"
        )
    vision, images = config.vision_config, processor.image_processor
    for field, ours, theirs in (
        ("patch_size", images.patch_size, vision.patch_size),
        ("merge_size", images.merge_size, vision.spatial_merge_size),
        ("temporal_patch_size", images.temporal_patch_size, vision.temporal_patch_size),
    ):
        if ours != theirs:
            what = f"{field} is {ours} in the image processor's configuration, but {theirs} in the model's config.json"
            raise UserError(f"model and image processor do not match: {what}")


def check_same_kind(path: str | Path, theirs: Any, ours: Any, their_processor: Any, processor: Any) -> None:
    """Raise UserError unless the reference at `path`, of which these are config and processor, is like the model."""
    what = f"--reference-model {path} must have the architecture and the vocabulary of --model"
    parts = {
        "": (theirs, ours, ("model_type",)),
        "text_config.": (theirs.get_text_config(), ours.get_text_config(), TEXT_SIZES),
        "vision_config.": (theirs.vision_config, ours.vision_config, VISION_SIZES),
    }
    for part, (their_config, our_config, fields) in parts.items():
        for field in fields:
            there, here = getattr(their_config, field, None), getattr(our_config, field, None)
            if there != here:
                raise UserError(f"{what}: its {part}{field} is {there}, and the model's is {here}")
    if their_processor.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise UserError(f"{what}: its tokenizer has other tokens")


def check_image_tokens(inputs: dict[str, Tensor], config: Any) -> None:
    """Raise UserError unless each image has as many tokens, in one piece, as the vision tower will make of it."""
    is_image = inputs["input_ids"] == config.image_token_id
    have = image_starts(is_image).flatten().cumsum(0)[is_image.flatten()].bincount()[1:].tolist()
    grids = inputs.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long))
    wanted = (grids.prod(1) // config.vision_config.spatial_merge_size**2).tolist()
    if have != wanted or not torch.equal(is_image, inputs["mm_token_type_ids"] == 1):
        what = f"images of {_some(wanted) or 'no'} tokens came with {_some(have) or 'no'} image tokens in the prompts"
        raise UserError(f"{what}: check image_token_id in config.json, the chat template and the questions")


def image_starts(is_image: Tensor) -> Tensor:
    """Where an image begins: [P, T] bool, of whether a token is an image's. Between two images are other tokens."""
    return is_image & ~nn.functional.pad(is_image, (1, 0))[:, :-1]


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter. Raises UserError if it holds a model as well, or does not name the base."""
    folder = Path(path)
    adapter = read_json(folder / "adapter_config.json") if os.path.isdir(folder) else None
    if adapter is None:
        return False
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if any(not file.name.startswith("adapter_") for file in files):
        which = "move adapter_config.json away if the adapter is in the weights already, else the weights"
        raise UserError(f"{str(folder)!r} holds both a model and an adapter, and it is not clear what to load: {which}")
    if not files:
        raise UserError(f"{str(folder)!r} holds an adapter without weights: adapter_model.safetensors is missing")
    if adapter_base(folder) is None:
        what = "base_model_name_or_path in adapter_config.json must be the folder, or the hub name, of its base"
        raise UserError(f"{str(folder)!r} holds an adapter that names no base: {what}")
    return True


def _check_ids(folder: Path, config: dict[str, Any]) -> None:
    """Check pad_token_id and eos_token_id: transformers accepts any, and fails later or never ends a completion."""
    text = _text_config(config)
    vocabulary = text.get("vocab_size")
    generation = read_json(folder / "generation_config.json") or {}
    for file, values in (("config.json", text), ("generation_config.json", generation)):
        for name, wanted in (("pad_token_id", "a token id"), ("eos_token_id", "a token id, or a list of token ids,")):
            value = values.get(name)
            several = isinstance(value, list) and name == "eos_token_id"
            if value is None or (_are_ids(value if several else [value], vocabulary)):
                continue
            room = f"from 0 to {vocabulary - 1}" if isinstance(vocabulary, int) else "from 0 on"
            raise UserError(f"{name} in {folder / file} must be {wanted} {room}, got {described(value)}")


def _are_ids(ids: list[Any], vocabulary: Any) -> bool:
    end = vocabulary if isinstance(vocabulary, int) else float("inf")
    return bool(ids) and all(type(token) is int and 0 <= token < end for token in ids)  # not a bool


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json about the language model; in older folders that is the whole file."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _count(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _some(things: Iterable[Any]) -> str:
    names = [str(thing) for thing in things]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
