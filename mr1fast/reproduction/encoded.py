"""What the arms of a process need not do again: they share their base, their tests and, with a seed, their drawings.

To process images and to place their tokens takes a quarter of the time in which a model of this size is tested, and the
reference spends a third of its own on prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mr1fast.data.example import Example
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix
from mr1fast.model.prompts import IMAGES, take_prompts

MOST = 3000  # prompts that are kept, of some 80 KB each
NOT_TOKENS = (*IMAGES, "next_position")
Encoded = dict[tuple, tuple[Example, dict[str, Tensor]]]  # by question and addresses of the images: one prompt each


class EncodedOnce(Policy):
    """A policy whose prompts are encoded once; examples must have an image.

    known: what has been encoded, of all policies with this processor.
    """

    def __init__(self, model: Any, processor: Any, known: Encoded):
        super().__init__(model, processor)
        self.known = known

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        keys = [(example.problem, *map(id, example.images)) for example in examples]
        if new := {key: example for key, example in zip(keys, examples) if key not in self.known}:
            if len(self.known) + len(new) > MOST:
                self.known.clear()
                new = dict(zip(keys, examples))
            inputs = super().encode([*new.values()])
            for i, (key, example) in enumerate(new.items()):  # while it is kept, no other has its address
                self.known[key] = example, _unpadded(take_prompts(inputs, [i]))
        rows = [self.known[key][1] for key in keys]
        longest = max(row["input_ids"].shape[-1] for row in rows)
        return {name: torch.cat([self._padded(name, row[name], longest) for row in rows]) for name in rows[0]}

    def _padded(self, name: str, row: Tensor, longest: int) -> Tensor:
        """On the left, to so many tokens, with what `Policy.encode` has there."""
        if name in NOT_TOKENS:
            return row
        return pad(row, (longest - row.shape[-1], 0), value=self.pad_id if name == "input_ids" else 0)


def _unpadded(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """One prompt, without padding on the left."""
    padding = int((row["attention_mask"] == 0).sum())
    return {name: tensor if name in NOT_TOKENS else tensor[..., padding:] for name, tensor in row.items()}


class RunOnce(EncodedOnce):
    """A frozen policy through which prompts run once, too, whatever completions follow them."""

    def __init__(self, model: Any, processor: Any):
        super().__init__(model, processor, known={})
        self.freeze()
        self.prefixes: dict[bytes, Prefix] = {}  # of one prompt each, without padding

    def completion_hidden(
        self,
        inputs: dict[str, Tensor],
        completion_ids: Tensor,
        completion_mask: Tensor,
        prefix: Prefix | None = None,
    ) -> Tensor:
        return super().completion_hidden(inputs, completion_ids, completion_mask, prefix or self._prefix(inputs))

    def _prefix(self, inputs: dict[str, Tensor]) -> Prefix:
        keys = _keys(inputs)
        if new := [place for place, key in enumerate(keys) if key not in self.prefixes]:
            if len(self.prefixes) + len(new) > MOST:
                self.prefixes.clear()
                new = [*range(len(keys))]
            run = self.encode_prefix(take_prompts(inputs, new))
            self.prefixes |= {keys[place]: _alone(run, i) for i, place in enumerate(new)}
        return _together([self.prefixes[key] for key in keys])


def _keys(inputs: dict[str, Tensor]) -> list[bytes]:
    """What is in each prompt: its tokens, without padding, and the pixels of its image."""
    pixels = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist())
    ids = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    return [row.numpy().tobytes() + image.numpy().tobytes() for row, image in zip(ids, pixels, strict=True)]


def _alone(prefix: Prefix, prompt: int) -> Prefix:
    """Of this prompt, without padding."""
    one, shown = slice(prompt, prompt + 1), prefix.attention_mask[prompt]
    key_values = [(keys[one, :, shown], values[one, :, shown]) for keys, values in prefix.key_values]
    return Prefix(key_values, prefix.last_hidden[one], shown[None, shown], prefix.next_position[one])


def _together(prefixes: Sequence[Prefix]) -> Prefix:
    """[P], padded on the left."""
    longest = max(prefix.attention_mask.shape[1] for prefix in prefixes)

    def padded(part: Tensor, *behind: int) -> Tensor:
        return pad(part, (*behind, longest - part.shape[-1 - len(behind) // 2], 0))

    layers = zip(*(prefix.key_values for prefix in prefixes))
    return Prefix(
        [
            (torch.cat([padded(k, 0, 0) for k, _ in layer]), torch.cat([padded(v, 0, 0) for _, v in layer]))
            for layer in layers
        ],
        torch.cat([prefix.last_hidden for prefix in prefixes]),
        torch.cat([padded(prefix.attention_mask) for prefix in prefixes]),
        torch.cat([prefix.next_position for prefix in prefixes]),
    )
