import copy
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mr1fast.training import optimizer as module
from mr1fast.training.learning_rate import learning_rate_at
from mr1fast.training.optimizer import Optimizer


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


# ---- in chunks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 100, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_bit_of_the_update(monkeypatch, dtype, chunk_bytes):
    """The other one has float32 gradients of everything at once, and torch's own clipping."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    ours, theirs = layers(dtype), layers(dtype)
    masters = [nn.Parameter(weight.detach().float()) for weight in theirs.parameters()]
    adamw = torch.optim.AdamW(masters, weight_decay=0.0, fused=True)
    optimizer = Optimizer(ours.parameters(), max_grad_norm=0.1)
    for step in range(5):
        backward(ours, step)
        backward(theirs, step)
        for weight, master in zip(theirs.parameters(), masters):
            master.grad, weight.grad = weight.grad.float(), None
        norm = nn.utils.clip_grad_norm_(masters, 0.1).item()
        adamw.param_groups[0]["lr"] = 0.01
        adamw.step()
        with torch.no_grad():
            for weight, master in zip(theirs.parameters(), masters):
                weight.copy_(master)
        assert optimizer.step(0.01) == norm > 0.1
        for weight, ours_master, weight_there, master in zip(
            ours.parameters(), optimizer.masters, theirs.parameters(), masters
        ):
            assert torch.equal(weight, weight_there)
            assert torch.equal(ours_master, master)
    mine, other = optimizer.state_dict()["adamw"], adamw.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    assert all(
        torch.equal(mine["state"][i][name], value) for i in other["state"] for name, value in other["state"][i].items()
    )


def test_a_weight_without_a_gradient_stays():
    model = layers(torch.bfloat16)
    optimizer, before = Optimizer(model.parameters(), max_grad_norm=1.0), copy.deepcopy(model[1].state_dict())
    backward(model, 0)
    model[1].weight.grad = None
    optimizer.step(0.01)
    assert torch.equal(model[1].weight, before["weight"])
    assert not torch.equal(model[1].bias, before["bias"])


class PeakBytes(TorchDispatchMode):
    """The most that the results of operations, and the tensors given, took together at any time."""

    def __init__(self, tensors):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


@pytest.mark.parametrize(("chunk_bytes", "least", "most"), [(2**16, 16, 17), (2**30, 18, 19)])
def test_bytes_of_a_bfloat16_weight_at_the_peak_of_a_step(monkeypatch, chunk_bytes, least, most):
    """In the second row the float32 gradients are all there at once, and the measure sees them."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    weights = [nn.Parameter(torch.randn(64, 64, dtype=torch.bfloat16)) for _ in range(64)]
    optimizer = Optimizer(weights, max_grad_norm=1.0)
    for first in (True, False):  # the first makes the moments
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        moments = [tensor for state in optimizer.adamw.state.values() for tensor in state.values()]
        gradients = [weight.grad for weight in weights]
        memory = PeakBytes([*weights, *optimizer.masters, *gradients, *moments])
        del gradients
        with memory:
            optimizer.step(0.01)
        assert first == (not moments)
    assert least <= memory.peak / sum(weight.numel() for weight in weights) <= most
