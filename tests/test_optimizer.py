import copy
import itertools

import pytest
import torch
from torch import nn

from mr1fast.training.optimizer import Optimizer, learning_rate_at


def test_learning_rate_rises_and_falls():
    rates = [learning_rate_at(step, peak=1.0, max_steps=104, warmup_steps=4) for step in range(104)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[54] == pytest.approx(0.5)
    assert rates[103] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


@pytest.mark.parametrize("max_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_no_step_of_a_short_run_has_no_rate(max_steps, warmup_steps):
    for step in range(max_steps):
        assert 0 < learning_rate_at(step, peak=1.0, max_steps=max_steps, warmup_steps=warmup_steps) <= 1


def layers(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)).to(dtype)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    (scale * model(x.to(model[0].weight.dtype)).square().mean()).backward()


def test_it_is_adamw_with_clipping():
    ours, theirs = layers(), layers()
    optimizer, adamw = (
        Optimizer(ours.parameters(), max_grad_norm=0.1),
        torch.optim.AdamW(theirs.parameters(), weight_decay=0.0),
    )
    for step in range(5):
        backward(ours, step)
        backward(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1).item()
        assert norm > 0.1
        assert optimizer.step(0.01 * (step + 1)) == pytest.approx(norm, rel=1e-5)
        adamw.param_groups[0]["lr"] = 0.01 * (step + 1)
        adamw.step()
        adamw.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert a.grad is None


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(scale):
    model = layers()
    optimizer = Optimizer(model.parameters(), max_grad_norm=1.0)
    backward(model, 0)
    optimizer.step(0.01)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    backward(model, 1, scale)
    norm = optimizer.step(0.01)
    assert not norm < float("inf")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    after = optimizer.state_dict()["adamw"]["state"]
    assert all(torch.equal(state["adamw"]["state"][i]["exp_avg"], after[i]["exp_avg"]) for i in after)
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_weights_move_at_a_small_rate():
    model = layers(torch.bfloat16)
    start = copy.deepcopy(model.state_dict())
    optimizer = Optimizer(model.parameters(), max_grad_norm=1.0)
    for step in range(300):
        backward(model, step)
        optimizer.step(1e-5)
    moved = [not torch.equal(start[name], value) for name, value in model.state_dict().items()]
    assert all(moved)
    for weight, master in zip(optimizer.weights, optimizer.masters):
        assert torch.equal(weight, master.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_goes_on_bit_for_bit(dtype, tmp_path):
    whole, first = layers(dtype), layers(dtype)
    runs = [
        (whole, Optimizer(whole.parameters(), max_grad_norm=1.0)),
        (first, Optimizer(first.parameters(), max_grad_norm=1.0)),
    ]
    for model, optimizer in runs:
        for step in range(3):
            backward(model, step)
            optimizer.step(0.01)
    torch.save(runs[1][1].state_dict(), tmp_path / "state.pt")
    second = layers(dtype)
    second.load_state_dict(first.state_dict())
    resumed = Optimizer(second.parameters(), max_grad_norm=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for model, optimizer in (runs[0], (second, resumed)):
        for step in range(3, 6):
            backward(model, step)
            optimizer.step(0.01)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))
