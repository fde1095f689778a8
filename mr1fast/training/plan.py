"""What a step will hold in memory, said from options and config.json alone, before anything is loaded.

The figures come from the trainer's own step (plan_step.py), run on tensors that have a shape and no numbers
(sized.py). See docs/memory.md for what they include. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB, GIB = 2**20, 2**30
CATEGORIES = ("weights", "reference", "masters", "moments", "gradients", "key-value cache", "logits", "activations")
SFT_TOKENS = 64
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class StepShape:
    """All that decides how much memory a step takes.

    model: the Qwen2VLConfig. config: the trainer's configuration, of one task. dtype: of the weights, "bfloat16" or
    "float32". device: its type, "cuda" or "cpu", by which the loss head takes larger or smaller blocks. text_tokens: of
    a prompt, its image not counted. image_pixels: of its image after resizing, None for prompts without. freeze:
    "vision", "merger" or both. lora_rank: None trains the weights themselves. reference: "loaded", "offloaded" (on the
    device while its log-probabilities are computed), "shared" (the same weights, without the adapter) or "none".
    """

    model: Any
    config: Any
    dtype: str = "bfloat16"
    device: str = "cuda"
    text_tokens: int = 128
    image_pixels: int | None = None
    freeze: tuple[str, ...] = ()
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = LORA_TARGETS
    reference: str = "loaded"


@dataclass(frozen=True)
class Plan:
    """What a step holds: in each phase, the bytes of each category at the moment when the phase holds most."""

    parameters: int
    trainable: int
    phases: dict[str, dict[str, int]]

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(sum(held.values()) for held in self.phases.values())

    def fits(self, device_bytes: int) -> bool:
        return self.peak <= device_bytes

    def table(self) -> str:
        """A line for each category and a column for each phase."""
        unit, divisor = ("MiB", MIB) if self.peak < GIB else ("GiB", GIB)
        lines = [f"{unit:<16}" + "".join(f"{phase:>12}" for phase in self.phases)]
        for name in CATEGORIES:
            lines.append(f"{name:<16}" + "".join(f"{held[name] / divisor:>12.2f}" for held in self.phases.values()))
        lines.append(f"{'together':<16}" + "".join(f"{sum(h.values()) / divisor:>12.2f}" for h in self.phases.values()))
        return "\n".join(lines)


def plan(shape: StepShape) -> Plan:
    """What a step holds once the first has made the optimizer's moments. Takes seconds and about 0.1 GiB, anywhere."""
    from mr1fast.training.plan_step import measure

    trainer, held = measure(shape)
    phases = {phase: {name: found.get(name, 0) for name in CATEGORIES} for phase, found in held.items()}
    if shape.reference == "offloaded":
        phases = {phase: found if phase == "reference" else found | {"reference": 0} for phase, found in phases.items()}
    parameters = sum(parameter.numel() for parameter in trainer.policy.model.parameters())
    trainable = sum(parameter.numel() for parameter in trainer.policy.trainable_parameters())
    return Plan(parameters, trainable, phases)


def report_of_run(config: Any, path: str | Path) -> tuple[str, bool]:
    """(what `--plan` prints, whether a step fits), of a run of one task from the model in a folder.

    Of the folder, config.json and the image processor's settings are read. Raises UserError if they cannot be used.
    """
    from mr1fast.model.load import choose_device, choose_dtype
    from mr1fast.training.device_memory import usable_memory

    device = choose_device(config.device)
    dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    return report(shape_of_run(config, path, device=device.type, dtype=dtype), usable_memory(str(device)))


def shape_of_run(config: Any, path: str | Path, *, device: str, dtype: str) -> StepShape:
    """The largest step there may be: images have all the pixels that --max-pixels, or the processor, lets them have.

    Targets of supervised fine-tuning are short, whatever the longest completion.
    """
    from transformers import Qwen2VLConfig

    from mr1fast.model.checks import check_folder
    from mr1fast.model.load import load_processor

    check_folder(path)
    pixels = load_processor(path, max_pixels=config.max_pixels).image_processor.size["longest_edge"]
    if config.method == "sft":
        config = dataclasses.replace(config, max_completion_length=min(config.max_completion_length, SFT_TOKENS))
    return StepShape(Qwen2VLConfig.from_pretrained(path), config, dtype=dtype, device=device, image_pixels=pixels)


def report(shape: StepShape, device_bytes: int) -> tuple[str, bool]:
    """(what `--plan` prints, whether the step fits into so many bytes)."""
    planned = plan(shape)
    need, have = _in_words(planned.peak), _in_words(device_bytes)
    lines = [
        f"{planned.parameters:,} parameters, {planned.trainable:,} of them trained, in {shape.dtype}",
        _assumed(shape),
        "",
        planned.table(),
        "",
    ]
    if planned.fits(device_bytes):
        return "\n".join([*lines, f"a step needs {need} and fits: {have} can be used"]), True
    remedy = cheapest_remedy(shape, device_bytes)
    advice = "no option of this program makes it fit" if remedy is None else f"it fits with {remedy}"
    return "\n".join([*lines, f"a step needs {need}, and {have} can be used: {advice}"]), False


def _in_words(size: int) -> str:
    return f"{size / MIB:.0f} MiB" if size < GIB else f"{size / GIB:.1f} GiB"


def _assumed(shape: StepShape) -> str:
    config, vision = shape.config, shape.model.vision_config
    tokens = (shape.image_pixels or 0) // (vision.patch_size * vision.spatial_merge_size) ** 2
    image = f" and an image of {tokens} tokens" if tokens else ""
    completions = f"{config.num_generations} completions" if config.method != "sft" else "a target"
    number, pieces = config.prompts_per_step, config.gradient_accumulation_steps
    prompts = f"{number} prompt{'s' * (number > 1)} in {pieces} piece{'s' * (pieces > 1)}"
    return (
        f"{prompts}, each of {shape.text_tokens} tokens of text{image}, "
        f"with {completions} of {config.max_completion_length} tokens"
    )


def cheapest_remedy(shape: StepShape, device_bytes: int) -> str | None:
    """The options, as they are written, with which a step fits that does not fit as it is; None if none do.

    Tried in this order: pieces, which only cost time, then what changes the training, the least first.
    """
    for flags, changed in _remedies(shape):
        if plan(changed).fits(device_bytes):
            return flags
    return None


def _remedies(shape: StepShape) -> Iterator[tuple[str, StepShape]]:
    """(flags, the shape with them), of options that this version of the trainer has."""
    config = shape.config
    known = {field.name for field in dataclasses.fields(config)}
    prompts = config.prompts_per_step
    pieces = [n for n in range(config.gradient_accumulation_steps + 1, prompts + 1) if prompts % n == 0]

    def changed(**values: Any) -> StepShape:
        return dataclasses.replace(shape, config=dataclasses.replace(config, **values))

    for number in pieces:
        yield f"--gradient-accumulation-steps {number}", changed(gradient_accumulation_steps=number)
    most = f"--gradient-accumulation-steps {pieces[-1]} " if pieces else ""
    shape = changed(gradient_accumulation_steps=pieces[-1]) if pieces else shape
    config = shape.config
    if "freeze" in known and "vision" not in shape.freeze and shape.image_pixels is not None:
        yield f"{most}--freeze vision", dataclasses.replace(shape, freeze=("vision", *shape.freeze))
    if shape.image_pixels is not None:
        fewer = shape.image_pixels // 2
        yield f"{most}--max-pixels {fewer}", dataclasses.replace(shape, image_pixels=fewer)
    if config.method != "sft" and config.max_completion_length > 1:
        shorter = config.max_completion_length // 2
        yield f"{most}--max-completion-length {shorter}", changed(max_completion_length=shorter)
    if "lora_rank" in known and shape.lora_rank is None:
        yield f"{most}--lora-rank 16", dataclasses.replace(shape, lora_rank=16, reference="shared")
