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
    the processor resizes an image. text_tokens: of a prompt, its image not counted. sharers: processes among which
    weights and optimizer are divided (FSDP2); 1 if they are not.
    """

    model: Any
    options: TrainConfig
    name: str = "data"
    dtype: str = "bfloat16"
    device: str = "cuda"
    most_pixels: int = 28 * 28 * 1280
    text_tokens: int = TEXT_TOKENS
    sharers: int = 1

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
    def group_tokens(self) -> int:
        """Tokens of the longest prompt with its completions, as `batch.tokens_of` counts them."""
        task, merge = self.task, self.model.vision_config.spatial_merge_size
        completions = (1 if task.method == "sft" else task.num_generations) * task.max_completion_length
        return self.image_tokens * (1 + merge**2) + self.text_tokens + completions

    @property
    def prompts_at_a_time(self) -> int:
        """In the model, if all are as long as they may be."""
        task = self.task
        if task.gradient_accumulation_steps is not None:
            return task.prompts_per_step // task.gradient_accumulation_steps
        return min(max((task.tokens_per_microbatch or 0) // self.group_tokens, 1), task.prompts_per_step)

    @property
    def checkpoints(self) -> bool:
        return self.options.gradient_checkpointing == "on"

    def with_options(self, **changes: Any) -> StepShape:
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **changes))

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
    options: those that the plan has chosen, with their values. at_a_time: parameters that a process has gathered at
    once where several share them: two layers of the language model, and all that is in no layer.
    """

    parameters: int
    trainable: int
    phases: dict[str, dict[str, int]]
    offload_reference: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    at_a_time: int = 0

    @property
    def peak(self) -> int:
        """Bytes, at most: prompts and completions need not be as long as they may be."""
        return max(sum(held.values()) for held in self.phases.values())

    @property
    def least(self) -> int:
        """Bytes that are held however short prompts and completions are."""
        return max(sum(held[name] for name in FIXED) for held in self.phases.values())

    def shared(self, sharers: int) -> Plan:
        """That of each of so many processes among which weights and optimizer are divided (FSDP2)."""
        at_a_time, every, phases = min(self.at_a_time, self.parameters), self.parameters, {}
        for phase, held in self.phases.items():
            part = held | {name: -(-held[name] // sharers) for name in FIXED}
            computes = "reference" if phase == "reference" and held["reference"] else "weights"
            if phase in ("rollout", "reference", "policy"):
                gathered = every if phase == "rollout" else at_a_time
                part[computes] += held[computes] * gathered // every
            if phase == "policy":
                part["gradients"] += held["gradients"] * at_a_time // every
            phases[phase] = part
        return dataclasses.replace(self, phases=phases)

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
    layers = trainer.policy.layers
    layer = sum(parameter.numel() for parameter in layers[0].parameters())
    planned = Plan(parameters, trainable, phases, at_a_time=parameters - (len(layers) - 2) * layer)
    return planned if shape.sharers == 1 else planned.shared(shape.sharers)


def plan_for(shape: StepShape, usable: int) -> Plan:
    """The plan for a device with so many bytes, in which what is left open is chosen so that a step fits.

    First the largest prompt is given room (see `_fitted`); then as many prompts as fit are in the model at a time.
    """
    planned, task = _fitted(shape, usable), shape.task
    if task.gradient_accumulation_steps is not None or task.tokens_per_microbatch is not None:
        return planned
    planned = _chosen(planned, tokens_per_microbatch=shape.group_tokens)
    at_a_time = min(_room(planned, usable), task.prompts_per_step)
    while at_a_time > 1:
        options = planned.options | {"tokens_per_microbatch": at_a_time * shape.group_tokens}
        more = plan(shape.with_options(**options))
        more = more.with_reference_offloaded() if planned.offload_reference else more
        if more.peak <= usable:
            return _chosen(more, **options)
        at_a_time //= 2
    return planned


def _room(planned: Plan, usable: int) -> int:
    """An estimate of the number of prompts for which there is room, from a plan for one at a time; 0 if for none."""
    phases = [held for phase, held in planned.phases.items() if phase in ("reference", "policy")]
    return min(1 + (usable - sum(held.values())) // max(held["activations"], 1) for held in phases)


def _fitted(shape: StepShape, usable: int) -> Plan:
    """Where that makes a step fit, the reference is offloaded; else layers run again in backward; else both."""
    planned = _with_reference_where_it_fits(shape, usable)
    if planned.peak > usable and shape.options.gradient_checkpointing == "auto":
        on = {"gradient_checkpointing": "on"}
        planned = _chosen(_with_reference_where_it_fits(shape.with_options(**on), usable), **on)
    return planned


def _with_reference_where_it_fits(shape: StepShape, usable: int) -> Plan:
    planned = plan(shape)
    if planned.peak > usable and shape.reference == "own" and shape.device != "cpu" and shape.sharers == 1:
        offloaded = planned.with_reference_offloaded()
        return offloaded if offloaded.peak <= usable else planned
    return planned


def _chosen(planned: Plan, **options: Any) -> Plan:
    return dataclasses.replace(planned, options=planned.options | options)


def remedy(shape: StepShape, planned: Plan, usable: int) -> str | None:
    """Options, as they are written, with which a step fits that does not fit as `planned`; None if none do."""
    hopeless = planned.with_reference_offloaded().least > usable  # as long as as much is trained
    for written, changed in remedies(shape):
        if hopeless and _trained(changed.options) == _trained(shape.options):
            continue
        if _fitted(changed, usable).peak <= usable:
            return written
    return None


def _trained(options: TrainConfig) -> tuple:
    return options.trains_adapter, options.frozen_parts


def remedies(shape: StepShape) -> Iterator[tuple[str, StepShape]]:
    """(options, the step with them) to try: those that change the training least; with these another one; or LoRA."""
    task, options = shape.task, shape.options
    prompts, pieces = task.prompts_per_step, task.gradient_accumulation_steps
    changes: list[dict[str, Any]] = [
        {"gradient_accumulation_steps": number}
        for number in range((pieces or prompts) + 1, prompts + 1)
        if prompts % number == 0
    ]
    if (task.tokens_per_microbatch or 0) > shape.group_tokens:
        changes.append({"tokens_per_microbatch": shape.group_tokens})
    if options.gradient_checkpointing == "off":
        changes.append((changes[-1] if changes else {}) | {"gradient_checkpointing": "on"})
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
        yield written, shape.with_options(**change)


def _fewer_trained(options: TrainConfig) -> Iterator[dict[str, Any]]:
    frozen = {*options.frozen_parts, "vision"}
    if not options.trains_adapter and len(options.frozen_parts) < len(frozen) < len(PARTS):
        yield {"freeze": ",".join(part for part in PARTS if part in frozen)}


def _shorter(task: TaskConfig) -> Iterator[dict[str, Any]]:
    if task.method != "sft":
        yield {"max_completion_length": -(-task.max_completion_length // 2)}
        yield {"num_generations": max(task.num_generations // 2, 2)}
