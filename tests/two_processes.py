"""What tests/test_processes.py starts twice: the same steps as one process takes, divided between two."""

import os
import sys
from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
from train_program import Drawings

from mr1fast.model.adapter import add_adapter
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training.processes import Processes, started
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


SHARDED = ("grpo-d", "sft", "lora")
# In pieces that are the same however many processes there are.
EXACT = {name: RUNS[name] | {"gradient_accumulation_steps": 4} for name in ("dapo", "sft")}


def steps(settings, processes, *, exact=False):
    """(metrics of each step without times, weights after them, and the optimizer's state).

    exact: gradients are added up in float64.
    """
    config = TrainConfig(task="vc", max_steps=STEPS, learning_rate=1e-3, warmup_steps=1, eval_steps=0, **settings)
    policy, reference = (Policy(load_model(), load_processor()) for _ in range(2))
    if config.lora_rank is not None:
        policy = Policy(add_adapter(policy.model, rank=config.lora_rank, seed=0), policy.processor)
        reference = policy
    task = config.for_task("vc")
    trainer = Trainer(task, policy, reference if task.needs_reference else None, Drawings(), processes)
    with exact_sums(trainer.optimizer.weights) if exact else nullcontext():
        metrics = [trainer.step() for _ in range(STEPS)]
    kept = [{name: value for name, value in one.items() if "time" not in name} for one in metrics]
    state = trainer.optimizer.state_dict()
    if policy.is_sharded:  # what has been gathered can be divided again
        state = processes.from_main(state)
        trainer.optimizer.load_state_dict(state)
        again = trainer.optimizer.state_dict()
        assert not processes.is_main or same(again, state)
    with policy.gathered():
        return kept, [weight.detach().clone() for weight in policy.trainable_parameters()], state


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def exact_sums(weights):
    """Within the context, gradients of these weights are added up in float64, over pieces and processes."""
    sums = [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]

    def take(weight, total):
        total += weight.grad
        weight.grad = None

    def together(processes, _):
        for weight, total in zip(weights, sums):
            if processes.count > 1:
                dist.all_reduce(total)
            weight.grad = total.float()
            total.zero_()

    for weight, total in zip(weights, sums):
        weight.register_post_accumulate_grad_hook(lambda weight, total=total: take(weight, total))
    return patch.object(Processes, "sum_gradients", together)


def main(file):
    torch.set_num_threads(1)
    with started(None, "the test") as processes:
        results = {name: steps(settings, processes) for name, settings in RUNS.items()}
        weights = processes.gather(results["grpo-d"][1])
        assert all(one.equal(other) for one, other in zip(*weights))
        results |= {f"{name}, exact": steps(EXACT[name], processes, exact=True) for name in EXACT}
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        results |= {f"{name}, sharded": steps(RUNS[name], processes) for name in SHARDED}
        if processes.is_main:
            torch.save(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
