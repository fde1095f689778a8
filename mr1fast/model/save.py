"""Saving in the files that Qwen published, which transformers 4.49 (R1-V's), transformers 5 and vLLM of any age load.

transformers 5 itself writes others: a nested config.json, processor_config.json and chat_template.jinja, none of which
the versions before 4.52 understand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mr1fast.model.family import FAMILIES, Model
from mr1fast.model.processor import Qwen2VLTextImageProcessor

# What transformers 5 notes about how a tokenizer was loaded.
_LOADING = ("backend", "is_local", "local_files_only", "processor_class")


def save_model(model: Model, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write config.json, generation_config.json and the weights, which may be given by name."""
    model.save_pretrained(folder, state_dict=weights)
    _write(folder / "config.json", flat_config(_read(folder / "config.json")))


def save_processor(processor: Qwen2VLTextImageProcessor, folder: Path, model_type: str) -> None:
    """Write the tokenizer, preprocessor_config.json and chat_template.json, for a model of that type."""
    tokenizer, template = processor.tokenizer, processor.chat_template
    written = {"chat_template": template["default"] if isinstance(template, dict) else template}
    tokenizer.backend_tokenizer.no_padding()  # tokenizer.json would keep how the last batch was padded
    tokenizer.backend_tokenizer.no_truncation()
    with _os_errors_of_tokenizers():
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = {name: value for name, value in _read(folder / "tokenizer_config.json").items() if name not in _LOADING}
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
    config["added_tokens_decoder"] = {token: _fields(added) for token, added in tokenizer.added_tokens_decoder.items()}
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name of old
    _write(folder / "tokenizer_config.json", config | written)
    _write(folder / "chat_template.json", written)
    images = json.loads(processor.image_processor.to_json_string())
    size = images.pop("size")
    images |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    _write(folder / "preprocessor_config.json", images | {"processor_class": FAMILIES[model_type].processor_class})


@contextmanager
def _os_errors_of_tokenizers() -> Iterator[None]:
    """OSError where tokenizers could not write, which itself raises a bare `Exception` whatever happens."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error


def make_readable(folder: Path) -> None:
    """Give the weights the permissions of the other files: safetensors lets nobody but the owner read them."""
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "tokenizer_config.json").stat().st_mode)


def flat_config(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of transformers 5 as that of 4.49, where the language model's fields are not in a part."""
    text, vision = dict(nested["text_config"]), dict(nested["vision_config"])
    rope = dict(text.pop("rope_parameters"))
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    rope |= {"type": "mrope"} if kind == "default" else {"type": kind, "rope_type": kind}
    for part in (text, vision):
        part.pop("dtype", None)
        part.pop("model_type")  # that of the part, which only transformers 5 has
    whole = {name: value for name, value in nested.items() if name not in ("text_config", "dtype")}
    rope_fields = {"rope_theta": theta, "rope_scaling": rope}
    return text | whole | {"vision_config": vision, "torch_dtype": nested["dtype"]} | rope_fields


def _fields(token: Any) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
