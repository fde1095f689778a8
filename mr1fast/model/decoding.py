"""Completions of which each takes one token at a time: their keys and values, and the attention to them.

A prompt's keys and values are read where they lie, by all of its completions at once, and are neither copied nor
repeated: the queries of a group stand one below the other, as if the prompt had as many tokens to complete. A
completion's own keys and values are a second part; the two results are combined by their log-sum-exp.

The model calls `Decoding.update` and `attend` through two interfaces of transformers (tested with 5.17 to 5.23): the
cache, and the registry of attention functions.

Shapes: P prompts of T tokens (padded on the left), N completions, those of a prompt adjacent, H hidden; K key-value
heads with R heads of queries each, of width D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mr1fast.model.prefix import Prefix

ATTENTION = "mr1fast_decode"  # its name among transformers' attention implementations


class Decoding:
    """Keys and values of N completions, to which `Policy.decode` adds a token each at a time.

    static: all tensors stay where they are and as large as they are from token to token, and no number is taken from
    them, so that a step can be captured as a CUDA graph. Otherwise attention reads only what has been written.
    """

    def __init__(self, prefix: Prefix, prompts: Tensor, *, room: int, static: bool = False):
        """prompts: [N] int64, whose completions they are. room: for so many tokens of each."""
        self.prefix, self.static, self.length = prefix, static, 0
        self.place = torch.zeros(1, dtype=torch.long, device=prompts.device)  # `length`, for the device
        self.padded = not bool(prefix.attention_mask.all())
        self.biases: dict[int | None, tuple[Tensor | None, Tensor | None]] = {}  # of this token, for each window
        self.position = prefix.next_position[prompts]  # [N], M-RoPE's of the next token
        N = len(prompts)
        self.buffers = [
            [self._empty(tensor, N, room) for tensor in pair] for pair in prefix.key_values
        ]  # [N, K, room, D] of each layer
        self._group(prompts)

    @property
    def room(self) -> int:
        return self.buffers[0][0].shape[2]

    def resize(self, rows: Tensor, room: int) -> None:
        """Keep these completions [M] int64, in order, and make room for so many tokens of each."""
        self.position = self.position[rows]
        for pair in self.buffers:  # one after the other, so that there is no second copy of all of them
            for i, old in enumerate(pair):
                pair[i] = self._empty(old, len(rows), room)
                pair[i][:, :, : self.length] = old[:, :, : self.length].index_select(0, rows)
        self._group(self.prompts[rows])

    def _empty(self, like: Tensor, N: int, room: int) -> Tensor:
        """[N, K, room, D]. Zeros where it is read before it is written: its weights are 0, and 0 * NaN would be NaN."""
        size = N, like.shape[1], room, like.shape[3]
        return like.new_zeros(size) if self.static else like.new_empty(size)

    def _group(self, prompts: Tensor) -> None:
        """Arrange the completions for the attention to their prompts: [P, most completions of a prompt]."""
        used, prompts, sizes = prompts.unique_consecutive(return_inverse=True, return_counts=True)
        if 2 * len(used) <= len(self.prefix.next_position):  # else what it saves is less than what it takes to copy
            self.prefix = self.prefix.take(used)
        else:
            sizes = torch.zeros_like(self.prefix.next_position).index_copy_(0, used, sizes)
            prompts = used[prompts]
        self.prompts, self.group = prompts, int(sizes.max())
        self.slots = self.slot_of = None
        if int(sizes.min()) < self.group:  # a prompt with fewer completions has any others in the places that are left
            place = torch.arange(len(prompts), device=prompts.device)
            self.slot_of = prompts * self.group + place - (sizes.cumsum(0) - sizes)[prompts]
            self.slots = place.new_zeros(len(sizes) * self.group).index_copy_(0, self.slot_of, place)

    # ---- in the model -----------------------------------------------------------------------------------------------

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take up a token's keys and values [N, K, 1, D]. Returns those of all tokens."""
        pair = self.buffers[layer]
        for buffer, new in zip(pair, (keys, values)):
            if self.static:
                buffer.index_copy_(2, self.place, new)
            else:
                buffer[:, :, self.length : self.length + 1] = new
        if self.static:
            return pair[0], pair[1]
        return pair[0][:, :, : self.length + 1], pair[1][:, :, : self.length + 1]

    def advance(self) -> None:
        """To the next token, on the device."""
        self.place += 1
        self.position += 1

    def attend(self, layer: int, query: Tensor, own: tuple[Tensor, Tensor], scale: float, window: int | None) -> Tensor:
        """The attention [N, K, R, D] of a token to its prompt and to its completion; query: [N, K * R, 1, D]."""
        prompt = self.prefix.key_values[layer]
        P, K, T, D = prompt[0].shape
        query = query.view(len(query), K, -1, D)
        N, R = len(query), query.shape[2]
        slots = query if self.slots is None else query.index_select(0, self.slots)
        grouped = slots.view(P, self.group, K, R, D).transpose(1, 2).reshape(P, K, -1, D)
        if layer == 0:
            self.biases.clear()
        if window not in self.biases:  # all layers of a window have the same
            room = own[0].shape[2]
            self.biases[window] = self._prompt_bias(query, T, window), self._own_bias(query, room, window)
        bias, bias_own = self.biases[window]
        found, weight = attention(grouped, *prompt, bias, scale)
        found = found.reshape(P, K, self.group, R, D).transpose(1, 2).reshape(-1, K, R, D)
        weight = weight.reshape(P, K, self.group, R).transpose(1, 2).reshape(-1, K, R)
        if self.slot_of is not None:
            found, weight = (each.index_select(0, self.slot_of) for each in (found, weight))
        found_own, weight_own = attention(query, *own, bias_own, scale)
        share = torch.sigmoid(weight_own.view(N, K, R) - weight)  # e^own / (e^own + e^prompt)
        return torch.lerp(found, found_own, share.to(found.dtype)[..., None])

    def _prompt_bias(self, like: Tensor, T: int, window: int | None) -> Tensor | None:
        """[P or 1, 1, 1, T]: very low where a prompt is padded, or too far behind; None if it is nowhere."""
        hidden = ~self.prefix.attention_mask if self.padded else None
        if window is not None:
            far = torch.arange(T, device=like.device)[None] <= T + self.place - window
            hidden = far if hidden is None else hidden | far
        return None if hidden is None else _bias(hidden, like)

    def _own_bias(self, like: Tensor, room: int, window: int | None) -> Tensor | None:
        """[1, 1, 1, room]: very low where a buffer has not been written, or is too far behind."""
        if not self.static and window is None:
            return None
        place = torch.arange(room, device=like.device)[None]
        hidden = place > self.place
        return _bias(hidden if window is None else hidden | (place <= self.place - window), like)


def _bias(hidden: Tensor, like: Tensor) -> Tensor:
    """Not -inf, which would make NaN of a query from which everything is hidden; its share is 0 in the end.

    Between rows lie a multiple of 16 bytes, which the attention on a GPU wants.
    """
    rows, keys = hidden.shape
    bias = torch.zeros(rows, -(-keys // 8) * 8, dtype=like.dtype, device=like.device)[:, :keys]
    return bias.masked_fill_(hidden, torch.finfo(like.dtype).min / 2)[:, None, None]


def attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(attention [B, K, Q, D], log-sum-exp [B, K, Q] of the scores, float32 at least); bias: [B or 1, 1, 1, keys]."""
    B, K, Q, _ = query.shape
    if query.device.type == "cpu":
        bias = None if bias is None else bias.expand(B, 1, Q, -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=bias, scale=scale
        )
    if query.device.type == "cuda":  # one kernel in the place of fifteen, which for few queries take longer to start
        bias = None if bias is None else bias.expand(B, K, Q, -1)
        found, weight, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, values, bias, compute_log_sumexp=True, scale=scale
        )
        return found, weight[:, :, :Q]  # it has a multiple of 32
    return plain_attention(query, keys, values, bias, scale)


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`attention` in torch's public operations, for other devices and for the planner's tensors without numbers."""
    scores = (query @ keys.transpose(2, 3)).float() * scale
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).to(values.dtype) @ values, scores.logsumexp(-1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    decoding: Decoding,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer, in the place of its own attention."""
    found = decoding.attend(module.layer_idx, query, (key, value), scaling, sliding_window)  # type: ignore[arg-type]
    return found.flatten(1)[:, None], None


AttentionInterface.register(ATTENTION, attend)
