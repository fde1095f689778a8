"""What an arm at full scale costs, estimated from its sizes: no such run has been measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mr1fast.options.config import TrainConfig
from mr1fast.reproduction.seconds import spelt

PARAMETERS = {"2b": 2.2e9, "7b": 8.3e9}
ROWS = {"GEOQA_R1V_Train_8K": 8000, "clevr_cogen_a_train": 70_000}  # roughly; those of a folder are counted
PROMPT = 640  # tokens: 512 of an image of --max-pixels, and 128 of text
TESTED = 200 + 753  # problems: SuperCLEVR and GEOQA, before and after
FLOPS = 0.4 * 989e12  # bfloat16, a second, of an H100 at 40 % of its peak
TOKEN = 0.025  # seconds: one decoding step of the plain loop, however many completions
TEST_BATCH = 8


@dataclass(frozen=True)
class Cost:
    steps: int
    step_seconds: float
    test_seconds: float

    ASSUMES: ClassVar[str] = (
        "Estimated, not measured: 40 % of an H100's peak, 25 ms for each token that is sampled, all completions as "
        "long as they may be."
    )

    @property
    def hours(self) -> float:
        return (self.steps * self.step_seconds + self.test_seconds) / 3600

    @classmethod
    def of(cls, config: TrainConfig, size: str) -> Cost:
        """size: of Qwen2-VL, a key of PARAMETERS. Raises UserError if the data cannot be read."""
        task = config.with_steps({name: rows_of(config) for name in config.names}).for_task(config.names[0])
        parameters = PARAMETERS[size]
        tests = 2 * TESTED / TEST_BATCH * task.max_completion_length * TOKEN
        prompts = task.prompts_per_step * PROMPT
        if task.method == "sft":
            return cls(task.max_steps, 6 * parameters * prompts / FLOPS, tests)
        tokens = prompts + task.prompts_per_step * task.num_generations * task.max_completion_length
        passes = 6 + 2 * task.needs_reference
        sampling = task.max_completion_length * TOKEN / task.num_iterations
        return cls(task.max_steps, sampling + passes * parameters * tokens / FLOPS, tests)

    def __str__(self) -> str:
        return f"{self.steps:,} steps of about {self.step_seconds:.1f} s and tests, {spelt(3600 * self.hours)}"


def rows_of(config: TrainConfig) -> int:
    """How many examples there are to train on."""
    if config.train_samples is not None:
        return config.train_samples
    assert config.data is not None
    if not Path(config.data).exists():
        return ROWS.get(config.data.rpartition("/")[2], 8000)
    from mr1fast.data.dataset import load_split

    return len(load_split(config.data, "train", used=("train", "test"), reading=config.reading))
