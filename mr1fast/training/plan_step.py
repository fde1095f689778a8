"""The trainer's own step, run on tensors without numbers, so that plan.py can say what it holds in memory.

There are stand-ins for five things: for data, prompts of one length; for images, patches; for sampling, the last token
of each completion; for the kernels of the loss head, nothing; and for all pieces of a step, the first.
benchmarks/plan_check.py runs the same step with true weights to compare.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.losses.sizes import BEHIND_OPS, IN_PLACE, loss_head_of
from mr1fast.model.adapter import add_adapter
from mr1fast.model.checks import VISION_TOKENS
from mr1fast.model.decoding import Decoding
from mr1fast.model.family import family
from mr1fast.model.load import EMBEDDED, load_processor
from mr1fast.model.policy import Policy
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.model.prompts import prompt_length
from mr1fast.model.rollout import Rollout, Sampler
from mr1fast.model.sampling import Choice
from mr1fast.training import trainer as trainer_module
from mr1fast.training.plan import StepShape
from mr1fast.training.sized import MemoryTracker
from mr1fast.training.trainer import Trainer, sft_target


def measure(shape: StepShape) -> tuple[Trainer, dict[str, dict[str, int]]]:
    """(trainer without numbers, phase -> category -> bytes at the moment when the phase holds most)."""
    vocabulary = shape.model.get_text_config().vocab_size
    tracker = MemoryTracker(opened=BEHIND_OPS, skipped=IN_PLACE, vocabulary=vocabulary)
    model, reference = build_models(shape, "meta")
    tracker.take_numbers(model, "weights")
    if reference is not None:
        tracker.take_numbers(reference, "reference")
    with loss_head_of(shape.device), patch.object(trainer_module, "split_batch", _first_piece), tracker:
        trainer = build_trainer(shape, model, reference, _Patches)
        _label_training(trainer, tracker)
        length = shape.task.max_completion_length
        trainer.sampler = _LastTokenSampler(trainer.policy, max_completion_length=length)
        trainer.sampler.tracker = tracker

        def begin(phase: str) -> None:
            if phase == "rewards":  # they hold nothing
                return
            tracker.begin(phase, "gradients" if phase == "optimizer" else "activations")
            if phase == "policy" and shape.task.gradient_accumulation_steps > 1:  # those of the pieces before
                for weight in trainer.policy.trainable_parameters():
                    weight.grad = torch.empty_like(weight)
                    tracker.label([weight.grad], "gradients")

        trainer.phases.on_begin = begin
        trainer.step()
    return trainer, {phase: dict(held) for phase, held in tracker.peaks.items()}


# ---- the step -------------------------------------------------------------------------------------------------------


def build_models(shape: StepShape, device: str) -> tuple[Any, Any]:
    """(model, reference) with random weights; no reference if it is not needed, or has the weights of the model."""
    config, own = copy.deepcopy(shape.model), load_processor(EMBEDDED).tokenizer
    for field, token in VISION_TOKENS.items():  # the tokenizer is that of the embedded model
        setattr(config, field, own.convert_tokens_to_ids(token))
    text, options = config.get_text_config(), shape.options
    text.eos_token_id, text.vocab_size = own.eos_token_id, max(text.vocab_size, len(own))
    kind: Any = family("", config.model_type).model_class
    attention = "eager" if options.attention == "eager" else "sdpa"  # FlashAttention needs a GPU, and holds as much

    def build() -> Any:
        with torch.device(device):
            return kind._from_config(config, dtype=getattr(torch, shape.dtype), attn_implementation=attention)

    model = build()
    model.name_or_path = "model"  # PEFT wants one
    reference = build() if shape.reference == "own" else None
    if options.lora_rank is not None:
        with torch.device(device):
            model = add_adapter(model, rank=options.lora_rank, targets=options.lora_target_names)
    return model, reference


def build_trainer(
    shape: StepShape, model: Any, reference: Any, images: type[Qwen2VLImageProcessorPil] = Qwen2VLImageProcessorPil
) -> Trainer:
    vision, processor = shape.model.vision_config, load_processor(EMBEDDED)
    processor.tokenizer.model_max_length = sys.maxsize  # no warning: it is that of the embedded model
    processor.image_processor = images(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": 1, "longest_edge": shape.image_pixels},
    )
    policy = Policy(model, processor).freeze_parts(shape.options.frozen_parts)
    if not policy.trainable_parameters():
        raise UserError(f"--freeze {shape.options.freeze} leaves nothing to train")
    others = {"none": None, "shared": policy, "own": reference and Policy(reference, processor).freeze()}
    # Its completions all have the same reward, and none of them ends.
    task = dataclasses.replace(shape.task, dynamic_sampling=False, mask_truncated=False)
    return Trainer(task, policy, others[shape.reference], _Prompts(shape, processor))


class _Prompts:
    """A data set in which every prompt is as long as it may be. A digit is a token."""

    name = "prompts"

    def __init__(self, shape: StepShape, processor: Qwen2VLTextImageProcessor):
        vision = shape.model.vision_config
        image = Image.new("RGB", _largest(shape.image_pixels, vision.patch_size * vision.spatial_merge_size))
        without = prompt_length(processor, Example(image, "", "", "")) - shape.image_tokens
        tags = len(processor.tokenizer(sft_target(""))["input_ids"]) + 1  # the end of the turn
        problem = "1" * max(shape.text_tokens - without, 1)
        solution = "1" * max((shape.task.max_completion_length - tags) // 2, 1)
        self.example = Example(image, problem, solution, "an example", columns={"reasoning": solution})

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        return self.example


def _largest(pixels: int, side: int) -> tuple[int, int]:
    """(width, height) of the image with most tokens of side x side pixels, no wider than it must be for that."""
    tokens = max(pixels // side**2, 1)
    heights = range(math.isqrt(tokens), max(math.isqrt(tokens // 2), 1) - 1, -1)
    height = max(heights, key=lambda height: height * (tokens // height))
    return tokens // height * side, height * side


# ---- stand-ins ------------------------------------------------------------------------------------------------------


def _label_training(trainer: Trainer, tracker: MemoryTracker) -> None:
    """Masters, moments and gradients. AdamW makes its moments in its first step; the step that is measured is later."""
    optimizer = trainer.optimizer
    tracker.label((m for w, m in zip(optimizer.weights, optimizer.masters) if m is not w), "masters")
    for weight in optimizer.weights:
        weight.register_post_accumulate_grad_hook(lambda weight: tracker.label([weight.grad], "gradients"))
        weight.grad = torch.empty_like(weight)
    optimizer.step(0.0)
    tracker.label((t for state in optimizer.adamw.state.values() for t in state.values()), "moments")


_split_batch = trainer_module.split_batch


def _first_piece(batch: Any, pieces: int) -> list[Any]:
    """In the place of `split_batch`: the pieces are equally large, and all but their gradients is freed after each."""
    return _split_batch(batch, pieces)[:1]


class _Patches(Qwen2VLImageProcessorPil):
    """Images of one size as patches without numbers."""

    def preprocess(self, images: Any, *_: Any, **__: Any) -> BatchFeature:
        (width, height), side = images[0].size, self.patch_size
        grid = [1, height // side, width // side]
        patches = torch.empty(len(images) * math.prod(grid), 3 * self.temporal_patch_size * side**2)
        return BatchFeature({"pixel_values": patches, "image_grid_thw": torch.tensor([grid] * len(images))})


class _LastTokenSampler(Sampler):
    """Returns completions that all differ and are as long as they may be, of whose tokens it only runs the last."""

    tracker: MemoryTracker

    @torch.no_grad()
    def generate(
        self, examples, *, num_generations=1, temperature=1.0, top_k=0, top_p=1.0, prefix=None, streams=None
    ) -> Rollout:
        policy, L = self.policy, self.max_completion_length
        self._label(tensor for pair in prefix.key_values for tensor in pair)
        prompts = prefix.prompts_of(len(prefix.last_hidden) * num_generations)
        decoding, B = Decoding(prefix, prompts, room=L), len(prompts)
        self._label(buffer for pair in decoding.buffers for buffer in pair)
        digits = torch.tensor([300**t for t in range(min(L, 4))])
        ids = torch.nn.functional.pad(torch.arange(B)[:, None] // digits % 300, (0, L - len(digits)))
        hidden = prefix.last_hidden[prompts]
        if L > 1:
            decoding.length = L - 2
            hidden = policy.next_hidden(decoding, ids[:, -1])
        choice = Choice(policy.banned_ids, temperature, top_k, top_p)
        choice.of(policy.logits(hidden), torch.zeros(B, dtype=torch.float64))
        # Without log-probabilities, which would have to fit those of a single piece.
        return Rollout(ids, torch.ones(B, L, dtype=torch.bool), None, [""] * B)  # type: ignore[arg-type]

    def _label(self, tensors: Iterable[Tensor]) -> None:
        self.tracker.label(tensors, "key-value cache")
