"""The KL schedules against the paper's numbers and closed forms."""

import math

import pytest
import torch

from mr1fast import GRPOLoss, KLSchedule, kl_weight
from mr1fast.kernels.self_test import random_batch
from mr1fast.losses.kl_weight import EXPLORING, SCHEDULES

VISUAL_COUNTING = {"beta_min": 0.04, "beta_max": 0.10}
GEOMETRY = {"beta_min": 0.0, "beta_max": 0.02}


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.07), (15, 0.055), (30, 0.04), (65, 0.07), (100, 0.10), (101, 0.10), (10**9, 0.10)]
)
def test_paper_schedule_of_visual_counting(step, expected):
    assert kl_weight(step, 100, **VISUAL_COUNTING) == pytest.approx(expected, abs=1e-15)


def test_paper_schedule_touches_exactly_zero_for_geometry():
    assert kl_weight(0, 10, **GEOMETRY) == 0.01
    assert kl_weight(3, 10, **GEOMETRY) == 0.0
    assert kl_weight(10, 10, **GEOMETRY) == 0.02


@pytest.mark.parametrize("total", [1, 2, 7, 333])
@pytest.mark.parametrize("explore_fraction", [0.0, 0.1, 0.3, 0.999])
def test_paper_schedule_is_equation_3(total, explore_fraction):
    low, high = 0.01, 0.05
    middle, w = (low + high) / 2, explore_fraction * total
    for s in range(total + 1):
        if w > 0 and s <= w:
            expected = middle - (middle - low) * s / w
        else:
            expected = low + (high - low) * (s - w) / (total - w)
        actual = kl_weight(s, total, beta_min=low, beta_max=high, explore_fraction=explore_fraction)
        assert actual == pytest.approx(expected, abs=1e-12)
        assert low - 1e-15 <= actual <= high + 1e-15


@pytest.mark.parametrize(
    ("schedule", "form"),
    [
        ("linear", lambda p: p),
        ("cosine", lambda p: (1 - math.cos(math.pi * p)) / 2),
        ("exponential", lambda p: (math.exp(5 * p) - 1) / (math.exp(5) - 1)),
        ("constant", lambda p: 1.0),
    ],
)
def test_other_schedules(schedule, form):
    for s in (0, 1, 9, 20, 40, 55):
        expected = 0.02 + 0.07 * form(min(s / 40, 1))
        assert kl_weight(s, 40, beta_min=0.02, beta_max=0.09, schedule=schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("explore_fraction", [0.0, 0.25, 0.999])
def test_reversed_is_the_papers_schedule_backwards(explore_fraction):
    total, bounds = 40, {"beta_min": 0.02, "beta_max": 0.09, "explore_fraction": explore_fraction}
    for s in range(total + 1):
        backwards = kl_weight(s, total, schedule="reversed", **bounds)
        assert backwards == pytest.approx(kl_weight(total - s, total, **bounds), abs=1e-12)
    assert kl_weight(0, total, schedule="reversed", **bounds) == pytest.approx(0.09)


def test_a_schedule_is_one_function_and_one_entry(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "square", lambda p, low, high: low + (high - low) * p * p)
    assert kl_weight(5, 10, beta_min=0.0, beta_max=1.0, schedule="square") == 0.25
    assert set(EXPLORING) == {"paper", "reversed"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"total_steps": torch.tensor(10)}, "total_steps"),
        ({"total_steps": math.inf}, "total_steps"),
        ({"step": -1}, "step"),
        ({"step": math.nan}, "step"),
        ({"step": "1"}, "step .* must be a number >= 0, got '1'"),
        ({"beta_min": 0.2}, "beta_min"),
        ({"beta_min": "1e-6"}, "beta_min must be a number >= 0, got '1e-6'"),
        ({"explore_fraction": None}, "explore_fraction"),
        ({"beta_min": -0.1}, "beta_min"),
        ({"beta_max": float("nan")}, "beta_max"),
        ({"explore_fraction": 1.0}, "explore_fraction"),
        ({"explore_fraction": -0.1}, "explore_fraction"),
        ({"schedule": "papr"}, "did you mean 'paper'"),
        ({"schedule": "adaptive"}, "KLSchedule"),
        ({"schedule": ["paper"]}, "schedule must be one of paper, linear"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"step": 0, "total_steps": 10, "beta_min": 0.0, "beta_max": 0.1} | change
    with pytest.raises(ValueError, match=message):
        kl_weight(arguments.pop("step"), arguments.pop("total_steps"), **arguments)


def test_schedule_object_counts_and_resumes():
    schedule = KLSchedule(10, **VISUAL_COUNTING)
    values = [schedule.value]
    for _ in range(10):
        values.append(schedule.step())
    assert values == [kl_weight(s, 10, **VISUAL_COUNTING) for s in range(11)]
    resumed = KLSchedule(10, **VISUAL_COUNTING)
    half = KLSchedule(10, **VISUAL_COUNTING)
    for _ in range(4):
        half.step()
    half.update(1.0, 3)  # moves the adaptive schedule only
    resumed.load_state_dict(half.state_dict())
    assert resumed.value == values[4]
    for state in ({"value": 1.0}, None, {"step": -3, "value": 0.1}, {"step": "a", "value": 0.1}):
        with pytest.raises(ValueError, match="state"):
            resumed.load_state_dict(state)


def test_callable_schedule():
    schedule = KLSchedule(10, beta_min=0, beta_max=1, schedule=lambda step, total: step / total / 2)
    schedule.step()
    assert schedule.value == 0.05
    with pytest.raises(ValueError, match="schedule's result must be a number >= 0, got None"):
        print(KLSchedule(10, beta_min=0, beta_max=1, schedule=lambda step, total: None).value)


def test_adaptive_schedule():
    schedule = KLSchedule(10, beta_min=0.01, beta_max=0.05, schedule="adaptive", target_kl=0.1, horizon=10)
    assert schedule.value == pytest.approx(0.03)
    schedule.update(0.11, 5)  # error 0.1
    assert schedule.value == pytest.approx(0.03 * (1 + 0.1 * 5 / 10))
    schedule.update(float("nan"), 5)
    assert schedule.value == pytest.approx(0.03 * 1.05)
    for _ in range(50):
        schedule.update(10.0, 10)
    assert schedule.value == 0.05
    for _ in range(50):
        schedule.update(0.0, 10)
    assert schedule.value == 0.01
    resumed = KLSchedule(10, beta_min=0.01, beta_max=0.05, schedule="adaptive", target_kl=0.1, horizon=10)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.value == 0.01
    resumed.load_state_dict({"step": 3, "value": 99.0})
    assert resumed.value == 0.05
    for bad in (("x", 1), (0.1, "1"), (0.1, math.nan)):
        with pytest.raises(ValueError, match=r"current_kl|n_steps"):
            schedule.update(*bad)
    for bad in ({}, {"target_kl": "x"}, {"target_kl": 0.1, "horizon": None}):
        with pytest.raises(ValueError, match=r"target_kl|horizon"):
            KLSchedule(10, beta_min=0.01, beta_max=0.05, schedule="adaptive", **bad)


def test_module_takes_beta_from_the_schedule_and_resumes():
    batch = random_batch(2, 3, 9)
    arguments = (batch["logits"], batch["completion_ids"], batch["advantages"])
    criterion = GRPOLoss(kl_schedule=KLSchedule(10, **GEOMETRY), epsilon_high=0.28)
    for _ in range(3):
        criterion.kl_schedule.step()
    without_kl = GRPOLoss(epsilon_high=0.28)(*arguments, ref_per_token_logps=batch["ref_per_token_logps"])
    assert torch.equal(criterion(*arguments, ref_per_token_logps=batch["ref_per_token_logps"]).loss, without_kl.loss)
    criterion.kl_schedule.step()
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        criterion(*arguments)
    other = GRPOLoss(kl_schedule=KLSchedule(10, **GEOMETRY))
    other.load_state_dict(criterion.state_dict())
    assert other.kl_schedule.value == kl_weight(4, 10, **GEOMETRY)
    with pytest.raises(ValueError, match="beta"):
        GRPOLoss(kl_schedule=criterion.kl_schedule, beta=0.1)
