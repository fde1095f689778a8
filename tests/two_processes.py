"""What tests/test_processes.py starts twice: the same steps as one process takes, divided between two."""

import sys

import torch
from train_program import Drawings

from mr1fast.model.adapter import add_adapter
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training.processes import started
from mr1fast.training.trainer import Trainer

STEPS = 3
SETTINGS = {"prompts_per_step": 4, "num_generations": 3, "max_completion_length": 12, "temperature": 2.0}
# By what can go wrong: normalisers by completion and by token, pieces, a batch used twice, another method, an adapter.
RUNS = {
    "grpo-d": {**SETTINGS, "gradient_accumulation_steps": 4, "num_iterations": 2},
    "dapo": {**SETTINGS, "loss": "loss_type=dapo,entropy_coef=0.01,scale_rewards=batch"},
    "sft": {"prompts_per_step": 4, "method": "sft"},
    "lora": {**SETTINGS, "lora_rank": 2},
}


def steps(settings, processes):
    """(metrics of each step without times, weights after them)."""
    config = TrainConfig(task="vc", max_steps=STEPS, learning_rate=1e-3, warmup_steps=1, eval_steps=0, **settings)
    policy, reference = (Policy(load_model(), load_processor()) for _ in range(2))
    if config.lora_rank is not None:
        policy = Policy(add_adapter(policy.model, rank=config.lora_rank, seed=0), policy.processor)
        reference = policy
    task = config.for_task("vc")
    trainer = Trainer(task, policy, reference if task.needs_reference else None, Drawings(), processes)
    metrics = [trainer.step() for _ in range(STEPS)]
    kept = [{name: value for name, value in one.items() if "time" not in name} for one in metrics]
    return kept, [weight.detach().clone() for weight in policy.trainable_parameters()]


def main(file):
    torch.set_num_threads(1)
    with started(None, "the test") as processes:
        results = {name: steps(settings, processes) for name, settings in RUNS.items()}
        weights = processes.gather(results["grpo-d"][1])
        assert all(one.equal(other) for one, other in zip(*weights))
        if processes.is_main:
            torch.save(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
