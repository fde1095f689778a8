"""The same numbers as recorded, and the same bytes at every run on a CPU."""

import json

import pytest
import torch

from mr1fast.model.adapter import add_adapter
from mr1fast.model.load import choose_threads, load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training.trainer import Trainer
from tests import golden
from tests.train_program import Drawings

# (relative, absolute) differences. Processors add in other orders: with AVX2 and SSE4.2 (ATEN_CPU_CAPABILITY=default,
# MKL_ENABLE_INSTRUCTIONS=SSE4_2) on the same machine ten steps differed by 3.3e-6 at most, so 30 times that is allowed.
ROUNDING = {"rel": 1e-4, "abs": 1e-6}
# Such rounding can tip a draw, on perhaps one processor in 30; one completion of a step's 128 is another one then. From
# the step on whose tokens or reward show it, numbers have to agree as far as that completion leaves them.
TIPPED = {"rel": 0.3, "abs": 0.05}


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[pytest.mark.slow] * (method == "sft")) for method in golden.METHODS]
)
def test_ten_steps_are_those_of_the_record(method, one_thread):
    """If they are meant to be others: `python -m tests.golden` writes the record again."""
    wanted, tolerance = json.loads(golden.RECORD.read_text())[method], ROUNDING
    for step, (ours, recorded) in enumerate(zip(golden.steps(method), wanted, strict=True)):
        if method != "sft" and any(ours[name] != recorded[name] for name in ("num_tokens", "reward")):
            tolerance = TIPPED
        assert ours == pytest.approx(recorded, **tolerance), f"step {step + 1}"


SETTINGS = {"prompts_per_step": 3, "num_generations": 2, "max_completion_length": 12, "temperature": 2.0}
RUNS = {
    "grpo-d": {**SETTINGS, "num_iterations": 2},
    "checkpointing, packing, LoRA": {
        **SETTINGS, "gradient_checkpointing": "on", "tokens_per_microbatch": 100, "lora_rank": 2,
    },
}  # fmt: skip


def weights_after(steps, settings):
    config = TrainConfig(task="vc", max_steps=steps, learning_rate=1e-2, warmup_steps=0, eval_steps=0, **settings)
    policy, reference = (Policy(load_model(), load_processor()) for _ in range(2))
    if config.lora_rank is not None:
        policy = Policy(add_adapter(policy.model, rank=config.lora_rank, seed=0), policy.processor)
        reference = policy
    trainer = Trainer(config.for_task("vc"), policy, reference, Drawings())
    moved = [trainer.step()["grad_norm"] for _ in range(steps)]
    assert any(moved), "or nothing is compared"
    return [weight.detach().clone() for weight in policy.trainable_parameters()]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "grpo-d")) for name in RUNS])
def test_the_same_run_twice_gives_the_same_bytes(name, one_thread):
    first, second = (weights_after(4, RUNS[name]) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_number_of_threads_of_a_small_model_is_not_the_environments(monkeypatch):
    """So that its bytes do not depend on OMP_NUM_THREADS: sums in several threads are added in another order."""
    for count in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", count)
        assert choose_threads(load_model()) == 1
