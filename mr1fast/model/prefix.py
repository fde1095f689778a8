"""The shared part of the forward pass: each prompt, with its image, runs once for all of its completions.

Exact, with gradients: completions attend to the prompt's keys and values, which are repeated and not computed again,
and a gradient flows back through them into prompt and vision tower.

Shapes: P prompts of T tokens (padded on the left), G completions each, B = P * G with the completions of a prompt
adjacent, L tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, Qwen2VLForConditionalGeneration
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class Prefix:
    """What completions need of their prompts; on the graph unless computed under no_grad."""

    key_values: list[tuple[Tensor, Tensor]]  # of each layer, [P, key-value heads, T, head dim]
    last_hidden: Tensor  # [P, H], which predicts the first token of a completion
    attention_mask: Tensor  # [P, T] bool
    next_position: Tensor  # [P] int64, the M-RoPE position of the first token of a completion

    def take(self, prompts: Tensor) -> Prefix:
        """The prefix of each of N completions, of the `prompts` [N] int64."""
        key_values = [
            (keys.index_select(0, prompts), values.index_select(0, prompts)) for keys, values in self.key_values
        ]
        return Prefix(key_values, self.last_hidden[prompts], self.attention_mask[prompts], self.next_position[prompts])

    def prompts_of(self, completions: int) -> Tensor:
        """The prompt [B] of each of so many completions, those of a prompt adjacent."""
        P = self.last_hidden.shape[0]
        return torch.arange(P, device=self.last_hidden.device).repeat_interleave(completions // P)

    def detach(self) -> Prefix:
        key_values = [(keys.detach(), values.detach()) for keys, values in self.key_values]
        return Prefix(key_values, self.last_hidden.detach(), self.attention_mask, self.next_position)

    def cache(self, room: int = 0) -> Cache:
        """A cache that holds the prefix. With `room` for so many tokens it is written in place, without gradients."""
        if room == 0:
            return DynamicCache(self.key_values)
        return Cache(layers=[_RoomyLayer(keys, values, room) for keys, values in self.key_values])


class _RoomyLayer(DynamicLayer):
    """A cache layer that does not copy itself for every token that is sampled."""

    def __init__(self, keys: Tensor, values: Tensor, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        B, heads, self.length, D = keys.shape
        self.buffers = [tensor.new_empty(B, heads, self.length + room, D) for tensor in (keys, values)]
        for buffer, tensor in zip(self.buffers, (keys, values)):
            buffer[:, :, : self.length] = tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start : self.length] = new
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


def place_inputs(model: Qwen2VLForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`encode_prompts` on the model's device, with M-RoPE's position_ids [P, 3, T] and next_position [P], int64."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    mask = inputs["attention_mask"]
    positions, deltas = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=mask,
    )
    next_position = mask.sum(1) + deltas.flatten().to(mask.device)
    return inputs | {"position_ids": positions.transpose(0, 1), "next_position": next_position}


def encode_prefix(model: Qwen2VLForConditionalGeneration, inputs: dict[str, Tensor]) -> Prefix:
    """Run prompts, of `encode_prompts` or `place_inputs`, through vision tower and language model."""
    if "position_ids" not in inputs:
        inputs = place_inputs(model, inputs)
    input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = model.model.get_input_embeddings()(input_ids)
    if "image_grid_thw" in inputs:
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        is_image = (input_ids == model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_image, torch.cat(features).to(embeds.dtype))
    cache = DynamicCache()
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=inputs["position_ids"].transpose(0, 1),
        past_key_values=cache,
    ).last_hidden_state
    key_values = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]
    return Prefix(key_values, hidden[:, -1], mask.bool(), inputs["next_position"])  # type: ignore[arg-type]


def extend(model: Qwen2VLForConditionalGeneration, prefix: Prefix, cache: Cache, ids: Tensor, start: int) -> Tensor:
    """Hidden states [B, N, H] of the completions' tokens `ids` [B, N], the first of which is token `start`.

    `cache` holds the prefix and the completions' tokens before `start`, and takes up the new ones.
    """
    B, N = ids.shape
    offsets = torch.arange(start, start + N, device=ids.device)
    positions = (prefix.next_position[:, None] + offsets).expand(3, B, N)
    return model.model.language_model(
        inputs_embeds=model.model.get_input_embeddings()(ids),
        attention_mask=_attention_mask(model, prefix.attention_mask, start, N),
        position_ids=positions,
        past_key_values=cache,
    ).last_hidden_state


def completion_hidden(model: Qwen2VLForConditionalGeneration, prefix: Prefix, completion_ids: Tensor) -> Tensor:
    """Hidden states [B, L, H]: the one at t predicts `completion_ids[:, t]` (padded on the right, [B, L]).

    `prefix`: of the P prompts of the B completions. A completion that a prompt has several times, as is usual when
    answers are short, runs once.
    """
    prompts = prefix.prompts_of(completion_ids.shape[0])
    distinct, row_of = torch.cat([prompts[:, None], completion_ids], 1).unique(dim=0, return_inverse=True)
    prefix, ids = prefix.take(distinct[:, 0]), distinct[:, 1:]
    hidden = prefix.last_hidden[:, None]
    if ids.shape[1] > 1:
        hidden = torch.cat([hidden, extend(model, prefix, prefix.cache(), ids[:, :-1], 0)], 1)
    return hidden[row_of]


def _attention_mask(
    model: Qwen2VLForConditionalGeneration, prompt_mask: Tensor, start: int, N: int
) -> Tensor | dict[str, Tensor | None]:
    """For N tokens from `start` on. Padding on the right needs no mask: nothing before it attends to it.

    sdpa takes the finished mask (transformers would build it anew for every token that is sampled); for the other
    implementations transformers builds what they need from the [B, T + start + N] one.
    """
    B, T = prompt_mask.shape
    language_model = model.model.language_model
    if language_model.config._attn_implementation != "sdpa" or language_model.has_sliding_layers:
        return torch.cat([prompt_mask, prompt_mask.new_ones(B, start + N)], 1).long()
    allowed = torch.ones(N, start + N, dtype=torch.bool, device=prompt_mask.device).tril(start).expand(B, -1, -1)
    return {"full_attention": torch.cat([prompt_mask[:, None].expand(B, N, T), allowed], 2)[:, None]}
