"""The plan of a run, from its options and its device: what `--plan` prints, and what a run says that cannot fit."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mr1fast.errors import UserError
from mr1fast.model import load as models
from mr1fast.options.config import TrainConfig
from mr1fast.options.preset import sizes_of
from mr1fast.training.device_memory import NO_LIMIT, free_memory, usable_memory
from mr1fast.training.plan import CATEGORIES, GIB, Plan, StepShape, plan_for, remedy


@dataclass(frozen=True)
class Device:
    """kind: "cpu" or "cuda". free: bytes that nothing has taken. dtype: of a model's weights on it."""

    name: str
    kind: str
    free: int
    dtype: str

    @property
    def usable(self) -> int:
        return usable_memory(self.kind, self.free)

    def __str__(self) -> str:
        if self.free == NO_LIMIT:
            return f"{self.name}, which does not say how much memory it has"
        return f"{self.name}, where {_gib(self.usable)} can be used"


def device_of(options: TrainConfig, gigabytes: int | None = None) -> Device:
    """The run's device as it is now, or one with so much memory: a GPU, unless --device says cpu. Raises ValueError."""
    if gigabytes is None:
        there = models.choose_device(options.device)
        name, kind, free = str(there), there.type, free_memory(there)
    else:
        kind = "cpu" if options.device == "cpu" else "cuda"
        name, free = f"{'a CPU' if kind == 'cpu' else 'a GPU'} with {gigabytes} GB", gigabytes * GIB
    default = "bfloat16" if kind == "cuda" else "float32"
    return Device(name, kind, free, default if options.dtype == "auto" else options.dtype)


def shapes_of(options: TrainConfig, path: str | Path, device: Device, sharers: int = 1) -> Iterator[StepShape]:
    """The steps of each task. Of the model, config.json and the image processor's settings are read.

    sharers: see StepShape.

    Raises UserError if there is no such model.
    """
    model, pixels = models.load_config(path), models.most_pixels(path)
    if options.trains_adapter and options.lora_rank is None:
        options = _as_if_asked_for(options)
    options = options.with_steps(dict.fromkeys(options.names, 1))  # a step holds the same, however many there are
    for name in options.names:
        yield StepShape(
            model, options, name, dtype=device.dtype, device=device.kind, most_pixels=pixels, sharers=sharers
        )


def _as_if_asked_for(options: TrainConfig) -> TrainConfig:
    """Options that would make the adapter that --model is."""
    assert options.model is not None
    config = json.loads((Path(options.model) / "adapter_config.json").read_text(encoding="utf-8"))
    layers = config.get("target_modules")
    targets = ",".join(layers) if isinstance(layers, list) else None
    return dataclasses.replace(options, lora_rank=config.get("r", 16), lora_targets=targets)


# ---- what --plan prints ---------------------------------------------------------------------------------------------


def report(options: TrainConfig, gigabytes: int | None = None) -> tuple[str, bool]:
    """(what `--plan` prints, whether the steps of all tasks fit). Raises ValueError, whose message is one sentence."""
    if options.engine != "mr1fast":
        raise UserError(f"--plan knows what our own loop holds in memory, not --engine {options.engine}; leave it out")
    device = device_of(options, gigabytes)
    path = models.EMBEDDED if options.model is None else options.model
    try:
        shapes = list(shapes_of(options, sizes_of(str(path)) or path, device))
    except UserError as error:
        enough = "" if os.path.exists(path) else "; for --plan, a folder with its config.json is enough"
        raise UserError(f"{error}{enough}") from error
    parts, all_fit = [], True
    for shape in shapes:
        planned = plan_for(shape, device.usable)
        lines = [f"{path} on {shape.name}: {_described(shape, planned)}", "", table(planned), ""]
        parts.append("\n".join([*lines, _verdict(shape, planned, device)]))
        all_fit &= planned.peak <= device.usable
    return "\n\n".join(parts), all_fit


def _verdict(shape: StepShape, planned: Plan, device: Device) -> str:
    need = f"a step needs up to {_gib(planned.peak)}"
    if planned.peak <= device.usable:
        how = ", if the reference waits in the CPU's memory between its turns" if planned.offload_reference else ""
        return f"{need} and fits {device}{how}"
    return f"{need} and does not fit {device}; {_advice(shape, planned, device)}"


def _advice(shape: StepShape, planned: Plan, device: Device) -> str:
    options = remedy(shape, planned, device.usable)
    return "no option makes it fit" if options is None else f"it fits with {options}"


def _described(shape: StepShape, planned: Plan) -> str:
    task = shape.task
    what = "a target" if task.method == "sft" else f"{task.num_generations} completions"
    shape = shape.with_options(**planned.options)
    again = ", whose layers run again in backward (--gradient-checkpointing on)" if shape.checkpoints else ""
    return (
        f"{planned.parameters:,} parameters, {planned.trainable:,} of them trained, in {shape.dtype}{again}\n"
        f"{task.prompts_per_step} prompts, {shape.prompts_at_a_time} at a time, each "
        f"of {shape.image_tokens} tokens of an image and {shape.text_tokens} of text, with {what} of "
        f"{task.max_completion_length} tokens"
    )


def table(planned: Plan) -> str:
    """A line for each category and a column for each phase."""
    unit, digits, divisor = ("MiB", 1, 2**20) if planned.peak < GIB else ("GiB", 2, GIB)
    rows = {name: [held[name] for held in planned.phases.values()] for name in CATEGORIES}
    rows["total"] = [sum(held.values()) for held in planned.phases.values()]
    lines = [f"{unit:<16}" + "".join(f"{phase:>12}" for phase in planned.phases)]
    for name, sizes in rows.items():
        lines.append(f"{name:<16}" + "".join(f"{size / divisor:>12.{digits}f}" for size in sizes))
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size < GIB else f"{size / GIB:.1f} GiB"


# ---- before a run ---------------------------------------------------------------------------------------------------


def plans_before(options: TrainConfig, sharers: int = 1) -> dict[str, Plan]:
    """The plan of each task of a run that is about to begin; none for a small model, which fits anywhere, and for
    another engine. sharers: see StepShape.

    Raises UserError where a step cannot fit however short prompts and completions are; where only the longest do not
    fit, it is said as a warning.
    """
    if models.recipes.is_small_folder(options.model) or options.engine != "mr1fast":
        return {}
    assert options.model is not None
    device = device_of(options)
    plans: dict[str, Plan] = {}
    for shape in shapes_of(options, options.model, device, sharers):
        try:
            plans[shape.name] = planned = plan_for(shape, device.usable)
        except UserError:
            raise
        except Exception as error:  # a run can do without
            print(
                f"warning: no plan of the memory that a step takes ({type(error).__name__}: {error})", file=sys.stderr
            )
            return {}
        if planned.least > device.free:
            what = "weights, gradients, optimizer and reference of a step take"
            raise UserError(
                f"{what} {_gib(planned.least)}, and {device.name} has {_gib(device.free)} free; "
                f"{_advice(shape, planned, device)}"
            )
        if planned.peak > device.usable:
            print(f"warning: {_verdict(shape, planned, device)}", file=sys.stderr)
    return plans
