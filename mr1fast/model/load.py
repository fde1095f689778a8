"""Loading Qwen2-VL from any folder in Hugging Face format, and turning examples into its inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.options import recipes

EMBEDDED = Path(__file__).parents[1] / "embedded"

# The paper's, appended to every question.
PROMPT_SUFFIX = "Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags."


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_attention(name: str, device: torch.device) -> str:
    """The `attn_implementation` asked of transformers: "auto" is FlashAttention 2 where it can run, else sdpa."""
    usable = device.type == "cuda" and is_flash_attn_2_available()
    if name == "auto":
        return "flash_attention_2" if usable else "sdpa"
    if name == "flash_attention_2" and not usable:
        raise ValueError("attention 'flash_attention_2' needs a CUDA device and the flash-attn package; use 'sdpa'")
    return name


def choose_threads(model: Qwen2VLForConditionalGeneration) -> int:
    """CPU threads for a model of this size: in a small one a second thread costs more than it brings."""
    return 1 if is_small(model) else os.cpu_count() or 1


def is_small(model: Qwen2VLForConditionalGeneration) -> bool:
    """The embedded model, one trained from it, or one of its size."""
    return recipes.is_small(model.config.to_dict())


def load_model(
    path: str | Path = EMBEDDED,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL, in training mode, from a folder (or a hub name) in Hugging Face format. Raises ValueError if none."""
    _check_model(path)
    try:
        model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    except (OSError, RuntimeError, SafetensorError) as error:
        nowhere = "" if Path(path).exists() else ", and there is no such folder"
        raise ValueError(f"model {str(path)!r} cannot be loaded: {str(error).splitlines()[0]}{nowhere}") from error
    return model.to(device).train()  # type: ignore[arg-type]  # transformers' wrapper of `to` hides its `self`


def _check_model(path: str | Path) -> None:
    folder = Path(path)
    if not folder.exists():
        if isinstance(path, Path) or path.startswith((".", "/")) or path.count("/") != 1:
            raise ValueError(f"model folder {str(path)!r} does not exist")
        if folder.parent.exists():
            why = f"it is not looked up on the hub, because there is a folder {str(folder.parent)!r}"
            raise ValueError(f"model folder {path!r} does not exist; {why}")
        return  # a hub name
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{str(path)!r} holds no model: a Hugging Face config.json is wanted there") from None
    except ValueError:
        raise ValueError(f"{str(path)!r} holds no model: its config.json is not valid JSON") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != "qwen2_vl":
        raise ValueError(f"{str(path)!r} holds a model of type {model_type!r}; 'qwen2_vl' is wanted")


def load_processor(path: str | Path = EMBEDDED, *, max_pixels: int | None = None) -> Qwen2VLTextImageProcessor:
    """The tokenizer and image processor of a model folder. `max_pixels` bounds the image after resizing.

    Raises ValueError where one of them is missing, or for fewer pixels than an image token has.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        # transformers would make an empty tokenizer.
        raise ValueError(f"model {str(path)!r} has no usable tokenizer: tokenizer.json is missing")
    try:
        processor = Qwen2VLTextImageProcessor.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {str(path)!r} has no usable tokenizer and image processor: {reason}") from error
    if processor.chat_template is None:
        raise ValueError(f"model {str(path)!r} has no chat template: chat_template.jinja is missing")
    processor.tokenizer.padding_side = "left"
    if max_pixels is not None:
        side = processor.image_processor.patch_size * processor.image_processor.merge_size
        if max_pixels < side * side:
            raise ValueError(f"max_pixels must be at least {side * side}, which make an image token, got {max_pixels}")
        size = processor.image_processor.size
        processor.image_processor.size = {
            "shortest_edge": min(size["shortest_edge"], max_pixels),
            "longest_edge": max_pixels,
        }
    return processor


def prompt_text(processor: Qwen2VLTextImageProcessor, problem: str, has_image: bool = True) -> str:
    """The chat the model sees: one user turn with the image, the question and the suffix, and an open answer."""
    content: list[dict[str, str]] = [{"type": "image"}] if has_image else []
    content.append({"type": "text", "text": f"{problem} {PROMPT_SUFFIX}"})
    messages: list[Any] = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompts(processor: Qwen2VLTextImageProcessor, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Model inputs for P prompts, padded on the left to T tokens, on the CPU.

    Returns input_ids, attention_mask and mm_token_type_ids [P, T] int64 and, if there is any image, pixel_values
    [patches, C * 2 * patch * patch] float32 and image_grid_thw [images, 3] int64.
    """
    images = [example.image for example in examples if example.image is not None]
    texts = [prompt_text(processor, example.problem, example.image is not None) for example in examples]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    return {name: inputs[name] for name in inputs}


def prompt_length(processor: Qwen2VLTextImageProcessor, example: Example) -> int:
    """Tokens of the prompt that `encode_prompts` makes of this example, without a look at the image's pixels."""
    text = prompt_text(processor, example.problem, example.image is not None)
    tokens = len(processor.tokenizer(text, verbose=False)["input_ids"])
    if example.image is None:
        return tokens
    images, (width, height) = processor.image_processor, example.image.size
    return tokens - 1 + images.get_number_of_image_patches(height, width, {}) // images.merge_size**2


def longest_prompt(model: Qwen2VLForConditionalGeneration, max_completion_length: int) -> int:
    """Tokens that a prompt may have, so that it and its completion fit into what the model takes.

    Raises UserError where the completion alone does not fit.
    """
    limit = model.config.get_text_config().max_position_embeddings
    if max_completion_length >= limit:
        what = f"the model takes {limit} tokens (max_position_embeddings), prompt and completion together"
        raise UserError(f"a completion of {max_completion_length} tokens leaves no room for a prompt: {what}")
    return limit - max_completion_length
