"""The policy: a model and its processor. Only this file knows how such a model is built inside.

Each prompt, with its image, runs once for all of its completions: to sample them (`encode_prefix` and `next_hidden`)
and, again or with what is left of that, to find their log-probabilities (`completion_hidden`). That is exact, with
gradients: completions attend to the prompt's keys and values, and a gradient flows back through them into prompt and
vision tower.

Shapes: P prompts of T tokens (padded on the left), G completions each, B = P * G with the completions of a prompt
adjacent, L tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.model.adapter import merged, save_adapter, without_adapter
from mr1fast.model.checks import VISION_TOKENS, check_fit, check_image_tokens
from mr1fast.model.decoding import ATTENTION, Decoding
from mr1fast.model.family import Model, known
from mr1fast.model.hooks import attention_of
from mr1fast.model.passes import packed_hidden, plain_hidden
from mr1fast.model.patches import multiply_patches
from mr1fast.model.prefix import Prefix
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.model.prompts import encode_prompts, end_of_turn
from mr1fast.model.save import make_readable, save_model, save_processor
from mr1fast.model.varlen import kernel_for


class Policy:
    """A model with its processor.

    model: of FAMILIES, or a PeftModel on one whose adapters are layers within it (LoRA and its kin). Raises UserError
    for another model, or if model and processor do not match.
    """

    def __init__(self, model: nn.Module, processor: Qwen2VLTextImageProcessor):
        self.model: Any = model
        self.processor = processor
        self._base = _base_model(model)
        multiply_patches(self._base.model.visual)
        # How its layers are run, and within what each process has all weights: training.sharding changes these.
        self.body: Callable[..., Any] = self._base.model
        self.gathered: Callable[[], AbstractContextManager[None]] = nullcontext
        self.release: Callable[[], None] = lambda: None  # gives up what a pass without backward has left gathered
        self._head = _head(self._base)
        check_fit(self._base.config, processor)
        ends = _end_ids(self._base, processor)
        self.pad_id: int = processor.tokenizer.pad_token_id
        config, device = self._base.config, self._base.device
        # Images in an answer have no pixels, padding is no answer, and the last rows of the head are no tokens.
        banned = {getattr(config, field) for field in VISION_TOKENS}
        banned |= {self.pad_id, *range(len(processor.tokenizer), config.get_text_config().vocab_size)}
        # How `completion_hidden` runs: a packed row cannot be told from its windows.
        self.shares_prefix = not self._base.model.language_model.has_sliding_layers
        self.checkpointing = False  # whether layers run again in backward instead of keeping their activations
        self.end_ids = torch.tensor(ends, device=device)  # [N] int64: any of them ends a completion; the first, a turn
        self.banned_ids = torch.tensor(sorted(banned - {*ends}), device=device)  # never sampled

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are divided among processes."""
        return self.body is not self._base.model

    @property
    def base(self) -> Model:
        """The model without the adapter, if it has one, which is in its layers."""
        return self._base

    @property
    def layers(self) -> list[nn.Module]:
        """Of the language model, from the first."""
        return list(self._base.model.language_model.layers)

    @property
    def device(self) -> torch.device:
        return self._base.device

    def freeze(self) -> Policy:
        """Switch off gradients and dropout for good, as a reference needs it. Returns the policy itself."""
        self.model.eval().requires_grad_(False)
        return self

    def offload(self) -> Policy:
        """Keep the model in the CPU's memory; `on` lends it to a device. Returns the policy itself."""
        self.model.to("cpu")
        return self

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Within the context the model is on this device, then where it was before; its weights must not change."""
        home = self.device
        if device == home:
            yield
            return
        weights = [(weight, weight.data) for weight in self.model.parameters()]
        self.model.to(device)
        try:
            yield
        finally:
            for weight, data in weights:  # what was copied is still there, and need not be copied back
                weight.data = data
            self.model.to(home)  # the buffers

    def freeze_parts(self, parts: Iterable[str]) -> Policy:
        """Do not train these parts, nor adapters on their layers. Layers before the first trained one need no graph."""
        for weight in self.weights_of(parts):
            weight.requires_grad_(False)
        return self

    def weights_of(self, parts: Iterable[str]) -> set[nn.Parameter]:
        """The weights of these PARTS: vision (the tower), merger (its last layers), language (with the head)."""
        visual = self._base.model.visual
        merger = set(visual.merger.parameters())
        weights = {
            "vision": set(visual.parameters()) - merger,
            "merger": merger,
            "language": {*self._base.model.language_model.parameters(), self._head.weight},
        }
        return {weight for part in parts for weight in weights[part]}

    @property
    def has_adapter(self) -> bool:
        return self.model is not self._base

    def without_adapter(self) -> AbstractContextManager[None]:
        """Within the context the policy computes what the base under its adapter does."""
        return without_adapter(self.model)

    def merge(self) -> Policy:
        """A policy that has the adapter in its weights, an ordinary Qwen2-VL. This one cannot be used any more."""
        return Policy(merged(self.model), self.processor)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        """Model (if it has an adapter, only that) and processor in Hugging Face format, as `load_model` reads them.

        Of a sharded policy within `gathered`.
        """
        # Of a sharded model, state_dict() would be that of its parts.
        weights = dict(self.model.named_parameters(remove_duplicate=False)) if self.is_sharded else None
        if self.has_adapter:
            save_adapter(self.model, folder, weights)
        else:
            save_model(self.model, folder, weights)
        self.save_processor(folder)

    def save_processor(self, folder: Path) -> None:
        """What stands beside a model's weights: the processor, and the prompt if it is not the usual one."""
        save_processor(self.processor, folder, self._base.config.model_type)
        make_readable(folder)
        self.processor.prompt.record(folder)

    # ---- text and tokens --------------------------------------------------------------------------------------------

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Inputs of P prompts on the model's device: `place(encode_prompts(...))`."""
        return self.place(encode_prompts(self.processor, examples))

    def place(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`encode_prompts` on the model's device, with M-RoPE's position_ids [P, 3, T] and next_position [P], int64.

        Raises UserError where image tokens and images do not match.
        """
        check_image_tokens(inputs, self._base.config)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        mask = inputs["attention_mask"]
        positions, deltas = self._base.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=mask,
        )
        next_position = mask.sum(1) + deltas.flatten().to(mask.device)
        return inputs | {"position_ids": positions.transpose(0, 1), "next_position": next_position}

    def encode_completions(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """completion_ids [B, L] int64 and completion_mask [B, L] bool of given texts, each with the end of its turn."""
        tokenizer, end = self.processor.tokenizer, int(self.end_ids[0])
        rows = [torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], end]) for text in texts]
        pad = nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_value=self.pad_id)
        mask = pad([torch.ones_like(row).bool() for row in rows], batch_first=True)
        return ids.to(self.device), mask.to(self.device)

    def decode(self, completion_ids: Tensor, completion_mask: Tensor) -> list[str]:
        """The completions [B, L] as text, without the token that ended them.

        Not skip_special_tokens=True, which removes <think> and <answer> from models that registered them as special.
        """
        kept = completion_mask & ~torch.isin(completion_ids, self.end_ids)
        rows = zip(completion_ids.tolist(), kept.tolist())  # rows of tensors would take four times as long
        return [self.processor.tokenizer.decode([*compress(row, keep)]) for row, keep in rows]

    # ---- forward ----------------------------------------------------------------------------------------------------

    @property
    def head_weight(self) -> Tensor:
        """The weight [V, H] of the language-model head, which has no bias."""
        return self._head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H]."""
        return self._head(hidden)

    def encode_prefix(self, inputs: dict[str, Tensor]) -> Prefix:
        """Run prompts, of `encode` or `place`, through vision tower and language model."""
        cache = DynamicCache()
        hidden = self.body(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"].transpose(0, 1),
            past_key_values=cache,
            pixel_values=inputs.get("pixel_values"),
            image_grid_thw=inputs.get("image_grid_thw"),
        ).last_hidden_state
        key_values = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]
        return Prefix(key_values, hidden[:, -1], inputs["attention_mask"].bool(), inputs["next_position"])  # type: ignore[arg-type]

    def next_hidden(self, decoding: Decoding, ids: Tensor) -> Tensor:
        """Hidden states [N, H] after the completions' next tokens `ids` [N], which `decoding` takes up.

        Without gradients, and without anything that waits for the device.
        """
        language_model = self._base.model.language_model
        with attention_of(language_model.config, ATTENTION):
            hidden = language_model(
                input_ids=ids[:, None],
                attention_mask=dict.fromkeys(
                    ("full_attention", "sliding_attention")
                ),  # `decoding` knows what is hidden
                position_ids=decoding.position[:, None].expand(3, -1, 1),
                past_key_values=decoding,
                decoding=decoding,
            ).last_hidden_state
        decoding.advance()
        return hidden[:, 0]

    def completion_hidden(
        self,
        inputs: dict[str, Tensor],
        completion_ids: Tensor,
        completion_mask: Tensor,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Hidden states [N, H], each of which predicts one of the N tokens of `completion_ids` [B, L] that count.

        inputs: of `place`, for the P prompts of the B completions. completion_mask: [B, L], which tokens count; the
        order is that of the completions, one after another. Differentiable. prefix: of these prompts, if they have run
        and share it; they do not run again, and a gradient reaches them through its graph.
        """
        given = self._base, self.body, inputs, completion_ids, completion_mask
        if self.shares_prefix:
            return packed_hidden(*given, prefix, checkpointing=self.checkpointing)
        return plain_hidden(*given, checkpointing=self.checkpointing)

    def describe_pass(self, *, share_prefix: bool = True) -> str:
        """What `completion_hidden` does with these weights, if it shares prefixes where it can."""
        if not (share_prefix and self.shares_prefix):
            return "each completion with its prompt, padded"
        model, language = self._base, self._base.config.get_text_config()
        kernel = kernel_for(model.device, model.dtype, eager=language._attn_implementation == "eager")
        return f"prompts and completions in one packed row, {kernel.name}"


def _base_model(model: Any) -> Model:
    """The model itself, into whose layers PEFT has put those of an adapter, if there is one."""
    if (adapter := getattr(model, "active_peft_config", None)) is not None:
        if adapter.is_prompt_learning:
            raise UserError(f"adapters of type {adapter.peft_type.value} cannot be trained here; use LoRA")
        model = model.get_base_model()
    if not isinstance(model, Model):
        raise UserError(f"a {type(model).__name__} cannot be trained here: it is {known()}")
    return model


def _head(model: Model) -> nn.Linear:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:  # the loss takes its weight, and would not see the adapter's
        raise UserError(
            "an adapter on the language-model head (lm_head) cannot be trained here; leave lm_head out of it"
        )
    return head


def _end_ids(model: Model, processor: Qwen2VLTextImageProcessor) -> list[int]:
    """The ids that end a completion: the chat template's end of a turn, the generation config's and the tokenizer's."""
    named = model.generation_config.eos_token_id
    named = model.config.get_text_config().eos_token_id if named is None else named
    ends = [end_of_turn(processor), *(named if isinstance(named, list) else [named]), processor.tokenizer.eos_token_id]
    found = list(dict.fromkeys(end for end in ends if end is not None))
    if not found:
        raise UserError(
            "neither generation_config.json nor the tokenizer names an eos token, so no completion would end"
        )
    return found
