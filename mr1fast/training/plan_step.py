"""The trainer's own step, run on tensors without numbers, so that plan.py can say what it holds in memory.

Stand-ins are only: prompts as long as they may be, of words without meaning; a sampler that goes through the last token
of its completions; the kernels of the loss head; and, from the third piece of a step on, the results of the second.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mr1fast.data.example import Example
from mr1fast.kernels import dispatch, linear, linear_op
from mr1fast.model.checks import VISION_TOKENS
from mr1fast.model.load import PROMPT_SUFFIX
from mr1fast.model.policy import Policy
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.model.rollout import Rollout, Sampler
from mr1fast.training import trainer as trainer_module
from mr1fast.training.plan import StepShape
from mr1fast.training.sized import MemoryTracker, without_numbers
from mr1fast.training.trainer import Trainer, needs_reference

_CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def measure(shape: StepShape) -> tuple[Trainer, dict[str, dict[str, int]]]:
    """(trainer without numbers, bytes of each phase by category when they are most)."""
    vocabulary = shape.model.get_text_config().vocab_size
    tracker = MemoryTracker(opened=_OPENED, skipped="mr1fast_native", vocabulary=vocabulary)
    model, reference = build_models(shape, "meta")
    for category, built in {"weights": model, "reference": None if reference is model else reference}.items():
        if built is not None:
            without_numbers(built)
            tracker.label([*built.parameters(), *built.buffers()], category)
    with _loss_head_of(shape.device), _pieces_alike(), tracker:
        trainer = build_trainer(shape, model, reference)
        _label_training(trainer, tracker, has_images=shape.image_pixels is not None)
        _follow(trainer, tracker)
        tracker.begin("prompts" if shape.config.method == "sft" else "rollout")
        trainer.step()
    return trainer, {phase: dict(held) for phase, held in tracker.peaks.items()}


def build_models(shape: StepShape, device: str) -> tuple[Any, Any]:
    """(model, reference) with random weights; the reference may be the model itself, or None."""

    def build() -> Any:
        with torch.device(device):
            return Qwen2VLForConditionalGeneration._from_config(
                shape.model, dtype=getattr(torch, shape.dtype), attn_implementation="sdpa"
            )

    model = build()
    for name, weight in model.named_parameters():
        if ".visual." in name and ("merger" if ".visual.merger." in name else "vision") in shape.freeze:
            weight.requires_grad_(False)
    if shape.lora_rank is not None:
        from peft import LoraConfig, get_peft_model

        with torch.device(device):
            model = get_peft_model(model, LoraConfig(r=shape.lora_rank, target_modules=list(shape.lora_targets)))
    if shape.reference == "shared":
        return model, model
    return model, None if shape.reference == "none" else build()


def build_trainer(shape: StepShape, model: Any, reference: Any) -> Trainer:
    processor = build_processor(shape)
    with_reference = reference is not None and shape.config.method != "sft" and needs_reference(shape.config)
    return Trainer(
        shape.config, Policy(model, processor), Policy(reference, processor) if with_reference else None, Prompts(shape)
    )


def build_processor(shape: StepShape) -> Qwen2VLTextImageProcessor:
    """A tokenizer of words and the image processor that fits the model."""
    config, vision = shape.model, shape.model.vision_config
    ids = {token: getattr(config, field) for field, token in VISION_TOKENS.items()}
    free = (i for i in range(config.get_text_config().vocab_size) if i not in set(ids.values()))
    ids |= {token: next(free) for token in ("<|im_end|>", "<|endoftext|>", "w")}
    backend = Tokenizer(WordLevel(ids, unk_token="w"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_tokens([AddedToken(token, special=True) for token in ids if token != "w"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": 1, "longest_edge": shape.image_pixels or 2**24},
    )
    return Qwen2VLTextImageProcessor(images, tokenizer, chat_template=_CHAT_TEMPLATE)


class Prompts:
    """A data set in which every prompt is as long as it may be."""

    name = "prompts"

    def __init__(self, shape: StepShape):
        vision = shape.model.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        self.image = None if shape.image_pixels is None else Image.new("RGB", _largest(shape.image_pixels, side))
        words = shape.text_tokens - len(PROMPT_SUFFIX.split()) - (2 if self.image else 0)  # an image has two markers
        self.problem = " ".join("w" * max(words, 1))
        # A target of supervised fine-tuning has the solution twice, between tags of a word each, and its end.
        self.solution = " ".join("w" * max((shape.config.max_completion_length - 1) // 2, 1))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        return Example(self.image, self.problem, self.solution, str(index))


def _largest(pixels: int, side: int) -> tuple[int, int]:
    """(width, height) of the image with most tokens of side x side pixels, no wider than it must be for that."""
    tokens = max(pixels // side**2, 1)
    heights = range(math.isqrt(tokens), max(math.isqrt(tokens // 2), 1) - 1, -1)
    height = max(heights, key=lambda height: height * (tokens // height))
    return tokens // height * side, height * side


# ---- what memory is for ---------------------------------------------------------------------------------------------


def _label_training(trainer: Trainer, tracker: MemoryTracker, has_images: bool) -> None:
    """Masters, moments and gradients. AdamW makes its moments in its first step; the step that is measured is later."""
    optimizer = trainer.optimizer
    tracker.label((m for w, m in zip(optimizer.weights, optimizer.masters) if m is not w), "masters")
    for name, weight in trainer.policy.model.named_parameters():
        if weight.requires_grad and (has_images or ".visual." not in name):
            weight.register_post_accumulate_grad_hook(lambda weight: tracker.label([weight.grad], "gradients"))
            weight.grad = torch.empty_like(weight)
    optimizer.step(0.0)
    tracker.label((t for state in optimizer.adamw.state.values() for t in state.values()), "moments")


def _follow(trainer: Trainer, tracker: MemoryTracker) -> None:
    """Tell the tracker where the phases of a step begin."""
    length = trainer.config.max_completion_length
    sampler = _LastTokenSampler(trainer.policy, max_completion_length=length, generator=trainer.generator)
    sampler.tracker = tracker
    trainer.sampler = sampler
    at_phases(trainer, lambda phase: tracker.begin(phase, "gradients" if phase == "optimizer" else "activations"))


def at_phases(trainer: Trainer, begin: Callable[[str], None]) -> None:
    """Call `begin` where the phases of the next step begin but for the first, in which prompts are completed."""

    def before(owner: Any, method: str, phase: str) -> None:
        original = getattr(owner, method)

        @wraps(original)
        def wrapped(*args, **kwargs):
            setattr(owner, method, original)
            begin(phase)
            return original(*args, **kwargs)

        setattr(owner, method, wrapped)

    if trainer.reference is not None:
        before(trainer.reference, "encode_prefix", "reference")
    before(trainer, "update", "policy")
    before(trainer.optimizer, "step", "optimizer")


class _LastTokenSampler(Sampler):
    """Gives completions that all differ and are as long as they may be, of whose tokens it only runs the last."""

    tracker: MemoryTracker

    @torch.no_grad()
    def generate(self, examples, *, num_generations=1, temperature=1.0, prefix=None) -> Rollout:
        policy, L = self.policy, self.max_completion_length
        prefix = prefix or policy.encode_prefix(policy.encode(examples))
        self._label(tensor for pair in prefix.key_values for tensor in pair)
        prefix = prefix.take(prefix.prompts_of(len(prefix.last_hidden) * num_generations))
        self._label(tensor for pair in prefix.key_values for tensor in pair)
        cache: Any = prefix.cache(room=L)
        self._label(buffer for layer in cache.layers for buffer in layer.buffers)
        hidden, B = prefix.last_hidden, len(prefix.last_hidden)
        base = min(policy.head_weight.shape[0], 100)
        digits = torch.tensor([base**t for t in range(min(L, 4))])
        ids = torch.nn.functional.pad(torch.arange(B)[:, None] // digits % base, (0, L - len(digits)))
        if L > 1:
            for layer in cache.layers:
                layer.length += L - 2
            hidden = policy.extend(prefix, cache, ids[:, -1:], L - 2)[:, 0]
        all_logps = (policy.logits(hidden).float() / temperature).log_softmax(-1)
        self._choose(all_logps, temperature)
        return Rollout(ids, torch.ones(B, L, dtype=torch.bool), torch.zeros(B, L), [""] * B)

    def _label(self, tensors: Iterator[Tensor]) -> None:
        self.tracker.label(tensors, "key-value cache")


# ---- the loss head --------------------------------------------------------------------------------------------------

# The registered ops of the loss head hide what they allocate.
_OPENED: dict[Any, Callable] = {
    torch.ops.mr1fast.linear_grpo_loss.default: linear_op.linear_grpo_op._init_fn,
    torch.ops.mr1fast.linear_score.default: linear_op.linear_score_op._init_fn,
    torch.ops.mr1fast.linear_score_backward.default: linear_op.linear_score_backward_op._init_fn,
}


def _grpo_forward(logits, batch, spec, grad) -> tuple[Tensor | None, ...]:
    """See `dispatch.Backend`; every row has a gradient."""
    flags = [torch.ones(batch.ids.shape, dtype=torch.bool) for _ in range(2)]
    loss, logps, entropies, kl, coef = (torch.ones(batch.ids.shape) for _ in range(5))
    return torch.ones(()), loss, logps, entropies, None if batch.ref_logps is None else kl, *flags, coef


def _score_forward(logits, ids, mask, temperature) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(ids.shape), torch.ones(ids.shape), torch.ones(ids.shape)


_NO_KERNELS = dispatch.Backend("plan", lambda _: None, _grpo_forward, _score_forward, lambda *_: None)


@contextmanager
def _loss_head_of(device: str) -> Iterator[None]:
    """The loss head without kernels, in blocks of the size that they have on this device."""
    kind = "cpu" if device == "cpu" else "gpu"
    backends, chunk_bytes, min_rows = dispatch.BACKENDS, linear.CHUNK_BYTES["cpu"], linear.MIN_ROWS["cpu"]
    dispatch.BACKENDS = (_NO_KERNELS,)
    linear.CHUNK_BYTES["cpu"], linear.MIN_ROWS["cpu"] = linear.CHUNK_BYTES[kind], linear.MIN_ROWS[kind]
    try:
        yield
    finally:
        dispatch.BACKENDS = backends
        linear.CHUNK_BYTES["cpu"], linear.MIN_ROWS["cpu"] = chunk_bytes, min_rows


# ---- pieces ---------------------------------------------------------------------------------------------------------


@contextmanager
def _pieces_alike() -> Iterator[None]:
    """The pieces of a step are equally large: the first has no gradients before it, and the second is as all others."""
    names = ("batch_logps", "grpo_batch_loss", "sft_batch_loss")
    functions = {name: getattr(trainer_module, name) for name in names}
    for name, function in functions.items():
        setattr(trainer_module, name, _first_two(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(trainer_module, name, function)


def _first_two(function: Callable) -> Callable:
    results: list[Any] = []

    @wraps(function)
    def call(*args, **kwargs):
        if len(results) < 2:
            result = function(*args, **kwargs)
            results.append(_cut_off(result))
            return result
        return _cut_off(results[-1])

    return call


def _cut_off(result: Any) -> Any:
    """A loss, or log-probabilities, of which there is nothing to differentiate."""
    if isinstance(result, Tensor):
        return result.detach().requires_grad_(torch.is_grad_enabled())
    return dataclasses.replace(result, loss=_cut_off(result.loss))
