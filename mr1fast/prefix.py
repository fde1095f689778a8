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
from transformers import DynamicCache, Qwen2VLForConditionalGeneration


@dataclass(frozen=True)
class Prefix:
    """What completions need of their prompts; on the graph unless computed under no_grad."""

    key_values: list[tuple[Tensor, Tensor]]  # of each layer, [P, key-value heads, T, head dim]
    last_hidden: Tensor  # [P, H], which predicts the first token of a completion
    attention_mask: Tensor  # [P, T] bool
    next_position: Tensor  # [P] int64, the M-RoPE position of the first token of a completion

    def repeat(self, num_generations: int) -> Prefix:
        """The prefix of each of B completions."""

        def each(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(num_generations, 0)

        key_values = [(each(keys), each(values)) for keys, values in self.key_values]
        return Prefix(key_values, each(self.last_hidden), each(self.attention_mask), each(self.next_position))

    def cache(self) -> DynamicCache:
        return DynamicCache(self.key_values)


def encode_prefix(model: Qwen2VLForConditionalGeneration, inputs: dict[str, Tensor]) -> Prefix:
    """Run the prompts of `encode_prompts` (on any device) through vision tower and language model."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = model.model.get_input_embeddings()(input_ids)
    grid = inputs.get("image_grid_thw")
    if grid is not None:
        features = model.model.get_image_features(inputs["pixel_values"], grid).pooler_output
        is_image = (input_ids == model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_image, torch.cat(features).to(embeds.dtype))
    positions, deltas = model.model.get_rope_index(
        input_ids, inputs["mm_token_type_ids"], image_grid_thw=grid, attention_mask=attention_mask
    )
    cache = DynamicCache()
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=attention_mask, position_ids=positions, past_key_values=cache
    ).last_hidden_state
    key_values = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]
    next_position = attention_mask.sum(1) + deltas.flatten().to(attention_mask.device)
    return Prefix(key_values, hidden[:, -1], attention_mask.bool(), next_position)  # type: ignore[arg-type]


def extend(
    model: Qwen2VLForConditionalGeneration, prefix: Prefix, cache: DynamicCache, ids: Tensor, start: int
) -> Tensor:
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


def completion_hidden(
    model: Qwen2VLForConditionalGeneration, inputs: dict[str, Tensor], completion_ids: Tensor, num_generations: int
) -> Tensor:
    """Hidden states [B, L, H]: the one at t predicts `completion_ids[:, t]` (padded on the right, [B, L])."""
    prefix = encode_prefix(model, inputs).repeat(num_generations)
    first = prefix.last_hidden[:, None]
    if completion_ids.shape[1] == 1:
        return first
    return torch.cat([first, extend(model, prefix, prefix.cache(), completion_ids[:, :-1], 0)], 1)


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
