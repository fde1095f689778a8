"""Sampling: G completions of each prompt with a key-value cache, the prompt computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from mr1fast.errors import UserError
from mr1fast.model.prefix import Prefix, encode_prefix, extend


@dataclass(frozen=True)
class Rollout:
    """G completions of each of P prompts, B = P * G, those of a prompt adjacent."""

    completion_ids: Tensor  # [B, L] int64, the pad token after the end of sequence
    completion_mask: Tensor  # [B, L] bool, true up to and with the end of sequence
    per_token_logps: Tensor  # [B, L] float32, of the model at the temperature of sampling, 0 where masked


@torch.no_grad()
def generate(
    model: Qwen2VLForConditionalGeneration,
    inputs: dict[str, Tensor],
    *,
    num_generations: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    prefix: Prefix | None = None,
) -> Rollout:
    """Complete each of P prompts `num_generations` times, up to the end of sequence or `max_new_tokens`.

    inputs: of `encode_prompts`, padded on the left. temperature: 0 takes the likeliest token.
    generator: on the model's device; without one torch's global state is used.
    prefix: of these inputs, if the caller has computed it.
    Raises UserError (a ValueError) for a model that computes no numbers.
    """
    eos, banned, pad = end_tokens(model), banned_tokens(model), pad_token(model)
    prefix = prefix or encode_prefix(model, inputs)
    prefix = prefix.take(prefix.prompts_of(len(prefix.last_hidden) * num_generations))
    cache, hidden = prefix.cache(room=max_new_tokens), prefix.last_hidden
    if not hidden.isfinite().all():
        raise UserError("the model's hidden states are not finite: its weights are broken")
    B = hidden.shape[0]
    finished = torch.zeros(B, dtype=torch.bool, device=hidden.device)
    ids: list[Tensor] = []
    mask: list[Tensor] = []
    logps: list[Tensor] = []
    for t in range(max_new_tokens):
        if t > 0:
            hidden = extend(model, prefix, cache, ids[-1][:, None], t - 1)[:, 0]
        all_logps = (model.lm_head(hidden).float() / (temperature or 1.0)).log_softmax(-1)  # [B, V]
        token = _choose(all_logps, banned, temperature, generator).masked_fill(finished, pad)
        ids.append(token)
        mask.append(~finished)
        logps.append(all_logps.gather(1, token[:, None])[:, 0].masked_fill(finished, 0))
        finished = finished | torch.isin(token, eos)
        if finished.all():
            break
    return Rollout(torch.stack(ids, 1), torch.stack(mask, 1), torch.stack(logps, 1))


def _choose(all_logps: Tensor, banned: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    allowed = all_logps.index_fill(1, banned, -torch.inf)
    if temperature == 0:
        return allowed.argmax(-1)
    # Not exp: the banned tokens may have had all of the probability.
    return torch.multinomial(allowed.softmax(-1), 1, generator=generator)[:, 0]


def decode(tokenizer, rollout: Rollout, eos: Tensor) -> list[str]:
    """The completions as text, without their end-of-sequence token.

    Not skip_special_tokens=True, which removes <think> and <answer> from models that registered them as special.
    """
    kept = rollout.completion_mask & ~torch.isin(rollout.completion_ids, eos)
    return [tokenizer.decode(row[keep]) for row, keep in zip(rollout.completion_ids.cpu(), kept.cpu())]


def end_tokens(model: Qwen2VLForConditionalGeneration) -> Tensor:
    """Ids [N] that end a completion: of the generation config, which may name several, else of the config."""
    eos = model.generation_config.eos_token_id
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    if eos is None:
        raise UserError("the model's generation_config.json names no eos_token_id, so that no completion would end")
    return torch.tensor(eos, device=model.device).reshape(-1)


def pad_token(model: Qwen2VLForConditionalGeneration) -> int:
    pad = model.generation_config.pad_token_id
    return int(end_tokens(model)[0]) if pad is None else pad


def banned_tokens(model: Qwen2VLForConditionalGeneration) -> Tensor:
    """Ids [N] that are never sampled: images in an answer have no pixels, and padding is not an answer."""
    config = model.config
    candidates = {
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
        pad_token(model),
    }
    return torch.tensor(sorted(candidates - {None, *end_tokens(model).tolist()}), device=model.device)
