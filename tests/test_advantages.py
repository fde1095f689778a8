"""Group-relative advantages: against the oracle, and exactly 0 where rewards are equal, on every backend."""

import pytest
import torch
from loss_cases import on, run
from oracle import group_relative

from mr1fast import group_advantages, grpo_loss, linear_grpo_loss
from mr1fast.kernels.self_test import device_of, every_backend, random_batch

NAN = float("nan")
SCALES = ("group", "batch", "none")
# Of most of these the mean, as a sum divided by a number, is another float: in float32, in float64, or in both.
VALUES = (0.3, 0.1, 1 / 3, 0.7, 0.9, -1.1, 1e30, -3e-39, 16_777_217.0, 0.0)


@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("num_generations", [1, 2, 4])
def test_against_the_oracle(num_generations, scale_rewards):
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, NAN, 1.0, NAN, NAN, 3.0, 3.0, 3.0, 3.0])
    rewards = torch.cat([rewards, torch.full((4,), NAN)])
    actual = group_advantages(rewards, num_generations, scale_rewards=scale_rewards)
    expected = torch.tensor(group_relative(rewards, num_generations, scale_rewards))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert (actual[rewards.isnan()] == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
def test_far_from_zero(offset):
    """What differs is all that counts: float32's mean of such rewards has no digits left for it."""
    rewards = torch.tensor([0.0, 0.25, 0.5, 2.0, 0.0, 0.25, 0.25, 0.5]) + offset
    for scale_rewards in SCALES:
        expected = torch.tensor(group_relative(rewards, 4, scale_rewards))
        actual = group_advantages(rewards, 4, scale_rewards=scale_rewards)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_generations", [1, 2, 3, 5, 7, 8])
def test_equal_rewards_are_exactly_their_mean(num_generations, dtype, scale_rewards):
    values = [value for value in VALUES if abs(value) < torch.finfo(dtype).max]
    for value in values:
        rewards = torch.full((2 * num_generations,), value, dtype=dtype)
        advantages = group_advantages(rewards, num_generations, scale_rewards=scale_rewards)
        assert advantages.dtype == torch.promote_types(dtype, torch.float32)
        assert (advantages == 0).all(), value
        rewards[num_generations // 2] = NAN  # an absent one changes nothing for the others
        assert (group_advantages(rewards, num_generations, scale_rewards=scale_rewards) == 0).all(), value
    # Equal in each group, but not in the batch.
    rewards = torch.tensor(values, dtype=dtype).repeat_interleave(num_generations)
    assert (group_advantages(rewards, num_generations, scale_rewards=scale_rewards) == 0).all()


def rewarded(value, num_generations, dtype):
    """Two groups of equal rewards, the second one with an absent one, and the batch that goes with them."""
    batch = random_batch(2 * num_generations, 1, 16) | {"completion_mask": None, "advantages": None}
    rewards = torch.full((2 * num_generations,), value).to(dtype)
    rewards[num_generations] = NAN
    return batch, rewards


# (0.9, 3) alone in Triton, whose interpreter is slow.
EQUAL = [((0.9, 3), backend) for backend in every_backend()]
EQUAL += [(case, b) for case in ((0.3, 8), (1 / 3, 3), (1e30, 7)) for b in every_backend() if b != "triton"]


@pytest.mark.parametrize(("case", "backend"), EQUAL)
@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rewards_give_no_gradient_on_any_backend(dtype, scale_rewards, case, backend):
    value, num_generations = case
    batch, rewards = rewarded(value, num_generations, dtype)
    settings = {"rewards": rewards, "num_generations": num_generations, "scale_rewards": scale_rewards}
    output, gradient = run(grpo_loss, batch["logits"], batch, backend=backend, **settings)
    assert output["loss"].item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("backend", [backend for backend in every_backend() if backend != "triton"])
@pytest.mark.parametrize("scale_rewards", SCALES)
def test_equal_rewards_give_no_gradient_from_hidden_states(scale_rewards, backend):
    batch, rewards = rewarded(0.3, 8, torch.float32)
    V = batch.pop("logits").shape[-1]
    tensors = on(device_of(backend), batch | {"hidden": torch.randn(16, 1, 4), "weight": torch.randn(V, 4)})
    hidden, weight = (tensors.pop(name).requires_grad_() for name in ("hidden", "weight"))
    tensors |= {"rewards": rewards.to(hidden.device), "num_generations": 8, "scale_rewards": scale_rewards}
    linear_grpo_loss(hidden, weight, backend=backend, **tensors).loss.backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_no_rewards():
    for scale_rewards in SCALES:
        assert group_advantages(torch.zeros(0), 2, scale_rewards=scale_rewards).shape == (0,)


def test_compiled():
    rewards = torch.tensor([0.3, 0.3, 1.0, NAN])
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    for scale_rewards in SCALES:
        expected = group_advantages(rewards, 2, scale_rewards=scale_rewards)
        assert torch.equal(compiled(rewards, 2, scale_rewards=scale_rewards), expected)
