"""GRPOLoss inside a model: its KL schedule is saved and resumed with the rest, by torch and by safetensors."""

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from mr1fast import GRPOLoss, KLSchedule

BOUNDS = {"beta_min": 0.01, "beta_max": 0.05}


class Trained(nn.Module):
    def __init__(self, schedule):
        super().__init__()
        self.head = nn.Linear(2, 3)
        self.criterion = GRPOLoss(kl_schedule=schedule, epsilon_high=0.28)


def scheduled(steps=0, **settings):
    schedule = KLSchedule(10, **BOUNDS, **settings)
    for _ in range(steps):
        schedule.step()
    if settings:
        schedule.update(1.0, 5)
    return schedule


SCHEDULES = {"paper": {}, "adaptive": {"schedule": "adaptive", "target_kl": 0.1, "horizon": 77}}


@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("how", ["state_dict", "torch.save", "safetensors", "deepcopy"])
def test_the_schedule_is_resumed(how, settings, tmp_path):
    saved, resumed = Trained(scheduled(4, **settings)), Trained(KLSchedule(10, **BOUNDS, **settings))
    if how == "state_dict":
        resumed.load_state_dict(saved.state_dict())
    elif how == "torch.save":
        torch.save(saved.state_dict(), tmp_path / "model.pt")
        resumed.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    elif how == "safetensors":
        save_model(saved, str(tmp_path / "model.safetensors"))
        assert load_model(resumed, str(tmp_path / "model.safetensors")) == (set(), [])
    else:
        resumed = copy.deepcopy(saved)
    assert torch.equal(resumed.head.weight, saved.head.weight)
    assert resumed.criterion.kl_schedule.state_dict() == saved.criterion.kl_schedule.state_dict()
    assert resumed.criterion.kl_schedule.steps_done == 4
    assert resumed.criterion.kl_schedule.value == saved.criterion.kl_schedule.value


def test_without_a_schedule(tmp_path):
    saved, loaded = Trained(None), Trained(None)
    loaded.load_state_dict(saved.state_dict())
    save_model(saved, str(tmp_path / "model.safetensors"))
    assert load_model(loaded, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(loaded.head.weight, saved.head.weight)
    assert all(isinstance(value, torch.Tensor) for value in saved.state_dict().values())


def test_state_dicts_from_before_it_was_a_tensor():
    schedule = scheduled(4)
    state = GRPOLoss(kl_schedule=schedule).state_dict() | {"_extra_state": schedule.state_dict()}
    resumed = GRPOLoss(kl_schedule=KLSchedule(10, **BOUNDS))
    resumed.load_state_dict(state)
    assert resumed.kl_schedule.value == schedule.value
    GRPOLoss().load_state_dict({"_extra_state": {}})  # and without a schedule


def test_a_state_without_a_schedule_does_not_resume_one():
    with pytest.raises(ValueError, match="state must be a dict with step and value"):
        GRPOLoss(kl_schedule=KLSchedule(10, **BOUNDS)).load_state_dict(GRPOLoss().state_dict())


def test_a_model_in_half_precision_keeps_the_state():
    saved = Trained(scheduled(3)).to(torch.bfloat16)
    resumed = Trained(KLSchedule(10, **BOUNDS))
    resumed.load_state_dict(saved.state_dict())
    assert resumed.criterion.kl_schedule.value == saved.criterion.kl_schedule.value
