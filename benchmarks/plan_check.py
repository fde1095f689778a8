"""`python -m benchmarks.plan_check`: what the planner says a step holds, beside what a real step held.

A Qwen2-VL of 60 million random weights in the proportions of 2B takes two steps on the CPU, in a process of its own for
each setting. Measured is by how much the resident memory of the second step rises, at most, above that of a process
that has imported everything and trained a model of one layer. Prints a table; needs Linux, 3 GB and some minutes; the
exit code is 1 if any plan is off by more than 10 %. `--cards` prints which GPU is enough for which training instead,
`--processes` what each of several GPUs holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.models import PIXELS, QWEN_2B, QWEN_7B, in_proportion
from benchmarks.timing import libc_call, memory_pages, process_status, reset_high_water
from mr1fast.options.config import TrainConfig
from mr1fast.training import plan_step, trainer
from mr1fast.training.device_memory import usable_memory
from mr1fast.training.plan import GIB, Plan, StepShape, plan, remedies

ON_CPU: dict[str, Any] = {"model": in_proportion(layers=10, vocabulary=32_768), "dtype": "float32", "device": "cpu"}
IMAGE_TOKEN = 28**2  # pixels
GRPO = {
    "prompts_per_step": 2,
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 64,
    "max_pixels": 128 * IMAGE_TOKEN,
}


def setting(changes: dict[str, Any], **of_shape: Any) -> StepShape:
    return StepShape(options=TrainConfig(data="none", **GRPO | changes), **ON_CPU | of_shape)


SETTINGS = {
    "GRPO-D, all prompts at once": setting({"gradient_accumulation_steps": 1}),
    "GRPO-D, a prompt at a time": setting({"prompts_per_step": 4, "gradient_accumulation_steps": 4}),
    "GRPO without a reference, long completions": setting(
        {"method": "grpo", "beta": 0.0, "max_completion_length": 256}
    ),
    # Of few tokens: this multiplies very slowly in bfloat16 where the processor has no instructions for it.
    "GRPO-D in bfloat16, short": setting(
        {"max_completion_length": 16, "max_pixels": 32 * IMAGE_TOKEN}, dtype="bfloat16"
    ),
    "GRPO-D, layers run again in backward": setting({"gradient_checkpointing": "on", "max_completion_length": 128}),
    "GRPO with LoRA, a large image": setting({"method": "grpo", "max_pixels": PIXELS, "lora_rank": 16}),
    "SFT, vision tower frozen": setting({"method": "sft", "prompts_per_step": 8, "freeze": "vision"}),
}


# ---- measured -------------------------------------------------------------------------------------------------------


def measured(shape: StepShape) -> dict[str, int]:
    """Bytes by which each phase of a second step rises above a process that has everything but this model."""
    torch.set_num_threads(1)
    with memory_pages("fresh"):
        options = dataclasses.replace(shape.options, prompts_per_step=1, gradient_accumulation_steps=1)
        _two_steps(dataclasses.replace(shape, model=in_proportion(layers=1, vocabulary=400), options=options))
        gc.collect()
        libc_call("malloc_trim", 0)
        before = process_status("VmRSS")
        peaks = _two_steps(shape)
    assert before is not None
    return {phase: peak - before for phase, peak in peaks.items()}


def _two_steps(shape: StepShape) -> dict[str, int]:
    """The highest resident memory in each phase of the second."""
    one = true_trainer(shape)
    peaks: dict[str, int] = {}
    phases: list[str] = []

    def begin(phase: str) -> None:
        if phases:
            peaks[phases[-1]] = process_status("VmHWM") or 0
        phases.append(phase)
        reset_high_water()

    with patch.object(trainer, "group_advantages", random_advantages):
        one.step()
        gc.collect()
        libc_call("malloc_trim", 0)
        one.phases.on_begin = begin
        one.step()
        begin("")
    return peaks


def true_trainer(shape: StepShape) -> trainer.Trainer:
    """One on the CPU with random weights, whose completions are as long as they may be."""
    torch.manual_seed(0)
    made = plan_step.build_trainer(shape, *plan_step.build_models(shape, "cpu"))
    if shape.task.method != "sft":
        made.policy.end_ids = torch.tensor([-1])
    return made


def random_advantages(rewards: torch.Tensor, num_generations: int, **_: Any) -> torch.Tensor:
    """In the place of `group_advantages`: random weights earn nothing, and tokens without an advantage cost less."""
    return torch.randn(len(rewards))


def compare(names: Sequence[str]) -> bool:
    """Prints a line for each setting. Returns whether every peak is within 10 %."""
    print("| setting | planned, MiB | measured, MiB | ratio | ratio by phase |")
    print("|---|---|---|---|---|")
    good = True
    for name in names:
        shape = SETTINGS[name]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.plan_check", "--measure", name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        planned = plan(shape)
        ratio = planned.peak / max(found.values())
        good &= 0.9 <= ratio <= 1.1
        phases = ", ".join(f"{phase} {sum(held.values()) / found[phase]:.2f}" for phase, held in planned.phases.items())
        print(
            f"| {name} | {planned.peak / 2**20:.0f} | {max(found.values()) / 2**20:.0f} | {ratio:.2f} | {phases} |",
            flush=True,
        )
    return good


# ---- cards ----------------------------------------------------------------------------------------------------------

CARDS = (24, 40, 48, 80, 141)  # GB
TRAININGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "2B": (QWEN_2B, {}),
    "2B, LoRA": (QWEN_2B, {"lora_rank": 16}),
    "7B, LoRA": (QWEN_7B, {"lora_rank": 16}),
    "7B": (QWEN_7B, {}),
}


def print_cards() -> None:
    """What steps of the paper's models need, on which cards they fit, and with what else they would."""
    print(f"| | GiB | {' | '.join(f'{card} GB' for card in CARDS)} |\n|---|---|{'---|' * len(CARDS)}")
    for name, (model, options) in TRAININGS.items():
        shape = StepShape(model, TrainConfig(model="Qwen/Qwen2-VL", data="none", max_pixels=PIXELS, **options))
        cells: dict[int, str] = {}
        first = 0
        for how, planned in ways(shape):
            first = first or planned.peak
            for card in CARDS:
                if planned.peak <= usable_memory("cuda", card * GIB):
                    cells.setdefault(card, how)
            if len(cells) == len(CARDS):
                break
        print(f"| {name} | {first / GIB:.1f} | {' | '.join(cells.get(card, 'no') for card in CARDS)} |", flush=True)


def ways(shape: StepShape) -> Iterator[tuple[str, Plan]]:
    """(how a step fits, its plan), in the order in which a run tries them, and then with other options."""
    planned = plan(shape)
    yield "fits", planned
    if shape.reference == "own":
        yield "fits, the reference offloaded", planned.with_reference_offloaded()
    again = shape.with_options(gradient_checkpointing="on")
    yield "fits, checkpointed", smallest(again)
    for written, changed in remedies(again):
        yield f"`{written}`", smallest(changed)


def smallest(shape: StepShape) -> Plan:
    planned = plan(shape)
    return planned.with_reference_offloaded() if shape.reference == "own" else planned


# ---- processes ------------------------------------------------------------------------------------------------------

PROMPTS = 16


def print_processes() -> None:
    """GiB that each of n GPUs holds at most, of a step of R1-V's images and 16 prompts, of which it has its share."""
    counts = (2, 4, 8)
    heads = ["1 GPU", *(f"{how}, {n}" for how in ("DDP", "FSDP2") for n in counts)]
    print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, (model, options) in TRAININGS.items():
        given = {"prompts_per_step": PROMPTS, "gradient_accumulation_steps": PROMPTS, "max_pixels": PIXELS, **options}
        run = TrainConfig(model="Qwen/Qwen2-VL", data="none", gradient_checkpointing="on", **given)
        alone = plan(StepShape(model, run))
        plans = [alone, *(with_share(alone, n) for n in counts), *(with_share(alone, n).shared(n) for n in counts)]
        print(f"| {name} | {' | '.join(f'{one.peak / GIB:.1f}' for one in plans)} |", flush=True)


def with_share(planned: Plan, processes: int) -> Plan:
    """With so many prompts fewer in a step, one being in the model at a time: the key-value cache is that of all."""
    held = planned.phases["rollout"]
    rollout = held | {"key-value cache": held["key-value cache"] // processes}
    return dataclasses.replace(planned, phases=planned.phases | {"rollout": rollout})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"{'; '.join(SETTINGS)} (all if none is named)")
    parser.add_argument("--cards", action="store_true", help="which GPU is enough for which training, planned only")
    parser.add_argument("--processes", action="store_true", help="what each of several GPUs holds, planned only")
    parser.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)  # what each process is started with
    options = parser.parse_args()
    if unknown := set(options.settings) - set(SETTINGS):
        parser.error(f"no setting {', '.join(sorted(unknown))}; there are: {'; '.join(SETTINGS)}")
    if options.measure:
        print(json.dumps(measured(SETTINGS[options.measure])))
        return 0
    if options.cards or options.processes:
        (print_cards if options.cards else print_processes)()
        return 0
    return 0 if compare(options.settings or list(SETTINGS)) else 1


if __name__ == "__main__":
    sys.exit(main())
