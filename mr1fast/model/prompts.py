"""Turning examples into a model's inputs: the prompt as text, as tokens, and how long it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import jinja2
import torch
from torch import Tensor

from mr1fast.data.example import IMAGE_MARKER, Example
from mr1fast.errors import UserError
from mr1fast.model.checks import image_starts
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.options.prompt import Prompt

# Of all images of a batch; every other input has a row for each prompt.
IMAGES = ("pixel_values", "image_grid_thw")


def prompt_messages(prompt: Prompt, problem: str, images: int = 1) -> list[dict[str, Any]]:
    """The chat before the answer: the prompt's system turn, if it has one, and a user turn.

    The user's turn has the images, the question and the suffix. `images`: their number; `Example.problem` says where
    they stand.
    """
    texts = problem.split(IMAGE_MARKER)
    if len(texts) - 1 != images:
        texts = [""] * images + [problem]
    texts[-1] = prompt.after(texts[-1])
    content: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": text}] if text else []
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.system}]})
    return messages


def prompt_text(processor: Qwen2VLTextImageProcessor, problem: str, images: int = 1) -> str:
    """What the model sees: `prompt_messages`, and an open answer."""
    messages: Any = prompt_messages(processor.prompt, problem, images)
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompts(processor: Qwen2VLTextImageProcessor, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Model inputs for P prompts, padded on the left to T tokens, on the CPU.

    Returns input_ids, attention_mask and mm_token_type_ids [P, T] int64 and, if there is any image, pixel_values
    [patches, C * 2 * patch * patch] float32 and image_grid_thw [images, 3] int64. Raises UserError for a question that
    cannot be encoded.
    """
    images = [image for example in examples for image in example.images]
    texts = [_prompt_of(processor, example) for example in examples]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    return {name: inputs[name] for name in inputs}


def take_prompts(inputs: dict[str, Tensor], prompts: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of `encode_prompts` or `Policy.place` for these prompts, in this order; one may be there several times."""
    index = torch.tensor(prompts, device=inputs["input_ids"].device)
    taken = {name: rows[index] for name, rows in inputs.items() if name not in IMAGES}
    if "image_grid_thw" in inputs:
        counts = image_starts(inputs["mm_token_type_ids"] == 1).sum(1).tolist()
        patches = inputs["image_grid_thw"].prod(1).tolist()
        images = [*zip(inputs["image_grid_thw"], inputs["pixel_values"].split(patches))]
        starts = [0, *accumulate(counts)]
        if chosen := [image for prompt in prompts for image in images[starts[prompt] : starts[prompt + 1]]]:
            grids, pixels = zip(*chosen)
            taken |= {"image_grid_thw": torch.stack(grids), "pixel_values": torch.cat(pixels)}
    return taken


def prompt_length(processor: Qwen2VLTextImageProcessor, example: Example) -> int:
    """Number of tokens that `encode_prompts` makes of this example, found without looking at the images' pixels."""
    tokens = len(processor.tokenizer(_prompt_of(processor, example), verbose=False)["input_ids"])
    images = processor.image_processor
    patches = sum(images.get_number_of_image_patches(image.height, image.width, {}) for image in example.images)
    return tokens - len(example.images) + patches // images.merge_size**2


def longest_prompt(model: Any, max_completion_length: int) -> int:
    """The largest number of tokens in a prompt that leaves room for its completion in the model.

    `model`: a model or its config. Raises UserError where the completion alone does not fit.
    """
    limit = getattr(model, "config", model).get_text_config().max_position_embeddings
    if max_completion_length >= limit:
        what = f"the model takes {limit} tokens (max_position_embeddings) for prompt and completion together"
        raise UserError(f"a completion of {max_completion_length} tokens leaves no room for a prompt: {what}")
    return limit - max_completion_length


def end_of_turn(processor: Qwen2VLTextImageProcessor) -> int | None:
    """The id of the token with which the chat template ends an answer, or None if it has no such token."""
    answer = "an answer"
    messages: list[Any] = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "a question"), ("assistant", answer))
    ]
    try:
        text = processor.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, TypeError):  # a template for prompts only
        return None
    _, found, after = text.rpartition(answer)
    tokenizer = processor.tokenizer
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _prompt_of(processor: Qwen2VLTextImageProcessor, example: Example) -> str:
    """The example's prompt as text, with one image token for each image."""
    text = prompt_text(processor, example.problem, len(example.images))
    name = example.name or "an example"
    if (text.count(processor.image_token), text.count(processor.video_token)) != (len(example.images), 0):
        markers = f"{processor.image_token} or {processor.video_token}"
        raise UserError(f"the question of {name} contains {markers}, which stand for pixels; remove them")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the question of {name} is not valid Unicode: {error.reason}") from None
    return text
