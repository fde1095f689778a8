"""`python -m benchmarks.plan_check`: what the planner says a step holds, beside what a real step held.

A Qwen2-VL of 60 million random weights in the proportions of 2B takes two steps on the CPU, in a process of its own for
each setting. Measured is by how much the resident memory of the second step rises, at most, above that of a process
that has imported everything and trained a model of one layer. Prints a table; needs Linux, 3 GB and some minutes; the
exit code is 1 if any plan is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Qwen2VLConfig

from benchmarks.steps_2b import PIXELS, TEXT, VISION
from benchmarks.timing import libc_call, memory_pages, process_status, reset_high_water
from mr1fast.options.config import TrainConfig
from mr1fast.training import plan_step, trainer
from mr1fast.training.device_memory import usable_of_gpu
from mr1fast.training.plan import Plan, StepShape, plan

SPECIAL = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def model(text: dict[str, Any], vision: dict[str, Any], tied: bool = True) -> Qwen2VLConfig:
    """Qwen2-VL-2B's configuration but for what is given."""
    text = {**TEXT, "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None, **text}
    ids: dict[str, Any] = {name: number % text["vocab_size"] for name, number in SPECIAL.items()}
    vision = VISION | {"hidden_size": text["hidden_size"]} | vision
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


QWEN_2B = model({}, {})
QWEN_7B = model(
    {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    {},
    tied=False,
)
PROPORTIONS: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 2240,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
SMALL = model(
    PROPORTIONS | {"num_hidden_layers": 10, "vocab_size": 32768}, {"depth": 10, "embed_dim": 384, "num_heads": 6}
)
ONE_LAYER = model(
    PROPORTIONS | {"num_hidden_layers": 1, "vocab_size": 64}, {"depth": 1, "embed_dim": 384, "num_heads": 6}
)


def task(method: str, prompts: int, pieces: int, length: int, group: int = 8) -> TrainConfig:
    return dataclasses.replace(
        TrainConfig(method=method, task="vc").for_task("vc"),
        prompts_per_step=prompts,
        gradient_accumulation_steps=pieces,
        max_completion_length=length,
        num_generations=group,
        warmup_steps=0,
    )


ON_CPU: dict[str, Any] = {"model": SMALL, "dtype": "float32", "device": "cpu", "image_pixels": 128 * 28**2}
SETTINGS = {
    "all prompts at once": StepShape(config=task("grpo-d", 2, 1, 64), **ON_CPU),
    "a prompt at a time": StepShape(config=task("grpo-d", 4, 4, 64), **ON_CPU),
    "long completions, a prompt at a time": StepShape(config=task("grpo-d", 2, 2, 256, group=4), **ON_CPU),
    # Of few tokens: this multiplies very slowly in bfloat16 where the processor has no instructions for it.
    "bfloat16, short": StepShape(
        config=task("grpo-d", 2, 2, 16, group=2),
        **ON_CPU | {"dtype": "bfloat16", "image_pixels": 32 * 28**2, "text_tokens": 32},
    ),
    "LoRA, a large image": StepShape(
        config=task("grpo", 2, 2, 64), **ON_CPU | {"image_pixels": PIXELS}, lora_rank=16, reference="shared"
    ),
    "SFT, vision tower frozen": StepShape(config=task("sft", 8, 2, 32), **ON_CPU, freeze=("vision",), reference="none"),
}


# ---- measured -------------------------------------------------------------------------------------------------------


def measured(shape: StepShape) -> dict[str, int]:
    """Bytes by which each phase of a second step rises above a process that has everything but this model."""
    torch.set_num_threads(1)
    with memory_pages("fresh"):
        config = dataclasses.replace(shape.config, prompts_per_step=1, gradient_accumulation_steps=1)
        _two_steps(dataclasses.replace(shape, model=ONE_LAYER, config=config))
        gc.collect()
        libc_call("malloc_trim", 0)
        before = process_status("VmRSS")
        peaks = _two_steps(shape)
    assert before is not None
    return {phase: peak - before for phase, peak in peaks.items()}


def _two_steps(shape: StepShape) -> dict[str, int]:
    """The highest resident memory in each phase of the second."""
    trainer.group_advantages = random_advantages
    one = true_trainer(shape)
    one.step()
    gc.collect()
    libc_call("malloc_trim", 0)
    peaks: dict[str, int] = {}
    phases = ["prompts" if shape.config.method == "sft" else "rollout"]

    def begin(phase: str) -> None:
        peaks[phases[-1]] = process_status("VmHWM") or 0
        phases.append(phase)
        reset_high_water()

    plan_step.at_phases(one, begin)
    reset_high_water()
    one.step()
    begin("")
    return peaks


def true_trainer(shape: StepShape) -> trainer.Trainer:
    """One on the CPU with random weights, whose completions are as long as they may be."""
    torch.manual_seed(0)
    made = plan_step.build_trainer(shape, *plan_step.build_models(shape, "cpu"))
    if shape.config.method != "sft":
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

CARDS = {"24 GB": 24_564, "40 GB": 40_960, "48 GB": 46_068, "80 GB": 81_559, "141 GB": 143_771}  # MiB, of nvidia-smi
SHARDED = ("weights", "reference", "masters", "moments", "gradients")


def print_cards() -> None:
    """What steps of the paper's models need, and which cards have it."""
    usable = {card: usable_of_gpu(mebibytes * 2**20) for card, mebibytes in CARDS.items()}
    print(f"| | completion, image (tokens) | GiB | {' | '.join(CARDS)} |\n|---|---|---|{'---|' * len(CARDS)}")
    for name, model, changes in (
        ("2B full", QWEN_2B, {}),
        ("2B LoRA", QWEN_2B, {"lora_rank": 16, "reference": "shared"}),
        ("7B LoRA", QWEN_7B, {"lora_rank": 16, "reference": "shared"}),
        ("7B full on 8", QWEN_7B, {}),
    ):
        cards = 8 if "8" in name else 1
        for length, pixels in ((512, PIXELS), (256, PIXELS // 2)):
            config = task("grpo-d", 16 // cards, 16 // cards, length)
            shape: Any = {"model": model, "config": config, "image_pixels": pixels, **changes}
            need = _on_each(plan(StepShape(**shape)), cards)
            fits = " | ".join("yes" if need <= have else "no" for have in usable.values())
            print(f"| {name} | {length}, {pixels // 784} | {need / 2**30:.1f} | {fits} |", flush=True)


def _on_each(planned: Plan, cards: int) -> float:
    """The peak in bytes where what belongs to the weights is divided among so many cards."""
    return max(
        sum(size / cards if name in SHARDED else size for name, size in held.items())
        for held in planned.phases.values()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"{'; '.join(SETTINGS)} (all if none is named)")
    parser.add_argument("--cards", action="store_true", help="which GPU is enough for which training, planned only")
    parser.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)  # what each process is started with
    options = parser.parse_args()
    if unknown := set(options.settings) - set(SETTINGS):
        parser.error(f"no setting {', '.join(sorted(unknown))}; there are: {'; '.join(SETTINGS)}")
    if options.measure:
        print(json.dumps(measured(SETTINGS[options.measure])))
        return 0
    if options.cards:
        print_cards()
        return 0
    return 0 if compare(options.settings or list(SETTINGS)) else 1


if __name__ == "__main__":
    sys.exit(main())
