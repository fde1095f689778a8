"""Loading a model and its processor from any folder in Hugging Face format."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_flash_attn_2_available

from mr1fast.errors import UserError
from mr1fast.model.adapter import load_adapter
from mr1fast.model.checks import check_finite, check_folder, check_not_quantised, check_weights, is_adapter
from mr1fast.model.family import Model, family
from mr1fast.model.files import check_processor_files, check_readable, check_weight_files
from mr1fast.model.liger import use_liger
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.model.prompts import prompt_text
from mr1fast.options import recipes
from mr1fast.options.prompt import Prompt, recorded_prompt

EMBEDDED = Path(__file__).parents[1] / "embedded"

# What torch.compile, DDP, FSDP, activation checkpointing and PEFT add to the names of the weights they wrap.
_WRAPPERS = {
    r"^(?:(?:_orig_mod|module|_fsdp_wrapped_module|base_model\.model)\.)+": "",
    r"(?<![^.])(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+": "",
}


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


def choose_threads(model: Model) -> int:
    """CPU threads for a model of this size: for a small one, a second thread costs more than it gains.

    For other models it is OMP_NUM_THREADS if that is set, else the number of processors that this process may use.
    """
    if is_small(model):
        return 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (int(wanted) if wanted.isdecimal() else 0) or usable or 1


def is_small(model: Model) -> bool:
    """The embedded model, one trained from it, or one of its size."""
    return recipes.is_small(model.config.to_dict())


def load_model(
    path: str | Path = EMBEDDED,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    liger: bool = False,
) -> Any:
    """A model of FAMILIES, in training mode, from a folder (or a hub name) in Hugging Face format.

    From an adapter's folder, a PeftModel on its base. liger: with Liger's layers, see `use_liger`. Raises UserError (a
    ValueError) if there is no model, or if some of its weights are missing.
    """
    if is_adapter(path):
        base = _of_base(path, partial(load_model, device=device, dtype=dtype, attention=attention, liger=liger))
        adapted = load_adapter(base, Path(path))
        check_finite(path, adapted)
        adapted.name_or_path = str(path)  # type: ignore[assignment]  # else it would be the base's
        return adapted.train()
    check_folder(path)
    check_weight_files(path)
    try:
        kind = family(path, AutoConfig.from_pretrained(path, trust_remote_code=False).model_type)
        with _without_loading_report():
            loaded: Any = kind.model_class.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attention,
                key_mapping=_WRAPPERS,
                ignore_mismatched_sizes=True,  # `check_weights` reports them
                output_loading_info=True,
                trust_remote_code=False,
            )
    except (UserError, ModuleNotFoundError):  # a package that is missing is named by the program
        raise
    except Exception as error:  # what transformers meets in other people's folders can be of any type
        raise _cannot_be_loaded(path, error) from error
    model, found = loaded
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers has found an adapter on the hub
        advice = f"download it (hf download {path} --local-dir DIR) and give its folder"
        raise UserError(f"model {str(path)!r} is an adapter: {advice}")
    check_not_quantised(path, model.config.to_dict())
    check_weights(path, model, found)
    model._weight_conversions = None  # with them, transformers would save the weights under the wrappers' names
    model.to(device).train()
    check_finite(path, model)
    if liger:
        use_liger(model)
    return model


def load_config(path: str | Path) -> Any:
    """A model's configuration, or that of an adapter's base. Raises UserError as `load_model` does."""
    if is_adapter(path):
        return _of_base(path, load_config)
    check_folder(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # as above
        raise _cannot_be_loaded(path, error) from error
    family(path, config.model_type)
    return config


def most_pixels(path: str | Path) -> int:
    """Of an image after resizing, by the image processor's settings; transformers' default where there are none."""
    try:
        size = Qwen2VLImageProcessorPil.from_pretrained(recipes.adapter_base(path) or path).size
    except (OSError, ValueError):
        size = Qwen2VLImageProcessorPil().size
    return size.get("longest_edge") or size.get("max_pixels") or Qwen2VLImageProcessorPil().size["longest_edge"]


def _cannot_be_loaded(path: str | Path, error: Exception) -> UserError:
    check_readable(path)
    nowhere = "" if os.path.exists(path) else ", and there is no such folder"
    return UserError(f"model {str(path)!r} cannot be loaded: {_reason(error)}{nowhere}")


def _of_base(folder: str | Path, load: Callable[[str], Any]) -> Any:
    """What `load` returns for the base of an adapter."""
    base = recipes.adapter_base(folder)
    assert base is not None
    try:
        if is_adapter(base):
            raise UserError("it is an adapter itself")
        return load(base)
    except UserError as error:
        where = "see base_model_name_or_path in its adapter_config.json"
        raise UserError(f"the base of the adapter {str(folder)!r} cannot be loaded ({where}): {error}") from error


@contextmanager
def _without_loading_report() -> Iterator[None]:
    """Suppress the table of missing and unknown weights that transformers logs; we say it in one sentence."""
    logger = logging.getLogger("transformers.modeling_utils")

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def load_processor(
    path: str | Path = EMBEDDED, *, max_pixels: int | None = None, prompt: Prompt | None = None
) -> Qwen2VLTextImageProcessor:
    """The tokenizer and image processor of a model folder. `max_pixels` bounds the image after resizing.

    prompt: how questions are put to the model; by default as it was trained, as far as the folder says.
    Where an adapter's folder has neither, they are those of its base. Raises UserError (a ValueError) if one of them is
    missing or cannot be used, or if `max_pixels` is less than one image token.
    """
    folder, prompt = Path(path), prompt or recorded_prompt(path)
    if os.path.isdir(folder):
        base = recipes.adapter_base(folder)
        if base and not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
            return load_processor(base, max_pixels=max_pixels, prompt=prompt)
        check_processor_files(folder)
    try:
        processor = Qwen2VLTextImageProcessor.from_pretrained(path, trust_remote_code=False)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # as above
        check_readable(path)
        raise UserError(f"model {str(path)!r} has no usable tokenizer and image processor: {_reason(error)}") from error
    tokenizer = processor.tokenizer
    processor.prompt = prompt
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    _check_chat_template(path, processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"model {str(path)!r} has a tokenizer with neither pad_token nor eos_token; it needs one of them"
            )
        tokenizer.pad_token = tokenizer.eos_token  # any will do: it is masked
    try:
        tokenizer("a question")
    except Exception as error:  # its settings are looked at only now, such as a model_max_length that is no number
        raise UserError(f"model {str(path)!r} has a tokenizer that cannot be used: {_reason(error)}") from error
    _set_image_size(path, processor.image_processor, max_pixels)
    return processor


def _check_chat_template(path: str | Path, processor: Qwen2VLTextImageProcessor) -> None:
    if processor.chat_template is None:
        where = "none of chat_template.jinja, chat_template.json and tokenizer_config.json has one"
        raise UserError(f"model {str(path)!r} has no chat template: {where}")
    try:
        texts = [prompt_text(processor, "a question", images) for images in (1, 0)]
    except Exception as error:  # a template is a program
        raise UserError(f"model {str(path)!r} has a chat template that cannot be used: {_reason(error)}") from error
    said = ("a question", processor.prompt.system or "")
    if [text.count(processor.image_token) for text in texts] != [1, 0] or not all(
        part in text for part in said for text in texts
    ):
        what = f"it must write the system prompt, the question and, for an image, one {processor.image_token}"
        raise UserError(f"model {str(path)!r} has a chat template that is not Qwen2-VL's: {what}")


def _set_image_size(path: str | Path, image_processor: Any, max_pixels: int | None) -> None:
    """Set the bounds of a resized image in pixels, reading either of the two forms in which models write them."""
    size = dict(image_processor.size)
    least, most = (
        size.get("shortest_edge") or size.get("min_pixels"),
        size.get("longest_edge") or size.get("max_pixels"),
    )
    if not (isinstance(least, int) and isinstance(most, int)):
        raise UserError(f"model {str(path)!r} has an image processor without min_pixels and max_pixels in its size")
    if max_pixels is not None:
        side = image_processor.patch_size * image_processor.merge_size
        if max_pixels < side * side:
            raise UserError(f"max_pixels must be at least {side * side}, which is one image token, got {max_pixels}")
        least, most = min(least, max_pixels), max_pixels
    image_processor.size = {"shortest_edge": least, "longest_edge": most}


def _reason(error: Exception) -> str:
    """The message of a library's error, on one line of reasonable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
