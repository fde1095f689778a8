"""The first ten steps of the default run and of supervised fine-tuning, as tests/golden.json records them.

A change that is meant to change numbers writes the record again, and shows in its diff: `python -m tests.golden`.
"""

import json
import sys
from pathlib import Path

import torch

from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training.run_data import load_data
from mr1fast.training.trainer import Trainer

RECORD = Path(__file__).with_suffix(".json")
STEPS = 10
METHODS = ("grpo-d", "sft")
RECORDED = {
    "grpo-d": ("loss", "grad_norm", "kl", "entropy", "beta", "learning_rate", "reward", "num_tokens"),
    "sft": ("loss", "grad_norm", "learning_rate", "num_tokens"),
}


def steps(method: str) -> list[dict[str, float]]:
    """What the run `--task vc --method METHOD` logs, on a CPU and in one thread, as it always does with this model."""
    torch.set_num_threads(1)
    config = TrainConfig(task="vc", method=method, device="cpu", eval_steps=0, eval_samples=0)
    policy, reference = (Policy(load_model(), load_processor()) for _ in range(2))
    task, data = config.for_task("vc"), load_data(config).train["vc"]
    trainer = Trainer(task, policy, reference.freeze() if task.needs_reference else None, data)
    return [{name: metrics[name] for name in RECORDED[method]} for metrics in (trainer.step() for _ in range(STEPS))]


def main() -> None:
    rows = {method: ",\n".join(map(json.dumps, steps(method))) for method in METHODS}  # a line for each step
    RECORD.write_text("{" + ",".join(f'\n"{method}": [\n{lines}\n]' for method, lines in rows.items()) + "\n}\n")
    print(f"{RECORD} is written")


if __name__ == "__main__":
    sys.exit(main())
