"""What tests/test_processes.py starts twice, once for all its tests, as importing torch takes longer than they do."""

import io
import json
import os
import signal
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from train_program import SMALL, Drawings, main

from mr1fast.model.adapter import add_adapter
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training.processes import Processes, own_rank, started
from mr1fast.training.trainer import Trainer

PROGRAM = ["--task=vc", "--save-steps=2", "--report-to=none", *SMALL]
# (arguments, more of them in the second process, what is said)
MISTAKES = [
    (["--seed=1"], ["--learning-rate=1"], "process 1 was started with other options than process 0"),
    (["--prompts-per-step=3"], [], "must be a multiple of the number of processes, got 3 and 2"),
    (["--max-stps=3"], [], "unknown option --max-stps"),
]

SETTINGS = {"prompts_per_step": 4, "num_generations": 3, "max_completion_length": 12, "temperature": 2.0}
# By what can go wrong: normalisers by completion and by token, pieces, a batch used twice, another method, an adapter.
RUNS = {
    "grpo-d": {**SETTINGS, "max_steps": 3, "gradient_accumulation_steps": 4, "num_iterations": 2},
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
    settings = {"max_steps": 2, **settings}
    config = TrainConfig(task="vc", learning_rate=1e-3, warmup_steps=1, eval_steps=0, **settings)
    policy, reference = (Policy(load_model(), load_processor()) for _ in range(2))
    if config.lora_rank is not None:
        policy = Policy(add_adapter(policy.model, rank=config.lora_rank, seed=0), policy.processor)
        reference = policy
    task = config.for_task("vc")
    trainer = Trainer(task, policy, reference if task.needs_reference else None, Drawings(), processes)
    with exact_sums(trainer.optimizer.weights) if exact else nullcontext():
        metrics = [trainer.step() for _ in range(settings["max_steps"])]
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


def said(*arguments):
    """(exit code, output, errors) of the training program in this process."""
    connect()
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        code = main(*arguments)
    return code, output.getvalue(), errors.getvalue()


def connect():
    """The next time that the processes look for each other they do so at another port: the last may still be taken."""
    os.environ["MASTER_PORT"] = PORTS.pop(0)


def make_mistakes(folder):
    """Each mistake, in the same two processes."""
    run = folder / "run"
    return [said(*PROGRAM, *all_, *own * own_rank(), "--output-dir", run) for all_, own, _ in MISTAKES]


def take_steps(folder):
    connect()
    with started(None, "the test") as processes:
        results = {name: steps(settings, processes) for name, settings in RUNS.items()}
        weights = processes.gather(results["grpo-d"][1])
        assert all(one.equal(other) for one, other in zip(*weights))
        results |= {f"{name}, exact": steps(EXACT[name], processes, exact=True) for name in EXACT}
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        results |= {f"{name}, sharded": steps(RUNS[name], processes) for name in SHARDED}
        if processes.is_main:
            torch.save(results, folder / "steps.pt")


def end(number, after, *arguments):
    """What is said by a run whose second process is sent a signal when it has taken so many steps."""
    step = Trainer.step

    def step_with_signal(trainer):
        if own_rank() == 1 and trainer.finished_steps == after:
            os.kill(os.getpid(), number)
        return step(trainer)

    Trainer.step = step_with_signal
    try:
        return said(*arguments)
    finally:
        Trainer.step = step


def end_early(folder):
    """By Ctrl-C in the second process, and again by its death."""
    run = folder / "run"
    yield end(signal.SIGINT, 1, *PROGRAM, "--max-steps=1000", "--output-dir", run)
    yield end(signal.SIGKILL, 3, "--resume", run)


def write(file, sayings):
    """After each, as the next may be the last."""
    told = []
    for one in sayings:
        told.append(one)
        file.write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    to_do, folder, *PORTS = sys.argv[1:]
    file = Path(folder) / f"said-{own_rank()}.json"
    if to_do == "steps":
        write(file, make_mistakes(Path(folder)))
        take_steps(Path(folder))
    else:
        write(file, end_early(Path(folder)))
