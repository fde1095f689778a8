"""Folders as they lie on the hub, written by hand: two layers, random weights, every file as Qwen published it.

Nothing here is written by what the tests check (`mr1fast.model.save`, `save_pretrained`).
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForImageTextToText

# The published models, by what sets their folders apart.
KINDS: dict[str, dict[str, Any]] = {
    "2B": {},
    "7B": {"tied": False, "shards": 3, "spare": 40},
    "2.5, 3B": {"family": "qwen2_5_vl", "shards": 2},
    "2.5, 7B": {"family": "qwen2_5_vl", "tied": False},
}
FIRST_SPECIAL = 151_643  # of the real tokenizer
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# What Qwen2.5 added; these are not special.
LATER = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
)  # fmt: skip
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif "
    "content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if "
    "add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif "
    "'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = "How many items are there? Output the thinking process, then the final answer: it is the sum of the angles. "


def hub_folder(
    folder: Path,
    family: str = "qwen2_vl",
    *,
    tied: bool = True,
    first_special: int = 400,
    spare: int = 7,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A model folder of that family.

    first_special: id of <|endoftext|>, which all ordinary tokens come before. spare: rows of the embeddings beyond the
    tokenizer's, as the real models have some hundreds. tied: as in 2B and 3B; 7B is not.
    """
    folder.mkdir(parents=True)
    added = SPECIAL + (LATER if family == "qwen2_5_vl" else ())
    ids = {token: first_special + place for place, token in enumerate(added)}
    _write_json(folder / "config.json", _config(family, tied, ids, first_special + len(added) + spare, dtype))
    _write_json(folder / "generation_config.json", _generation_config(ids))
    _write_tokenizer(folder, ids)
    processor_class = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[family]
    _write_json(folder / "preprocessor_config.json", PREPROCESSOR | {"processor_class": processor_class})
    _write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})
    _write_weights(folder, tied, shards, dtype)
    return folder


def _config(family: str, tied: bool, ids: dict[str, int], vocabulary: int, dtype: torch.dtype) -> dict[str, Any]:
    """Flat, as in every folder of before transformers 4.52: the language model's fields are not in a part of their own.

    The range of the weights is ten times the real one, or so narrow a model would hardly look at its image.
    """
    vision = {
        "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 4, "hidden_size": 64, "initializer_range": 0.2},
        "qwen2_5_vl": {
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "initializer_range": 0.2,
        },
    }[family]
    return {
        "architectures": [MODEL_CLASSES[family]],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.2,
        "intermediate_size": 96,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "model_type": family,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": vision
        | {
            "depth": 2,
            "num_heads": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": vocabulary,
    }


MODEL_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}


def _generation_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "repetition_penalty": 1.0,
        "temperature": 0.01,
        "top_p": 0.001,
        "top_k": 1,
        "transformers_version": "4.37.0",
    }


@functools.cache
def _trained() -> dict[str, Any]:
    """Vocabulary and merges of a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [CORPUS] * 10, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )
    return json.loads(tokenizer.to_str())["model"]


def _write_tokenizer(folder: Path, ids: dict[str, int]) -> None:
    trained = _trained()
    unused = range(len(trained["vocab"]), min(ids.values()))
    vocabulary = trained["vocab"] | {f"unused{number}": number for number in unused}
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in ids:
        tokenizer.add_tokens([AddedToken(token, special=token in SPECIAL, normalized=False)])
    assert {token: tokenizer.token_to_id(token) for token in ids} == ids
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    sides = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {number: {"content": token, **sides, "special": token in SPECIAL} for token, number in ids.items()}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_weights(folder: Path, tied: bool, shards: int, dtype: torch.dtype) -> None:
    """Under the names of transformers before 4.52, which are the hub's."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).to(dtype)
    for weight in model.parameters():  # norms and biases, too, are no longer those that it started with
        if weight.ndim == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight.contiguous()
        for name, weight in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    names, place = list(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        place |= dict.fromkeys(part, file)
    size = sum(weight.nbytes for weight in weights.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": place})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
