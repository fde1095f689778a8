"""What a step will hold in memory, said from options and config.json alone, before anything is loaded.

The figures come from the trainer's own step (plan_step.py), run on tensors that have a shape and no numbers (sized.py);
docs/memory.md says what they include. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mr1fast.options.config import TaskConfig, TrainConfig
from mr1fast.options.fields import option_string
from mr1fast.options.problem_options import PARTS

GIB = 2**30
# Held whatever the data are.
FIXED = ("weights", "reference", "masters", "moments", "gradients")
CATEGORIES = (*FIXED, "key-value cache", "logits", "activations")
# What the data decide, and the options do not: how long prompts are beside their image, and targets of fine-tuning.
TEXT_TOKENS, SFT_TOKENS = 128, 64
R1_V_PIXELS = 401_408


@dataclass(frozen=True)
class StepShape:
    """All that decides how much memory a step takes.

    model: the Qwen2VLConfig. options: of the run; name: of the task in it. dtype: of the weights, "bfloat16" or
    "float32". device: "cuda" or "cpu", by which the loss head takes larger or smaller blocks. most_pixels: to which
    the processor resizes an image. text_tokens: of a prompt, its image not counted.
    """

    model: Any
    options: TrainConfig
    name: str = "data"
    dtype: str = "bfloat16"
    device: str = "cuda"
    most_pixels: int = 28 * 28 * 1280
    text_tokens: int = TEXT_TOKENS

    @property
    def task(self) -> TaskConfig:
        """The task's options, but for rewards, which take no memory and may be the user's own programs."""
        task = dataclasses.replace(self.options.for_task(self.name), reward_weights={"format": 1.0})
        if task.method == "sft":
            return dataclasses.replace(task, max_completion_length=min(task.max_completion_length, SFT_TOKENS))
        return task

    @property
    def image_pixels(self) -> int:
        """Of the largest image, after resizing, that leaves room for the text in the longest prompt."""
        vision, text = self.model.vision_config, self.model.get_text_config()
        longest = self.options.max_prompt_length or text.max_position_embeddings - self.task.max_completion_length
        token = (vision.patch_size * vision.spatial_merge_size) ** 2
        most = self.options.max_pixels or self.most_pixels
        return max(min(most, (longest - self.text_tokens) * token), token)

    @property
    def image_tokens(self) -> int:
        vision = self.model.vision_config
        return self.image_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2

    @property
    def reference(self) -> str:
        """ "own" weights; "shared": the model without its adapter; or "none", as there is no KL term."""
        if not self.task.needs_reference:
            return "none"
        return "shared" if self.options.trains_adapter and self.options.reference_model is None else "own"


@dataclass(frozen=True)
class Plan:
    """What a step holds: in each phase, the bytes of each category at the moment when the phase holds most.

    offload_reference: whether the reference is to wait on the CPU while its log-probabilities are not computed.
    """

    parameters: int
    trainable: int
    phases: dict[str, dict[str, int]]
    offload_reference: bool = False

    @property
    def peak(self) -> int:
        """Bytes, at most: prompts and completions need not be as long as they may be."""
        return max(sum(held.values()) for held in self.phases.values())

    @property
    def least(self) -> int:
        """Bytes that are held however short prompts and completions are."""
        return max(sum(held[name] for name in FIXED) for held in self.phases.values())

    def with_reference_offloaded(self) -> Plan:
        phases = {
            phase: held if phase == "reference" else held | {"reference": 0} for phase, held in self.phases.items()
        }
        return dataclasses.replace(self, phases=phases, offload_reference=True)


def plan(shape: StepShape) -> Plan:
    """What a step holds after the first, which makes the optimizer's moments; with the reference on the device.

    Takes seconds and about 0.1 GiB, anywhere.
    """
    from mr1fast.training.plan_step import measure

    trainer, found = measure(shape)
    phases = {phase: {name: held.get(name, 0) for name in CATEGORIES} for phase, held in found.items()}
    parameters = sum(parameter.numel() for parameter in trainer.policy.model.parameters())
    trainable = sum(parameter.numel() for parameter in trainer.policy.trainable_parameters())
    return Plan(parameters, trainable, phases)


def plan_for(shape: StepShape, usable: int) -> Plan:
    """The plan for a device with so many bytes: the reference is offloaded where that makes the difference."""
    planned = plan(shape)
    if planned.peak > usable and shape.reference == "own" and shape.device != "cpu":
        offloaded = planned.with_reference_offloaded()
        return offloaded if offloaded.peak <= usable else planned
    return planned


def remedy(shape: StepShape, planned: Plan, usable: int) -> str | None:
    """Options, as they are written, with which a step fits that does not fit as `planned`; None if none do."""
    hopeless = planned.with_reference_offloaded().least > usable  # as long as as much is trained
    for written, changed in remedies(shape):
        if hopeless and _trained(changed.options) == _trained(shape.options):
            continue
        if plan_for(changed, usable).peak <= usable:
            return written
    return None


def _trained(options: TrainConfig) -> tuple:
    return options.trains_adapter, options.frozen_parts


def remedies(shape: StepShape) -> Iterator[tuple[str, StepShape]]:
    """(options, the step with them) to try: those that change the training least; with these another one; or LoRA."""
    task, options = shape.task, shape.options
    prompts, pieces = task.prompts_per_step, task.gradient_accumulation_steps
    changes: list[dict[str, Any]] = [
        {"gradient_accumulation_steps": number} for number in range(pieces + 1, prompts + 1) if prompts % number == 0
    ]
    first = changes[-1] if changes else {}
    if shape.image_pixels > R1_V_PIXELS:
        changes.append(first := first | {"max_pixels": R1_V_PIXELS})
    shorter = list(_shorter(task))
    changes += [first | change for change in (*_fewer_trained(options), *shorter)]
    if "language" not in options.frozen_parts:  # else there is no layer for the adapter
        adapted = first if options.trains_adapter else first | {"lora_rank": 16}
        for change in ({}, *shorter):
            changes.append(adapted := adapted | change)
    for change in filter(None, changes):
        written = " ".join(f"{option_string(name)} {value}" for name, value in change.items())
        yield written, dataclasses.replace(shape, options=dataclasses.replace(options, **change))


def _fewer_trained(options: TrainConfig) -> Iterator[dict[str, Any]]:
    frozen = {*options.frozen_parts, "vision"}
    if not options.trains_adapter and len(options.frozen_parts) < len(frozen) < len(PARTS):
        yield {"freeze": ",".join(part for part in PARTS if part in frozen)}


def _shorter(task: TaskConfig) -> Iterator[dict[str, Any]]:
    if task.method != "sft":
        yield {"max_completion_length": -(-task.max_completion_length // 2)}
        yield {"num_generations": max(task.num_generations // 2, 2)}
